"""`specforge fit` with context parallelism: the run of one rank, whatever the groups; what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from datamodules import DisaggregatedDataModule, OfflineDataModule
from specforge.callbacks.strategies import ContextDDPStrategy
from specforge.cli.main import main
from specforge.contracts import CapturePolicy, StrategySpec
from specforge.errors import UserError
from specforge.eval.report import read_history
from tests.ranks import train_on_ranks
from tests.tiny import TINY_OPTIONS, recipe

EAGLE3 = {**TINY_OPTIONS["Eagle3Module"], "steps": 3}
DFLASH = {**TINY_OPTIONS["DFlashModule"], "draft_config": {"draft_vocab_size": 64, "block_size": 4}}
MODULES = {"Eagle3Module": EAGLE3, "DFlashModule": DFLASH}


def words(module: str, target: Path, features: Path, folder: Path, ranks: int, **changes: object) -> list[str]:
    """Words of a run of four steps of ten samples, the last of two, that validates at its end."""
    model = {"class_path": module, "init_args": {"target": str(target), **MODULES[module]}}
    options = {"max_steps": -1, "max_epochs": 1, "logger": False, "devices": ranks}
    options = {f"trainer__{name}": value for name, value in options.items()}
    checkpoint = {"every_n_train_steps": 2, "keep": -1}
    path = recipe(target, features, folder, model=model, checkpoint=checkpoint, **{**options, **changes})
    return ["--config", str(path)]


def strategy(kind: str, size: int) -> dict[str, object]:
    return {"trainer__strategy": {"class_path": f"Context{kind}Strategy", "init_args": {"context_size": size}}}


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    saved = torch.load(folder / "run" / "checkpoints" / "step-00000004.ckpt", weights_only=True)
    return saved["state_dict"], read_history(folder / "run" / "metrics.jsonl")


def assert_same_run(found: Path, expected: Path) -> None:
    """Weights to fp32 rounding; losses, hits, τ, and the tokens that were counted."""
    (weights, rows), (others, history) = outcome(found), outcome(expected)
    assert weights.keys() == others.keys()
    for name, value in others.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5, msg=f"{found}: {name}")
    for row, alone in zip(rows, history, strict=True):
        for name in {"step", "val/loss", "val/tau", *(x for x in alone if x.startswith("train/"))} & alone.keys():
            if "per_second" not in name:
                assert row[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), (found, name)
        if "train/loss" in alone:
            shares = [x["train/supervised_tokens_per_second"] / x["train/tokens_per_second"] for x in (row, alone)]
            assert shares[0] == pytest.approx(shares[1])


def test_ranks_that_share_batches_train_as_one(target, features, tmp_path):
    """Four ranks in two groups, one of which meets an empty batch, or in one group that accumulates.

    EAGLE-3's runs, resumed from their middle, end with their own weights bit for bit.
    """
    jobs, alone = {}, {}
    for module in MODULES:
        folder = tmp_path / module
        alone[module] = folder / "one"
        assert main(["fit", *words(module, target, features, alone[module], 1, data__init_args__batch_size=10)]) == 0
        for kind in ("DDP", "FSDP2"):
            groups = {**strategy(kind, 2), "data__init_args__batch_size": 5}
            jobs[f"{module}, {kind}"] = words(module, target, features, folder / kind, 4, **groups)
    eagle = tmp_path / "Eagle3Module"
    for kind in ("DDP", "FSDP2"):
        half, again = eagle / kind / "run/checkpoints/step-00000002.ckpt", eagle / kind / "resumed/run"
        resume = ["--ckpt_path", str(half), "--trainer.default_root_dir", str(again)]
        jobs[f"{kind}, resumed"] = [*jobs[f"Eagle3Module, {kind}"], *resume]
    whole = {"trainer__strategy": "ContextDDPStrategy", "trainer__accumulate_grad_batches": 2}
    whole["data__init_args__batch_size"] = 5
    jobs["all"] = words("Eagle3Module", target, features, eagle / "all", 4, **whole)
    train_on_ranks(jobs, 4)
    for module in MODULES:
        for name in ("DDP", "FSDP2", *(["all"] if module == "Eagle3Module" else [])):
            assert_same_run(tmp_path / module / name, alone[module])
    for kind in ("DDP", "FSDP2"):
        weights, _ = outcome(eagle / kind)
        resumed, _ = outcome(eagle / kind / "resumed")
        assert all(torch.equal(resumed[name], value) for name, value in weights.items()), kind


def sharing(datamodule, features: Path):
    """A datamodule on the last of four ranks, of which two share a batch."""
    spec = StrategySpec(
        "eagle3", CapturePolicy((1, 3, 4)), ("aux_hidden_states", "last_hidden_states"), 3, min_tokens=3
    )
    module = SimpleNamespace(spec=spec, training_plan=None)
    shard = {"num_replicas": 2, "rank": 1}
    strategy = SimpleNamespace(distributed_sampler_kwargs=shard, root_device=torch.device("cpu"))
    datamodule.trainer = SimpleNamespace(global_rank=3, world_size=4, strategy=strategy, lightning_module=module)
    return datamodule


def test_groups_share_training_batches_and_not_those_of_the_validation(features):
    data = sharing(OfflineDataModule(str(features), batch_size=4), features)
    data.setup("fit")
    train, heldout = data.train_dataloader(), data.val_dataloader()
    assert (train.rank, train.world_size) == (1, 2)
    assert (heldout.rank, heldout.world_size) == (3, 4)


def test_samples_that_a_rank_may_leave_out_are_refused(features):
    data = sharing(OfflineDataModule(str(features), batch_size=4, bad_samples="skip"), features)
    data.setup("fit")
    with pytest.raises(UserError, match=r"data\.bad_samples: skip does not work with context parallelism"):
        data.train_dataloader()


def test_disaggregated_training_is_refused(features, prompts, tmp_path):
    store, metadata = tmp_path / "store", tmp_path / "meta.db"
    options = {"store": str(store), "metadata": str(metadata), "batch_size": 4}
    data = sharing(DisaggregatedDataModule(str(prompts), **options), features)
    with pytest.raises(UserError, match="context parallelism does not work with DisaggregatedDataModule"):
        data.setup("fit")
    assert not metadata.exists()


def test_groups_that_do_not_divide_the_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(DDPStrategy, "setup_environment", lambda self: None)
    monkeypatch.setattr(ContextDDPStrategy, "world_size", 3)
    with pytest.raises(UserError, match=r"context_size is 2, which does not divide the number of ranks, 3"):
        ContextDDPStrategy(2).setup_environment()
