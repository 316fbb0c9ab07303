"""Checkpoints that stay valid if the process is killed at any moment: atomic files, rotation, ``last`` and ``best``.

Lightning writes a checkpoint into TMPDIR and moves it, which is not atomic across file systems, and removes a link
before it writes the new one. Here a checkpoint is written next to its final path, synced and renamed, and links are
replaced by renaming too. A checkpoint never contains pickled objects.

Only the files tell which checkpoints exist and how good they are: the callback state in a checkpoint is older than the
files written after it. A checkpoint of :class:`BestCheckpoint` contains the metrics of its own validation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

import specforge.stopping as stopping
from specforge.callbacks.copies import Copies
from specforge.callbacks.lightning_internals import CheckpointCallback
from specforge.callbacks.resume import ExactResume
from specforge.checkpoints import STEP, checkpoint_bytes, read_checkpoint
from specforge.errors import UserError
from specforge.files import check_local, replace_link, write_file
from specforge.options import NonNegativeInt, PositiveInt

FOLDER = "checkpoints"
_MEASURED = "specforge_validation"
_LEFTOVER = re.compile(  # temporary files of write_file and replace_link
    r"\.(?:(?:step|best)-\d{8,}\.ckpt\.[a-z0-9_]{8}|(?:last|best)\.ckpt\.\d+)"
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and reads them without unpickling."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file; an existing one is replaced when the new one is complete."""
        write_file(Path(path), checkpoint_bytes(checkpoint))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file."""
        return read_checkpoint(Path(path))


class DraftCheckpoint(CheckpointCallback):
    """ModelCheckpoint that relies on the files alone, and saves the position after the last optimizer step."""

    named: str | None = None  # the checkpoint that the user resumes from by path; it is never removed

    def __init__(self, monitor: str, keep: int, name: str, every_n_train_steps: int | None = None) -> None:
        super().__init__(
            monitor=monitor,
            mode="max",
            save_top_k=keep,
            filename=f"{name}-{{step:08d}}",
            auto_insert_metric_name=False,
            enable_version_counter=False,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=False,
        )
        self.prefix = name
        self._writes = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save under the run's folder."""
        self.dirpath = os.path.realpath(os.path.join(trainer.default_root_dir, FOLDER))
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the state: the files are the record."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove temporary files of a killed run."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            for path in self.folder.glob(".*.ckpt.*"):
                if _LEFTOVER.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return Path(str(self.dirpath))

    def files(self) -> list[Path]:
        """This callback's checkpoints, ordered by step."""
        found = [path for path in self.folder.glob(f"{self.prefix}-*.ckpt") if STEP.fullmatch(path.name)]
        return sorted(found, key=step_of)

    def path_of(self, trainer: pl.Trainer) -> Path:
        """The path of a checkpoint of the current step."""
        return Path(self.format_checkpoint_name({"step": torch.tensor(trainer.global_step)}))

    def write(self, trainer: pl.Trainer, path: Path) -> None:
        """Write a checkpoint of the last finished optimizer step."""
        self._writes = True
        try:
            with exact_resume(trainer).at_last_step():
                self.save_to(trainer, str(path))
        finally:
            self._writes = False

    def point(self, trainer: pl.Trainer, link: str, target: Path) -> None:
        """Point a link to one of the checkpoints."""
        if trainer.is_global_zero and Path(os.path.realpath(self.folder / link)) != target:
            replace_link(self.folder / link, target)

    def remove(self, trainer: pl.Trainer, paths: Iterable[Path]) -> None:
        """Remove checkpoints, except the one that the user resumes from."""
        for path in paths:
            if trainer.is_global_zero and str(path) != os.path.realpath(self.named or ""):
                path.unlink(missing_ok=True)

    def copy(self, trainer: pl.Trainer) -> None:
        """Bring the copies of the run's checkpoints up to date, if there are any."""
        for callback in trainer.checkpoint_callbacks if trainer.is_global_zero else ():
            if isinstance(callback, LastCheckpoint) and callback.copies is not None:
                callback.copies.put(self.folder)

    # Lightning's own triggers, switched off; subclasses save in their own.

    def on_train_batch_end(self, *_: Any) -> None:
        """Do nothing."""

    on_train_epoch_end = on_validation_end = on_train_end = on_train_batch_end


class LastCheckpoint(DraftCheckpoint):
    """Periodic checkpoints (last.ckpt links to the newest).

    Args:
        every_n_train_steps: optimizer steps between checkpoints; 0 saves only the last step.
        keep: number of most recent checkpoints to keep; -1 keeps all.
        copy_to: fsspec URL, such as s3://bucket/run, to which all checkpoints are copied; a run resumes from the copies
            (default: no copies).
    """

    def __init__(
        self, every_n_train_steps: NonNegativeInt = 200, keep: PositiveInt | Literal[-1] = 2, copy_to: str | None = None
    ) -> None:
        super().__init__("step", keep, "step", every_n_train_steps)
        self.copies = Copies.at(copy_to)
        self._seen = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that copies can be written, and that they are this run's."""
        super().setup(trainer, pl_module, stage)
        if self.copies is not None and stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:
            self.copies.join(self.folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish what a kill interrupted: the link, and the removal of old checkpoints."""
        super().on_train_start(trainer, pl_module)
        self._seen = trainer.global_step
        path = self.path_of(trainer)
        if trainer.strategy.broadcast(path.exists()) and not trainer.fast_dev_run:
            self.mark_saved(trainer)
            if not (self.folder / "last.ckpt").exists():
                self.point(trainer, "last.ckpt", path)
            self._rotate(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:  # type: ignore[override]
        """Remember the position after an optimizer step, and save it if it is due."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        exact_resume(trainer).finished_step(trainer)
        if self.interval and trainer.global_step % self.interval == 0:
            self.save_now(trainer)

    def save_now(self, trainer: pl.Trainer) -> None:
        """Save the last finished step, unless it is saved already."""
        if self.is_saved(trainer):
            return
        path = self.path_of(trainer)
        self.last_model_path = self.best_model_path = str(path)
        with stopping.finishing():
            self.write(trainer, path)
            self.point(trainer, "last.ckpt", path)
            self.copy(trainer)
            trainer.strategy.barrier("the checkpoint is complete")
            trainer.train_dataloader.durable(trainer.global_step)
            self._rotate(trainer)

    def _rotate(self, trainer: pl.Trainer) -> None:
        if self.save_top_k > 0:
            # Later checkpoints belong to an earlier continuation from this step; they are overwritten in turn.
            past = [path for path in self.files() if step_of(path) <= trainer.global_step]
            self.remove(trainer, past[: -self.save_top_k])
            self.copy(trainer)


class BestCheckpoint(DraftCheckpoint):
    """Best checkpoints by validation (best.ckpt links to the best).

    Args:
        monitor: metric to maximise.
        keep: number of best checkpoints to keep; -1 keeps all, 0 keeps none.
    """

    def __init__(self, monitor: str = "val/tau", keep: NonNegativeInt | Literal[-1] = 1) -> None:
        super().__init__(monitor, keep, "best")
        self._scores: dict[Path, float] = {}
        self._warned = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read from the files which drafts are the best."""
        super().on_train_start(trainer, pl_module)
        if self.save_top_k == 0 or trainer.fast_dev_run:
            return
        found = {path: self._score(path) for path in self.files()} if trainer.is_global_zero else {}
        scores = {path: score for path, score in found.items() if score is not None}
        self._scores = trainer.strategy.broadcast(scores)
        self._update_files(trainer)

    def _score(self, path: Path) -> float | None:
        try:
            checkpoint = read_checkpoint(path)
        except UserError as error:
            pl.utilities.rank_zero_warn(f"{error}; it is not considered for best.ckpt")
            return None
        measured = checkpoint.get(_MEASURED)
        if measured is None:  # written by an earlier version
            states = [x for key, x in checkpoint["callbacks"].items() if key.startswith(type(self).__name__)]
            measured = {state["monitor"]: float(state["current_score"]) for state in states}
        return float(measured.get(self.monitor, float("-inf")))

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:  # type: ignore[override]
        """Save the draft if it is among the best."""
        if self.is_saved(trainer) or self.save_top_k == 0:
            return
        if self.monitor not in trainer.callback_metrics:
            self._warn(trainer)
            return
        score = float(trainer.callback_metrics[self.monitor])
        score = float("-inf") if score != score else score
        path = self.path_of(trainer)
        others = [x for other, x in self._scores.items() if other != path]
        better = path not in self._scores or score > self._scores[path]
        better &= self.save_top_k == -1 or len(others) < self.save_top_k or score > min(others)
        if not trainer.strategy.reduce_boolean_decision(better):
            return
        self._scores.pop(path, None)
        self._scores[path] = score
        self.current_score = torch.tensor(score)
        self._publish()
        with stopping.finishing():
            self.write(trainer, path)
            self._update_files(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the metrics of the validation."""
        if self._writes:
            checkpoint[_MEASURED] = {name: float(x) for name, x in trainer.callback_metrics.items()}

    def _update_files(self, trainer: pl.Trainer) -> None:
        """Point the link to the best, and remove the checkpoints that are no longer among the best."""
        if not self._scores:
            return
        present = Path(os.path.realpath(self.folder / "best.ckpt"))
        # Checkpoints scored by another monitor rank last, the current best first among them.
        ranking = sorted(self._scores, key=lambda path: (-self._scores[path], path != present))
        self.point(trainer, "best.ckpt", ranking[0])
        if self.save_top_k > 0:
            for path in ranking[self.save_top_k :]:
                del self._scores[path]
            self.remove(trainer, ranking[self.save_top_k :])
        self.copy(trainer)
        self._publish()

    def _publish(self) -> None:
        """Set the attributes of a ModelCheckpoint that loggers and Lightning read."""
        self.best_k_models = {str(path): torch.tensor(score) for path, score in self._scores.items()}
        self.best_model_path = max(self.best_k_models, key=lambda path: float(self.best_k_models[path]))
        self.best_model_score = self.best_k_models[self.best_model_path]

    def _warn(self, trainer: pl.Trainer) -> None:
        measured = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        if measured and not self._warned:
            self._warned = True
            pl.utilities.rank_zero_warn(
                f"best_checkpoint.monitor: validation does not measure {self.monitor}, so there is no best.ckpt; it "
                f"measures {', '.join(measured)}"
            )


def find_checkpoint(name: str, run: Path, copies: Copies | None = None) -> Path | None:
    """The file that ``--ckpt_path`` names.

    Args:
        name: a path; or ``last`` or ``best`` of the run in the folder.
        run: the run's folder.
        copies: of the run's checkpoints; for ``last`` and ``best`` they are fetched, unless the folder is as new.

    Returns:
        The file; None for ``last`` if the run has no checkpoint.

    Raises:
        UserError: there is no such file.
    """
    if name not in ("last", "best"):
        check_local(name, "--ckpt_path", ", or copy the checkpoint to this host")
        if not Path(name).is_file():
            raise UserError(f"--ckpt_path {name}: no such checkpoint")
        return Path(name)
    folder = run / FOLDER
    if copies is not None:
        copies.get(folder)
    found = folder / f"{name}.ckpt"
    if found.exists():
        return found
    files = [path for path in folder.glob("*.ckpt") if STEP.fullmatch(path.name) and path.exists()]
    newest = max(files, key=lambda path: (step_of(path), path.name), default=None)
    if name == "best":
        hint = "" if newest is None else f"; the newest is {newest}"
        raise UserError(f"--ckpt_path best: {found}: no such checkpoint{hint}")
    return newest  # the link does not exist yet, or was lost when the folder was copied


def check_folder(run: Path, resumes: bool, copies: Copies | None = None) -> None:
    """Reject a run's folder that is not writable or contains another run, and copies of another run's checkpoints.

    Raises:
        UserError: the folder cannot be used.
    """
    if copies is not None and not resumes and (names := copies.names()):
        raise UserError(
            f"checkpoint.copy_to {copies.url}: holds {max(names)} of an earlier run; resume it with --ckpt_path last, "
            "or choose another place"
        )
    check_local(run, "trainer.default_root_dir", ", or set checkpoint.copy_to for copies of the checkpoints")
    for path in (run / FOLDER, *(run / FOLDER).absolute().parents):
        if path.exists() or path.is_symlink():
            if not path.is_dir():
                raise UserError(f"trainer.default_root_dir {run}: {path} is not a folder")
            if not os.access(path, os.W_OK | os.X_OK):
                raise UserError(f"trainer.default_root_dir {run}: {path} is not writable")
            break
    old = sorted(path.name for path in (run / FOLDER).glob("*.ckpt") if path.exists())
    if old and not resumes:
        name = "last" if find_checkpoint("last", run) else str(run / FOLDER / old[-1])
        raise UserError(
            f"{run / FOLDER}: holds {old[-1]} of an earlier run; resume it with --ckpt_path {name}, or choose another "
            "trainer.default_root_dir"
        )


def exact_resume(trainer: Any) -> ExactResume:
    """The callback that keeps the position after the last optimizer step."""
    (found,) = [callback for callback in trainer.callbacks if isinstance(callback, ExactResume)]
    return found


def step_of(path: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    match = STEP.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))
