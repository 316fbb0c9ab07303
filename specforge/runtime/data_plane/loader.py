"""The stream of training batches: plan, fetch ahead, check, pack, and a position that survives a crash.

The position of the stream is what was *trained*, not what was fetched. Every batch carries the cursor of the
position behind it; the trainer acknowledges it after the step, and ``state_dict`` returns the last
acknowledged one. So whatever was fetched ahead and not trained is fetched again after a resume, and
skipping to the middle of an epoch reads nothing, because the plan needs only lengths.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from specforge import stopping
from specforge.contracts import (
    AUX_HIDDEN_STATES,
    INPUT_IDS,
    LOSS_MASK,
    SampleRef,
    StrategySpec,
    TrainBatch,
    content_id,
    mask_spans,
)
from specforge.errors import UserError
from specforge.runtime.data_plane.packing import BatchPlan
from specforge.runtime.data_plane.store import BadSampleError, SampleStore, StoreFullError

logger = logging.getLogger(__name__)

_LATER = ("dtype", "encoding")  # parts of a state that checkpoints of the first version lack


class FeatureDataLoader:
    """Packed batches of stored samples; one pass over it is an epoch.

    Args:
        refs: committed samples.
        store: holds their tensors, or produces them.
        spec: what the algorithm reads.
        batch_size: documents of a batch; or
        max_tokens: most tokens of a batch. Exactly one of the two is given.
        shuffle: a new order every epoch.
        seed: of the orders.
        rank: this process.
        world_size: all processes; each gets the same number of batches, the last ones may be empty.
        prefetch: most batches to fetch ahead, fewer where the store has no room; 0 fetches in the caller's thread.
        bad_samples: ``error`` stops at a damaged sample, ``skip`` leaves it out and counts it.
        pad_to: pad batches to a multiple of this many tokens.
        pin_memory: put batches in page-locked memory.
        plan_batch: makes the plan of a batch, in the thread that fetches it; None leaves batches without.

    Raises:
        UserError: a sample lacks what the spec asks for or is longer than ``max_tokens``, or a number is out of range.
    """

    def __init__(
        self,
        refs: Sequence[SampleRef],
        store: SampleStore,
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
        plan_batch: Callable[[TrainBatch], Any] | None = None,
    ) -> None:
        check_refs(refs, spec)
        if prefetch < 0 or pad_to < 1:
            raise UserError("batches: prefetch must be at least 0 and pad_to at least 1")
        self.refs, self.store, self.spec = list(refs), store, spec
        self.rank, self.world_size = rank, world_size
        self.prefetch, self.bad_samples = prefetch, bad_samples
        self.pad_to, self.pin_memory, self.plan_batch = pad_to, pin_memory, plan_batch
        self.quarantined: dict[str, str] = {}
        try:
            self.plan = BatchPlan(
                [ref.num_tokens for ref in refs],
                batch_size=batch_size,
                max_tokens=max_tokens,
                shuffle=shuffle,
                seed=seed,
            )
        except ValueError as error:
            raise UserError(f"batches: {error}") from error
        self._empty = _empty_sample(self.refs[0])
        ids = "".join(ref.sample_id for ref in self.refs).encode()
        self._identity = {
            "samples": content_id(ids),
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "shuffle": shuffle,
            "seed": seed,
            "world_size": world_size,
            "dtype": self.refs[0].provenance.dtype,
            "encoding": self.refs[0].provenance.encoding,
        }
        self._start = (0, 0)
        self._acknowledged = {"epoch": 0, "batch": 0}

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        return -(-len(self.plan) // self.world_size)

    def __iter__(self) -> Iterator[TrainBatch]:
        """Stream one epoch: the next one, or the rest of the one that a loaded state names.

        An iterator that nobody draws from, such as Lightning's trial of every loader, moves nothing.
        """
        return self._stream()

    def state_dict(self) -> dict[str, Any]:
        """Position behind the last acknowledged batch, and what the plan was made from."""
        return {**self._acknowledged, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            UserError: the samples or the batching are not those of the saved run.
        """
        for key, value in self._identity.items():
            known = key in state or key not in _LATER
            if known and state.get(key) != value:
                what = "the training samples" if key == "samples" else f"{key} ({state.get(key)}, now {value})"
                raise UserError(
                    f"cannot resume in the middle of the data: {what} changed since the checkpoint; restore it, "
                    "or start a new run from the weights alone (model.init_from)"
                )
        epoch, batch = int(state["epoch"]), int(state["batch"])
        self._start = (epoch + 1, 0) if batch >= len(self) else (epoch, batch)
        self._acknowledged = {"epoch": epoch, "batch": batch}

    def acknowledge(self, batch: TrainBatch) -> None:
        """Record that a batch was trained."""
        self._acknowledged = batch.cursor
        self.store.free(batch.sample_ids)

    def upcoming(self, rank: int) -> Iterator[tuple[int, int, list[SampleRef]]]:
        """Every batch that a rank will ask for, epoch after epoch: its epoch, its number in it, its samples."""
        epoch, first = self._start
        while True:
            for number, refs in list(enumerate(self._batches(epoch, rank)))[first:]:
                yield epoch, number, refs
            epoch, first = epoch + 1, 0

    def _batches(self, epoch: int, rank: int) -> Iterator[list[SampleRef]]:
        batches = self.plan.epoch(epoch)[rank :: self.world_size]
        for n in range(len(self)):
            yield [self.refs[int(i)] for i in (batches[n] if n < len(batches) else ())]

    def _stream(self) -> Iterator[TrainBatch]:
        epoch, first = self._start
        self._start = (epoch + 1, 0)
        batches = list(self._batches(epoch, self.rank))[first:]
        work = deque((refs, {"epoch": epoch, "batch": n}) for n, refs in enumerate(batches, first + 1))
        torch.get_num_threads()  # fixes this thread's number before the fetching threads set their own
        if self.prefetch == 0:
            for refs, cursor in work:
                self.store.reserve(refs)
                yield self._load(refs, cursor)
            return
        pending: deque[tuple[list[SampleRef], Future[TrainBatch]]] = deque()
        pool = ThreadPoolExecutor(self.store.readers, "features", initializer=_stay_single_threaded)
        try:
            while work or pending:
                while work and len(pending) <= self.prefetch:
                    # The batch that is wanted now is fetched even where there is no room: it may never come.
                    if not self.store.reserve(work[0][0]) and pending:
                        break
                    refs, cursor = work.popleft()
                    pending.append((refs, pool.submit(self._load, refs, cursor)))
                batch = pending[0][1].result()  # it stays pending, so that whoever ends this wait interrupts it
                pending.popleft()
                yield batch
        finally:
            if pending:
                self.store.interrupt()
            pool.shutdown(wait=not stopping.asked(), cancel_futures=True)
            for refs, _ in pending:
                self.store.free([ref.sample_id for ref in refs])

    def _load(self, refs: Iterable[SampleRef], cursor: dict[str, int]) -> TrainBatch:
        samples: list[dict[str, Tensor]] = []
        kept: list[SampleRef] = []
        leases = []
        try:
            for ref in refs:
                try:
                    leases.append(self.store.get(ref))
                except BadSampleError as error:
                    self._quarantine(ref, error)
                    continue
                except StoreFullError as error:
                    raise UserError(f"a batch does not fit into memory for features: {error}") from error
                samples.append(leases[-1].tensors)
                kept.append(ref)
            batch = collate(samples, kept, self.spec, self._empty, self.pad_to, pin_memory=self.pin_memory)
        finally:
            for lease in leases:
                self.store.release(lease)
        batch.cursor = cursor
        batch.plan = None if self.plan_batch is None else self.plan_batch(batch)
        return batch.pin_memory() if self.pin_memory else batch

    def _quarantine(self, ref: SampleRef, error: BadSampleError) -> None:
        if self.bad_samples == "error":
            raise UserError(f"{error} (from {ref.source}); skip such samples with data.bad_samples: skip") from error
        if ref.sample_id not in self.quarantined:
            self.quarantined[ref.sample_id] = error.reason
            logger.warning("left out %s (from %s)", error, ref.source)


def _stay_single_threaded() -> None:
    """A second pool of OpenMP threads would spin against the training step's (twice slower on two cores)."""
    torch.set_num_threads(1)


def collate(
    samples: Sequence[dict[str, Tensor]],
    refs: Sequence[SampleRef],
    spec: StrategySpec,
    empty: dict[str, Tensor],
    pad_to: int = 1,
    *,
    pin_memory: bool = False,
) -> TrainBatch:
    """Pack samples end to end into a flat row; the tensors are copies.

    Args:
        samples: tensors of each sample, by name.
        refs: their references.
        spec: which tensors the algorithm reads.
        empty: the tensors of a sample without tokens, for a batch without samples.
        pad_to: pad to a multiple of this many tokens.
        pin_memory: pack the features in page-locked memory, which is used again and need not be copied into later.
    """
    lengths = tuple(ref.num_tokens for ref in refs)
    padding = -sum(lengths) % pad_to

    def pack(name: str, pin_memory: bool = False) -> Tensor:
        parts = [sample[name] for sample in samples] or [empty[name]]
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
        sample_ids=tuple(ref.sample_id for ref in refs),
    )


def _empty_sample(ref: SampleRef) -> dict[str, Tensor]:
    return {f.name: torch.zeros(0, *f.shape[1:], dtype=getattr(torch, f.dtype)) for f in ref.features}


def check_refs(refs: Sequence[SampleRef], spec: StrategySpec) -> None:
    """Refuse samples that the algorithm cannot use.

    Raises:
        UserError: there are none, or one was captured differently or is too short.
    """
    if not refs:
        raise UserError("features: there are no samples")
    kind = _kind(refs[0])
    for ref in refs:
        captured = ref.provenance.capture
        if AUX_HIDDEN_STATES in spec.features and captured.layer_ids != spec.capture.layer_ids:
            raise UserError(
                f"features of sample {ref.sample_id} hold layers {list(captured.layer_ids)}, but {spec.algorithm} "
                f"reads {list(spec.capture.layer_ids)}; capture them again or set model.layer_ids"
            )
        missing = sorted({*spec.features, INPUT_IDS, LOSS_MASK} - {feature.name for feature in ref.features})
        if missing:
            raise UserError(f"features of sample {ref.sample_id} lack {missing[0]}, which {spec.algorithm} reads")
        if _kind(ref) != kind:
            raise UserError(
                f"features of sample {ref.sample_id} are {_kind(ref)}, but those of sample {refs[0].sample_id} are "
                f"{kind}; capture them again"
            )
        if ref.num_tokens < spec.min_tokens:
            raise UserError(
                f"sample {ref.sample_id} (from {ref.source}) has {ref.num_tokens} tokens; "
                f"{spec.algorithm} needs {spec.min_tokens}"
            )


def _kind(ref: SampleRef) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of a token of each feature."""
    return {feature.name: (feature.dtype, feature.shape[1:]) for feature in ref.features}
