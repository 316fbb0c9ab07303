"""Base class of all datamodules: common options and loaders. Subclasses differ in the source of samples."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import lightning.pytorch as pl
import torch

from specforge.contracts import Sample, StrategySpec, TokenCounts, TrainBatch
from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.options import NonNegativeInt, PositiveInt, Seed
from specforge.runtime.data_plane.loader import FeatureDataLoader
from specforge.runtime.data_plane.store import SampleStore


class Algorithm(Protocol):
    """The interface of LightningModules to datamodules."""

    spec: StrategySpec
    target: TargetFiles

    def training_plan(self, batch: TrainBatch) -> Any:
        """Index tensors of a training batch, on the CPU."""


class Split(NamedTuple):
    """Samples of ``train`` or ``heldout``, and the store that holds or produces their tensors."""

    samples: Sequence[Any]  # of the type that the store takes
    store: SampleStore[Any]


class FeatureDataModule(pl.LightningDataModule):
    """Samples to train on, and held-out ones.

    Args:
        batch_size: documents per micro-batch; give either this or max_tokens.
        max_tokens: maximum number of tokens per micro-batch; give either this or batch_size.
        limit_samples: train on this many samples, chosen by the seed (default: all); validation always takes all of
            its samples.
        seed: random seed for the order of each epoch.
        prefetch: maximum number of batches to prefetch.
        bad_samples: what to do with a sample that is damaged or cannot be produced: ``error`` stops, ``skip`` leaves it
            out and counts it.
        pad_to: pad batches to a multiple of this many tokens; affects speed (fewer shapes), not the result.
        val_batch_size: documents per validation batch.
    """

    def __init__(
        self,
        batch_size: PositiveInt | None = None,
        max_tokens: PositiveInt | None = None,
        limit_samples: PositiveInt | None = None,
        seed: Seed = 0,
        prefetch: NonNegativeInt = 2,
        bad_samples: Literal["error", "skip"] = "error",
        pad_to: PositiveInt = 64,
        val_batch_size: PositiveInt = 8,
    ) -> None:
        super().__init__()
        if (batch_size is None) == (max_tokens is None):
            raise UserError("data: give either batch_size or max_tokens")
        self.limits: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens}
        self.limit_samples, self.seed, self.prefetch = limit_samples, seed, prefetch
        self.bad_samples, self.pad_to, self.val_batch_size = bad_samples, pad_to, val_batch_size
        self._batches: int | None = None

    @abstractmethod
    def split(self, name: str) -> Split | None:
        """The split ``train`` or ``heldout``; None if there is none."""

    @abstractmethod
    def token_counts(self) -> TokenCounts | None:
        """Token counts of the training prompts; None if nothing is trained."""

    @property
    def module(self) -> Algorithm:
        """The LightningModule of the run."""
        module: Algorithm = self.trainer.lightning_module
        return module

    def sample_refs(self) -> Sequence[Sample]:
        """Samples to train on, or the held-out ones where nothing is trained."""
        part = self.split("train") or self.split("heldout")
        samples = part.samples if part is not None else []
        if self.limit_samples is None or self.limit_samples >= len(samples):
            return samples
        return random.Random(self.seed).sample(samples, self.limit_samples)

    def batches_per_epoch(self) -> int:
        """Micro-batches per epoch on each rank."""
        if self._batches is None:
            self._batches = len(self.train_dataloader())
        return self._batches

    def train_dataloader(self) -> FeatureDataLoader:
        """A new loader of the training samples.

        Raises:
            UserError: ranks share their batches (context parallelism), but could leave out different samples.
        """
        part = self.split("train")
        assert part is not None
        if self.shares_batches and self.bad_samples == "skip":
            raise UserError(
                "data.bad_samples: skip does not work with context parallelism, because ranks that share a batch could "
                "leave out different samples; set error"
            )
        options = {"plan_batch": self.module.training_plan, **self.limits}
        return self._loader(self.sample_refs(), part.store, self._train_shard(), shuffle=True, **options)

    @property
    def shares_batches(self) -> bool:
        """Whether several ranks train on the same batches (context parallelism)."""
        _, shards = self._train_shard()
        return shards < self.trainer.world_size

    def _train_shard(self) -> tuple[int, int]:
        """Which of how many shards of the training batches this rank reads."""
        trainer = self.trainer
        shard = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
        return (shard["rank"], shard["num_replicas"]) if shard else (trainer.global_rank, trainer.world_size)

    def val_dataloader(self) -> FeatureDataLoader | list[Any]:
        """A loader of the held-out samples, in order; empty if none are held out."""
        part = self.split("heldout")
        if part is None:
            return []
        shard = self.trainer.global_rank, self.trainer.world_size
        return self._loader(*part, shard, shuffle=False, acknowledged=False, batch_size=self.val_batch_size)

    def _loader(
        self, samples: Sequence[Sample], store: SampleStore[Any], shard: tuple[int, int], **options: Any
    ) -> FeatureDataLoader:
        return FeatureDataLoader(
            samples,
            store,
            self.module.spec,
            seed=self.seed,
            rank=shard[0],
            world_size=shard[1],
            prefetch=self.prefetch,
            bad_samples=self.bad_samples,
            pad_to=self.pad_to,
            pin_memory=torch.cuda.is_available() and self.trainer.strategy.root_device.type == "cuda",
            **options,
        )


def nothing_held_out(folder: Path) -> UserError:
    """The error for validating without held-out samples."""
    return UserError(f"{folder}: no such folder; there is nothing held out to validate on")


def batch_bytes(samples: Sequence[Sample], batch_size: int | None, max_tokens: int | None) -> int:
    """Maximum number of bytes of features in a batch within these limits."""
    if max_tokens is None:
        return sum(sorted((sample.nbytes for sample in samples), reverse=True)[:batch_size])
    return int(max_tokens * max(sample.nbytes / sample.num_tokens for sample in samples))
