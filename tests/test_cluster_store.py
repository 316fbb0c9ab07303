"""A run on a cluster whose features are in the nodes' memory, and what it tells: its status, and JSON lines."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from specforge.cli.main import main
from specforge.cli.status import ClusterRun
from specforge.runtime.addresses import open_metadata
from specforge.runtime.control_plane.metadata import STATES, State
from tests.disaggregated import disaggregated, places
from tests.runtime.data_plane.mooncake_store import absent
from tests.test_disaggregated import RANKS
from tests.test_training import assert_same_weights, losses

ray = pytest.importorskip("ray", reason="needs Ray (pip install -e '.[ray]')")
from tests import test_cluster as shared  # noqa: E402

environment, cluster, undisturbed = shared.environment, shared.cluster, shared.undisturbed  # fixtures

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.slow, pytest.mark.mooncake, absent]

SIZE = 64 << 20  # bytes that each of the two nodes lends


def in_memory(path: Path, address: str, gates: dict[Path, int] | None = None, **options: object) -> Path:
    """A recipe for the cluster, with features in the nodes' memory."""
    content = yaml.safe_load(path.read_text())
    data = content["data"]["init_args"]
    del data["store"]
    data |= {"max_bytes": 2 * SIZE} | options
    path.write_text(yaml.safe_dump(content))
    return shared.on_cluster(path, address, gates, producers={"count": 2}, store_bytes=SIZE, store_owners=2)


def kill_an_owner() -> None:
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    owners = sorted(name for name in names if name.startswith("test-memory-"))
    assert len(owners) == 4
    actor = ray.get_actor(owners[0], namespace="specforge")
    os.kill(ray.get(actor.__ray_call__.remote(lambda self: __import__("os").getpid())), signal.SIGKILL)


def test_a_lost_part_of_the_memory_is_produced_again(
    target, prompts, tmp_path, cluster, undisturbed, monkeypatch, capfd
):
    where, gates = places(tmp_path), {tmp_path / "gate": 5}
    path = disaggregated(target, prompts, tmp_path, where, RANKS, batch_size=5, max_samples=40)
    in_memory(path, cluster.address, gates)
    monkeypatch.setenv("SPECFORGE_LOG", "json")
    seen: list[ClusterRun] = []

    def disturb(gate: Path, ranks: list[dict]) -> None:
        seen.append(ClusterRun.load(tmp_path / "run"))
        kill_an_owner()

    try:
        assert shared.launch(path, gates, disturb) == 0
    finally:
        print(out := capfd.readouterr().out)
    lines = [json.loads(line) for line in out.splitlines()]
    assert any("1/2 of the memory of node" in line["message"] for line in lines)
    again = [line for line in lines if "; it is produced again" in line["message"]]
    assert again
    assert {(line["role"], line["level"]) for line in again} == {("trainer", "warning")}
    assert {line["run"] for line in lines} == {"test"}
    assert {(line["role"], line["rank"]) for line in lines} >= {("producer", 0), ("producer", 1), ("driver", None)}
    (before,) = seen
    assert [name for name, *_ in before.processes] == ["producer 0", "producer 1", "trainer 0", "trainer 1"]
    assert before.store.startswith("mooncake://")
    assert ClusterRun.load(tmp_path / "run").processes == []
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert_same_weights(tmp_path / "run", undisturbed)
    metadata = open_metadata(where["metadata"])
    assert metadata.counts() == {**dict.fromkeys(STATES, 0), State.DURABLE: 2 * 32}
    metadata.close()
    shared.assert_ray_is_idle()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_bytes": 3 * SIZE}, "cluster.store_bytes: 2 x 67,108,864 bytes are less than data.max_bytes"),
        ({"store": "here"}, "cluster.store_bytes: the features are in data.store; leave one of them out"),
    ],
)
def test_what_cannot_be_stored_is_refused(target, prompts, tmp_path, cluster, changes, message, capfd):
    path = in_memory(disaggregated(target, prompts, tmp_path, places(tmp_path)), cluster.address, **changes)
    assert main(["launch", "--config", str(path)]) == 2
    assert message in capfd.readouterr().err
    assert sorted(x.name for x in tmp_path.iterdir()) == ["recipe.yaml"]
    shared.assert_ray_is_idle()
