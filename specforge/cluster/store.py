"""A Mooncake store for a run: its master next to the driver, and owners, which lend memory, on the nodes."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from specforge.cli.serve import mooncake_master
from specforge.cluster.board import NAMESPACE
from specforge.console import say
from specforge.errors import UserError, mistake_behind
from specforge.files import first_line
from specforge.runtime.data_plane.mooncake import MooncakeAddress, connect

_START = 120.0  # seconds in which the first owners start


class Owner:
    """Lends memory of its node until it dies; with it, what it holds is lost.

    Args:
        address: address of the master.
        nbytes: how much memory.
    """

    def __init__(self, address: MooncakeAddress, nbytes: int) -> None:
        self._address, self._nbytes = address, nbytes

    def lend(self) -> None:
        """Return once the memory is there."""
        self._client = connect(self._address, self._nbytes)

    def stay(self, lent: None) -> None:
        """Never return, or fail as :meth:`lend` has, with whose result it is called."""
        threading.Event().wait()


class MooncakeStore:
    """Starts a master, and owners on each node that runs processes; starts owners again, on new nodes too.

    Args:
        run: name of the run; the owners' names begin with it.
        host: address of this host in the cluster.
        nbytes: memory that each node lends.
        owners: number of processes of a node that lend it, equal parts each.
        max_bytes: what the run stores at once; it must fit.

    Raises:
        UserError: Mooncake is not installed on a node, or the nodes do not lend enough.
    """

    def __init__(self, run: str, host: str, nbytes: int, owners: int, max_bytes: int) -> None:
        nodes = _nodes()
        if len(nodes) * nbytes < max_bytes:
            raise UserError(
                f"cluster.store_bytes: {len(nodes)} x {nbytes:,} bytes are less than data.max_bytes ({max_bytes:,}); "
                "raise one or lower the other"
            )
        self._run, self._nbytes, self._count, self._stack = run, nbytes // owners, owners, ExitStack()
        # By node and number: the actor, and the reference of what `stay` returns.
        self._owners: dict[tuple[str, int], tuple[Any, Any]] = {}
        with socket.create_server((host, 0)) as port, socket.create_server((host, 0)) as metrics:
            self._address = MooncakeAddress(host, port.getsockname()[1], metrics.getsockname()[1])
        self._stack.enter_context(mooncake_master(host, self._address.port, self._address.metrics))
        self._stack.callback(self._end_owners)
        try:
            ray.get(self.keep(), timeout=_START)
        except RayError as error:
            self.end()
            mistake = mistake_behind(getattr(error, "cause", None))
            raise mistake or UserError(f"store: its memory cannot be had ({first_line(error)})") from error

    @property
    def address(self) -> str:
        """What data.store takes."""
        return str(self._address)

    def keep(self) -> list[Any]:
        """Replace owners that have died, and start one on each new node; returns what ends when the new ones lend."""
        nodes, lent = _nodes(), []
        for place, (owner, stays) in list(self._owners.items()):
            if ray.wait([stays], timeout=0)[0]:
                node = nodes.get(place[0], place[0][:8])
                part = "the memory" if self._count == 1 else f"1/{self._count} of the memory"
                say(f"{part} of node {node} is lost, with the features in it")
                ray.kill(owner)
                del self._owners[place]
        for node, number in {(node, i) for node in nodes for i in range(self._count)} - self._owners.keys():
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            name = f"{self._run}-memory-{node}-{number}"
            owner = (
                ray.remote(Owner)
                .options(name=name, namespace=NAMESPACE, num_cpus=0, max_concurrency=2, scheduling_strategy=there)
                .remote(self._address, self._nbytes)
            )
            lent.append(owner.lend.remote())
            self._owners[node, number] = owner, owner.stay.remote(lent[-1])
        return lent

    def end(self) -> None:
        """End the owners, then the master."""
        self._stack.close()

    def _end_owners(self) -> None:
        for owner, _ in self._owners.values():
            ray.kill(owner)


def _nodes() -> dict[str, str]:
    """Addresses of the nodes that run processes, by identity."""
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    }
