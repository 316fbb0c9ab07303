"""SIGTERM and Ctrl-C: finish what is being computed, save, stop; on every rank in front of the same batch.

Lightning's own handler broadcasts from inside the signal handler, which hangs a job of several ranks
whenever one of them gets the signal alone, and pays for it with a broadcast and a host synchronisation in
every micro-step. Here a stop is :mod:`specforge.stopping`'s. A rank alone stops wherever it waits, or behind the batch
that it computes. Several ranks agree, over CPU, in front of each batch, when all of them have it: so none of them waits
for another in a collective operation, however long a sample takes to come.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.trainer import call

from specforge import stopping
from specforge.callbacks.checkpoint import LastCheckpoint

_KEY = "specforge_stop"
_POLL = 0.25  # seconds


class Preemption(pl.Callback):
    """Saves the last finished step after a signal, and ends the run with :class:`~specforge.stopping.Stopped`."""

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._group: Any = None
        self._agreed = False
        self._over = threading.Event()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep the signals, which Lightning takes when it has set up everything."""
        self._trainer = trainer
        connector = trainer._signal_connector
        connector.register_signal_handlers = _then(connector.register_signal_handlers, stopping.keep_signals)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the ranks' CPU group, and switch off Lightning's broadcast of every micro-step."""
        loop = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None
        for part in (loop, loop.val_loop):  # waiting for a batch is never work
            part._on_before_fetch = _then(part._on_before_fetch, lambda: stopping.work(False))
            part._on_after_fetch = _then(part._on_after_fetch, lambda: stopping.work(self._group is not None))
        if trainer.world_size > 1:
            # Ranks wait here for whoever has no batch yet, which may take as long as its samples do.
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
            threading.Thread(target=self._pass_on, name="stop", daemon=True).start()
            stopping.work(True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there is something to lose."""
        stopping.begin()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Compute the batch if no rank stops. The next wait is where a stop is heard again."""
        self._gate()
        stopping.work(True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation can be repeated, so a rank alone may leave it anywhere."""
        stopping.work(self._group is not None)

    def on_validation_batch_start(self, *_: Any) -> None:
        """Compute the batch if no rank stops."""
        self._gate()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save, if this is a stop."""
        if not isinstance(exception, stopping.Stopped) or not stopping.began():
            return
        stopping.hold()
        if self._group is not None and not self._agreed:
            self._agree(True)  # the others are in front of a batch, or get there
        last = [x for x in trainer.checkpoint_callbacks if isinstance(x, LastCheckpoint)]
        for callback in last:
            callback.save_now(trainer)
        how = "resume with --ckpt_path last"
        if not last:
            how = "nothing is saved, as trainer.enable_checkpointing is false"
        elif trainer.global_step == 0:
            how = "nothing is lost, so start it again"
        pl.utilities.rank_zero_info(f"stopped by a signal after step {trainer.global_step}; {how}")

    def end(self) -> int:
        """Close what the stopped run has open.

        Returns:
            The exit status. A rank that Lightning started ends with 0: it kills all others when one of them fails.
        """
        trainer = self._trainer
        stopping.hold()
        self._over.set()
        if trainer is None or not stopping.began():
            if trainer is not None and hasattr(trainer.strategy.launcher, "procs"):
                trainer.strategy.launcher.kill(signal.SIGKILL)  # they may wait for this rank in C++
            pl.utilities.rank_zero_info("stopped by a signal before the training began; nothing is changed")
        else:
            call._call_teardown_hook(trainer)
        return 0 if trainer is not None and _is_a_child(trainer) else 143

    def _gate(self) -> None:
        if self._group is not None and self._agree(stopping.came()):
            self._agreed = True
            raise stopping.Stopped

    def _agree(self, stop: bool) -> bool:
        flag = torch.tensor(int(stop))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def _pass_on(self) -> None:
        """A signal that one rank gets reaches all."""
        store = torch.distributed.distributed_c10d._get_default_store()
        while not self._over.wait(_POLL):
            try:
                if stopping.came():
                    store.set(_KEY, "1")
                    return
                if store.check([_KEY]):
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                    return
            except (RuntimeError, OSError):
                return  # the rank that keeps the store has ended

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The run is over."""
        self._over.set()


def _then(first: Callable[[], None], second: Callable[[], object]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both


def _is_a_child(trainer: pl.Trainer) -> bool:
    environment = trainer._accelerator_connector.cluster_environment
    return trainer.local_rank > 0 and isinstance(environment, LightningEnvironment)
