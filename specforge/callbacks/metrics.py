"""Training metrics: summed on the device, read and logged every few steps, and written to the run's folder.

Every value is a ratio of sums over all ranks and over the steps since the last row. Values are read back from the
device, and Lightning's logging is called, only on steps that are logged (and after a run's first step, for the progress
line).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from specforge.callbacks.strategies import data_shards
from specforge.contracts import TrainBatch
from specforge.eval.report import HISTORY, read_history
from specforge.files import write_file
from specforge.system import peak_memory


class TrainingMetrics(pl.Callback):
    """Logs loss and accuracy by position, learning rate, gradient norm and tokens/s.

    ``metrics.jsonl`` in the run's folder contains every logged row, training and validation, for the report. A resumed
    run drops the rows after its checkpoint. Sums that are not logged yet are part of a checkpoint.

    Attributes:
        validated_step: optimizer step of the last complete validation; -1 before the first.
        latest: ``loss`` and ``tokens_per_second`` of the last row, or of a run's first step.
        flow: what :class:`ExactResume` measured of the data of the next row.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._tokens = self._supervised = 0
        self._clock = _Clock()
        self._logged_step = self._first_step = -1
        self._elapsed = 0.0
        self._path: Path | None = None
        self.validated_step = -1
        self.latest: dict[str, float] = {}
        self.flow: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training so far."""
        return {"elapsed": self._elapsed + self._clock.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the seconds."""
        self._elapsed = float(state_dict["elapsed"])

    @property
    def rank_state(self) -> tuple[Tensor | None, int, int]:
        """Sums of this rank since the last row; the tensor is never written to."""
        return self._sums, self._tokens, self._supervised

    @rank_state.setter
    def rank_state(self, state: tuple[Tensor | None, int, int]) -> None:
        self._sums, self._tokens, self._supervised = state

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the history; a resumed run drops the rows that it will write again."""
        self._clock.start()
        self._logged_step = self._first_step = trainer.global_step
        self.latest = {}
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self._path = Path(trainer.default_root_dir) / HISTORY
            self._drop_rows(trainer)
        self.validated_step = trainer.strategy.broadcast(self.validated_step)

    def _drop_rows(self, trainer: pl.Trainer) -> None:
        """Drop the rows after the position that training starts from."""
        assert self._path is not None
        step, batches = trainer.global_step, trainer.fit_loop.total_batch_idx + 1
        repeats = getattr(trainer.fit_loop, "validation_due", False)

        def is_kept(row: dict[str, Any]) -> bool:
            if row["step"] != step or not _is_validation(row):
                return bool(row["step"] <= step)
            # While the next step is accumulated, a step may be validated more than once.
            return not repeats and row.get("batches", 0) <= batches

        rows = [row for row in read_history(self._path) if trainer.ckpt_path is not None and is_kept(row)]
        self.validated_step = max((row["step"] for row in rows if _is_validation(row)), default=-1)
        write_file(self._path, "".join(json.dumps(row) + "\n" for row in rows))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        """Add the batch to the sums; log them if the step is logged."""
        output = outputs["output"]
        row = torch.stack([output.losses.float(), output.hits.float(), output.rows.float()])
        self._sums = row if self._sums is None else self._sums.to(row.device) + row
        self._tokens += sum(batch.lengths)
        self._supervised += output.num_supervised
        step = trainer.global_step
        if is_time_to_log(trainer) and step != self._logged_step:
            self._logged_step = step
            self._log(trainer, pl_module)
        elif not self.latest and step > self._first_step:
            seconds = max(self._clock.seconds, 1e-9)
            loss, tokens = row[0].sum() / row[2].sum().clamp(min=1), self._tokens * data_shards(trainer)
            self.latest = {"loss": float(loss), "tokens_per_second": tokens / seconds}

    def _log(self, trainer: pl.Trainer, pl_module: Any) -> None:
        assert self._sums is not None
        seconds = self._clock.restart()
        self._elapsed += seconds
        totals = torch.cat([self._sums.flatten(), self._sums.new_tensor([self._tokens, self._supervised])])
        totals = trainer.strategy.reduce(totals, reduce_op="sum")
        losses, hits, rows = totals[:-2].view(3, -1)
        tokens, supervised = totals[-2:].tolist()
        tokens *= data_shards(trainer) / trainer.world_size  # ranks that share a batch have all counted its tokens
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
        log_row(trainer, pl_module, values)
        self.latest = {name: values[f"train/{name}"] for name in ("loss", "tokens_per_second")}
        shown = {"loss": self.latest["loss"], "tok/s": self.latest["tokens_per_second"]}  # in other progress bars
        pl_module.log_dict(shown, prog_bar=True, logger=False, rank_zero_only=True)
        self._append(trainer, values | self.flow)
        self._sums, self._tokens, self._supervised = None, 0, 0

    def validated(self, trainer: pl.Trainer) -> None:
        """Write the row of a validation; its presence means that the validation and its checkpoint are complete."""
        self.validated_step = trainer.global_step
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if values and self._path is not None:
            self._append(trainer, values)
        if "val/tau" in values:
            interval = f"[{values['val/tau_low']:.2f}, {values['val/tau_high']:.2f}]"
            trainer.print(f"step {trainer.global_step}: held-out tau {values['val/tau']:.3f} {interval}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stop the clock: validation does not count as training time."""
        self._clock.stop()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the clock again."""
        self._clock.start()

    def _append(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        if self._path is not None:
            row = {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "batches": trainer.fit_loop.total_batch_idx + 1,
                "seconds": self._elapsed,
                "peak_memory_gb": peak_memory(str(trainer.strategy.root_device)) / 1e9,
                **values,
            }
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")


class _Clock:
    """A stopwatch that can be paused."""

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


def log_row(trainer: pl.Trainer, pl_module: pl.LightningModule, values: dict[str, float], bar: str = "") -> None:
    """Log values of the current optimizer step, as ``metrics.jsonl`` numbers it; Lightning's own number is one less.

    Args:
        trainer: its loggers get the values.
        pl_module: the values become the trainer's ``callback_metrics``.
        values: by name.
        bar: name of the value that Lightning's progress bars show too.
    """
    if values and not trainer.sanity_checking:
        for logger in trainer.loggers:
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, trainer.global_step)
            logger.save()
    for name, value in values.items():
        pl_module.log(name, value, prog_bar=name == bar, logger=False, rank_zero_only=True)


def is_time_to_log(trainer: pl.Trainer) -> bool:
    """Whether the current step is logged (``trainer.log_every_n_steps``; 0 logs none)."""
    every: int = trainer.log_every_n_steps
    return every > 0 and trainer.global_step % every == 0


def _is_validation(row: dict[str, Any]) -> bool:
    return any(name.startswith("val/") for name in row)
