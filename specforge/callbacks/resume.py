"""Exact resume: the data position that was trained, and every random generator of every rank."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from specforge.callbacks.lightning_internals import callback_states
from specforge.callbacks.metrics import TrainingMetrics
from specforge.errors import UserError

_KEY = "specforge_rng"
# What a checkpoint says of its step beside the weights and the loops.
_POSITION = ("epoch", "global_step", "callbacks")


class ExactResume(pl.Callback):
    """Acknowledges batches to the loader, and saves and restores random states.

    It must acknowledge here, not in the module's hook: ModelCheckpoint saves before the module's hook runs, so
    the checkpoint would hold the position before the batch it was trained on. Random states are restored
    when training starts, after Lightning has created the loader's iterator (which draws from them).

    It also keeps the position of the last optimizer step: weights change only there, so that a checkpoint of that
    position can be written at any moment, such as in the middle of a window or of a validation.
    """

    def __init__(self) -> None:
        self._saved: list[dict[str, Any]] | None = None
        self._position: dict[str, Any] | None = None
        self._wanted = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is trained."""
        trainer.train_dataloader.acknowledge(batch)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gather the random states of all ranks."""
        states: list[Any] = [_rank_state(trainer)]
        if self._wanted and self._position is not None:
            checkpoint.update({key: self._position[key] for key in _POSITION})
            checkpoint["loops"]["fit_loop"] = self._position["fit_loop"]
            states = [self._position[_KEY]]
        states = [_on_cpu(states[0])]
        if trainer.world_size > 1:
            mine, states = states[0], [None] * trainer.world_size
            torch.distributed.all_gather_object(states, mine)
        checkpoint[_KEY] = states

    def finished_step(self, trainer: pl.Trainer) -> None:
        """Keep the position behind an optimizer step; called when all that belongs to the step is done."""
        self._position = {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "fit_loop": trainer.fit_loop.state_dict(),
            "callbacks": _copy(callback_states(trainer)),
            _KEY: _rank_state(trainer),
        }

    @contextmanager
    def at_last_step(self) -> Iterator[None]:
        """Checkpoints that are written within the block are of the position behind the last optimizer step."""
        self._wanted = True
        try:
            yield
        finally:
            self._wanted = False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep them until training starts.

        Raises:
            UserError: the run has another number of ranks now.
        """
        self._saved = checkpoint.get(_KEY)
        if self._saved is not None and len(self._saved) != trainer.world_size:
            raise UserError(
                f"the checkpoint was made on {len(self._saved)} ranks, this run has {trainer.world_size}; resume on "
                "as many, or start a new run from the weights alone (model.init_from)"
            )
        if self._saved is not None:
            self._position = {key: _copy(checkpoint[key]) for key in _POSITION}
            self._position["fit_loop"] = _copy(checkpoint["loops"]["fit_loop"])
            self._position[_KEY] = self._saved[trainer.global_rank]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore what is this rank's own."""
        if self._saved is not None:
            state = self._saved[trainer.global_rank]
            restore_rng(state)
            for callback, sums in zip(_metrics(trainer), state.get("metrics", []), strict=False):
                callback.rank_state = sums
            self._saved = None


def _copy(value: Any) -> Any:
    """The same value in containers of its own; tensors are shared, as nobody writes into those of a state."""
    if isinstance(value, dict):
        return {key: _copy(x) for key, x in value.items()}
    return [_copy(x) for x in value] if isinstance(value, list) else value


def _on_cpu(value: Any) -> Any:
    """A state whose tensors can be sent to another rank."""
    if isinstance(value, dict):
        return {key: _on_cpu(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(x) for x in value)
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _metrics(trainer: Any) -> list[TrainingMetrics]:
    return [callback for callback in trainer.callbacks if isinstance(callback, TrainingMetrics)]


def _rank_state(trainer: pl.Trainer) -> dict[str, Any]:
    """What is this rank's own: its random states, and what it has measured since the last row of the history."""
    return {**rng_state(), "metrics": [callback.rank_state for callback in _metrics(trainer)]}


def rng_state() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    return {
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Set every generator to a state from :func:`rng_state`."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy["key"].numpy().astype(np.uint32), "pos": numpy["pos"]},
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
