"""`specforge fit` end to end on the tiny target: the loss's normaliser, crashes, resuming, Lightning's traps."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from specforge.callbacks.checkpoint import step_of
from specforge.cli.main import main
from specforge.eval.report import read_history
from tests.processes import Command
from tests.ranks import train_on_ranks
from tests.tiny import recipe


def fit(path: Path, *options: object) -> Path:
    """Run `specforge fit` here; returns the run's folder."""
    assert main(["fit", "--config", str(path), *map(str, options)]) == 0
    return Path(yaml.safe_load(path.read_text())["trainer"]["default_root_dir"])


def start(path: Path, *options: object) -> Command:
    return Command("fit", "--config", path, *options)


def weights(run: Path, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / name, weights_only=True)["state_dict"]


def last_step(run: Path) -> int:
    """The step of the run's last checkpoint."""
    return step_of((run / "checkpoints" / "last.ckpt").resolve())


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def assert_same_weights(a: Path, b: Path, **tolerance: float) -> None:
    mine, others = weights(a), weights(b)
    assert mine.keys() == others.keys()
    for name in mine:
        if tolerance:
            torch.testing.assert_close(mine[name], others[name], **tolerance)
        else:
            assert torch.equal(mine[name], others[name]), name


def wait_for_steps(process: Command, run: Path, steps: int) -> None:
    """Return once the run has logged so many steps."""
    while process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and path.read_text().count('"train/loss":') >= steps:
            return
        time.sleep(0.01)  # there is nothing to wait on but the file
    raise AssertionError(f"the run ended too early:\n{process.stdout.read()}")


@pytest.fixture(scope="module")
def undisturbed(target, features, tmp_path_factory):
    """A run of 12 steps with a checkpoint every 4th, shuffled over more than one epoch."""
    return fit(recipe(target, features, tmp_path_factory.mktemp("undisturbed"), **LONG))


LONG = {"trainer__max_steps": 12, "checkpoint": {"every_n_train_steps": 4}}


def test_batch_of_4_is_accumulation_of_4(target, features, tmp_path):
    data = {"features": str(features), "batch_size": 4}
    wide = fit(recipe(target, features, tmp_path / "wide", data__init_args=data))
    narrow = fit(
        recipe(
            target,
            features,
            tmp_path / "narrow",
            data__init_args={**data, "batch_size": 1},
            trainer__accumulate_grad_batches=4,
        )
    )
    assert losses(wide).keys() == losses(narrow).keys()
    assert_same_weights(wide, narrow, rtol=1e-4, atol=1e-5)


def test_ranks_of_uneven_data_finish_together(target, features, tmp_path):
    """32 samples in batches of 5 are 7 batches: the second rank's last one is empty."""
    path = recipe(
        target,
        features,
        tmp_path,
        trainer__devices=2,
        trainer__strategy="fsdp2",
        data__init_args__batch_size=5,
        trainer__max_steps=-1,
        trainer__max_epochs=2,
    )
    train_on_ranks({"run": ["--config", str(path)]}, 2)
    assert sorted(losses(tmp_path / "run"))[-1] == 8


@pytest.mark.parametrize("step", [3, 7, 10])
def test_kill_9_and_resume_is_bit_identical(target, features, tmp_path, undisturbed, step):
    path = recipe(target, features, tmp_path, **LONG)
    process = start(path)
    wait_for_steps(process, tmp_path / "run", step)
    process.kill()
    process.wait()
    run = fit(path, "--ckpt_path", "last")
    assert losses(run) == losses(undisturbed)
    assert_same_weights(run, undisturbed)


def test_resume_in_the_middle_of_an_accumulation_window(target, features, tmp_path):
    changes = {**LONG, "trainer__accumulate_grad_batches": 3, "data__init_args__batch_size": 2}
    whole = fit(recipe(target, features, tmp_path / "whole", **changes))
    path = recipe(target, features, tmp_path / "cut", **changes)
    process = start(path)
    wait_for_steps(process, tmp_path / "cut" / "run", 6)
    process.kill()
    process.wait()
    cut = fit(path, "--ckpt_path", "last")
    assert losses(cut) == losses(whole)
    assert_same_weights(cut, whole)


def test_sigterm_saves_the_finished_step_and_exits_143(target, features, tmp_path, undisturbed):
    path = recipe(target, features, tmp_path, **{**LONG, "checkpoint": {"every_n_train_steps": 1000}})
    process = start(path)
    wait_for_steps(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "resume with --ckpt_path last" in output
    assert "eagle3 draft for tiny" in (tmp_path / "run" / "report.html").read_text()
    run = fit(path, "--ckpt_path", "last")
    assert_same_weights(run, undisturbed)


# The eight traps of Lightning's defaults.


def test_trap_loader_state_is_saved_and_restored(undisturbed):
    saved = torch.load(undisturbed / "checkpoints" / "step-00000008.ckpt", weights_only=True)
    (state,) = saved["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert (state["epoch"], state["batch"]) == (0, 8)


def test_trap_no_batch_is_repeated_or_skipped_over_a_resume(target, features, tmp_path, monkeypatch):
    seen: list[tuple[str, ...]] = []
    from lightning_modules.eagle3 import Eagle3Module

    original = Eagle3Module.training_step
    monkeypatch.setattr(
        Eagle3Module,
        "training_step",
        lambda self, batch, i: (seen.append(batch.sample_ids), original(self, batch, i))[1],
    )
    path = recipe(target, features, tmp_path, **LONG)
    fit(path, "--trainer.max_steps", 5)
    first, seen[:] = list(seen), []
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()
    (tmp_path / "run" / "checkpoints" / "last.ckpt").symlink_to("step-00000004.ckpt")
    fit(path, "--ckpt_path", "last", "--trainer.max_steps", 8)
    assert seen[0] == first[4]  # step 5 was trained after the checkpoint of step 4: it comes again
    epoch = [name for batch in [*first[:4], *seen] for name in batch]
    assert len(epoch) == len(set(epoch)) == 32


def test_trap_a_torn_checkpoint_is_never_last(target, features, tmp_path, monkeypatch):
    path = recipe(target, features, tmp_path, **LONG)
    fit(path, "--trainer.max_steps", 4)
    before = (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes()

    def torn(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", torn)
    assert main(["fit", "--config", str(path), "--ckpt_path", "last"]) != 0
    monkeypatch.undo()
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "last.ckpt").read_bytes() == before
    assert not [p for p in folder.iterdir() if p.is_file() and not p.is_symlink() and p.suffix != ".ckpt"]


def test_trap_the_checkpoint_does_not_override_the_configuration(target, features, tmp_path):
    path = recipe(target, features, tmp_path, trainer__max_steps=4, model__init_args__gamma=2)
    fit(path)
    run = fit(path, "--ckpt_path", "last", "--trainer.max_steps", 8, "--model.gamma", 3)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["gamma"] == 3
    assert max(losses(run)) == 8


def test_trap_the_best_checkpoint_survives_a_restart(target, features, tmp_path):
    path = recipe(
        target,
        features,
        tmp_path,
        trainer__max_steps=4,
        trainer__check_val_every_n_epoch=None,
        trainer__val_check_interval=2,
        checkpoint={"every_n_train_steps": 2},
    )
    run = fit(path)
    best = (run / "checkpoints" / "best.ckpt").resolve()
    score = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    fit(path, "--ckpt_path", "last", "--trainer.max_steps", 6, "--model.optimizer.lr", 0.0)
    assert (run / "checkpoints" / "best.ckpt").resolve().exists()
    after = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    key = next(k for k in score if k.startswith("BestCheckpoint"))
    assert after[key]["best_model_score"] >= score[key]["best_model_score"]
    assert best.exists() or after[key]["best_model_score"] > score[key]["best_model_score"]


def test_trap_checkpoints_hold_no_frozen_target(undisturbed, target):
    saved = weights(undisturbed)
    assert all(name.startswith("draft.") for name in saved)
    assert not any("embed" in name for name in saved)


def test_trap_one_reduction_per_optimizer_step(target, features, tmp_path):
    """Two ranks, accumulation of 2: the gradient buckets are reduced once a window, and once as zeros before them."""
    path = recipe(
        target,
        features,
        tmp_path,
        trainer__devices=2,
        trainer__strategy="ddp",
        trainer__accumulate_grad_batches=2,
        trainer__max_steps=3,
        data__init_args__batch_size=2,
    )
    process = Command("fit", "--config", path, call="tests.test_training:fit_and_count_reductions")
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "reductions 3" in output


def fit_and_count_reductions(words: list[str]) -> int:
    """What the first rank does; the second one is as ever."""
    count, original = 0, DistributedDataParallel.__init__

    def hook(state, bucket):  # torch refuses annotations that are strings
        nonlocal count
        count += bucket.is_last() and bool(bucket.buffer().any())
        return allreduce_hook(state, bucket)

    def initialize(self: DistributedDataParallel, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self.register_comm_hook(None, hook)

    DistributedDataParallel.__init__ = initialize
    status = main(words)
    print("reductions", count)
    return status


def test_trap_another_number_of_ranks_is_refused(target, features, tmp_path, undisturbed):
    checkpoint = undisturbed / "checkpoints" / "step-00000008.ckpt"
    process = start(
        recipe(target, features, tmp_path, **LONG),
        "--trainer.devices",
        2,
        "--trainer.strategy",
        "ddp",
        "--ckpt_path",
        checkpoint,
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "1 ranks, this run has 2" in output or "world_size" in output


def test_tau_does_not_move_with_the_batch_size_of_the_validation(target, features, tmp_path):
    found = []
    for size in (1, 3, 8):
        path = recipe(
            target,
            features,
            tmp_path / str(size),
            data__init_args__val_batch_size=size,
            trainer__val_check_interval=1.0,
        )
        run = fit(path, "--trainer.max_steps", -1, "--trainer.max_epochs", 1)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append([row["val/tau"] for row in rows if "val/tau" in row])
    assert found[0]
    assert found[1] == pytest.approx(found[0])
    assert found[2] == pytest.approx(found[0])


def test_the_report_is_one_file_with_pictures_beside_it(undisturbed):
    html = (undisturbed / "report.html").read_text()
    assert "data:image/png;base64" in html
    assert 'src="http' not in html
    assert list((undisturbed / "report").glob("*.png"))


def test_validate_prints_rounded_numbers_and_leaves_no_files(target, features, tmp_path, undisturbed, capsys):
    path = recipe(target, features, tmp_path)
    assert main(["validate", "--config", str(path), "--ckpt_path", str(undisturbed / "checkpoints" / "last.ckpt")]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("val/"))
    last = [row for row in read_history(undisturbed / "metrics.jsonl") if "val/tau" in row][-1]
    assert printed == {name: f"{value:.4g}" for name, value in last.items() if name.startswith("val/")}
    assert not (tmp_path / "run").exists()


def test_loggers_have_the_steps_of_the_history_and_the_options(target, features, tmp_path):
    path = recipe(target, features, tmp_path, trainer__max_steps=5, trainer__log_every_n_steps=2)
    run = fit(path, "--trainer.val_check_interval=2", "--trainer.logger=CSVLogger")
    with (run / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        logged = [(int(row["step"]), "tau" if row["val/tau"] else "loss") for row in csv.DictReader(file)]
    history = [(row["step"], "tau" if "val/tau" in row else "loss") for row in read_history(run / "metrics.jsonl")]
    assert logged == history == [(2, "loss"), (2, "tau"), (4, "loss"), (4, "tau"), (5, "tau")]
    options = yaml.safe_load((run / "lightning_logs" / "version_0" / "hparams.yaml").read_text())
    assert options["trainer"]["max_steps"] == 5
    assert options["model"]["init_args"]["steps"] == 3
    assert options["data"]["init_args"]["features"] == str(features)


def test_tensorboard_has_the_options_and_nothing_of_a_rejected_run(target, features, tmp_path):
    path = recipe(target, features, tmp_path, trainer__max_steps=1)
    folder = fit(path) / "tensorboard"
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["model"]["init_args"]["steps"] == 3
    files = sorted(folder.iterdir())
    assert main(["fit", "--config", str(path)]) == 2
    assert main(["validate", "--config", str(path), "--ckpt_path", "last"]) == 0
    assert sorted(folder.iterdir()) == files
