"""Training on features that the target makes while the draft trains: prompts, and the target in this process.

The same worker, store and stream as offline; no thread but the stream's own, no file and no socket. The prefetching
thread runs the target on the prompts of the next batches while this one is trained.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from datamodules.base import FeatureDataModule
from specforge.contracts import PromptTask, Provenance, SampleRef, TokenCounts
from specforge.data.prompts import PromptSet
from specforge.errors import UserError
from specforge.inference.rollout_worker import RolloutWorker, expect, plan_batches
from specforge.inference.target_engine import HFTargetEngine, HTTPTargetEngine, TargetEngine
from specforge.options import Dtype, NonNegativeInt, PositiveInt, Seed
from specforge.runtime.data_plane.local import MemoryBackend
from specforge.runtime.data_plane.on_demand import ProducedSamples
from specforge.runtime.data_plane.store import FeatureStore, SampleStore
from specforge.system import pick_device


class OnlineDataModule(FeatureDataModule):
    """Prompts from `specforge prepare`; their features are made when they are needed and freed when they are trained.

    The target reads each prompt by itself, so features do not depend on what they are made together with: a run that
    was killed goes on bit for bit, and so does one on features of `specforge capture --batch_tokens 1`.

    Args:
        prompts: folder with ``train`` and, for validation, ``heldout``.
        batch_size: documents of a micro-batch; or
        max_tokens: most tokens of a micro-batch. Exactly one of the two.
        dtype: compute dtype of the target, and that of the features.
        device: where the target runs: cpu, cuda, ...; ``auto`` is where the draft is trained.
        max_bytes: most bytes of features in memory; fewer batches are fetched ahead where they would not fit.
        keep_bytes: keep so many bytes of trained features for the next epochs; the rest is made again.
        limit_samples: train on so many samples, drawn by the seed; all by default.
        seed: of the epochs' orders.
        prefetch: most batches fetched ahead.
        bad_samples: what to do with a sample of which the target makes NaN: ``error`` stops, ``skip`` leaves it out.
        pad_to: pad batches to a multiple of this many tokens; it changes the speed (few shapes), not the result.
        val_batch_size: documents of a validation batch.
        server: address of `specforge target serve`, which then runs the target in place of this process.
        token_file: holds that server's token.
        encoding: the server sends features as they are, or in 8 bits.
    """

    def __init__(
        self,
        prompts: str,
        batch_size: PositiveInt | None = None,
        max_tokens: PositiveInt | None = None,
        dtype: Dtype = "bfloat16",
        device: str = "auto",
        max_bytes: PositiveInt = 4 << 30,
        keep_bytes: NonNegativeInt = 0,
        limit_samples: PositiveInt | None = None,
        seed: Seed = 0,
        prefetch: NonNegativeInt = 2,
        bad_samples: Literal["error", "skip"] = "error",
        pad_to: PositiveInt = 64,
        val_batch_size: PositiveInt = 8,
        server: str | None = None,
        token_file: str = "runs/target.token",
        encoding: Literal["raw", "float8_e4m3fn"] = "raw",
    ) -> None:
        super().__init__(batch_size, max_tokens, limit_samples, seed, prefetch, bad_samples, pad_to, val_batch_size)
        self.folder = Path(prompts)
        self.dtype, self.device = dtype, device if device == "auto" else pick_device(device)
        self.max_bytes, self.keep_bytes = max_bytes, keep_bytes
        if server is None and encoding != "raw":
            raise UserError(
                f"data.encoding is {encoding}, but features neither travel nor are stored here; leave it out, or "
                "name a data.server"
            )
        self.server, self.token_file, self.encoding = server, Path(token_file), encoding
        self._engine: TargetEngine | None = None
        self._engine_lock = threading.Lock()  # the streams of training and validation share the target
        self._splits: dict[str, tuple[list[SampleRef], ProducedSamples]] = {}
        self._counts: TokenCounts | None = None

    def setup(self, stage: str) -> None:
        """Read the prompts and load the target."""
        if stage == "fit" and "train" not in self._splits:
            prompts = PromptSet.load(self.folder / "train")
            self._counts = prompts.counts
            self._splits["train"] = self._produced(prompts, until_read=False)
            self._check_room(self._splits["train"][0], self.keep_bytes, **self.limits)
        if "heldout" not in self._splits and (self.folder / "heldout").exists():
            self._splits["heldout"] = self._produced(PromptSet.load(self.folder / "heldout"), until_read=True)
            self._check_room(self._splits["heldout"][0], 0, self.val_batch_size, None)
        if stage != "fit" and "heldout" not in self._splits:
            raise UserError(f"{self.folder / 'heldout'}: no such folder; there is nothing held out to validate on")

    def split(self, name: str) -> tuple[Sequence[SampleRef], SampleStore] | None:
        """References and tensors of ``train`` or ``heldout``."""
        return self._splits.get(name)

    def token_counts(self) -> TokenCounts | None:
        """Token counts of the training prompts."""
        return self._counts

    def _produced(self, prompts: PromptSet, until_read: bool) -> tuple[list[SampleRef], ProducedSamples]:
        trainer, module = self.trainer, self.trainer.lightning_module  # type: ignore[union-attr]
        if self._engine is None:
            device = str(trainer.strategy.root_device) if self.device == "auto" else self.device
            self._engine = (
                HFTargetEngine(module.target, self.dtype, device)
                if self.server is None
                else HTTPTargetEngine(self.server, self.token_file, module.target, self.dtype, encoding=self.encoding)
            )
        provenance = Provenance(
            module.target.name, module.target.fingerprint, prompts.tokenizer, module.spec.capture, self.dtype
        )
        store = FeatureStore(MemoryBackend(), max_bytes=self.max_bytes)
        committed: list[SampleRef] = []
        worker = RolloutWorker(self._engine, store, committed.extend, provenance)
        tasks = [task for batch in plan_batches(prompts.tasks, 1) for task in batch]  # in the order of capture
        self._engine.check(provenance.capture)
        travelled = replace(provenance, encoding=self.encoding)  # which a resumed run must not change
        refs = [replace(ref, provenance=travelled) for ref in expect(tasks, provenance, module.target.hidden_size)]
        by_name = dict(zip((ref.sample_id for ref in refs), tasks, strict=True))

        def produce(name: str) -> SampleRef:
            with self._engine_lock:
                return _produce(worker, by_name[name], committed)

        keep = 0 if until_read else self.keep_bytes
        return refs, ProducedSamples(store, produce, keep_bytes=keep, until_read=until_read)

    def _check_room(self, refs: Sequence[SampleRef], keep: int, batch_size: int | None, max_tokens: int | None) -> None:
        sizes = sorted((ref.nbytes for ref in refs), reverse=True)
        per_token = max(ref.nbytes / ref.num_tokens for ref in refs)
        batch = sum(sizes[:batch_size]) if max_tokens is None else int(max_tokens * per_token)
        if batch + keep > self.max_bytes:
            kept = f" and keep_bytes {keep:,}" if keep else ""
            raise UserError(
                f"data: the features of a batch may take {batch:,} bytes; with them{kept}, max_bytes must be at "
                f"least {batch + keep:,}, not {self.max_bytes:,}"
            )


def _produce(worker: RolloutWorker, task: PromptTask, committed: list[SampleRef]) -> SampleRef:
    for _ in worker.produce([task], 1):
        pass
    return committed.pop()
