"""SIGTERM, Ctrl-C, and data that stops coming: save and stop, on every rank before the same batch.

Lightning broadcasts from inside the signal handler, which hangs a run of several ranks if only one of them gets the
signal, and costs a broadcast and a host synchronisation in every micro-step. Here :mod:`specforge.stopping` handles the
signals. A single rank stops wherever it waits, or after the batch that it computes. Several ranks agree over the CPU
before each batch, when all of them have fetched it, so that none of them waits for another in a collective operation
while a sample is late.

A batch that cannot be fetched leaves the model and the optimizer as the last step left them, so it ends the run in the
same way, but with its error. The rank that gets the error tells the others, which need not get one.
"""

from __future__ import annotations

import signal
import sys
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
from specforge.errors import UserError, mistake_behind
from specforge.files import first_line

_KEY, _REASON = "specforge_stop", "specforge_reason"
_POLL = 0.25  # seconds


class Preemption(pl.Callback):
    """Saves the last finished step after a signal or a failed fetch.

    After a signal, the run ends with :class:`~specforge.stopping.Stopped`.
    """

    def __init__(self) -> None:
        self._run: pl.Trainer | None = None
        self._group: Any = None
        self._agreed = False
        self._fetch_error: BaseException | None = None
        self._reason = ""  # why the data stopped, on whichever rank
        self._after = ""  # after which step that was, and how to go on
        self._over = threading.Event()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the signals back after Lightning has registered its own handlers."""
        self._run = trainer
        after_signal_handlers(trainer, stopping.keep_signals)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Create the ranks' CPU group, and switch off Lightning's broadcast in every micro-step."""
        disable_sigterm_broadcast(trainer)
        # Waiting for a batch may always be interrupted.
        around_fetch(trainer, lambda: stopping.work(False), self._after_fetch)
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
        """Save, if this is a stop, or if the next batch could not be fetched."""
        is_stop = isinstance(exception, stopping.Stopped)
        if not stopping.began() or not (is_stop or exception is self._fetch_error):
            return
        stopping.hold()
        if not is_stop:
            self._reason = str(mistake_behind(exception) or first_line(exception))
        if self._group is not None and not self._meet(trainer, is_stop):
            return
        how = self._save(trainer)
        if not self._reason:
            pl.utilities.rank_zero_info(f"stopped by a signal after step {trainer.global_step}; {how}")
            return
        repeated = how in self._reason
        self._after = f"training stopped after step {trainer.global_step}{'' if repeated else f'; {how}'}"
        if not is_stop and mistake_behind(exception) is None:  # it ends in a stack trace, not in :meth:`fail`
            pl.utilities.rank_zero_info(self._after)

    def _meet(self, trainer: pl.Trainer, is_stop: bool) -> bool:
        """Wait for the other ranks, which reach the next batch and stop there; False if one of them has died."""
        if not is_stop:
            self._over.set()
            self._reason = f"rank {trainer.global_rank}: {self._reason}"
        try:
            if not is_stop:
                _store().set(_REASON, self._reason)
                _store().set(_KEY, "1")
            if not self._agreed:
                self._agree(True)
            if is_stop and _store().check([_REASON]):
                self._reason = _store().get(_REASON).decode()
        except RuntimeError:
            if is_stop:
                raise
            return False
        return True

    def _save(self, trainer: pl.Trainer) -> str:
        """Save the last step; returns how to go on."""
        last = [x for x in trainer.checkpoint_callbacks if isinstance(x, LastCheckpoint)]
        if trainer.strategy.broadcast(trainer.train_dataloader.replaced()):
            return "nothing is saved, because another trainer has replaced this one"
        try:
            for callback in last:
                callback.save_now(trainer)
        except Exception as error:
            if not self._reason:
                raise
            return f"it cannot be saved ({first_line(error)})"  # the reason is what the user has to know
        if not last:
            return "nothing is saved because trainer.enable_checkpointing is false"
        if trainer.global_step == 0:
            return "nothing was trained yet; start the run again"
        return "resume with --ckpt_path last"

    def fail(self, mistake: UserError) -> int:
        """End a run that a mistake has stopped; if all ranks have saved, the first rank of the host reports it.

        Returns:
            The exit status of another rank.

        Raises:
            UserError: the mistake, with how to go on.
        """
        if not self._after:
            raise mistake
        if self._run is not None and _is_a_child(self._run):
            return 0
        raise UserError(f"{mistake}; {self._after}") from mistake

    def end(self) -> int:
        """Close a stopped run.

        Returns:
            The exit status. A rank that Lightning started exits with 0, because Lightning kills all ranks if one fails.

        Raises:
            UserError: the data stopped on another rank.
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
        if self._reason:
            return self.fail(UserError(self._reason))
        return 0 if trainer is not None and _is_a_child(trainer) else 143

    def _after_fetch(self) -> None:
        """Note the error of a fetch; Lightning calls this while it is raised."""
        self._fetch_error = sys.exc_info()[1]
        stopping.work(self._group is not None)

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
        store = _store()
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


def _store() -> Any:
    """What all ranks can read and write."""
    return torch.distributed.distributed_c10d._get_default_store()


def _is_a_child(trainer: pl.Trainer) -> bool:
    """Whether Lightning started this rank."""
    return trainer.local_rank > 0 and isinstance(cluster_environment(trainer), LightningEnvironment)
