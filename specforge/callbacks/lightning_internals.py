"""Every private name of Lightning and argparse that SpecForge uses, under a public name of ours.

Lightning offers no public way to do these things. ``tests/callbacks/test_lightning_internals.py`` checks that each name
still exists and that no other file uses one, so that an upgrade fails there first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.utilities import _is_max_limit_reached
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer import call

NoExperiment = _DummyExperiment
is_limit_reached = _is_max_limit_reached


# Signals and teardown.


def after_signal_handlers(trainer: pl.Trainer, function: Callable[[], object]) -> None:
    """Call ``function`` whenever Lightning has registered its own signal handlers."""
    connector = trainer._signal_connector
    connector.register_signal_handlers = _then(connector.register_signal_handlers, function)


def disable_sigterm_broadcast(trainer: pl.Trainer) -> None:
    """Skip Lightning's broadcast and host synchronisation in every micro-step."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def around_fetch(trainer: pl.Trainer, before: Callable[[], object], after: Callable[[], object]) -> None:
    """Call functions before and after the training and validation loops fetch a batch."""
    loop = trainer.fit_loop.epoch_loop
    for part in (loop, loop.val_loop):
        part._on_before_fetch = _then(part._on_before_fetch, before)
        part._on_after_fetch = _then(part._on_after_fetch, after)


def _then(first: Callable[[], None], second: Callable[[], object]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both


def tear_down(trainer: pl.Trainer) -> None:
    """Run the teardown hooks of an interrupted run."""
    call._call_teardown_hook(trainer)


def cluster_environment(trainer: pl.Trainer) -> Any:
    """The environment that started this process's ranks."""
    return trainer._accelerator_connector.cluster_environment


def spawns(trainer: pl.Trainer) -> bool:
    """Whether the strategy starts its ranks with ``spawn``, which has to pickle the trainer."""
    return getattr(trainer.strategy.launcher, "_start_method", None) == "spawn"


# Loops and checkpoints.


class LightningFitLoop(_FitLoop):
    """Lightning's outermost loop."""

    @property
    def validation_follows(self) -> bool:
        """Whether a validation follows the present batch."""
        return bool(self.epoch_loop._should_check_val_fx(self._data_fetcher))


@contextmanager
def same_first_iteration(trainer: pl.Trainer) -> Iterator[None]:
    """A loop that runs within the block does not change whether logging has begun in the enclosing loop."""
    connector = trainer._logger_connector
    first = connector._first_loop_iter
    yield
    connector._first_loop_iter = first


def callback_states(trainer: pl.Trainer) -> dict[str, Any]:
    """The states of all callbacks, as a checkpoint contains them."""
    return call._call_callbacks_state_dict(trainer)


class CheckpointCallback(ModelCheckpoint):
    """ModelCheckpoint whose saving can be called from outside its own hooks."""

    def save_to(self, trainer: pl.Trainer, path: str) -> None:
        """Write a checkpoint."""
        self._save_checkpoint(trainer, path)

    def is_saved(self, trainer: pl.Trainer) -> bool:
        """Whether the present step is saved already, or must not be saved now."""
        return bool(self._should_skip_saving_checkpoint(trainer))

    def mark_saved(self, trainer: pl.Trainer) -> None:
        """Treat the present step as saved."""
        self._last_global_step_saved = trainer.global_step

    @property
    def interval(self) -> int:
        """Optimizer steps between two checkpoints; 0 if only the last step is saved."""
        return int(self._every_n_train_steps)


class DataParallelStrategy(ModelParallelStrategy):
    """ModelParallelStrategy in which all devices are data parallel; its ``auto`` is tensor parallel within a node."""

    def setup_environment(self) -> None:
        """Set the size before the device mesh is built from it."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


# Help.


class FitParser(LightningArgumentParser):
    """Parser whose help starts with SpecForge's options and hides Lightning's others.

    Attributes:
        helps: help of some options; Lightning's options that are missing here are hidden.
        titles: headings by the first part of an option's name.
        shows_all: whether nothing is hidden.
    """

    helps: ClassVar[dict[str, str]] = {}
    titles: ClassVar[dict[str, str]] = {}
    shows_all = False

    def format_help(self) -> str:
        """The help text."""
        order = ["help", "cluster", "seed_everything", "model", "data", "checkpoint", "best_checkpoint", "ckpt_path"]
        order.append("trainer")

        def first_key(group: Any) -> str:
            keys = (action.dest.split(".")[0] for action in group._group_actions)
            return next((key for key in keys if key in order), "help")

        for group in self._action_groups:
            group.title = self.titles.get(first_key(group), group.title)
        self._action_groups.sort(key=lambda group: order.index(first_key(group)))
        for action in self._actions:
            key, _, name = action.dest.partition(".")
            if action.help == "Path to a configuration file.":  # of one group; --config serves for all
                action.help = argparse.SUPPRESS
            elif action.dest in self.helps:
                action.help = self.helps[action.dest]
            elif ((key == "trainer" and name) or key in ("weights_only", "verbose")) and not self.shows_all:
                action.help = argparse.SUPPRESS
        return str(super().format_help())
