"""Exact resume: the trained position of the data, and every random generator of every rank."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from specforge.callbacks.lightning_internals import callback_states
from specforge.callbacks.metrics import TrainingMetrics, is_time_to_log, log_row
from specforge.callbacks.strategies import settle_buckets
from specforge.contracts import TrainBatch
from specforge.errors import UserError
from specforge.runtime.data_plane.loader import RunLength

_KEY = "specforge_rng"
_POSITION = ("epoch", "global_step", "callbacks")  # top-level entries of a checkpoint that depend on its step


class ExactResume(pl.Callback):
    """Acknowledges trained batches to the loader, and saves and restores random states.

    Batches are acknowledged in a callback, because ModelCheckpoint saves before the module's own hook runs: the
    checkpoint would hold the position before its last batch. Random states are restored when training starts, after
    Lightning has created the loader's iterator, which draws from them.

    The callback also records the position after each optimizer step. Weights change only there, so a checkpoint of that
    position can be written at any moment, such as in the middle of gradient accumulation or of a validation.
    """

    def __init__(self) -> None:
        self._saved: list[dict[str, Any]] | None = None
        self._position: dict[str, Any] | None = None
        self._wanted = False
        self._step = 0  # last finished optimizer step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the data stream at the checkpoint's step, and restore the state of this rank."""
        self._step = trainer.global_step
        length = RunLength(
            int(trainer.num_training_batches), trainer.accumulate_grad_batches, trainer.max_steps, trainer.max_epochs
        )
        trainer.train_dataloader.start(self._step, length)
        settle_buckets(trainer.strategy.model)
        if self._saved is not None:
            state = self._saved[trainer.global_rank]
            restore_rng(state)
            for callback, sums in zip(_metrics(trainer), state.get("metrics", []), strict=False):
                callback.rank_state = sums
            self._saved = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        """Acknowledge the batch for the step that was taken, or for the next one while gradients accumulate."""
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        trainer.train_dataloader.acknowledge(batch, self._step if stepped else self._step + 1)
        if stepped and is_time_to_log(trainer):
            flow = {f"data/{name}": value for name, value in trainer.train_dataloader.flow().items()}
            log_row(trainer, pl_module, flow, bar="data/wait")
            for callback in _metrics(trainer):
                callback.flow = flow

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report a store that has failed since the last batch was fetched."""
        trainer.train_dataloader.check()

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
        """Record the position after an optimizer step; called once everything that belongs to the step is done."""
        self._position = {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "fit_loop": trainer.fit_loop.state_dict(),
            "callbacks": _copy(callback_states(trainer)),
            _KEY: _rank_state(trainer),
        }

    @contextmanager
    def at_last_step(self) -> Iterator[None]:
        """Within the block, checkpoints hold the position after the last optimizer step."""
        self._wanted = True
        try:
            yield
        finally:
            self._wanted = False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the random states until training starts.

        Raises:
            UserError: the checkpoint was written by a different number of ranks.
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


def _copy(value: Any) -> Any:
    """A copy of nested containers; tensors are shared, because nobody writes into those of a state."""
    if isinstance(value, dict):
        return {key: _copy(x) for key, x in value.items()}
    return [_copy(x) for x in value] if isinstance(value, list) else value


def _on_cpu(value: Any) -> Any:
    """A copy of a state whose tensors can be sent to another rank."""
    if isinstance(value, dict):
        return {key: _on_cpu(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(x) for x in value)
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _metrics(trainer: Any) -> list[TrainingMetrics]:
    return [callback for callback in trainer.callbacks if isinstance(callback, TrainingMetrics)]


def _rank_state(trainer: pl.Trainer) -> dict[str, Any]:
    """State that differs between ranks: random states, and metrics summed since the last logged row."""
    return {**rng_state(), "metrics": [callback.rank_state for callback in _metrics(trainer)]}


def rng_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy and torch, as tensors and plain values."""
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
