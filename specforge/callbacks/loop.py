"""Lightning's outermost loop, with validations that neither a kill nor the end of a run leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.utilities import _is_max_limit_reached

from specforge.callbacks.checkpoint import LastCheckpoint
from specforge.callbacks.metrics import TrainingMetrics


class FitLoop(_FitLoop):
    """Repeats the validation that follows a checkpoint's step, and validates when training is over.

    A step is saved before it is validated, so a checkpoint holds nothing of that validation: not its row, not the best
    draft, not what early stopping counts. Lightning skips it when it resumes. Here a checkpoint says whether a
    validation follows, and whoever resumes from it repeats that; the outcome is the same, whether it had been cut off
    or not. A run that has nothing left to train passes through its start and its end, for its last validation may
    have been cut off too.

    Args:
        trainer: its loop is replaced.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer, trainer.min_epochs, trainer.max_epochs)
        self.epoch_loop = trainer.fit_loop.epoch_loop
        self.validation_due = False
        self._epoch = 0  # of the last step
        loop = self.epoch_loop.val_loop
        loop.run = self._then_keep(loop.run)

    def _then_keep(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A validation that ends in the history, behind the best checkpoint."""

        def run_and_keep() -> Any:
            outputs = run()
            if not self.trainer.sanity_checking and not self.epoch_loop.val_loop.skip:
                self._metrics.validated(self.trainer)
            return outputs

        return run_and_keep

    @property
    def _metrics(self) -> TrainingMetrics:
        (metrics,) = [x for x in self.trainer.callbacks if isinstance(x, TrainingMetrics)]
        return metrics

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return _is_max_limit_reached(self.epoch_loop.global_step, self.max_steps) or _is_max_limit_reached(
            self.epoch_progress.current.processed, self.max_epochs
        )

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do at all."""
        return bool(self.max_batches == 0 or self.trainer.limit_train_batches == 0)

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Say whether a validation follows."""
        follows = self.trainer.training and self.epoch_loop._should_check_val_fx(self._data_fetcher)
        return {**super().on_save_checkpoint(), "validation_due": bool(follows)}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Remember whether one follows."""
        super().on_load_checkpoint(state_dict)
        self.validation_due = bool(state_dict.get("validation_due", False))

    def on_run_start(self) -> None:
        """Repeat the validation behind the checkpoint, unless the run is finished and has its row."""
        trainer = self.trainer
        if trainer.enable_validation:
            trainer.validating = True
            self.epoch_loop.val_loop.setup_data()
            trainer.training = True
        self._announce()
        self.validation_due &= not self.finished
        super().on_run_start()
        if self.validation_due:
            self.validation_due = False
            self._validate()

    def reset(self) -> None:
        """Remember the checkpoint's epoch, before Lightning takes an epoch that ends with it for completed.

        Lightning then goes on as if in the middle of an epoch and does not count the next one as begun, so that the
        data's position in the checkpoints of that epoch is not used when epochs bound the run.
        """
        self._epoch, processed = self.trainer.current_epoch, self.epoch_progress.current.processed
        super().reset()
        if self.epoch_progress.current.processed > processed:
            self.reset_restart_stage()

    def on_advance_start(self) -> None:
        """Remember the epoch, before Lightning takes one that the run ends in for completed."""
        super().on_advance_start()
        self._epoch = self.trainer.current_epoch

    def _announce(self) -> None:
        """Say beforehand what might surprise afterwards."""
        trainer, held_out = self.trainer, sum(self.epoch_loop.val_loop.max_batches)
        text = ""
        if self.finished:
            text = (
                f"nothing is left to train: the checkpoint is of step {trainer.global_step}; raise trainer.max_steps "
                "or trainer.max_epochs to go on"
            )
        elif trainer.enable_validation and not held_out:
            text = "nothing is held out, so there will be no val/tau and no best.ckpt"
        elif held_out and trainer.global_step == 0 and not self._validates_before_the_end():
            text = (
                f"the first validation is the last step's: trainer.val_check_interval is {trainer.val_check_interval}, "
                f"trainer.check_val_every_n_epoch {trainer.check_val_every_n_epoch}, and an epoch has "
                f"{self.max_batches} batches"
            )
        if text:
            pl.utilities.rank_zero_info(text)

    def _validates_before_the_end(self) -> bool:
        trainer, length = self.trainer, self.max_batches
        ends = [
            self.max_steps * trainer.accumulate_grad_batches if self.max_steps > 0 else float("inf"),
            self.max_epochs * length if self.max_epochs and self.max_epochs > 0 else float("inf"),
        ]
        if trainer.val_check_batch is None:  # by the clock
            return True
        whole_epochs = (trainer.check_val_every_n_epoch or 1) - 1
        return bool(whole_epochs * length + trainer.val_check_batch <= min(ends))

    def on_run_end(self) -> None:
        """Save and validate the last step, if that has not been done."""
        trainer = self.trainer
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.save_now(trainer)
        if trainer.enable_validation and self._metrics.validated_step != trainer.global_step:
            self._validate()
        super().on_run_end()

    def _validate(self) -> None:
        """Validate the last step, as the loop of its epoch would."""
        trainer, loop, progress = self.trainer, self.epoch_loop.val_loop, self.epoch_progress.current
        first, completed = trainer._logger_connector._first_loop_iter, progress.completed
        trainer.validating, loop.restarting, progress.completed = True, False, self._epoch
        loop.run()
        trainer.training, progress.completed = True, completed
        trainer._logger_connector._first_loop_iter = first
