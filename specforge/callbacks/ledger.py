"""Exactly once, as the checkpoint sees it: what each optimizer step trained, and what a complete checkpoint covers."""

from __future__ import annotations

import time
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl

from specforge.callbacks.metrics import is_time_to_log
from specforge.contracts import TrainBatch


@runtime_checkable
class Ledger(Protocol):
    """What a datamodule with a control plane offers; those without have nothing to record."""

    def rewind(self, loader: Any, step: int) -> None:
        """Go back to the checkpoint of ``step``, from which the loader goes on; on every rank."""

    def trained(self, epoch: int, sample_ids: tuple[str, ...], step: int) -> None:
        """Optimizer step ``step`` used samples of an epoch on this rank."""

    def durable(self, step: int) -> None:
        """The checkpoint of ``step`` is complete; on every rank."""

    def flow(self) -> dict[str, float]:
        """What to log of the stream: samples that are ready, samples a second, ..."""


class SampleLedger(pl.Callback):
    """Tells the control plane what was trained and what is durable, and takes it back to the checkpoint at a resume.

    A window's samples are recorded when its optimizer step is done, before any checkpoint of that step is written;
    :class:`~specforge.callbacks.checkpoint.LastCheckpoint` calls :meth:`saved` when the file is complete and linked.
    """

    def __init__(self) -> None:
        self._ledger: Ledger | None = None
        self._window: list[tuple[int, tuple[str, ...]]] = []
        self._step = 0
        self._waited = 0.0
        self._since = self._logged = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go back to the step that training starts from."""
        data = getattr(trainer, "datamodule", None)
        self._ledger = data if isinstance(data, Ledger) else None
        self._window, self._step = [], trainer.global_step
        if self._ledger is not None:
            self._ledger.rewind(trainer.train_dataloader, trainer.global_step)
        self._since = self._logged = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The time since the last batch was spent waiting for this one."""
        self._waited += time.perf_counter() - self._since

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        """Record the window once its step is done."""
        if self._ledger is None:
            return
        self._window.append((batch.cursor["epoch"], batch.sample_ids))
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        for epoch, sample_ids in self._window:
            self._ledger.trained(epoch, sample_ids, self._step)
        self._window = []
        if is_time_to_log(trainer):
            self._log(pl_module, self._ledger.flow())
        self._since = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is not waiting."""
        self._since = time.perf_counter()

    def saved(self, trainer: pl.Trainer) -> None:
        """A checkpoint of the present step is complete."""
        if self._ledger is not None:
            self._ledger.durable(trainer.global_step)

    def _log(self, pl_module: Any, flow: dict[str, float]) -> None:
        now = time.perf_counter()
        share = self._waited / max(now - self._logged, 1e-9)
        self._waited, self._logged = 0.0, now
        pl_module.log_dict({f"data/{name}": value for name, value in flow.items()}, rank_zero_only=True)
        pl_module.log("data/wait", share, prog_bar=True, rank_zero_only=True)
