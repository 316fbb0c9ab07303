"""Training batches: planned, prefetched, checked, packed, and resumed exactly.

The loader's position counts *trained* batches, not fetched ones. Each batch carries a cursor, the position after that
batch; the trainer acknowledges the batch once it is trained, and ``state_dict`` returns the last acknowledged cursor.
So batches that were prefetched but not trained are fetched again after a resume. Resuming in the middle of an epoch
reads nothing that it skips, because the plan needs only lengths.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor

import specforge.stopping as stopping
from specforge.contracts import (
    ANY_ENGINE,
    AUX_HIDDEN_STATES,
    INPUT_IDS,
    LOSS_MASK,
    Sample,
    SampleT,
    StrategySpec,
    TrainBatch,
    content_id,
    engine_label,
    mask_spans,
)
from specforge.errors import UserError
from specforge.runtime.data_plane.packing import BatchPlan
from specforge.runtime.data_plane.store import BadSampleError, SampleStore, StoreFullError

logger = logging.getLogger(__name__)

_LATER = ("dtype", "encoding", "engine")  # missing from checkpoints of earlier versions


class RunLength(NamedTuple):
    """How far a run trains."""

    batches: int  # micro-batches per epoch on each rank
    accumulate: int  # micro-batches per optimizer step
    max_steps: int = -1  # optimizer steps of the run; negative for no limit
    max_epochs: int | None = None  # epochs of the run; None or negative for no limit

    def ends_before(self, epoch: int, batch: int) -> bool:
        """Whether the run is over before this batch of this epoch."""
        step = epoch * -(-self.batches // self.accumulate) + batch // self.accumulate
        epochs = -1 if self.max_epochs is None else self.max_epochs
        return 0 <= epochs <= epoch or 0 <= self.max_steps <= step


class FeatureDataLoader(Generic[SampleT]):
    """Packed batches of samples; one pass over the loader is one epoch.

    Args:
        samples: the samples of an epoch.
        store: holds or produces their tensors.
        spec: requirements of the algorithm.
        batch_size: documents per batch; or
        max_tokens: maximum number of tokens per batch. Give exactly one of the two.
        shuffle: draw a new order every epoch.
        seed: random seed for the orders.
        rank: this process.
        world_size: number of processes. Each gets the same number of batches; the last ones may be empty.
        prefetch: maximum number of batches to prefetch, fewer if the store is full; 0 fetches in the caller's thread.
        bad_samples: ``error`` stops at a damaged sample, ``skip`` leaves it out and counts it.
        pad_to: pad batches to a multiple of this many tokens.
        pin_memory: put batches into page-locked memory.
        acknowledged: whether batches will be acknowledged; if not, their samples are released once they are packed.
        plan_batch: makes the plan of a batch, in the thread that fetches it; None makes none.

    Raises:
        UserError: a sample lacks a required feature or exceeds ``max_tokens``, or a number is out of range.
    """

    def __init__(
        self,
        samples: Sequence[SampleT],
        store: SampleStore[SampleT],
        spec: StrategySpec,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
        bad_samples: str = "error",
        pad_to: int = 1,
        pin_memory: bool = False,
        acknowledged: bool = True,
        plan_batch: Callable[[TrainBatch], Any] | None = None,
    ) -> None:
        check_samples(samples, spec)
        if prefetch < 0 or pad_to < 1:
            raise UserError("batches: prefetch must be at least 0 and pad_to at least 1")
        self.samples, self.store, self.spec = list(samples), store, spec
        self.rank, self.world_size = rank, world_size
        self.prefetch, self.bad_samples = prefetch, bad_samples
        self.pad_to, self.pin_memory, self.acknowledged = pad_to, pin_memory, acknowledged
        self.plan_batch = plan_batch
        self.quarantined: dict[str, str] = {}
        try:
            self.plan = BatchPlan(
                [sample.num_tokens for sample in self.samples],
                batch_size=batch_size,
                max_tokens=max_tokens,
                shuffle=shuffle,
                seed=seed,
            )
        except ValueError as error:
            raise UserError(f"batches: {error}") from error
        self._empty = _empty_sample(self.samples[0])
        self._identity: dict[str, Any] = {
            "samples": content_id("".join(sample.sample_id for sample in self.samples).encode()),
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "shuffle": shuffle,
            "seed": seed,
            "world_size": world_size,
            "dtype": self.samples[0].provenance.dtype,
            "encoding": self.samples[0].provenance.encoding,
            "engine": " and ".join(sorted({engine_label(sample.provenance.engine) for sample in self.samples})),
        }
        self._start = (0, 0)
        self._acknowledged = {"epoch": 0, "batch": 0}
        self._waited, self._since = 0.0, time.perf_counter()
        self._failure: UserError | None = None  # of the store, since the last fetch

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return -(-len(self.plan) // self.world_size)

    def __iter__(self) -> Iterator[TrainBatch]:
        """Stream the next epoch, or the rest of the epoch named by a loaded state.

        Creating an iterator does not move the position until a batch is drawn: Lightning creates one as a test.
        """
        return self._stream()

    def state_dict(self) -> dict[str, Any]:
        """Position after the last acknowledged batch, and the inputs of the plan."""
        return {**self._acknowledged, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position.

        Raises:
            UserError: the samples or the batching differ from those of the saved run.
        """
        for key, value in self._identity.items():
            known = key in state or key not in _LATER
            if known and state.get(key) != value and ANY_ENGINE not in (value, state.get(key)):
                name = "world_size, the number of ranks with batches of their own," if key == "world_size" else key
                what = "the training samples" if key == "samples" else f"{name} ({state.get(key)}, now {value})"
                raise UserError(
                    f"cannot resume in the middle of the data: {what} changed since the checkpoint; restore it, "
                    "or start a new run from the weights alone (model.init_from)"
                )
        epoch, batch = int(state["epoch"]), int(state["batch"])
        self._start = (epoch + 1, 0) if batch >= len(self) else (epoch, batch)
        self._acknowledged = {"epoch": epoch, "batch": batch}

    def start(self, step: int, length: RunLength) -> None:
        """Start training at this position, after the checkpoint of ``step``; called on every rank."""
        self.store.start(step, partial(self._until_end, length))
        self._waited, self._since = 0.0, time.perf_counter()

    def acknowledge(self, batch: TrainBatch, step: int) -> None:
        """Record that optimizer step ``step`` uses a batch.

        If the store fails, the next fetch raises its error, as the step has to be finished before it can be saved.

        Raises:
            UserError: another trainer has replaced this one.
        """
        self._acknowledged = batch.cursor
        with self._raised_by_next_fetch():
            self.store.trained(batch.sample_ids, batch.cursor["epoch"], step)

    def durable(self, step: int) -> None:
        """Record that the checkpoint of ``step`` is complete; called on every rank.

        If the store fails, the next fetch raises its error.
        """
        with self._raised_by_next_fetch():
            self.store.durable(step)

    def check(self) -> None:
        """Raise what the next fetch would raise.

        Raises:
            UserError: the store has failed since the last fetch.
        """
        if self._failure is not None:
            raise self._failure

    def replaced(self) -> bool:
        """Whether another trainer has replaced this one, which must not save any more; the first rank knows."""
        return self.store.replaced()

    @contextmanager
    def _raised_by_next_fetch(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            if self.replaced():
                raise
            self._failure = self._failure or error

    def flow(self) -> dict[str, float]:
        """Figures of the store since the last call, and ``wait``, the share of time spent waiting for batches.

        Empty for stores whose samples are not produced during training.
        """
        found: dict[str, float] = {}
        with self._raised_by_next_fetch():
            found = self.store.flow()
        if found:
            now = time.perf_counter()
            found["wait"] = self._waited / max(now - self._since, 1e-9)
            self._waited, self._since = 0.0, now
        return found

    def upcoming(self, rank: int) -> Iterator[tuple[int, int, list[SampleT]]]:
        """Endless stream of the batches that a rank will ask for: epoch, number in the epoch, samples."""
        epoch, first = self._start
        while True:
            for number, samples in list(enumerate(self._batches(epoch, rank)))[first:]:
                yield epoch, number, samples
            epoch, first = epoch + 1, 0

    def _until_end(self, length: RunLength, rank: int) -> Iterator[tuple[int, list[SampleT]]]:
        for epoch, number, samples in self.upcoming(rank):
            if number >= length.batches:  # left out by trainer.limit_train_batches
                continue
            if length.ends_before(epoch, number):
                return
            yield epoch, samples

    def _batches(self, epoch: int, rank: int) -> Iterator[list[SampleT]]:
        batches = self.plan.epoch(epoch)[rank :: self.world_size]
        for n in range(len(self)):
            yield [self.samples[int(i)] for i in (batches[n] if n < len(batches) else ())]

    def _stream(self) -> Iterator[TrainBatch]:
        epoch, first = self._start
        self._start = (epoch + 1, 0)
        batches = list(self._batches(epoch, self.rank))[first:]
        work = deque((samples, {"epoch": epoch, "batch": n}) for n, samples in enumerate(batches, first + 1))
        torch.get_num_threads()  # fixes this thread's number before the fetching threads set their own
        if self.prefetch == 0:
            for samples, cursor in work:
                self.check()
                self.store.reserve(samples)
                yield self._timed(partial(self._load, samples, cursor))
            return
        pending: deque[tuple[list[SampleT], Future[TrainBatch]]] = deque()
        pool = ThreadPoolExecutor(self.store.readers, "features", initializer=_stay_single_threaded)
        try:
            while work or pending:
                self.check()
                while work and len(pending) <= self.prefetch:
                    # The next batch is fetched even if there is no space for it: space may never become free.
                    if not self.store.reserve(work[0][0]) and pending:
                        break
                    samples, cursor = work.popleft()
                    pending.append((samples, pool.submit(self._load, samples, cursor)))
                # It is still pending, so that leaving this wait interrupts it.
                batch = self._timed(partial(self._wait, pending[0][1]))
                pending.popleft()
                yield batch
        finally:
            if pending:
                self.store.interrupt()
            pool.shutdown(wait=not stopping.stop_requested(), cancel_futures=True)
            for samples, _ in pending:
                self.store.release([sample.sample_id for sample in samples])

    def _wait(self, fetched: Future[TrainBatch]) -> TrainBatch:
        """Wait for a batch; outside the main thread, nothing but the callback ends that when the run stops."""
        with stopping.call_on_stop(self.store.interrupt):
            try:
                return fetched.result()
            except UserError:
                stopping.check()
                raise

    def _timed(self, wait: Callable[[], TrainBatch]) -> TrainBatch:
        start = time.perf_counter()
        batch = wait()
        self._waited += time.perf_counter() - start
        return batch

    def _load(self, samples: Iterable[SampleT], cursor: dict[str, int]) -> TrainBatch:
        tensors: list[dict[str, Tensor]] = []
        kept: list[Sample] = []
        for sample in samples:
            try:
                tensors.append(self.store.get(sample))
            except BadSampleError as error:
                self._quarantine(sample, error)
                continue
            except StoreFullError as error:
                raise UserError(f"a batch does not fit into memory for features: {error}") from error
            kept.append(sample)
        batch = collate(tensors, kept, self.spec, self._empty, self.pad_to, pin_memory=self.pin_memory)
        if not self.acknowledged:
            self.store.release(batch.sample_ids)
        batch.cursor = cursor
        batch.plan = None if self.plan_batch is None else self.plan_batch(batch)
        return batch.pin_memory() if self.pin_memory else batch

    def _quarantine(self, sample: Sample, error: BadSampleError) -> None:
        if self.bad_samples == "error":
            raise UserError(f"{error} (from {sample.source}); skip such samples with data.bad_samples: skip") from error
        if sample.sample_id not in self.quarantined:
            self.quarantined[sample.sample_id] = error.reason
            logger.warning("left out %s (from %s)", error, sample.source)


def _stay_single_threaded() -> None:
    """A second pool of OpenMP threads would compete with the training step (twice slower on two cores)."""
    torch.set_num_threads(1)


def collate(
    tensors: Sequence[dict[str, Tensor]],
    samples: Sequence[Sample],
    spec: StrategySpec,
    empty: dict[str, Tensor],
    pad_to: int = 1,
    *,
    pin_memory: bool = False,
) -> TrainBatch:
    """Pack samples end to end into one flat row, padded to a multiple of ``pad_to`` tokens; the batch holds copies.

    ``empty`` has the tensors of a sample without tokens, for a batch without samples. With ``pin_memory``, features are
    packed into page-locked memory, which torch reuses, so that no further copy is needed.
    """
    lengths = tuple(sample.num_tokens for sample in samples)
    padding = -sum(lengths) % pad_to

    def pack(name: str, pin_memory: bool = False) -> Tensor:
        parts = [sample[name] for sample in tensors] or [empty[name]]
        if padding:
            parts.append(parts[0].new_zeros(padding, *parts[0].shape[1:]))
        rows = (sum(map(len, parts)), *parts[0].shape[1:])
        return torch.cat(parts, out=torch.empty(rows, dtype=parts[0].dtype, pin_memory=pin_memory))

    mask = pack(LOSS_MASK).bool()
    return TrainBatch(
        input_ids=pack(INPUT_IDS).long(),
        loss_mask=mask,
        features={name: pack(name, pin_memory) for name in spec.features},
        lengths=lengths,
        spans=mask_spans(mask, lengths),
        sample_ids=tuple(sample.sample_id for sample in samples),
    )


def _empty_sample(sample: Sample) -> dict[str, Tensor]:
    return {f.name: torch.zeros(0, *f.shape[1:], dtype=getattr(torch, f.dtype)) for f in sample.features}


def check_samples(samples: Sequence[Sample], spec: StrategySpec) -> None:
    """Reject samples that the algorithm cannot use.

    Raises:
        UserError: there are none, or one has the wrong features or is too short.
    """
    if not samples:
        raise UserError("features: the folder contains no samples")
    first = _feature_types(samples[0])
    for sample in samples:
        captured = sample.provenance.capture
        if AUX_HIDDEN_STATES in spec.features and captured.layer_ids != spec.capture.layer_ids:
            raise UserError(
                f"features of sample {sample.sample_id} hold layers {list(captured.layer_ids)}, but {spec.algorithm} "
                f"reads {list(spec.capture.layer_ids)}; capture with --recipe, or set model.layer_ids (for a new draft)"
            )
        missing = sorted({*spec.features, INPUT_IDS, LOSS_MASK} - {feature.name for feature in sample.features})
        if missing:
            raise UserError(f"features of sample {sample.sample_id} lack {missing[0]}, which {spec.algorithm} reads")
        if _feature_types(sample) != first:
            raise UserError(
                f"features of sample {sample.sample_id} are {_feature_types(sample)}, but those of sample "
                f"{samples[0].sample_id} are {first}; capture them again"
            )
        if sample.num_tokens < spec.min_tokens:
            raise UserError(
                f"sample {sample.sample_id} (from {sample.source}) has {sample.num_tokens} tokens; "
                f"{spec.algorithm} needs at least {spec.min_tokens}"
            )


def _feature_types(sample: Sample) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape per token of each feature."""
    return {feature.name: (feature.dtype, feature.shape[1:]) for feature in sample.features}
