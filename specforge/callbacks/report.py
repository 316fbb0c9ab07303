"""Provenance of a run, written at its start, and its report, written at its end."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from specforge.eval.report import HISTORY, PROVENANCE, versions, write_report
from specforge.files import write_file
from specforge.stopping import Stopped


class RunReport(pl.Callback):
    """Writes ``provenance.json`` when training starts and ``report.html`` when it ends or is interrupted."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Record what runs, where, and on which target and data."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        content = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": ["specforge", *sys.argv[1:]],
            "resumed_at_step": trainer.global_step,
            "versions": versions(),
            "platform": platform.platform(),
            "device": str(trainer.strategy.root_device),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
            "ranks": trainer.world_size,
            "threads": torch.get_num_threads(),
            "target": pl_module.target.name,
            "target_fingerprint": pl_module.target.fingerprint,
            "algorithm": pl_module.spec.to_json(),
            "data": _data_size(trainer),
            "trainable_parameters": sum(p.numel() for p in pl_module.draft.parameters() if p.requires_grad),
        }
        write_file(Path(trainer.default_root_dir) / PROVENANCE, json.dumps(content, indent=2) + "\n")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the report."""
        self._write(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write the report of a run that is stopped by a signal; its checkpoint is saved by then."""
        if isinstance(exception, Stopped):
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        run = Path(trainer.default_root_dir)
        if trainer.is_global_zero and not trainer.fast_dev_run and (run / HISTORY).exists():
            trainer.print(f"wrote {write_report(run)}")


def _data_size(trainer: pl.Trainer) -> dict[str, int]:
    """Samples and tokens of the training data, as far as they are known when training starts."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    refs = data.sample_refs() if hasattr(data, "sample_refs") else []
    return {"samples": len(refs), "tokens": sum(ref.num_tokens for ref in refs)} if refs else {}
