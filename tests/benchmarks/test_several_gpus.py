"""The benchmarks of several GPUs on CPUs, at tiny sizes: what they compare and count, not how fast it is."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import pools, several_gpus
from benchmarks.attempts import Attempts, Failed
from benchmarks.collectives import count
from specforge.cli.main import main
from specforge.inference.target_engine import HFTargetEngine
from tests.ranks import train_on_ranks
from tests.runtime.data_plane.mooncake_store import needs_mooncake


@pytest.fixture
def quick(monkeypatch, capfd):
    """Commands run in this process, those of several ranks in ranks of their own; most of their time is imports."""

    def specforge(attempts, *words, **env):
        words = [str(word) for word in words]
        ranks = int(words[words.index("--trainer.devices") + 1]) if "--trainer.devices" in words else 1
        if ranks > 1:
            train_on_ranks({"run": words[1:]}, ranks)
        elif main(words) != 0:
            raise Failed(capfd.readouterr().err)

    monkeypatch.setattr(Attempts, "specforge", specforge)


def rows(part, tmp_path, *words):
    """The results of a part, none of which failed."""
    path = tmp_path / "rows.json"
    status = part([*map(str, words), "--shape", "tiny", "--folder", str(tmp_path), "--json", str(path)])
    found = json.loads(path.read_text())["rows"]
    assert (status, [row["failed"] for row in found if "failed" in row]) == (0, [])
    return found


@pytest.mark.slow
def test_ranks_train_alike_and_reduce_once_per_step(quick, tmp_path):
    """Windows of four micro-batches: accumulated by one rank, or two by each of two."""
    options = ["train", "--ranks", 1, 2, "--window", 4, "--warmup", 1, "--steps", 1]
    alone, ddp, fsdp2 = rows(several_gpus.main, tmp_path, *options)
    assert (alone["strategy"], ddp["strategy"], fsdp2["strategy"]) == ("auto", "ddp", "fsdp2")
    assert len(alone["losses"]) == 3
    for row in (ddp, fsdp2):
        assert row["equal"]
        assert row["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    weights = alone["parameters"]
    assert alone["collectives"] == {}
    once = {"count": 1, "elements": weights, "bytes": 4 * weights}
    assert {k: x for k, x in ddp["collectives"].items() if k != "small"} == {"all_reduce": once}
    # Weights are gathered for each micro-batch, because they are sharded again after its backward pass.
    twice = {"count": 2, "elements": 2 * weights, "bytes": 8 * weights}
    assert {k: x for k, x in fsdp2["collectives"].items() if k != "small"} == {
        "all_gather": twice,
        "reduce_scatter": once,
    }


@pytest.mark.slow
def test_a_sharded_checkpoint_resumes_bit_for_bit_and_starts_one_rank(quick, tmp_path):
    (row,) = rows(several_gpus.main, tmp_path, "resume", "--ranks", 2, "--strategies", "fsdp2", "--half", 1)
    assert row["bit_for_bit"]
    assert row["weights_on_one_rank"] == 0.0
    assert "made on 2 ranks, this run has 1" in row["on_one_rank"]


def test_a_difference_of_checkpoints_is_seen():
    x = {"state": {0: {"exp_avg": torch.ones(3), "step": 1}}, "list": [torch.zeros(2)]}
    y = {"state": {0: {"exp_avg": torch.tensor([1.0, 1.0, 1.5]), "step": 1}}, "list": [torch.zeros(2)]}
    assert several_gpus.difference(x, x) == 0.0
    assert several_gpus.difference(x, y) == 0.5
    with pytest.raises(Failed, match="exp_avg"):
        several_gpus.difference({"list": x["list"]}, x)


def test_features_of_several_devices_are_compared_with_one(tmp_path, monkeypatch):
    """A stand-in for a server: transformers, whose other attention differs in the last bits."""

    def stand_in(options, files, size, log):
        return HFTargetEngine(files, options.dtype, attention=[None, "sdpa", "eager"][size])

    monkeypatch.setattr(several_gpus, "open_engine", stand_in)
    words = ["target", "--dtype", "float32", "--prompts", 3, "--tokens", 40]
    one, two = rows(several_gpus.main, tmp_path, *words)
    assert one["last_hidden_states from fp32"] == 0.0
    for name in ("aux_hidden_states", "last_hidden_states"):
        assert 0.0 < two[f"{name} from one"] < 1e-5


@pytest.mark.slow
@needs_mooncake
def test_a_trainer_reads_from_producers_and_from_disk(quick, tmp_path):
    disk, produced = rows(
        pools.main, tmp_path, "--devices", "cpu", "--stores", "disk", "mooncake", "--owners", 2, "--steps", 14
    )
    assert (disk["store"], produced["store"], produced["producers"]) == ("disk", "mooncake", 1)
    for row in (disk, produced):
        assert 0 <= row["wait_ms"] <= row["p99_wait_ms"] <= row["longest_wait_ms"] < row["mean_step_ms"] * 4
        assert row["mean_wait_ms"] <= row["longest_wait_ms"]
    assert produced["vs_disk"] == pytest.approx(produced["mean_step_ms"] / disk["mean_step_ms"] - 1)


def test_collectives_are_counted_in_traces_of_both_backends():
    """All-reduces name no type: it is what the backend's own event says for as many elements."""

    def event(name, dims, types=(), **args):
        return {"name": name, "args": {"Input Dims": dims, "Input type": list(types), **args}}

    gloo = [
        event("c10d::allreduce_", [[[2000]], [], []], ["TensorList", "", ""]),
        event("gloo:all_reduce", [[2000]], ["float"]),
        event("c10d::allreduce_", [[[]], [], []], ["TensorList", "", ""]),
        event("aten::add", [[5000], [5000]], ["float", "float"]),
    ]
    nccl = [
        event("c10d::_allgather_base_", [[4000], [2000], []], ["c10::BFloat16", "c10::BFloat16", ""]),
        event("c10d::_reduce_scatter_base_", [[2000], [4000], []], ["float", "float", ""]),
        event("c10d::allreduce_", [[[3000]], [], []], ["TensorList", "", ""]),
        event("record_param_comms", [[3000]], **{"dtype": "Float", "In msg nelems": 3000}),
        event("c10d::allreduce_", [[[5000]], [], []], ["TensorList", "", ""]),
    ]
    assert count(gloo) == {
        "all_reduce": {"count": 1, "elements": 2000, "bytes": 8000},
        "small": {"count": 1, "elements": 1, "bytes": None},
    }
    assert count(nccl) == {
        "all_gather": {"count": 1, "elements": 4000, "bytes": 8000},
        "reduce_scatter": {"count": 1, "elements": 4000, "bytes": 16000},
        "all_reduce": {"count": 2, "elements": 8000, "bytes": None},
    }


def test_a_failure_is_named_and_the_others_go_on_until_the_time_is_over(capsys):
    attempts = Attempts(limit=600)

    def run(*words):
        return {"printed": attempts.command(*words)}

    assert "exit status 2: " in attempts.attempt({"case": 1}, lambda: run("json.tool", "--no-such"))["failed"]
    assert "positional" in attempts.attempt({"case": 2}, lambda: run("json.tool", "--help"))["printed"]
    assert [json.loads(line)["case"] for line in capsys.readouterr().out.splitlines()] == [1, 2]
    assert attempts.finish(["case", "printed"], None) == 1
    assert "| 1 | exit status 2: " in capsys.readouterr().out

    attempts = Attempts(limit=0.5)
    assert "killed, because" in attempts.attempt({"case": 3}, lambda: run("http.server", "0"))["failed"]
    assert attempts.attempt({"case": 4}, lambda: run("json.tool"))["failed"].startswith("not started")
