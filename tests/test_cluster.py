"""`specforge launch` on a Ray cluster of several nodes, on this machine: results, and what dies on the way."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from specforge.cli.main import main
from specforge.errors import UserError
from specforge.runtime.addresses import open_metadata
from specforge.runtime.control_plane.claim import claim
from tests import ray_workers
from tests.disaggregated import STEPS, assert_nothing_is_left, disaggregated, places, stored_bytes
from tests.gate import wait_at_gate
from tests.processes import Command
from tests.ranks import train_on_ranks
from tests.test_disaggregated import RANKS
from tests.test_training import assert_same_weights, losses
from tests.tiny import recipe

ray = pytest.importorskip("ray", reason="needs Ray (pip install -e '.[ray]')")
from specforge.cluster.metadata import RedisActor, RedisServer  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.slow]

PRODUCERS, TRAINERS = 3, 2
ROOM = 3  # CPUs of each of two nodes; the head has none
MARK = "SPECFORGE_TEST_CLUSTER"  # variable of the environment
# What `launch` starts, and what Ray Train starts for it.
PROCESSES = ("ray::Board", "ray::Producer", "ray::RedisServer", "ray::Train", "ray::RayTrainWorker")


@pytest.fixture(scope="module")
def environment(workers) -> Iterator[pytest.MonkeyPatch]:
    """Of the clusters and what runs on them."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_enable_worker_prestart", "0")  # a process for each CPU, most of which are not needed
    patch.setenv("RAY_prestart_worker_first_driver", "0")
    patch.setenv("RAY_worker_niceness", "0")
    patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # another process
    patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # it kills workers if the tests beside need much memory
    patch.setenv("RAY_health_check_period_ms", "1000")  # a lost node is noticed sooner
    patch.setenv("RAY_health_check_failure_threshold", "3")
    patch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    patch.setenv("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # a rank's end is noticed sooner
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # of the nodes, for tests.gate
    patch.setenv("OMP_NUM_THREADS", "1")
    yield patch
    patch.undo()


@pytest.fixture(scope="module")
def cluster(environment) -> Iterator:
    """A head without CPUs, where the driver is, and nodes of their own; this process is connected to it."""
    environment.setenv(MARK, f"cluster of {os.getpid()}")
    made = start_cluster(0)
    for _ in range(2):
        add_node(made)
    ray.init(made.address, log_to_driver=False, logging_level="error")
    yield made
    ray.shutdown()
    made.shutdown()


def start_cluster(cpus: int) -> Any:
    from ray.cluster_utils import Cluster

    without = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}  # processes of the head
    return Cluster(
        initialize_head=True, head_node_args={"num_cpus": cpus, "worker_path": ray_workers.__file__, **without}
    )


def add_node(cluster) -> Any:
    """Works in any thread, unlike with a handler of signals that ends the node."""
    cluster._shutdown_at_exit = False
    return cluster.add_node(num_cpus=ROOM, worker_path=ray_workers.__file__)


@pytest.fixture(scope="session")
def undisturbed(target, prompts, tmp_path_factory) -> Path:
    """Weights and losses of two ranks without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = ["--target", target, "--prompts", prompts, "--output", folder / "features", "--dtype", "float32"]
    assert main(["capture", *map(str, [*words, "--batch_tokens", 1])]) == 0
    data = {"features": str(folder / "features"), "batch_size": 5}
    path = recipe(target, prompts, folder, **STEPS | RANKS, data__init_args=data)
    train_on_ranks({"undisturbed": ["--config", str(path)]}, TRAINERS)
    return folder / "run"


def on_cluster(path: Path, address: str, gates: dict[Path, int] | None = None, **cluster: object) -> Path:
    """A recipe with the section `cluster`, and gates before steps."""
    content = yaml.safe_load(path.read_text())
    for gate, step in (gates or {}).items():
        gate.mkdir()
        callback = {"class_path": "tests.gate.Gate", "init_args": {"folder": str(gate), "step": step}}
        content["trainer"].setdefault("callbacks", []).append(callback)
    content["cluster"] = {
        "address": address,
        "name": "test",
        "placement": "spread",
        "producers": {"count": PRODUCERS},
        "trainers": {"count": TRAINERS},
    } | cluster
    path.write_text(yaml.safe_dump(content))
    return path


def pids(*names: str) -> list[int]:
    """Workers with one of these names whose cluster, or the command that started it, has the mark of this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            ours = (path / "cmdline").read_bytes().startswith(tuple(name.encode() for name in names))
            if ours and ray_workers.environment_of(int(path.name)).get(MARK) == os.environ[MARK]:
                found.append(int(path.name))
    return sorted(found)


def servers(run: Path) -> list[int]:
    """Redis servers of a run, which overwrite their environment with their title."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.readlink(path / "cwd") == str(run / "redis"):
                found.append(int(path.name))
    return found


def metric(run: Path, port: int, name: str) -> float:
    """A metric of a run, as Prometheus reads it."""
    token = (run / "metrics-token").read_text().strip()
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {token}"}, timeout=60)
    return float(re.search(rf"^specforge_{name} (.*)$", answer.text, re.M).group(1))


def kill_producers(draw, count: int) -> None:
    wait_for(lambda: len(pids("ray::Producer")) >= count)
    for pid in draw.sample(pids("ray::Producer"), count):
        os.kill(pid, signal.SIGKILL)


def kill_ranks(draw, ranks, count: int = 1) -> None:
    for rank in draw.sample(ranks, count):
        os.kill(rank["pid"], signal.SIGKILL)


def kill_redis(run: Path) -> None:
    (redis,) = servers(run)
    os.kill(redis, signal.SIGKILL)


def kill_the_actor_of_redis(run: Path) -> None:
    (redis,), (actor,) = servers(run), pids("ray::RedisServer")
    os.kill(actor, signal.SIGKILL)
    wait_for(lambda: redis not in servers(run))


@contextmanager
def redis_of(run: Path) -> Iterator[str]:
    """The address of a server with the metadata of a run that has ended."""
    server = RedisServer(run / "redis", "127.0.0.1")
    server.keep()
    yield server.address
    server.end()


def kill_a_node(draw, cluster, ranks) -> None:
    lost = draw.choice(ranks)["node"]
    (node,) = [node for node in cluster.worker_nodes if node.node_id == lost]
    raylet = node.all_processes["raylet"][0].process
    cluster.remove_node(node, allow_graceful=False)
    raylet.wait()  # its processes end once it is gone, and a zombie is not
    for rank in ranks:
        while rank["node"] == lost and Path(f"/proc/{rank['pid']}").exists():
            time.sleep(0.05)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(max(1, metafunc.config.getoption("--fault-seeds") // 3)))


def launch(path: Path, gates: dict[Path, int], disturb: Callable[[Path, list[dict]], None], *words: str) -> int:
    """Launch a run; ``disturb`` is called when all ranks are at a gate, which opens afterwards."""
    done, errors = threading.Event(), []

    def work() -> None:
        try:
            for gate in gates:
                disturb(gate, wait_at_gate(gate, TRAINERS, lambda: not done.is_set()))
                (gate / "open").touch()
        except BaseException as error:
            errors.append(error)
            if not done.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
            for gate in gates:
                (gate / "open").touch()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        return main(["launch", "--config", str(path), *words])
    finally:
        done.set()
        thread.join()
        assert not errors, errors


@pytest.mark.redis
def test_weights_are_those_without_ray_whatever_process_dies(
    target, prompts, tmp_path, cluster, undisturbed, seed, capfd
):
    """Eleven kills."""
    draw = random.Random(f"processes {seed}")
    first, second = sorted(draw.sample(range(1, 8), 2))
    where, gates = places(tmp_path), {tmp_path / "one rank": first, tmp_path / "all ranks": second}
    own = where | {"metadata": "auto"}  # then `launch` starts Redis
    path = disaggregated(target, prompts, tmp_path, own, RANKS, batch_size=5, max_samples=40)
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    on_cluster(path, cluster.address, gates, metrics_port=port)

    def disturb(gate: Path, ranks: list[dict]) -> None:
        wait_for(lambda: metric(tmp_path / "run", port, "trainer_restarts_total") == [*gates].index(gate))
        (kill_redis if gate.name == "one rank" else kill_the_actor_of_redis)(tmp_path / "run")
        kill_producers(draw, PRODUCERS)
        kill_ranks(draw, ranks, 1 if gate.name == "one rank" else TRAINERS)

    assert launch(path, gates, disturb) == 0
    print(gates, out := capfd.readouterr().out)
    assert out.count("the Redis server died and was started again") == 2
    assert out.count("it is started again") >= 2 * PRODUCERS
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert_same_weights(tmp_path / "run", undisturbed)
    assert_ray_is_idle()
    with redis_of(tmp_path / "run") as address:
        assert_nothing_is_left(where | {"metadata": address}, trained=2 * 32)


@pytest.mark.redis
@pytest.mark.usefixtures("environment")
def test_a_run_whose_driver_or_head_was_killed_goes_on(target, prompts, tmp_path, undisturbed, seed, monkeypatch):
    """Ten kills; nothing of the run is left, and it is resumed on the same cluster, then on a new one.

    Its checkpoints are lost each time, but not their copies.
    """
    draw = random.Random(f"driver {seed}")
    monkeypatch.setenv(MARK, f"driver {seed} of {os.getpid()}")
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "8")
    first, second = sorted(draw.sample(range(1, 8), 2))
    where, gates = places(tmp_path), {tmp_path / "driver": first, tmp_path / "head": second}
    path = disaggregated(target, prompts, tmp_path, where | {"metadata": "auto"}, RANKS, batch_size=5, max_samples=40)
    made = start_cluster(PRODUCERS + TRAINERS)
    on_cluster(path, made.address, gates)

    def resume() -> Command:
        shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)  # their copies are used
        return Command(
            *("launch", "--config", path, "--cluster.address", made.address, "--ckpt_path", "last"),
            *("--checkpoint.copy_to", f"file://{tmp_path}/copies"),
            apart=True,
        )

    run = resume()
    try:
        ranks = wait_at_gate(tmp_path / "driver", TRAINERS, lambda: run.poll() is None)
        kill_redis(tmp_path / "run")
        kill_producers(draw, PRODUCERS)
        kill_ranks(draw, ranks)
        run.kill()
        print(*run.communicate())
        wait_for(lambda: pids(*PROCESSES) == servers(tmp_path / "run") == [])
        (tmp_path / "driver" / "open").touch()
        run = resume()
        wait_at_gate(tmp_path / "head", TRAINERS, lambda: run.poll() is None)
        kill_producers(draw, PRODUCERS)
        made.head_node.all_processes["gcs_server"][0].process.kill()
        out, err = run.communicate(timeout=120)
        print(out, err)
        lines = [line for line in err.splitlines() if line.startswith("specforge: ")]
        assert run.returncode == 2
        assert re.fullmatch(
            r"specforge: the head of the Ray cluster \(.*\) has not answered for 4 s; .* --ckpt_path last", lines[0]
        )
        assert len(err.splitlines()) == 1
        wait_for(lambda: pids(*PROCESSES) == servers(tmp_path / "run") == [])
        made.shutdown()
        (tmp_path / "head" / "open").touch()
        made = start_cluster(PRODUCERS + TRAINERS)
        run = resume()
        out, err = run.communicate(timeout=600)
        print(out, err)
        assert run.returncode == 0
        wait_for(lambda: pids(*PROCESSES) == servers(tmp_path / "run") == [])
    finally:
        run.kill()
        made.shutdown()
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["resumed_at_step"] > 0
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert_same_weights(tmp_path / "run", undisturbed)
    with redis_of(tmp_path / "run") as address:
        assert_nothing_is_left(where | {"metadata": address}, trained=2 * 32)


def test_producers_give_their_room_to_trainers_when_nodes_are_lost(
    target, prompts, tmp_path, cluster, undisturbed, seed, capfd
):
    """Two kills; the cluster is full, so that either node holds more producers than can stay without the other."""
    draw = random.Random(f"node {seed}")
    first, second = sorted(draw.sample(range(1, 9), 2))
    where, gates = places(tmp_path), {tmp_path / "first": first, tmp_path / "second": second}
    path = disaggregated(target, prompts, tmp_path, where, RANKS, batch_size=5, max_samples=40)
    on_cluster(path, cluster.address, gates, producers={"count": 4})

    def disturb(gate: Path, ranks: list[dict]) -> None:
        if gate.name == "second":
            assert len(producers()) < 4
            add_node(cluster)
        wait_for(lambda: len(producers()) == 4)
        for name in producers():
            ray.get(ray.get_actor(name, namespace="specforge").node.remote())
        kill_a_node(draw, cluster, ranks)

    try:
        assert launch(path, gates, disturb) == 0
    finally:
        print(gates, out := capfd.readouterr().out)
        for _ in range(2 - len(cluster.worker_nodes)):
            add_node(cluster)
    assert len(re.findall(r"waiting for .* for . trainers?: producers? .* stopped meanwhile", out)) == 2
    assert "there is room again for producer" in out
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert_same_weights(tmp_path / "run", undisturbed)
    assert_nothing_is_left(where, trained=2 * 32)
    assert_ray_is_idle()


def test_producers_come_and_go_and_a_stopped_run_goes_on(
    target, prompts, tmp_path, cluster, undisturbed, capfd, monkeypatch
):
    """By themselves between one and three, and as `--scale` wants; the store holds no more than `max_bytes`.

    A third node is for producers only if the trainers' nodes have no room.
    """
    for name in ("_LOOK", "_GROW", "_SHRINK"):
        monkeypatch.setattr(f"specforge.cluster.scaling.{name}", 0.3)
    where, gates, limit = places(tmp_path), {tmp_path / "gate": 3}, 1_300_000
    engine = {"class_path": "tests.gated_engine.GatedEngine", "init_args": {"gate": str(tmp_path / "gate" / "read")}}
    path = disaggregated(target, prompts, tmp_path, where, RANKS, batch_size=5, max_bytes=limit)
    wanted = {"count": 1, "max_count": 3, "engine": engine}
    on_cluster(path, cluster.address, gates, producers=wanted, placement="beside_trainers")
    peaks, third = [0], add_node(cluster)

    def wait_until(count: int) -> None:
        def reached() -> bool:
            peaks.append(stored_bytes(tmp_path / "store"))
            return producers() == {f"test-producer-{i}" for i in range(count)}

        wait_for(reached)

    def disturb(gate: Path, ranks: list[dict]) -> None:
        wait_until(1)
        for count in (5, 1):  # room beside trainers is for four
            assert main(["launch", "--config", str(path), "--scale", str(count)]) == 0
            wait_until(count)
            nodes = [ray.get(ray.get_actor(x, namespace="specforge").node.remote()) for x in producers()]
            assert sum(node in {rank["node"] for rank in ranks} for node in nodes) == min(count, 4)
        stores = [f"--data.{name}={tmp_path / 'other' / name}" for name in where]
        assert main(["launch", "--config", str(path), "--ckpt_path", "last", *stores]) == 2  # of the same name
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: ray.get(ray.get_actor("test", namespace="specforge").stops.remote()))

    def starve() -> None:
        wait_until(3)
        (tmp_path / "gate" / "read").touch()

    starving = threading.Thread(target=starve)
    starving.start()
    try:
        assert launch(path, gates, disturb) == 143
    finally:
        cluster.remove_node(third)
    starving.join()
    out, err = capfd.readouterr()
    print(peaks, out, err)
    assert "training waits for samples: producer 2 is added" in out
    assert "producers wait for training: producer 1 is removed" in out
    assert "test: 5 producers instead of 1" in out
    assert "nodes with trainers have no room for producer 4; any node will do" in out
    assert 0.5 * limit < max(peaks) <= limit
    assert "cluster.name: a run named test is going on in this cluster" in err
    assert re.search(r"stopped by a signal after step [34]; resume with --ckpt_path last", out)
    assert_ray_is_idle()
    assert main(["launch", "--config", str(path), "--ckpt_path", "last"]) == 0
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert_same_weights(tmp_path / "run", undisturbed)
    assert_nothing_is_left(where, trained=2 * 32)
    assert_ray_is_idle()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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


@pytest.mark.redis
@pytest.mark.usefixtures("cluster")
def test_a_server_that_cannot_be_started_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="run/redis: cannot be used"):
        RedisActor(tmp_path / "run" / "redis", "127.0.0.1")


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
    metadata = open_metadata("taken.db", create=True)
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
