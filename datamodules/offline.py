"""Training on captured features: a manifest of references, shards on disk, no control plane."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from specforge.contracts import SampleRef, TokenCounts
from specforge.errors import UserError
from specforge.runtime.data_plane.features import FeatureFolder
from specforge.runtime.data_plane.loader import FeatureDataLoader


class OfflineDataModule(pl.LightningDataModule):
    """Features that `specforge capture` wrote.

    Args:
        features: folder with ``train`` and, for validation, ``heldout``.
        batch_size: documents of a micro-batch; or
        max_tokens: most tokens of a micro-batch. Exactly one of the two.
        limit_samples: train on so many samples, drawn by the seed; all by default.
        seed: of the epochs' orders.
        prefetch: batches fetched ahead.
        bad_samples: what to do with a damaged sample: ``error`` stops, ``skip`` leaves it out and counts it.
        pad_to: pad batches to a multiple of this many tokens; it changes the speed (few shapes), not the result.
        val_batch_size: documents of a validation batch.
    """

    def __init__(
        self,
        features: str,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        limit_samples: int | None = None,
        seed: int = 0,
        prefetch: int = 2,
        bad_samples: Literal["error", "skip"] = "error",
        pad_to: int = 64,
        val_batch_size: int = 8,
    ) -> None:
        super().__init__()
        if (batch_size is None) == (max_tokens is None):
            raise UserError("data: give either batch_size or max_tokens")
        self.folder = Path(features)
        self.limits: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens}
        self.limit_samples, self.seed, self.prefetch = limit_samples, seed, prefetch
        self.bad_samples, self.pad_to, self.val_batch_size = bad_samples, pad_to, val_batch_size
        self.train_features: FeatureFolder | None = None
        self.val_features: FeatureFolder | None = None
        self._batches: int | None = None

    def setup(self, stage: str) -> None:
        """Read the manifests."""
        if self.train_features is None and stage == "fit":
            self.train_features = FeatureFolder.open(self.folder / "train")
        if self.val_features is None and (self.folder / "heldout").exists():
            self.val_features = FeatureFolder.open(self.folder / "heldout")
        if stage != "fit" and self.val_features is None:
            raise UserError(
                f"{self.folder / 'heldout'}: no such folder; there is nothing held out to validate on"
            )

    def sample_refs(self) -> Sequence[SampleRef]:
        """References of the samples to train on."""
        features = self.train_features or self.val_features
        refs = features.refs if features is not None else []
        if self.limit_samples is None or self.limit_samples >= len(refs):
            return refs
        return random.Random(self.seed).sample(refs, self.limit_samples)

    def token_counts(self) -> TokenCounts | None:
        """Token counts of the training prompts."""
        return self.train_features.counts if self.train_features is not None else None

    def batches_per_epoch(self) -> int:
        """Micro-batches of an epoch on each rank."""
        if self._batches is None:
            self._batches = len(self.train_dataloader())
        return self._batches

    def train_dataloader(self) -> FeatureDataLoader:
        """A fresh stream over the training samples."""
        assert self.train_features is not None
        return self._loader(
            self.train_features, list(self.sample_refs()), shuffle=True, pad_to=self.pad_to, **self.limits
        )

    def val_dataloader(self) -> FeatureDataLoader | list[Any]:
        """The held-out samples, in order; nothing where none are held out."""
        if self.val_features is None:
            return []
        return self._loader(
            self.val_features, self.val_features.refs, shuffle=False, pad_to=self.pad_to,
            batch_size=self.val_batch_size,
        )  # fmt: skip

    def test_dataloader(self) -> FeatureDataLoader | list[Any]:
        """The held-out samples."""
        return self.val_dataloader()

    def _loader(self, features: FeatureFolder, refs: list[SampleRef], **options: Any) -> FeatureDataLoader:
        trainer, module = self.trainer, self.trainer.lightning_module  # type: ignore[union-attr]
        return FeatureDataLoader(
            refs, features.store, module.spec, seed=self.seed, rank=trainer.global_rank,
            world_size=trainer.world_size, prefetch=self.prefetch, bad_samples=self.bad_samples,
            pin_memory=torch.cuda.is_available() and trainer.strategy.root_device.type == "cuda", **options,
        )  # fmt: skip
