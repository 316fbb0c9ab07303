"""What a run leaves behind for its reader: provenance at the start, the report at the end."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from specforge.callbacks.metrics import FILE
from specforge.eval.evaluate import versions
from specforge.eval.report import PROVENANCE, write_report
from specforge.files import write_file


class RunReport(pl.Callback):
    """Writes ``provenance.json`` when training starts and ``report.html`` when it is done."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write down what is about to run, where, and on what."""
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
            "trainable_parameters": sum(p.numel() for p in pl_module.draft.parameters() if p.requires_grad),
        }
        write_file(Path(trainer.default_root_dir) / PROVENANCE, json.dumps(content, indent=2) + "\n")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the report."""
        run = Path(trainer.default_root_dir)
        if trainer.is_global_zero and not trainer.fast_dev_run and (run / FILE).exists():
            trainer.print(f"wrote {write_report(run)}")
