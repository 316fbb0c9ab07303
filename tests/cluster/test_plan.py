"""What fits where, and what a plan prints; nothing here needs Ray."""

from __future__ import annotations

import pytest
import yaml

from specforge.cluster.options import ClusterOptions, ProducerOptions, TrainerOptions
from specforge.cluster.plan import Node, beside, capacity, describe, give_up, left, place
from specforge.errors import UserError
from tests.disaggregated import disaggregated, places

NODES = [Node("a", 4, 2), Node("b", 4, 2)]


def cluster(producers: int, trainers: int, placement: str = "pack", **each: int) -> ClusterOptions:
    return ClusterOptions(
        producers=ProducerOptions(producers, **each), trainers=TrainerOptions(trainers), placement=placement
    )


def test_pack_fills_one_node_before_the_next():
    assert place(NODES, cluster(3, 2)) == [
        ("a", ["producer 0", "producer 1", "producer 2", "trainer 0"]),
        ("b", ["trainer 1"]),
    ]


def test_spread_fills_all_nodes_evenly():
    assert place(NODES, cluster(2, 2, "spread")) == [
        ("a", ["producer 0", "trainer 0"]),
        ("b", ["producer 1", "trainer 1"]),
    ]


def test_producers_run_beside_trainers_as_long_as_there_is_room():
    nodes = [*NODES, Node("c", 4, 2)]
    assert place(nodes, cluster(7, 2, "beside_trainers")) == [
        ("a", ["producer 0", "producer 2", "producer 4", "trainer 0"]),
        ("b", ["producer 1", "producer 3", "producer 5", "trainer 1"]),
        ("c", ["producer 6"]),
    ]


def test_the_room_beside_trainers_is_what_the_run_itself_leaves():
    wanted = cluster(3, 2, "beside_trainers", cpus=2)
    there = left([*NODES, Node("c", 9, 0)], ["a", "b"], ["a", "c", ""], wanted)
    assert there == [Node("a", 1, 2), Node("b", 3, 2), Node("c", 7, 0)]
    assert beside(there, ["a", "b"], wanted.producers) == "b"
    assert beside(there, ["a"], wanted.producers) is None


def test_gpus_decide_first():
    """Trainers would take the CPUs that the only node with two free GPUs needs."""
    assert place([Node("a", 2, 2), Node("b", 2, 0)], cluster(1, 2, gpus=2, cpus=2)) == [
        ("a", ["producer 0"]),
        ("b", ["trainer 0", "trainer 1"]),
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (cluster(1, 1, gpus=3), "1 producer with 1 CPU and 3 GPUs and 1 trainer with 1 CPU do not fit"),
        (cluster(8, 1, max_count=9), r"^cluster: 8 to 9 producers with 1 CPU each and 1 trainer with 1 CPU do not fit"),
        (cluster(1, 4, "beside_trainers", cpus=3), "or add nodes, or use another placement$"),
        (cluster(8, 1), r"8 producers with 1 CPU each .* \(a: 4 CPUs and 2 GPUs; b: 4 CPUs and 2 GPUs\)"),
    ],
)
def test_what_does_not_fit_is_refused(wanted, message):
    with pytest.raises(UserError, match=message):
        place(NODES, wanted)


@pytest.mark.parametrize(
    ("free", "producers", "stopped"),
    [
        ([4], {0: "a"}, []),
        ([3], {0: "a", 1: "a", 2: "a"}, [2]),
        ([1, 1], {0: "a", 1: "b", 2: "a"}, [1, 2]),
        ([2, 1, 0], {0: "b", 1: "c"}, [0]),  # one CPU of node c is of no use to a trainer
        ([2, 0], {0: "b"}, None),
        ([3], {0: "lost"}, None),
    ],
)
def test_the_last_producers_whose_room_helps_give_it_to_two_trainers(free, producers, stopped):
    """Trainers with two CPUs each, producers with one; ``free`` are the CPUs of nodes a, b and c."""
    nodes = [Node(name, cpus, 0) for name, cpus in zip("abc", free, strict=False)]
    assert give_up(nodes, producers, ClusterOptions(trainers=TrainerOptions(2, cpus=2))) == stopped


def test_capacity_counts_whole_processes_on_each_node():
    nodes = [Node("a", 3, 1), Node("b", 1.5, 4), Node("c", 4, 0)]
    assert capacity(nodes, ProducerOptions(cpus=2)) == 3
    assert capacity(nodes, ProducerOptions(cpus=1, gpus=1)) == 2


def test_a_plan_tells_sizes_and_places(target, prompts, tmp_path):
    recipe = yaml.safe_load(disaggregated(target, prompts, tmp_path, places(tmp_path)).read_text())
    recipe["data"]["init_args"] |= {"encoding": "raw", "max_bytes": 10**9}
    lines = describe(cluster(3, 2), NODES, recipe, {"features": "here", "metadata": "there"})
    per_token = 4 * 32 * 4 + 5  # four states of 32 values in fp32, token id and mask
    assert lines[0].endswith("capturing layers [1, 3, 4] and the last hidden states")
    assert lines[0].startswith("3 producers with 1 CPU each: ")
    assert lines[2].startswith(
        f"  features: {per_token} bytes per token; 10,000 tokens/s write {per_token / 100:.0f} MB/s"
    )
    assert "2 trainers with 1 CPU each: eagle3" in lines
    assert f"  at most 1.00 GB of features at once, about {10**9 // per_token:,} tokens" in lines
    assert lines[-2:] == ["node a: producer 0, producer 1, producer 2, trainer 0", "node b: trainer 1"]
