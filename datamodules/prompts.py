"""Base class of the datamodules that start from prompts; the features are produced during training."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal

from datamodules.base import FeatureDataModule, Split, nothing_held_out
from specforge.contracts import Provenance, TokenCounts
from specforge.data.prompts import PromptSet
from specforge.options import Dtype, PositiveInt


class PromptDataModule(FeatureDataModule):
    """Prompts from `specforge prepare`.

    Args:
        prompts: folder with ``train`` and, for validation, ``heldout``.
        dtype: compute dtype of the target, and dtype of the features; ``auto`` for that of the target's files.
        encoding: format in which features are sent or stored: ``raw``, or ``float8_e4m3fn``, 8 bits with a scale per
            token.
        max_bytes: maximum number of bytes of features to hold at once; at the limit, fewer batches are prefetched.
        mix_engines: train on features of several engines, which differ in their last bits: those that different
            producers run, or another one after a resume.
        **options: options of every datamodule.
    """

    def __init__(
        self,
        prompts: str,
        dtype: Dtype = "bfloat16",
        encoding: Literal["raw", "float8_e4m3fn"] = "raw",
        max_bytes: PositiveInt = 4 << 30,
        mix_engines: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.folder, self.encoding, self.max_bytes = Path(prompts), encoding, max_bytes
        self.dtype: str = dtype
        self.mix_engines = mix_engines
        self._splits: dict[str, Split] = {}
        self._counts: TokenCounts | None = None

    @abstractmethod
    def open_split(self, name: str, prompts: PromptSet) -> Split:
        """The samples of some prompts, and the store that gets them."""

    def setup(self, stage: str) -> None:
        """Read the prompts and open the stores of their samples."""
        self.dtype = self.module.target.compute_dtype(self.dtype)
        heldout = self.folder / "heldout"
        if stage != "fit" and not heldout.exists():
            raise nothing_held_out(heldout)
        if "heldout" not in self._splits and heldout.exists():
            self._splits["heldout"] = self.open_split("heldout", PromptSet.load(heldout))
        if "train" not in self._splits and stage == "fit":
            prompts = PromptSet.load(self.folder / "train")
            self._counts = prompts.counts
            self._splits["train"] = self.open_split("train", prompts)

    def split(self, name: str) -> Split | None:
        """The split ``train`` or ``heldout``; None if there is none."""
        return self._splits.get(name)

    def token_counts(self) -> TokenCounts | None:
        """Token counts of the training prompts; None if nothing is trained."""
        return self._counts

    def provenance(self, prompts: PromptSet, engine: str) -> Provenance:
        """Origin of the features of these prompts."""
        target, capture = self.module.target, self.module.spec.capture
        fingerprints = target.fingerprint, prompts.tokenizer
        return Provenance(target.name, *fingerprints, capture, self.dtype, encoding=self.encoding, engine=engine)
