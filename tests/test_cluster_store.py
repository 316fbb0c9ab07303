"""A run on a cluster whose features are in the nodes' memory, and what it tells: its status, and JSON lines."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import yaml

from specforge.cli.main import main
from tests.disaggregated import disaggregated, places
from tests.gate import wait_at_gate
from tests.runtime.data_plane.mooncake_store import absent
from tests.test_disaggregated import RANKS
from tests.test_training import assert_same_weights, losses

ray = pytest.importorskip("ray", reason="needs Ray (pip install -e '.[ray]')")
from specforge.cli.status import ClusterRun  # noqa: E402
from specforge.runtime.addresses import open_metadata  # noqa: E402
from specforge.runtime.control_plane.metadata import STATES, State  # noqa: E402
from tests.test_cluster import assert_ray_is_idle, cluster, undisturbed  # noqa: E402, F401

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.slow, pytest.mark.mooncake, absent]

SIZE = 64 << 20  # bytes that each of the two nodes lends


def in_memory(path: Path, address: str, **options: object) -> Path:
    """A recipe for the cluster, with features in the nodes' memory."""
    content = yaml.safe_load(path.read_text())
    data = content["data"]["init_args"]
    del data["store"]
    data |= {"max_bytes": 2 * SIZE} | options
    content["cluster"] = {
        "address": address,
        "name": "test",
        "placement": "spread",
        "producers": {"count": 2},
        "trainers": {"count": 2},
        "store_bytes": SIZE,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def kill_an_owner() -> None:
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    owners = sorted(name for name in names if name.startswith("test-memory-"))
    assert len(owners) == 2
    actor = ray.get_actor(owners[0], namespace="specforge")
    os.kill(ray.get(actor.__ray_call__.remote(lambda self: __import__("os").getpid())), signal.SIGKILL)


def test_a_lost_part_of_the_memory_is_produced_again(
    target,
    prompts,
    tmp_path,
    cluster,  # noqa: F811
    undisturbed,  # noqa: F811
    monkeypatch,
    capfd,
):
    where, gate = places(tmp_path), tmp_path / "gate"
    path = disaggregated(target, prompts, tmp_path, where, RANKS, batch_size=5, max_samples=40)
    in_memory(path, cluster.address)
    content = yaml.safe_load(path.read_text())
    content["trainer"]["callbacks"] = [{"class_path": "tests.gate.Gate", "init_args": {"folder": str(gate), "step": 5}}]
    path.write_text(yaml.safe_dump(content))
    gate.mkdir()
    monkeypatch.setenv("SPECFORGE_LOG", "json")
    done, seen = threading.Event(), []

    def disturb() -> None:
        wait_at_gate(gate, 2, lambda: not done.is_set())
        seen.append(ClusterRun.load(tmp_path / "run"))
        kill_an_owner()
        (gate / "open").touch()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        assert main(["launch", "--config", str(path)]) == 0
    finally:
        done.set()
        thread.join()
        print(out := capfd.readouterr().out)
    lines = [json.loads(line) for line in out.splitlines()]
    assert any("is lost, with the features in it" in line["message"] for line in lines)
    assert {line["run"] for line in lines} == {"test"}
    processes = {("producer", 0), ("producer", 1), ("trainer", 0), ("trainer", 1), ("driver", None)}
    assert {(line["role"], line["rank"]) for line in lines} >= processes - {("trainer", 1)}  # which may say nothing
    (before,) = seen
    assert [name for name, *_ in before.processes] == ["producer 0", "producer 1", "trainer 0", "trainer 1"]
    assert before.store.startswith("mooncake://")
    assert ClusterRun.load(tmp_path / "run").processes == []
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert_same_weights(tmp_path / "run", undisturbed)
    metadata = open_metadata(where["metadata"])
    assert metadata.counts() == {**dict.fromkeys(STATES, 0), State.DURABLE: 2 * 32}
    metadata.close()
    assert_ray_is_idle()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_bytes": 3 * SIZE}, "cluster.store_bytes: 2 x 67,108,864 bytes are less than data.max_bytes"),
        ({"store": "here"}, "cluster.store_bytes: the features are in data.store; leave one of them out"),
    ],
)
def test_what_cannot_be_stored_is_refused(target, prompts, tmp_path, cluster, changes, message, capfd):  # noqa: F811
    path = in_memory(disaggregated(target, prompts, tmp_path, places(tmp_path)), cluster.address, **changes)
    assert main(["launch", "--config", str(path)]) == 2
    assert message in capfd.readouterr().err
    assert sorted(x.name for x in tmp_path.iterdir()) == ["recipe.yaml"]
    assert_ray_is_idle()
