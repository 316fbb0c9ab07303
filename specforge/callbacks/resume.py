"""Exact resume: the data position that was trained, and every random generator of every rank."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from specforge.errors import UserError

_KEY = "specforge_rng"


class ExactResume(pl.Callback):
    """Acknowledges batches to the loader, and saves and restores random states.

    It must acknowledge here, not in the module's hook: ModelCheckpoint saves before the module's hook runs, so
    the checkpoint would hold the position before the batch it was trained on. Random states are restored
    when training starts, after Lightning has created the loader's iterator (which draws from them).
    """

    def __init__(self) -> None:
        self._saved: list[dict[str, Any]] | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is trained."""
        trainer.train_dataloader.acknowledge(batch)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gather the random states of all ranks."""
        states: list[Any] = [rng_state()]
        if trainer.world_size > 1:
            mine, states = states[0], [None] * trainer.world_size
            torch.distributed.all_gather_object(states, mine)
        checkpoint[_KEY] = states

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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore this rank's."""
        if self._saved is not None:
            restore_rng(self._saved[trainer.global_rank])
            self._saved = None


def rng_state() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    return {
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)), "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]), "gauss": float(numpy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }  # fmt: skip


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
