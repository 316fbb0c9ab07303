"""`specforge launch` on a Ray cluster of several nodes, on this machine: results, and what dies on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from specforge.cli.main import main
from tests.disaggregated import STEPS, assert_nothing_is_left, disaggregated, places
from tests.gate import wait_at_gate
from tests.test_disaggregated import RANKS
from tests.test_training import assert_same_weights, losses, start
from tests.tiny import recipe

ray = pytest.importorskip("ray", reason="needs Ray (pip install -e '.[ray]')")
pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.slow]

PRODUCERS, TRAINERS = 3, 2
ROOM = 4  # CPUs of each node but the head: one may be lost


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    """A head without CPUs, where the driver is, and nodes of their own; this process is connected to it."""
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_enable_worker_prestart", "0")  # a process for each CPU, most of which are not needed
    patch.setenv("RAY_prestart_worker_first_driver", "0")
    patch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    patch.setenv("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # of the nodes, for tests.gate
    patch.setenv("OMP_NUM_THREADS", "1")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=ROOM)
    ray.init(made.address, log_to_driver=False, logging_level="error")
    yield made
    ray.shutdown()
    made.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def undisturbed(target, prompts, tmp_path_factory) -> Path:
    """Weights and losses of two ranks without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = ["--target", target, "--prompts", prompts, "--output", folder / "features", "--dtype", "float32"]
    assert main(["capture", *map(str, [*words, "--batch_tokens", 1])]) == 0
    data = {"features": str(folder / "features"), "batch_size": 5}
    process = start(recipe(target, prompts, folder, **STEPS | RANKS, data__init_args=data))
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return folder / "run"


def on_cluster(path: Path, gate: Path, address: str) -> Path:
    """A recipe with the section `cluster`, and a gate before its fourth step."""
    content = yaml.safe_load(path.read_text())
    gate.mkdir()
    callback = {"class_path": "tests.gate.Gate", "init_args": {"folder": str(gate), "step": 3}}
    content["trainer"]["callbacks"] = [callback]
    content["cluster"] = {
        "address": address,
        "name": "test",
        "placement": "spread",
        "producers": {"count": PRODUCERS},
        "trainers": {"count": TRAINERS},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def kill_nothing(cluster, ranks) -> None:
    pass


def kill_a_producer(cluster, ranks) -> None:
    actor = ray.get_actor("test-producer-1", namespace="specforge")
    os.kill(ray.get(actor.__ray_call__.remote(lambda self: __import__("os").getpid())), signal.SIGKILL)


def kill_a_rank(cluster, ranks) -> None:
    os.kill(ranks[1]["pid"], signal.SIGKILL)


def kill_a_node(cluster, ranks) -> None:
    (node,) = [node for node in cluster.worker_nodes if node.node_id == ranks[0]["node"]]
    cluster.remove_node(node, allow_graceful=False)


@pytest.mark.parametrize("kill", [kill_nothing, kill_a_producer, kill_a_rank, kill_a_node])
def test_weights_are_those_without_ray(target, prompts, tmp_path, cluster, undisturbed, kill, capfd):
    where, gate = places(tmp_path), tmp_path / "gate"
    path = disaggregated(target, prompts, tmp_path, where, RANKS, batch_size=5, max_samples=40)
    on_cluster(path, gate, cluster.address)
    done = threading.Event()

    def disturb() -> None:
        kill(cluster, wait_at_gate(gate, TRAINERS, lambda: not done.is_set()))
        (gate / "open").touch()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        assert main(["launch", "--config", str(path)]) == 0
    finally:
        done.set()
        thread.join()
        print(out := capfd.readouterr().out)
        for _ in range(2 - len(cluster.worker_nodes)):
            cluster.add_node(num_cpus=ROOM)
    assert (gate / "open").exists()
    assert ("is started again" in out) == (kill is kill_a_producer)
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert_same_weights(tmp_path / "run", undisturbed)
    assert_nothing_is_left(where, trained=2 * 32)
    assert_ray_is_idle()


def assert_ray_is_idle() -> None:
    """No actor, placement group or resource of a run is left; Ray needs a moment to notice that processes ended."""
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"] == 2 * ROOM
    names = ray.util.list_named_actors(all_namespaces=True)
    assert [actor["name"] for actor in names if actor["namespace"] == "specforge"] == []  # Ray Train keeps one its own
    assert all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values())
