"""Training metrics: summed on the device, read now and then, logged, shown, and kept beside the run.

Every value is a ratio of sums over the steps since the last one was logged and over all ranks. Nothing is
read back from the device, and Lightning's logging is not called, except on the steps that log.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from specforge.contracts import TrainBatch
from specforge.files import write_file

FILE = "metrics.jsonl"


class TrainingMetrics(pl.Callback):
    """Logs loss and accuracy by position, learning rate, gradient norm and tokens/s.

    ``metrics.jsonl`` in the run's folder keeps every logged row, training and validation, for the report; a
    resumed run drops the rows behind its checkpoint. What is summed but not logged yet is part of a checkpoint.

    Attributes:
        validated_step: the optimizer step of the last complete validation, -1 before there is one.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._tokens = self._supervised = 0
        self._clock = _Clock()
        self._logged_step = -1
        self._elapsed = 0.0
        self._path: Path | None = None
        self.validated_step = -1

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training so far."""
        return {"elapsed": self._elapsed + self._clock.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._elapsed = float(state_dict["elapsed"])

    @property
    def rank_state(self) -> tuple[Tensor | None, int, int]:
        """What this rank has summed since the last row; nobody writes into the tensor."""
        return self._sums, self._tokens, self._supervised

    @rank_state.setter
    def rank_state(self, state: tuple[Tensor | None, int, int]) -> None:
        self._sums, self._tokens, self._supervised = state

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the history; forget what a resumed run will do again."""
        self._clock.start()
        self._logged_step = trainer.global_step
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self._path = Path(trainer.default_root_dir) / FILE
            self._forget(trainer)
        self.validated_step = trainer.strategy.broadcast(self.validated_step)

    def _forget(self, trainer: pl.Trainer) -> None:
        """Drop what lies behind the position that training starts from, where it will be done again."""
        assert self._path is not None
        step, batches = trainer.global_step, trainer.fit_loop.total_batch_idx + 1
        repeats = getattr(trainer.fit_loop, "validation_due", False)

        def stays(row: dict[str, Any]) -> bool:
            if row["step"] != step or not _is_validation(row):
                return bool(row["step"] <= step)
            # A step that is accumulated may be validated more than once, while the next one is.
            return not repeats and row.get("batches", 0) <= batches

        rows = [row for row in read_history(self._path) if trainer.ckpt_path is not None and stays(row)]
        self.validated_step = max((row["step"] for row in rows if _is_validation(row)), default=-1)
        write_file(self._path, "".join(json.dumps(row) + "\n" for row in rows))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        """Add the batch; on a step that logs, log."""
        output = outputs["output"]
        row = torch.stack([output.losses.float(), output.hits.float(), output.rows.float()])
        self._sums = row if self._sums is None else self._sums.to(row.device) + row
        self._tokens += sum(batch.lengths)
        self._supervised += output.num_supervised
        step = trainer.global_step
        if is_time_to_log(trainer) and step != self._logged_step:
            self._logged_step = step
            self._log(trainer, pl_module)

    def _log(self, trainer: pl.Trainer, pl_module: Any) -> None:
        assert self._sums is not None
        seconds = self._clock.restart()
        self._elapsed += seconds
        totals = torch.cat([self._sums.flatten(), self._sums.new_tensor([self._tokens, self._supervised])])
        totals = trainer.strategy.reduce(totals, reduce_op="sum")
        losses, hits, rows = totals[:-2].view(3, -1)
        tokens, supervised = totals[-2:].tolist()
        rows = rows.clamp(min=1)
        values = {
            "train/loss": float(losses.sum() / rows.sum()),
            "train/grad_norm": float(pl_module.grad_norm),
            "train/lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "train/tokens_per_second": tokens / seconds,
            "train/supervised_tokens_per_second": supervised / seconds,
        }
        values |= {f"train/accuracy_{k + 1}": float(a) for k, a in enumerate(hits / rows)}
        values |= {f"train/loss_{k + 1}": float(x) for k, x in enumerate(losses / rows)}
        pl_module.log_dict(values, rank_zero_only=True)
        shown = {"loss": values["train/loss"], "tok/s": values["train/tokens_per_second"]}
        pl_module.log_dict(shown, prog_bar=True, logger=False, rank_zero_only=True)
        self._append(trainer, values)
        self._sums, self._tokens, self._supervised = None, 0, 0

    def validated(self, trainer: pl.Trainer) -> None:
        """Keep a validation's values, when all that belongs to it is done: the row says that it is."""
        self.validated_step = trainer.global_step
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if values and self._path is not None:
            self._append(trainer, values)
        if "val/tau" in values:
            interval = f"[{values['val/tau_low']:.2f}, {values['val/tau_high']:.2f}]"
            trainer.print(f"step {trainer.global_step}: held-out tau {values['val/tau']:.3f} {interval}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stop the clock: a validation's time does not count as training."""
        self._clock.stop()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start it again."""
        self._clock.start()

    def _append(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        if self._path is not None:
            row = {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "batches": trainer.fit_loop.total_batch_idx + 1,
                "seconds": self._elapsed,
                **values,
            }
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")


class _Clock:
    """A stopwatch that can pause."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        return self._sum + (0.0 if self._since is None else time.perf_counter() - self._since)

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        self._sum, self._since = self.seconds, None

    def restart(self) -> float:
        seconds, self._sum, self._since = self.seconds, 0.0, time.perf_counter()
        return seconds


def is_time_to_log(trainer: pl.Trainer) -> bool:
    """Whether the present step is one of ``trainer.log_every_n_steps``; with 0, none is."""
    every: int = trainer.log_every_n_steps
    return every > 0 and trainer.global_step % every == 0


def _is_validation(row: dict[str, Any]) -> bool:
    return any(name.startswith("val/") for name in row)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of a history file; a line that a crash cut off, or anything else that is no row, is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows
