"""Best and last checkpoint, history and weights after kills at any point, against a small model of what must exist.

A kill is an exception at the n-th thing that a run does to its folder or computes; from then on nothing is written any
more, not even by what cleans up. τ is made up from the step, with ties, so that the best draft changes often.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from lightning_modules.eagle3 import Eagle3Module
from specforge.api import load_draft
from specforge.callbacks.acceptance import AcceptanceLengthEvaluation
from specforge.callbacks.copies import Copies
from specforge.checkpoints import read_checkpoint
from specforge.cli.main import main
from specforge.runtime.data_plane.loader import FeatureDataLoader
from tests.tiny import recipe


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


class Run:
    """A run's folder, what happens to it, and what must be true of it.

    Args:
        folder: of its own.
        seed: of τ at each step.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: Path, features: Path, folder: Path, seed: int) -> None:
        self.target, self.features, self.base, self.seed = target, features, folder, seed
        self.folder = folder / "run"
        self.checkpoints = self.folder / "checkpoints"
        self.left = self.done = 0
        self.strike: Callable[[], None] | None = None
        self.dead = False
        for owner, name in (
            (os, "replace"),
            (os, "unlink"),
            (os, "symlink"),
            (tempfile, "mkstemp"),
            (Path, "open"),
            (Eagle3Module, "training_step"),
            (Eagle3Module, "validation_step"),
        ):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))
        monkeypatch.setattr(AcceptanceLengthEvaluation, "on_validation_epoch_end", lambda _, *x: self.measure(*x))

    def counted(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            if self.dead:
                raise Killed
            mine = any(isinstance(x, Eagle3Module) or str(self.folder) in str(x) for x in (*args, *options.values()))
            if not mine or self.strike is None:
                return act(*args, **options)
            self.done += 1
            if self.done == self.left:
                self.strike()
            return act(*args, **options)

        return counted

    def die(self) -> None:
        """As SIGKILL does."""
        self.dead = True
        raise Killed

    def tau(self, step: int, of: str = "tau") -> float:
        return random.Random(f"{self.seed} {of} {step}").choice((1.0, 1.25, 1.5, 1.75))

    def measure(self, trainer: Any, module: Any) -> None:
        step = trainer.global_step
        values = {"val/tau": self.tau(step), "val/tau_low": 1.0, "val/tau_high": 2.0, "val/x": self.tau(step, "x")}
        module.log_dict(values, rank_zero_only=True)

    def fit(self, *words: object, at: int = -1, strike: Callable[[], None] = lambda: None, **changes: Any) -> int:
        """Start, or go on; the exit status, 137 after a kill.

        Args:
            words: more of the command line.
            at: where it strikes: at the n-th thing that the run does.
            strike: what happens there.
            changes: of the recipe.
        """
        self.left, self.strike, self.dead, self.done = at, strike, False, 0
        optimizer = {"lr": 1e-3, "schedule": "constant"}
        changes = {"trainer__check_val_every_n_epoch": None, "trainer__logger": False, **changes}
        path = recipe(self.target, self.features, self.base, model__init_args__optimizer=optimizer, **changes)
        try:
            return main(["fit", "--config", str(path), "--ckpt_path", "last", *map(str, words)])
        except Killed:
            return 137
        finally:
            self.strike, self.dead = None, False

    # What there is.

    def rows(self) -> list[dict[str, Any]]:
        text = (self.folder / "metrics.jsonl").read_text()
        clock = ("seconds", "peak_memory_gb", "train/tokens_per_second", "train/supervised_tokens_per_second")
        rows = [json.loads(line) for line in text.splitlines()]
        return [{key: x for key, x in row.items() if key not in clock} for row in rows]

    def validated(self) -> list[int]:
        return [row["step"] for row in self.rows() if "val/tau" in row]

    def names(self) -> list[str]:
        return sorted(path.name for path in self.checkpoints.iterdir() if path.name != ".run")

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return read_checkpoint(self.checkpoints / name)["state_dict"]

    def best(self, keep: int = 1, of: str = "tau", among: set[int] | None = None) -> list[str]:
        """Names of the best that must exist, the very best first: of equals, the earliest."""
        steps = {step for step in self.validated() if step > 0} if among is None else among
        ranking = sorted(steps, key=lambda step: (-self.tau(step, of), step))
        return [f"best-{step:08d}.ckpt" for step in ranking[: keep if keep >= 0 else None]]

    def check_links(self) -> None:
        """What a link points to exists and is whole."""
        for name in ("last.ckpt", "best.ckpt"):
            if (self.checkpoints / name).is_symlink():
                read_checkpoint(self.checkpoints / name)

    def check(self, keep: int = 2, keep_best: int = 1, best: list[str] | None = None) -> None:
        """The folder holds the newest, the best and their links, and nothing else."""
        best = self.best(keep_best) if best is None else best
        saved = [name for name in self.names() if name.startswith("step-")]
        assert self.names() == sorted([*saved, *best, "last.ckpt", *(["best.ckpt"] if best else [])])
        assert len(saved) <= keep
        assert os.readlink(self.checkpoints / "last.ckpt") == saved[-1]
        assert not best or os.readlink(self.checkpoints / "best.ckpt") == best[0]


def assert_equal(mine: Run, other: Run) -> None:
    """But for the checkpoints of steps at which one of them was stopped."""
    assert mine.rows() == other.rows()
    assert os.readlink(mine.checkpoints / "last.ckpt") == os.readlink(other.checkpoints / "last.ckpt")
    for name in other.names():
        if name in mine.names() or not name.startswith("step-"):
            ours, theirs = mine.weights(name), other.weights(name)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


@pytest.fixture
def run_in(monkeypatch, target, features, tmp_path) -> Callable[..., Run]:
    return lambda name="", seed=0: Run(monkeypatch, target, features, tmp_path / name, seed)


def drawn(rng: random.Random) -> dict[str, Any]:
    options = {
        "trainer__max_steps": rng.randint(3, 12),
        "trainer__val_check_interval": rng.randint(1, 6),
        "trainer__accumulate_grad_batches": rng.choice((1, 1, 2, 3)),
        "trainer__log_every_n_steps": rng.randint(1, 3),
        "checkpoint": {"every_n_train_steps": rng.randint(1, 5), "keep": rng.randint(1, 3)},
        "best_checkpoint": {"keep": rng.randint(1, 3)},
        "data__init_args__batch_size": rng.choice((2, 4)),
    }
    if rng.random() < 0.3:
        options |= {
            "trainer__max_steps": -1,
            "trainer__max_epochs": 2,
            "trainer__check_val_every_n_epoch": rng.randint(1, 2),
            "trainer__val_check_interval": rng.choice((0.25, 0.4, 1.0, 3)),
            "data__init_args__batch_size": 5,
        }
    return options


def test_kills_and_stops_anywhere_leave_what_the_undisturbed_run_leaves(run_in, fuzz):
    for case in range(5 * fuzz.factor):
        options = drawn(fuzz.rng)
        calm = run_in(f"calm{case}", case)
        assert calm.fit(**options) == 0
        things = calm.done
        calm.check(options["checkpoint"]["keep"], options["best_checkpoint"]["keep"])
        disturbed = run_in(f"disturbed{case}", case)
        for _ in range(fuzz.rng.randint(1, 3)):
            strike = fuzz.rng.choice((disturbed.die, lambda: signal.raise_signal(signal.SIGTERM)))
            if disturbed.fit(at=fuzz.rng.randint(1, things), strike=strike, **options) == 0:
                break
            disturbed.check_links()
        assert disturbed.fit(**options) == 0
        disturbed.check(options["checkpoint"]["keep"], options["best_checkpoint"]["keep"])
        assert_equal(disturbed, calm)


def test_copies_in_an_object_store_replace_the_folder_after_kills_anywhere(run_in, fuzz, monkeypatch):
    """Each kill also loses the folder of the checkpoints, or leaves an older state of it."""
    for case in range(2 * fuzz.factor):
        options = drawn(fuzz.rng)
        calm, disturbed = run_in(f"calm{case}", case), run_in(f"disturbed{case}", case)
        assert calm.fit(**options) == 0
        url, old = f"memory://{disturbed.folder}", disturbed.base / "old"
        options["checkpoint"]["copy_to"] = url
        for name in ("put_file", "cp_file", "rm_file"):
            monkeypatch.setattr(MemoryFileSystem, name, disturbed.counted(getattr(MemoryFileSystem, name)))
        for _ in range(3):
            if disturbed.fit(at=fuzz.rng.randint(1, calm.done), strike=disturbed.die, **options) == 0:
                break
            if disturbed.checkpoints.exists():
                lost = disturbed.checkpoints.rename(disturbed.base / "lost")
                if old.exists():
                    old.rename(disturbed.checkpoints)
                lost.rename(old)
        assert disturbed.fit(**options) == 0
        shutil.rmtree(old, ignore_errors=True)
        disturbed.check(options["checkpoint"]["keep"], options["best_checkpoint"]["keep"])
        assert_equal(disturbed, calm)
        store = fsspec.filesystem("memory")
        copies = {Path(path).name: store.cat_file(path) for path in store.ls(url, detail=False)}
        assert copies == {path.name: path.read_bytes() for path in disturbed.checkpoints.iterdir()}
        weights = load_draft(f"{url}/last.ckpt").state_dict()
        assert all(torch.equal(x, weights[name]) for name, x in calm.weights("last.ckpt").items())


def test_copies_are_those_of_one_run_and_never_older_than_what_is_there(target, features, tmp_path, capsys):
    """Neither another run's copies nor older ones of its own replace a run's checkpoints."""
    path, url = recipe(target, features, tmp_path), f"memory://{tmp_path}/copies"

    def fit(run: str, steps: int, *words: str) -> int:
        given = {"trainer.default_root_dir": tmp_path / run, "trainer.max_steps": steps, "ckpt_path": "last"}
        return main(["fit", "--config", str(path), *words, *(f"--{k}={v}" for k, v in given.items())])

    def kept(run: str) -> dict[str, bytes]:
        return {x.name: x.read_bytes() for x in (tmp_path / run / "checkpoints").iterdir()}

    copied = f"--checkpoint.copy_to={url}"
    assert fit("a", 2, copied) == fit("a", 4) == fit("b", 2) == 0
    before = kept("b")
    capsys.readouterr()
    assert fit("b", 4, copied) == 2
    assert f"checkpoint.copy_to {url}: holds copies of another run than {tmp_path}/b" in capsys.readouterr().err
    assert kept("b") == before
    newer = kept("a")
    assert fit("a", 4, copied) == 0  # nothing is trained again
    assert kept("a") == newer
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    assert fit("a", 4, copied) == 0
    assert "last.ckpt" in kept("a")
    capsys.readouterr()
    assert fit("c", 2, "--checkpoint.copy_to=file:///proc/copies") == 2  # before it trains
    assert "checkpoint.copy_to file:///proc/copies: cannot be used" in capsys.readouterr().err
    assert kept("c") == {}


def test_samples_are_durable_once_the_copy_is_complete(target, features, tmp_path, monkeypatch):
    """A run that lost its folder resumes from the copies, and would not train such samples again."""
    url, seen = f"memory://{tmp_path}/copies", {}
    durable = FeatureDataLoader.durable

    def record(loader: FeatureDataLoader, step: int) -> None:
        seen[step] = f"step-{step:08d}.ckpt" in Copies(url).names()
        durable(loader, step)

    monkeypatch.setattr(FeatureDataLoader, "durable", record)
    path = recipe(target, features, tmp_path, trainer__max_steps=4)
    assert (
        main(["fit", "--config", str(path), "--checkpoint.copy_to", url, "--checkpoint.every_n_train_steps", "2"]) == 0
    )
    assert seen == {2: True, 4: True}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.default_root_dir", "s3://bucket/run"], "trainer.default_root_dir s3://bucket/run: is an address"),
        (["--ckpt_path", "s3://bucket/last.ckpt"], "--ckpt_path s3://bucket/last.ckpt: is an address, but a path is"),
        (["--checkpoint.copy_to", "nowhere://a"], "checkpoint.copy_to nowhere://a: cannot be used (Protocol not known"),
        (["--checkpoint.copy_to", "memory://used"], "checkpoint.copy_to memory://used: holds last.ckpt of an earlier"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused(target, features, tmp_path, words, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fsspec.filesystem("memory").pipe("/used/last.ckpt", b"")
    path = recipe(target, features, tmp_path)
    assert main(["fit", "--config", str(path), *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


SAVED_AND_VALIDATED = {
    "trainer__max_steps": 6,
    "trainer__val_check_interval": 2,
    "checkpoint": {"every_n_train_steps": 2},
    "trainer__log_every_n_steps": 2,
}


def test_a_stop_saves_the_last_finished_step_wherever_it_comes(run_in):
    for at in range(5, 60, 6):
        run = run_in(str(at))
        options = {**SAVED_AND_VALIDATED, "checkpoint": {"every_n_train_steps": 100}}
        status = run.fit(at=at, strike=lambda: signal.raise_signal(signal.SIGTERM), **options)
        if status == 0:  # it was done already
            break
        assert status == 143
        steps = read_checkpoint(run.checkpoints / "last.ckpt")["global_step"] if run.checkpoints.exists() else 0
        assert steps >= max((row["step"] for row in run.rows()), default=0)
    assert at > 20


def test_a_finished_run_that_goes_on_keeps_its_best_and_its_history(run_in):
    for seed in range(3):
        run = run_in(str(seed), seed)
        assert run.fit(**SAVED_AND_VALIDATED) == 0
        assert run.fit("--trainer.max_steps", 9, **SAVED_AND_VALIDATED) == 0
        assert run.validated() == [2, 4, 6, 8, 9]
        assert run.fit("--trainer.max_steps", 12, **SAVED_AND_VALIDATED) == 0
        assert run.validated() == [2, 4, 6, 8, 9, 10, 12]
        run.check()


def test_the_same_command_again_on_a_finished_run_says_so_and_keeps_everything(run_in, caplog):
    run = run_in()
    assert run.fit(**SAVED_AND_VALIDATED) == 0
    before = {path: path.read_bytes() for path in run.checkpoints.iterdir()}, run.rows()
    caplog.clear()
    assert run.fit(**SAVED_AND_VALIDATED) == 0
    assert "nothing is left to train" in caplog.text
    assert before == ({path: path.read_bytes() for path in run.checkpoints.iterdir()}, run.rows())


def test_other_numbers_of_checkpoints_to_keep(run_in):
    run = run_in(seed=1)
    assert run.fit(**SAVED_AND_VALIDATED, best_checkpoint={"keep": 3}) == 0
    run.check(keep_best=3)
    assert run.fit("--checkpoint.keep", 1, "--checkpoint.every_n_train_steps", 3, **SAVED_AND_VALIDATED) == 0
    run.check(keep=1)
    options = ("--best_checkpoint.keep", -1, "--checkpoint.keep", -1, "--trainer.max_steps", 10)
    kept = {int(name[5:13]) for name in run.names() if name.startswith("best-")}
    assert run.fit(*options, **SAVED_AND_VALIDATED) == 0
    # Step 6 is validated again, for its checkpoint does not hold what that gave.
    run.check(keep=3, best=run.best(-1, among={*kept, 6, 8, 10}))


def test_another_monitor_ranks_what_there_is(run_in):
    for seed in range(3):
        run = run_in(str(seed), seed)
        assert run.fit(**SAVED_AND_VALIDATED) == 0
        (kept,) = {int(name[5:13]) for name in run.best()}
        options = ("--best_checkpoint.monitor", "val/x", "--trainer.max_steps", 8)
        assert run.fit(*options, **SAVED_AND_VALIDATED) == 0
        run.check(best=run.best(of="x", among={kept, 6, 8}))


def test_a_monitor_that_is_not_measured_is_said(run_in, recwarn):
    run = run_in()
    assert run.fit(**SAVED_AND_VALIDATED, best_checkpoint={"monitor": "val/tua"}) == 0
    (line,) = [str(w.message) for w in recwarn if "val/tua" in str(w.message)]
    assert "val/tau, val/tau_high" in line
    run.check(best=[])


def test_the_run_s_folder_is_moved(run_in):
    run = run_in()
    assert run.fit(**SAVED_AND_VALIDATED) == 0
    run.folder.rename(run.base / "moved")
    run.folder = run.base / "moved"
    run.checkpoints = run.folder / "checkpoints"
    options = ("--trainer.default_root_dir", run.folder, "--trainer.max_steps", 8)
    assert run.fit(*options, **SAVED_AND_VALIDATED) == 0
    assert run.validated() == [2, 4, 6, 8]
    run.check()


def test_links_that_were_lost_are_made_again(run_in):
    run = run_in()
    assert run.fit(**SAVED_AND_VALIDATED) == 0
    (run.checkpoints / "last.ckpt").unlink()
    (run.checkpoints / "best.ckpt").unlink()
    (run.checkpoints / "best.ckpt").symlink_to("best-00000099.ckpt")
    assert run.fit("--trainer.max_steps", 7, **SAVED_AND_VALIDATED) == 0
    assert run.validated() == [2, 4, 6, 7]
    run.check()


def test_going_back_to_an_older_checkpoint_does_not_lose_the_best(run_in):
    seed = next(i for i in range(100) if Run.tau(SimpleNamespace(seed=i), 6) > Run.tau(SimpleNamespace(seed=i), 4))
    run = run_in(seed=seed)
    assert run.fit(**SAVED_AND_VALIDATED) == 0
    best = run.best()
    older = run.checkpoints / "step-00000004.ckpt"
    run.seed = next(i for i in range(100) if all(Run.tau(SimpleNamespace(seed=i), x) == 1.0 for x in (4, 5)))
    assert run.fit("--ckpt_path", older, "--trainer.max_steps", 5, **SAVED_AND_VALIDATED) == 0
    assert os.readlink(run.checkpoints / "best.ckpt") == best[0]
    assert older.exists()


def test_what_a_kill_left_half_written_is_removed_and_nothing_else(run_in):
    run = run_in()
    assert run.fit(**SAVED_AND_VALIDATED) == 0
    ours = (".step-00000008.ckpt.ab_c1234", ".best-00000008.ckpt.abcdefgh", ".last.ckpt.4711", ".best.ckpt.1")
    others = (".notes.ckpt.abcdefgh", "step-best.ckpt", ".step-00000008.ckpt", "best-00000002.ckpt.bak", ".last.ckpt.x")
    for name in (*ours, *others):
        (run.checkpoints / name).write_bytes(b"x")
    assert run.fit(**SAVED_AND_VALIDATED) == 0
    assert {*others} <= {*run.names()}
    assert not {*ours} & {*run.names()}


def test_the_best_checkpoint_of_an_earlier_version_is_not_a_stranger(run_in):
    """It says its score in the state of the callback alone."""
    run = run_in(seed=3)
    assert run.fit(**SAVED_AND_VALIDATED) == 0
    (best,) = run.best()
    path = run.checkpoints / best
    content = read_checkpoint(path)
    del content["specforge_validation"]
    (key,) = [key for key in content["callbacks"] if key.startswith("BestCheckpoint")]
    content["callbacks"][key] |= {"current_score": torch.tensor(9.0)}
    torch.save(content, run.base / best)
    (run.base / best).rename(path)
    assert run.fit("--trainer.max_steps", 10, **SAVED_AND_VALIDATED) == 0
    run.check(best=[best])


def test_a_damaged_best_checkpoint_does_not_stop_the_run(run_in, recwarn):
    run = run_in()
    assert run.fit(**SAVED_AND_VALIDATED) == 0
    (best,) = run.best()
    with (run.checkpoints / best).open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    assert run.fit("--trainer.max_steps", 8, **SAVED_AND_VALIDATED) == 0
    assert any(f"{best}: the checksum does not match" in str(w.message) for w in recwarn)
    run.check_links()
    assert os.readlink(run.checkpoints / "best.ckpt") != best
