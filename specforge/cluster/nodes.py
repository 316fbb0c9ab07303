"""The nodes of the cluster and the places of the trainers, as Ray reports them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray
from ray._private.state import available_resources_per_node  # a DeveloperAPI; what is public gives totals only

from specforge.cluster.plan import Node


def all_nodes() -> list[Node]:
    """What Ray may use on each node, by its identity."""
    return [_node(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]


def free_nodes() -> list[Node]:
    """What is free on each node, by its identity."""
    return [_node(name, found) for name, found in available_resources_per_node().items()]


def trainers_wait() -> bool | None:
    """Whether the trainers have no place yet; None between two groups of them."""
    states = {group["state"] for group in _groups()}
    return "CREATED" not in states if states else None


def trainer_nodes() -> list[str] | None:
    """Identity of the node of each trainer; None while they have no place."""
    placed = [group for group in _groups() if group["state"] == "CREATED"]
    return [*placed[0]["bundles_to_node_id"].values()] if placed else None


def _groups() -> Iterator[dict[str, Any]]:
    """Placement groups of this run, all of which are the trainers'."""
    job = ray.get_runtime_context().get_job_id()  # the identity of a placement group ends with that of its job
    groups = ray.util.placement_group_table().items()
    return (group for name, group in groups if name.endswith(job) and group["state"] != "REMOVED")


def _node(name: str, resources: dict[str, float]) -> Node:
    return Node(name, resources.get("CPU", 0.0), resources.get("GPU", 0.0))
