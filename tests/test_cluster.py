"""`specforge launch` on a Ray cluster of several nodes, on this machine: results, and what dies on the way."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from specforge.cli.main import main
from specforge.runtime.addresses import open_metadata
from specforge.runtime.control_plane.claim import claim
from tests.disaggregated import STEPS, assert_nothing_is_left, disaggregated, places
from tests.gate import wait_at_gate
from tests.test_disaggregated import RANKS
from tests.test_training import assert_same_weights, losses, start
from tests.tiny import recipe

ray = pytest.importorskip("ray", reason="needs Ray (pip install -e '.[ray]')")
from specforge.cluster.metadata import RedisServer  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.slow]

PRODUCERS, TRAINERS = 3, 2
ROOM = PRODUCERS + TRAINERS  # CPUs of each node but the head: one of two nodes may be lost


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    """A head without CPUs, where the driver is, and nodes of their own; this process is connected to it."""
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_enable_worker_prestart", "0")  # a process for each CPU, most of which are not needed
    patch.setenv("RAY_prestart_worker_first_driver", "0")
    patch.setenv("RAY_health_check_period_ms", "1000")  # a lost node is noticed sooner
    patch.setenv("RAY_health_check_failure_threshold", "3")
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


def on_cluster(path: Path, address: str, gate: Path | None = None, step: int = 0, **cluster: object) -> Path:
    """A recipe with the section `cluster`, and a gate before a step."""
    content = yaml.safe_load(path.read_text())
    if gate is not None:
        gate.mkdir()
        callback = {"class_path": "tests.gate.Gate", "init_args": {"folder": str(gate), "step": step}}
        content["trainer"]["callbacks"] = [callback]
    content["cluster"] = {
        "address": address,
        "name": "test",
        "placement": "spread",
        "producers": {"count": PRODUCERS},
        "trainers": {"count": TRAINERS},
    } | cluster
    path.write_text(yaml.safe_dump(content))
    return path


def kill_a_producer(draw, cluster, ranks) -> None:
    actor = ray.get_actor(f"test-producer-{draw.randrange(PRODUCERS)}", namespace="specforge")
    os.kill(ray.get(actor.__ray_call__.remote(lambda self: __import__("os").getpid())), signal.SIGKILL)


def kill_a_rank(draw, cluster, ranks) -> None:
    os.kill(draw.choice(ranks)["pid"], signal.SIGKILL)


def kill_a_node(draw, cluster, ranks) -> None:
    lost = draw.choice(ranks)["node"]
    (node,) = [node for node in cluster.worker_nodes if node.node_id == lost]
    raylet = node.all_processes["raylet"][0].process
    cluster.remove_node(node, allow_graceful=False)
    raylet.wait()  # its processes end once it is gone, and a zombie is not
    for rank in ranks:
        while rank["node"] == lost and Path(f"/proc/{rank['pid']}").exists():
            time.sleep(0.05)


def kill_redis(draw, cluster, ranks) -> None:
    pids = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    (pid,) = [int(pid) for pid in pids if "redis-server" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(pid, signal.SIGKILL)


FAULTS = {"processes": [kill_redis, kill_a_producer, kill_a_rank], "node": [kill_a_node]}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(max(1, metafunc.config.getoption("--fault-seeds") // 3)))


@pytest.mark.parametrize("fault", [pytest.param("processes", marks=pytest.mark.redis), "node"])
def test_weights_are_those_without_ray(target, prompts, tmp_path, cluster, undisturbed, fault, seed, capfd):
    draw = random.Random(f"{fault} {seed}")
    where, gate, step = places(tmp_path), tmp_path / "gate", draw.randrange(1, 8)
    path = disaggregated(target, prompts, tmp_path, where, RANKS, batch_size=5, max_samples=40)
    on_cluster(path, cluster.address, gate, step)
    if kill_redis in FAULTS[fault]:  # which `launch` starts if no metadata are named
        content = yaml.safe_load(path.read_text())
        del content["data"]["init_args"]["metadata"]
        path.write_text(yaml.safe_dump(content))
    done = threading.Event()

    def disturb() -> None:
        ranks = wait_at_gate(gate, TRAINERS, lambda: not done.is_set())
        for kill in FAULTS[fault]:
            kill(draw, cluster, ranks)
        (gate / "open").touch()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        assert main(["launch", "--config", str(path)]) == 0
    finally:
        done.set()
        thread.join()
        print(f"step {step}", out := capfd.readouterr().out)
        for _ in range(2 - len(cluster.worker_nodes)):
            cluster.add_node(num_cpus=ROOM)
    assert (gate / "open").exists()
    assert "it is started again" in out
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert_same_weights(tmp_path / "run", undisturbed)
    assert_ray_is_idle()
    if kill_redis in FAULTS[fault]:
        assert "the Redis server died and was started again" in out
        server = RedisServer(tmp_path / "run" / "redis", "127.0.0.1")
        assert_nothing_is_left(where | {"metadata": server.address}, trained=2 * 32)
        server.end()
    else:
        assert_nothing_is_left(where, trained=2 * 32)


def test_producers_come_and_go_and_a_stopped_run_goes_on(target, prompts, tmp_path, cluster, undisturbed, capfd):
    where, gate = places(tmp_path), tmp_path / "gate"
    path = disaggregated(target, prompts, tmp_path, where, RANKS, batch_size=5, max_samples=40)
    on_cluster(path, cluster.address, gate, step=3)
    done = threading.Event()

    def scale(count: int) -> None:
        assert main(["launch", "--config", str(path), "--scale", str(count)]) == 0
        while producers() != {f"test-producer-{i}" for i in range(count)}:
            assert not done.wait(0.05)

    def disturb() -> None:
        wait_at_gate(gate, TRAINERS, lambda: not done.is_set())
        scale(4)
        stores = [f"--data.{name}={tmp_path / 'other' / name}" for name in where]
        assert main(["launch", "--config", str(path), "--ckpt_path", "last", *stores]) == 2  # of the same name
        scale(1)
        os.kill(os.getpid(), signal.SIGTERM)
        while not ray.get(ray.get_actor("test", namespace="specforge").stops.remote()):
            assert not done.wait(0.05)
        (gate / "open").touch()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        assert main(["launch", "--config", str(path)]) == 143
    finally:
        done.set()
        thread.join()
        out, err = capfd.readouterr()
        print(out, err)
    assert "test: 4 producers instead of 3" in out
    assert "cluster.name: a run test is going on in this cluster" in err
    assert re.search(r"stopped by a signal after step [34]; resume with --ckpt_path last", out)
    assert_ray_is_idle()
    assert main(["launch", "--config", str(path), "--ckpt_path", "last"]) == 0
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert_same_weights(tmp_path / "run", undisturbed)
    assert_nothing_is_left(where, trained=2 * 32)
    assert_ray_is_idle()


def producers() -> set[str]:
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return {name for name in names if "producer" in name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainers": {"count": 9}}, "3 producers with 1 CPU each and 9 trainers with 1 CPU each do not fit into the"),
        (
            {"producers": {"count": 1, "gpus": 1}},
            "1 producer with 1 CPU and 1 GPU and 2 trainers with 1 CPU each do not",
        ),
    ],
)
def test_what_does_not_fit_is_refused(target, prompts, tmp_path, cluster, changes, message, capfd):
    where = places(tmp_path)
    path = on_cluster(disaggregated(target, prompts, tmp_path, where), cluster.address, **changes)
    for words in ([], ["--plan", "true"]):
        assert main(["launch", "--config", str(path), *words]) == 2
        assert message in capfd.readouterr().err
    assert sorted(x.name for x in tmp_path.iterdir()) == ["recipe.yaml"]
    assert_ray_is_idle()


@pytest.mark.parametrize(
    ("stores", "message"),
    [
        ({"metadata": "redis://127.0.0.1:1/0"}, "metadata in Redis at 127.0.0.1:1/0: Error 111"),
        (
            {"metadata": "taken.db"},
            "the trainer of elsewhere/run (process 1 on other) is using it; give this run its own",
        ),
    ],
)
def test_stores_that_cannot_be_used_are_refused_before_anything_starts(
    target, prompts, tmp_path, cluster, stores, message, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    metadata = open_metadata("taken.db")
    holder = {"run": "elsewhere/run", "pid": 1, "host": "other", "machine": "another"}
    claim(metadata, json.dumps(holder), time.time(), time.time() + 600)
    metadata.close()
    before = sorted(tmp_path.iterdir())
    path = on_cluster(disaggregated(target, prompts, tmp_path, places(tmp_path) | stores), cluster.address)
    for words in ([], ["--plan", "true"]):
        assert main(["launch", "--config", str(path), *words]) == 2
        assert message in capfd.readouterr().err
    assert sorted(tmp_path.iterdir()) == sorted([*before, path])
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
