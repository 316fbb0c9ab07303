"""Acceptance length of held-out answers in every validation: exact offline τ with its interval."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from specforge.callbacks.metrics import log_row
from specforge.contracts import TrainBatch
from specforge.eval.metrics import AcceptanceLength


class AcceptanceLengthEvaluation(pl.Callback):
    """Logs ``val/tau``, its 95 % interval, ``val/acceptance_k`` and ``val/loss``.

    Works for any module whose ``validation_step`` returns the chains drafted for each answer.
    """

    def __init__(self) -> None:
        self._metric: AcceptanceLength | None = None
        self._loss = torch.zeros(2, dtype=torch.float64)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Reset the counters."""
        self._metric = AcceptanceLength(pl_module.gamma).to(pl_module.device)
        self._loss = torch.zeros(2, dtype=torch.float64)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: TrainBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the drafted chains of each document."""
        if self._metric is None:
            return
        answers: dict[int, tuple[Any, ...]] = dict.fromkeys(range(len(batch.lengths)), ())
        ends = torch.tensor(batch.lengths).cumsum(0)
        for (start, _), chain in zip(batch.spans, outputs.chains, strict=True):
            document = int(torch.searchsorted(ends, start, right=True))
            answers[document] = (*answers[document], chain)
        for chains in answers.values():
            self._metric.update(chains)
        self._loss += torch.tensor([float(outputs.loss), outputs.num_supervised], dtype=torch.float64)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Log the results over all ranks."""
        if self._metric is None:
            return
        result = self._metric.compute()
        tau = result["tau"]
        if tau.value != tau.value:
            return
        loss = self._loss.to(dtype=torch.float32, device=pl_module.device)
        loss = trainer.strategy.reduce(loss, reduce_op="sum")
        values = {"val/tau_low": tau.low, "val/tau_high": tau.high, "val/loss": float(loss[0] / loss[1].clamp(min=1))}
        values |= {f"val/acceptance_{k + 1}": a for k, a in enumerate(result["acceptance"])}
        log_row(trainer, pl_module, {**values, "val/tau": tau.value}, bar="val/tau")
