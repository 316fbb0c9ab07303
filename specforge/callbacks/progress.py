"""The progress of a run in one line of 80 columns: steps, time left, loss, tokens/s, peak memory and tau."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.live import Live
from rich.text import Text

from specforge.callbacks.metrics import TrainingMetrics, is_time_to_log
from specforge.system import peak_memory

_REFRESH = 0.2  # seconds


class RunProgress(ProgressBar):
    """Shows one line that is updated in place or, if the output is not a terminal, a line per row of metrics."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console(highlight=False)
        self._enabled = True
        self._live: Live | None = None
        self._shown_at = 0.0
        self._first_step, self._started = 0, 0.0

    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing, as on all ranks but the first."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and show the first line."""
        self._first_step, self._started = trainer.global_step, time.perf_counter()
        self._show(self._line(trainer), now=True)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:  # type: ignore[override]
        """Update the line; print one if the output is not a terminal and the step is logged."""
        if self._console.is_terminal:
            self._show(self._line(trainer))
        elif self._enabled and self._is_new_row(trainer):
            print(self._line(trainer), flush=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show that a validation has begun."""
        self._show_validation(trainer, 0)

    def on_validation_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:  # type: ignore[override]
        """Show how far the validation is."""
        self._show_validation(trainer, rest[3] + 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the run's line again."""
        if trainer.state.fn == "fit":
            self._show(self._line(trainer), now=True)
        else:
            self._stop()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the last line on the terminal."""
        self._show(self._line(trainer), now=True)
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._stop()

    def _is_new_row(self, trainer: pl.Trainer) -> bool:
        """Whether this batch ended the run's first step or a step that is logged."""
        is_step = (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches == 0
        return is_step and (trainer.global_step == self._first_step + 1 or is_time_to_log(trainer))

    def _show_validation(self, trainer: pl.Trainer, done: int) -> None:
        if not trainer.sanity_checking:
            total = sum(trainer.num_val_batches)
            step = f"step {trainer.global_step}: " if trainer.state.fn == "fit" else ""
            self._show(f"{step}validation, batch {done}/{total}", now=not done)

    def _show(self, line: str, now: bool = False) -> None:
        if not self._enabled or not self._console.is_terminal:
            return
        if not now and time.perf_counter() - self._shown_at < _REFRESH:
            return
        self._shown_at = time.perf_counter()
        if self._live is None:  # without a thread of its own, which a signal could interrupt
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, trainer: pl.Trainer) -> str:
        (metrics,) = [x for x in trainer.callbacks if isinstance(x, TrainingMetrics)]  # type: ignore[attr-defined]
        step, total = trainer.global_step, total_steps(trainer)
        parts = [f"step {step}" + (f"/{total}" if total else "")]
        done = step - self._first_step
        if total and done:
            left = (total - step) * (time.perf_counter() - self._started) / done
            parts.append(f"{duration(left)} left")
        if metrics.latest:
            parts.append(f"loss {metrics.latest['loss']:.3g}")
            parts.append(f"{three_digits(metrics.latest['tokens_per_second'])} tok/s")
        parts.append(f"peak {peak_memory(str(trainer.strategy.root_device)) / 1e9:.3g} GB")
        if "val/tau" in trainer.callback_metrics:
            parts.append(f"tau {float(trainer.callback_metrics['val/tau']):.3g}")
        return ", ".join(parts)


def total_steps(trainer: pl.Trainer) -> int | None:
    """Optimizer steps of the whole run; None if only time or a callback limits it."""
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    batches = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and batches != float("inf"):
        limits.append(trainer.max_epochs * -(-int(batches) // trainer.accumulate_grad_batches))
    return min(limits, default=None)


def duration(seconds: float) -> str:
    """Such as 0:42 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def three_digits(value: float) -> str:
    """A number with three significant digits, such as 864, 12.3k or 1.2M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
