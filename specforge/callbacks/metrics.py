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
    resumed run drops the rows behind its checkpoint.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._tokens = self._supervised = 0
        self._clock = _Clock()
        self._logged_step = -1
        self._elapsed = 0.0
        self._path: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training so far."""
        return {"elapsed": self._elapsed + self._clock.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._elapsed = float(state_dict["elapsed"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the history; forget what a resumed run will do again."""
        self._clock.start()
        self._logged_step = trainer.global_step
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        self._path = Path(trainer.default_root_dir) / FILE
        rows = [row for row in read_history(self._path) if row["step"] <= trainer.global_step]
        write_file(self._path, "".join(json.dumps(row) + "\n" for row in rows))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        """Add the batch; on a step that logs, log."""
        output = outputs["output"]
        row = torch.stack([output.losses.float(), output.hits.float(), output.rows.float()])
        self._sums = row if self._sums is None else self._sums + row
        self._tokens += sum(batch.lengths)
        self._supervised += output.count
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0 and step != self._logged_step:
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

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Keep the validation's values; their time does not count as training."""
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if trainer.state.fn == "fit" and values and self._path is not None:
            self._append(trainer, values)
            interval = f"[{values['val/tau_low']:.2f}, {values['val/tau_high']:.2f}]"
            trainer.print(f"step {trainer.global_step}: held-out tau {values['val/tau']:.3f} {interval}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        self._clock.stop()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start it again."""
        self._clock.start()

    def _append(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        if self._path is not None:
            row = {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
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


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of a history file; a last line that a crash cut off is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
