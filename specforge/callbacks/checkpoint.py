"""Checkpoints that survive a crash at any moment: atomic files, rotation, ``last`` and ``best`` by τ.

Lightning's own saving writes into TMPDIR and moves the file, which is not atomic across file systems, and
replaces its links by removing them first. Here a checkpoint is written beside its final name, synced and
renamed, and links are replaced by a rename too. A checkpoint never holds pickled objects.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from specforge.callbacks.ledger import SampleLedger
from specforge.errors import UserError
from specforge.export.checkpoint import read_checkpoint
from specforge.files import write_file

FOLDER = "checkpoints"
_STEP = re.compile(r"(?:step|best)-(\d+)\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads it without unpickling code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file; the old one, if any, stays until the new one is complete.

        Raises:
            UserError: the disk is full or not writable.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_file(Path(path), buffer.getbuffer())

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file.

        Raises:
            UserError: it is missing, damaged, or not a SpecForge checkpoint.
        """
        return read_checkpoint(Path(path))


class DraftCheckpoint(ModelCheckpoint):
    """ModelCheckpoint whose state survives a crash between two files and a move of the folder."""

    def __init__(self, monitor: str, keep: int, name: str, every_n_train_steps: int | None = None) -> None:
        super().__init__(
            monitor=monitor, mode="max", save_top_k=keep, filename=f"{name}-{{step:08d}}",
            auto_insert_metric_name=False, enable_version_counter=False,
            every_n_train_steps=every_n_train_steps, save_on_train_epoch_end=False,
        )  # fmt: skip

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save under the run's folder."""
        self._place(trainer)
        super().setup(trainer, pl_module, stage)

    def _place(self, trainer: pl.Trainer) -> None:
        if self.dirpath is None:  # type: ignore[has-type]
            self.dirpath = os.path.realpath(os.path.join(trainer.default_root_dir, FOLDER))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore scores; files are looked for in the present folder, wherever they were written."""

        def here(path: str) -> str:
            return os.path.join(str(self.dirpath), os.path.basename(path)) if path else path

        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        best = {path: score for path, score in best.items() if os.path.exists(path)}
        moved = {**state_dict, "dirpath": self.dirpath, "best_k_models": best}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            moved[key] = here(state_dict.get(key, ""))
        if best:
            moved["kth_best_model_path"] = min(best, key=lambda path: float(best[path]))
            moved["kth_value"] = best[moved["kth_best_model_path"]]
        super().load_state_dict(moved)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove files that a crash left between writing the new and removing the old."""
        super().on_train_start(trainer, pl_module)
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        if trainer.ckpt_path is None:
            self._refuse_an_old_run()
            return
        mine = str(self.filename).split("-", 1)[0]
        for path in Path(str(self.dirpath)).glob(f"{mine}-*.ckpt"):
            match = _STEP.fullmatch(path.name)
            stale = match is not None and int(match.group(1)) <= trainer.global_step
            if stale and str(path) not in self.best_k_models and str(path) != str(trainer.ckpt_path):
                path.unlink()

    def _refuse_an_old_run(self) -> None:
        old = sorted(path.name for path in Path(str(self.dirpath)).glob("*.ckpt"))
        if old:
            raise UserError(
                f"{self.dirpath}: holds {old[-1]} of an earlier run; resume it with --ckpt_path last, or choose "
                "another trainer.default_root_dir"
            )

    @staticmethod
    def _link_checkpoint(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            replace_link(Path(linkpath), Path(filepath))
        trainer.strategy.barrier()


class LastCheckpoint(DraftCheckpoint):
    """Every so many optimizer steps, and at the end; ``last.ckpt`` is a link to the newest.

    Args:
        every_n_train_steps: how often.
        keep: how many of the newest to keep.
    """

    def __init__(self, every_n_train_steps: int = 200, keep: int = 2) -> None:
        super().__init__("step", keep, "step", every_n_train_steps)
        self.save_last = "link"

    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        self._place(trainer)  # Lightning asks before setup
        return super()._find_last_checkpoints(trainer)

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Any]) -> None:
        super()._save_last_checkpoint(trainer, monitor_candidates)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SampleLedger):
                callback.saved(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last step."""
        self.save_now(trainer)

    def save_now(self, trainer: pl.Trainer) -> None:
        """Save the present step unless it is saved already."""
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)


class BestCheckpoint(DraftCheckpoint):
    """After each validation that raised τ; ``best.ckpt`` is a link to the best.

    Args:
        monitor: what to maximise.
        keep: how many of the best to keep.
    """

    def __init__(self, monitor: str = "val/tau", keep: int = 1) -> None:
        super().__init__(monitor, keep, "best")

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self.monitor in monitor_candidates:  # nothing is held out otherwise
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if self.best_model_path:
            self._link_checkpoint(trainer, self.best_model_path, os.path.join(str(self.dirpath), "best.ckpt"))


def replace_link(link: Path, target: Path) -> None:
    """Point ``link`` at ``target``, in one step."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)
