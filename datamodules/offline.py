"""Training on captured features: shards on disk and a manifest, without a control plane."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datamodules.base import FeatureDataModule, Split, nothing_held_out
from specforge.contracts import TokenCounts
from specforge.runtime.data_plane.feature_folder import FeatureFolder


class OfflineDataModule(FeatureDataModule):
    """Features from `specforge capture`.

    Args:
        features: folder with ``train`` and, for validation, ``heldout``.
        **options: options of every datamodule.
    """

    def __init__(self, features: str, **options: Any) -> None:
        super().__init__(**options)
        self.folder = Path(features)
        self._features: dict[str, FeatureFolder] = {}

    def setup(self, stage: str) -> None:
        """Read the manifests."""
        heldout = self.folder / "heldout"
        if stage == "fit" and "train" not in self._features:
            self._features["train"] = FeatureFolder.open(self.folder / "train")
        if "heldout" not in self._features and heldout.exists():
            self._features["heldout"] = FeatureFolder.open(heldout)
        if stage != "fit" and "heldout" not in self._features:
            raise nothing_held_out(heldout)

    def split(self, name: str) -> Split | None:
        """The split ``train`` or ``heldout``; None if there is none."""
        features = self._features.get(name)
        return None if features is None else Split(features.refs, features.store)

    def token_counts(self) -> TokenCounts | None:
        """Token counts of the training prompts; None if nothing is trained."""
        return self._features["train"].counts if "train" in self._features else None
