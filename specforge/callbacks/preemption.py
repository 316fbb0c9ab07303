"""SIGTERM and Ctrl-C: finish the optimizer step, save, stop; on every rank at the same step.

Lightning's own handler broadcasts from inside the signal handler, which hangs a job of several ranks
whenever one of them gets the signal alone, and pays for it with a broadcast and a host synchronisation in
every micro-step. Here the handler only sets a flag; the ranks compare flags now and then, over CPU.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from specforge.callbacks.checkpoint import LastCheckpoint


class Preemption(pl.Callback):
    """Saves ``last.ckpt`` and stops after a signal; a second Ctrl-C stops at once.

    Args:
        every_n_steps: with several ranks, compare flags every so many optimizer steps.

    Attributes:
        stopped: whether a signal ended the run.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self.stopped = False
        self._signal: int | None = None
        self._old: dict[int, Any] = {}
        self._group: Any = None
        self._last_step = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the ranks' CPU group, and switch off Lightning's broadcast of every micro-step."""
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over, after Lightning has registered its handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop behind a finished optimizer step."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if not self._agreed(trainer):
            return
        self.stopped = True
        trainer.should_stop = True
        for callback in trainer.callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.save_now(trainer)
        pl.utilities.rank_zero_info(
            f"stopped by a signal after step {trainer.global_step}; resume with --ckpt_path last"
        )

    def _agreed(self, trainer: pl.Trainer) -> bool:
        if trainer.world_size == 1:
            return self._signal is not None
        if trainer.global_step % self.every_n_steps:
            return False
        flag = torch.tensor(int(self._signal is not None))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}
