"""SIGTERM and Ctrl-C: finish the current batch, save and stop, on every rank before the same batch.

Lightning broadcasts from inside the signal handler, which hangs a run of several ranks if only one of them gets the
signal, and costs a broadcast and a host synchronisation in every micro-step. Here :mod:`specforge.stopping` handles the
signals. A single rank stops wherever it waits, or after the batch that it computes. Several ranks agree over the CPU
before each batch, when all of them have fetched it, so that none of them waits for another in a collective operation
while a sample is late.
"""

from __future__ import annotations

import signal
import threading
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment

import specforge.stopping as stopping
from specforge.callbacks.checkpoint import LastCheckpoint
from specforge.callbacks.lightning_internals import (
    after_signal_handlers,
    around_fetch,
    cluster_environment,
    disable_sigterm_broadcast,
    tear_down,
)

_KEY = "specforge_stop"
_POLL = 0.25  # seconds


class Preemption(pl.Callback):
    """Saves the last finished step after a signal, and ends the run with :class:`~specforge.stopping.Stopped`."""

    def __init__(self) -> None:
        self._run: pl.Trainer | None = None
        self._group: Any = None
        self._agreed = False
        self._over = threading.Event()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the signals back after Lightning has registered its own handlers."""
        self._run = trainer
        after_signal_handlers(trainer, stopping.keep_signals)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Create the ranks' CPU group, and switch off Lightning's broadcast in every micro-step."""
        disable_sigterm_broadcast(trainer)
        # Waiting for a batch may always be interrupted.
        around_fetch(trainer, lambda: stopping.work(False), lambda: stopping.work(self._group is not None))
        if trainer.world_size > 1:
            # Ranks wait in this group for those that have no batch yet, however long their samples take.
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
            threading.Thread(target=self._pass_on, name="stop", daemon=True).start()
            stopping.work(True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there is something to save."""
        stopping.begin()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Compute the batch unless a rank stops; the next wait can be interrupted again."""
        self._gate()
        stopping.work(True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation can be repeated, so a single rank may stop anywhere in it."""
        stopping.work(self._group is not None)

    def on_validation_batch_start(self, *_: Any) -> None:
        """Compute the batch unless a rank stops."""
        self._gate()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save, if this is a stop."""
        if not isinstance(exception, stopping.Stopped) or not stopping.began():
            return
        stopping.hold()
        if self._group is not None and not self._agreed:
            self._agree(True)  # the other ranks reach the next batch and agree there
        last = [x for x in trainer.checkpoint_callbacks if isinstance(x, LastCheckpoint)]
        for callback in last:
            callback.save_now(trainer)
        how = "resume with --ckpt_path last"
        if not last:
            how = "nothing is saved because trainer.enable_checkpointing is false"
        elif trainer.global_step == 0:
            how = "nothing was trained yet; start the run again"
        pl.utilities.rank_zero_info(f"stopped by a signal after step {trainer.global_step}; {how}")

    def end(self) -> int:
        """Close a stopped run.

        Returns:
            The exit status. A rank that Lightning started exits with 0, because Lightning kills all ranks if one fails.
        """
        trainer = self._run
        stopping.hold()
        self._over.set()
        if trainer is None or not stopping.began():
            if trainer is not None and hasattr(trainer.strategy.launcher, "procs"):
                trainer.strategy.launcher.kill(signal.SIGKILL)  # the ranks may be waiting for this one in C++
            pl.utilities.rank_zero_info("stopped by a signal before training began; nothing was changed")
        else:
            tear_down(trainer)
        return 0 if trainer is not None and _is_a_child(trainer) else 143

    def _gate(self) -> None:
        if self._group is not None and self._agree(stopping.signal_arrived()):
            self._agreed = True
            raise stopping.Stopped

    def _agree(self, stop: bool) -> bool:
        flag = torch.tensor(int(stop))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def _pass_on(self) -> None:
        """Pass a signal that one rank receives on to all ranks."""
        store = torch.distributed.distributed_c10d._get_default_store()
        while not self._over.wait(_POLL):
            try:
                if stopping.signal_arrived():
                    store.set(_KEY, "1")
                    return
                if store.check([_KEY]):
                    stopping.request()
                    return
            except (RuntimeError, OSError):
                return  # the rank that hosts the store has exited

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop passing signals on."""
        self._over.set()


def _is_a_child(trainer: pl.Trainer) -> bool:
    """Whether Lightning started this rank."""
    return trainer.local_rank > 0 and isinstance(cluster_environment(trainer), LightningEnvironment)
