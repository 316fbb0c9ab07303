"""Training on captured features: a manifest of references, shards on disk, no control plane."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from datamodules.base import FeatureDataModule
from specforge.contracts import SampleRef, TokenCounts
from specforge.errors import UserError
from specforge.options import NonNegativeInt, PositiveInt, Seed
from specforge.runtime.data_plane.feature_folder import FeatureFolder
from specforge.runtime.data_plane.store import SampleStore


class OfflineDataModule(FeatureDataModule):
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
        batch_size: PositiveInt | None = None,
        max_tokens: PositiveInt | None = None,
        limit_samples: PositiveInt | None = None,
        seed: Seed = 0,
        prefetch: NonNegativeInt = 2,
        bad_samples: Literal["error", "skip"] = "error",
        pad_to: PositiveInt = 64,
        val_batch_size: PositiveInt = 8,
    ) -> None:
        super().__init__(batch_size, max_tokens, limit_samples, seed, prefetch, bad_samples, pad_to, val_batch_size)
        self.folder = Path(features)
        self.train_features: FeatureFolder | None = None
        self.val_features: FeatureFolder | None = None

    def setup(self, stage: str) -> None:
        """Read the manifests."""
        if self.train_features is None and stage == "fit":
            self.train_features = FeatureFolder.open(self.folder / "train")
        if self.val_features is None and (self.folder / "heldout").exists():
            self.val_features = FeatureFolder.open(self.folder / "heldout")
        if stage != "fit" and self.val_features is None:
            raise UserError(f"{self.folder / 'heldout'}: no such folder; there is nothing held out to validate on")

    def split(self, name: str) -> tuple[Sequence[SampleRef], SampleStore] | None:
        """References and tensors of ``train`` or ``heldout``."""
        features = self.train_features if name == "train" else self.val_features
        return None if features is None else (features.refs, features.store)

    def token_counts(self) -> TokenCounts | None:
        """Token counts of the training prompts."""
        return self.train_features.counts if self.train_features is not None else None
