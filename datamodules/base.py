"""What the datamodules share: the loaders. They differ in where references and tensors come from."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from specforge.contracts import SampleRef, TokenCounts
from specforge.errors import UserError
from specforge.runtime.data_plane.loader import FeatureDataLoader
from specforge.runtime.data_plane.store import SampleStore


class FeatureDataModule(pl.LightningDataModule):
    """Samples to train on, and held-out ones.

    Args:
        batch_size: documents of a micro-batch; or
        max_tokens: most tokens of a micro-batch. Exactly one of the two.
        limit_samples: train on so many samples, drawn by the seed; all by default.
        seed: of the epochs' orders.
        prefetch: batches fetched ahead.
        bad_samples: what to do with a damaged sample.
        pad_to: pad batches to a multiple of this many tokens.
        val_batch_size: documents of a validation batch.
    """

    def __init__(
        self,
        batch_size: int | None,
        max_tokens: int | None,
        limit_samples: int | None,
        seed: int,
        prefetch: int,
        bad_samples: str,
        pad_to: int,
        val_batch_size: int,
    ) -> None:
        super().__init__()
        if (batch_size is None) == (max_tokens is None):
            raise UserError("data: give either batch_size or max_tokens")
        self.limits: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens}
        self.limit_samples, self.seed, self.prefetch = limit_samples, seed, prefetch
        self.bad_samples, self.pad_to, self.val_batch_size = bad_samples, pad_to, val_batch_size
        self._batches: int | None = None

    @abstractmethod
    def split(self, name: str) -> tuple[Sequence[SampleRef], SampleStore] | None:
        """References and tensors of ``train`` or ``heldout``; None where there are none."""

    @abstractmethod
    def token_counts(self) -> TokenCounts | None:
        """Token counts of the training prompts."""

    def sample_refs(self) -> Sequence[SampleRef]:
        """References of the samples to train on."""
        part = self.split("train") or self.split("heldout")
        refs = part[0] if part is not None else []
        if self.limit_samples is None or self.limit_samples >= len(refs):
            return refs
        return random.Random(self.seed).sample(refs, self.limit_samples)

    def batches_per_epoch(self) -> int:
        """Micro-batches of an epoch on each rank."""
        if self._batches is None:
            self._batches = len(self.train_dataloader())
        return self._batches

    def train_dataloader(self) -> FeatureDataLoader:
        """A fresh stream over the training samples."""
        part = self.split("train")
        assert part is not None
        plan = self.trainer.lightning_module.training_plan  # type: ignore[union-attr]
        return self._loader(self.sample_refs(), part[1], shuffle=True, plan_batch=plan, **self.limits)

    def val_dataloader(self) -> FeatureDataLoader | list[Any]:
        """The held-out samples, in order; nothing where none are held out."""
        part = self.split("heldout")
        return [] if part is None else self._loader(*part, shuffle=False, batch_size=self.val_batch_size)

    def test_dataloader(self) -> FeatureDataLoader | list[Any]:
        """The held-out samples."""
        return self.val_dataloader()

    def _loader(self, refs: Sequence[SampleRef], store: SampleStore, **options: Any) -> FeatureDataLoader:
        trainer, module = self.trainer, self.trainer.lightning_module  # type: ignore[union-attr]
        return FeatureDataLoader(
            refs,
            store,
            module.spec,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            prefetch=self.prefetch,
            bad_samples=self.bad_samples,
            pad_to=self.pad_to,
            pin_memory=torch.cuda.is_available() and trainer.strategy.root_device.type == "cuda",
            **options,
        )
