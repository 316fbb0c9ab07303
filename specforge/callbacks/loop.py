"""Lightning's outermost loop, with validations that neither a kill nor the end of a run skips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from specforge.callbacks.checkpoint import LastCheckpoint
from specforge.callbacks.lightning_internals import LightningFitLoop, is_limit_reached, same_first_iteration
from specforge.callbacks.metrics import TrainingMetrics


class FitLoop(LightningFitLoop):
    """Repeats the validation that follows a checkpoint's step, and validates when training ends.

    A step is saved before it is validated, so its checkpoint contains nothing of that validation: neither its metrics
    nor the best draft nor the state of early stopping. When Lightning resumes, it skips that validation. Here a
    checkpoint records whether a validation follows, and a resumed run repeats it, with the same outcome whether or not
    it had been interrupted. A run with nothing left to train still runs its start and end hooks, because its last
    validation may have been interrupted too.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer, trainer.min_epochs, trainer.max_epochs)
        self.epoch_loop = trainer.fit_loop.epoch_loop
        self.validation_due = False
        self._epoch = 0  # of the last step
        loop = self.epoch_loop.val_loop
        loop.run = self._recorded(loop.run)

    def _recorded(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A validation whose metrics are written to the history, after the best checkpoint."""

        def run_and_record() -> Any:
            outputs = run()
            if not self.trainer.sanity_checking and not self.epoch_loop.val_loop.skip:
                self._metrics.validated(self.trainer)
            return outputs

        return run_and_record

    @property
    def _metrics(self) -> TrainingMetrics:
        (metrics,) = [x for x in self.trainer.callbacks if isinstance(x, TrainingMetrics)]
        return metrics

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return is_limit_reached(self.epoch_loop.global_step, self.max_steps) or is_limit_reached(
            self.epoch_progress.current.processed, self.max_epochs
        )

    @property
    def skip(self) -> bool:
        """Whether there is nothing to run at all."""
        return bool(self.max_batches == 0 or self.trainer.limit_train_batches == 0)

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Record whether a validation follows."""
        return {**super().on_save_checkpoint(), "validation_due": self.trainer.training and self.validation_follows}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Read whether a validation follows."""
        super().on_load_checkpoint(state_dict)
        self.validation_due = bool(state_dict.get("validation_due", False))

    def on_run_start(self) -> None:
        """Repeat the validation that follows the checkpoint, unless the run is finished."""
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
        """Remember the checkpoint's epoch before Lightning marks an epoch that ends with the checkpoint as completed.

        Lightning then continues as if in the middle of an epoch and does not count the next one as started. If epochs
        limit the run, the data position in that epoch's checkpoints is then ignored, so the stage is reset here.
        """
        self._epoch, processed = self.trainer.current_epoch, self.epoch_progress.current.processed
        super().reset()
        if self.epoch_progress.current.processed > processed:
            self.reset_restart_stage()

    def on_advance_start(self) -> None:
        """Remember the epoch before Lightning marks one that the run ends in as completed."""
        super().on_advance_start()
        self._epoch = self.trainer.current_epoch

    def _announce(self) -> None:
        """Tell the user before training starts if there will be no validation, or only at the end."""
        trainer, held_out = self.trainer, sum(self.epoch_loop.val_loop.max_batches)
        text = ""
        if self.finished:
            text = (
                f"nothing is left to train: the checkpoint is at step {trainer.global_step}; raise trainer.max_steps "
                "or trainer.max_epochs to continue"
            )
        elif trainer.enable_validation and not held_out:
            text = "nothing is held out, so there will be no val/tau and no best.ckpt"
        elif held_out and trainer.global_step == 0 and not self._validates_before_the_end():
            text = (
                "the validation interval exceeds the run, so the only validation follows the last step: "
                f"trainer.val_check_interval is {trainer.val_check_interval}, trainer.check_val_every_n_epoch is "
                f"{trainer.check_val_every_n_epoch}, and an epoch has {self.max_batches} batches"
            )
        if text:
            pl.utilities.rank_zero_info(text)

    def _validates_before_the_end(self) -> bool:
        trainer, length = self.trainer, self.max_batches
        ends = [
            self.max_steps * trainer.accumulate_grad_batches if self.max_steps > 0 else float("inf"),
            self.max_epochs * length if self.max_epochs and self.max_epochs > 0 else float("inf"),
        ]
        if trainer.val_check_batch is None:  # the interval is a time
            return True
        whole_epochs = (trainer.check_val_every_n_epoch or 1) - 1
        return bool(whole_epochs * length + trainer.val_check_batch <= min(ends))

    def on_run_end(self) -> None:
        """Save and validate the last step, unless that is done."""
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
        completed = progress.completed
        trainer.validating, loop.restarting, progress.completed = True, False, self._epoch
        with same_first_iteration(trainer):
            loop.run()
        trainer.training, progress.completed = True, completed
