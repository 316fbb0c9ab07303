"""Samples that other processes produce, in training order and within the byte limit of the feature store.

The trainer knows which samples it will ask for, and how many bytes each takes, before any of them is produced. It
queues prompts in training order, only as many as fit into the store, and producers work on whatever is queued. So a
slow trainer slows the producers down, the store cannot overflow, and later samples never displace earlier ones.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from enum import Enum, auto

from torch import Tensor

from specforge.contracts import ANY_ENGINE, ExpectedSample, Provenance, SampleRef, engine_label
from specforge.errors import UserError
from specforge.runtime.control_plane.claim import TrainerClaim
from specforge.runtime.control_plane.controller import DataFlowController, sample_key, stamped
from specforge.runtime.control_plane.metadata import State, StateError
from specforge.runtime.data_plane.store import BadSampleError, SampleStore

logger = logging.getLogger(__name__)

Batch = tuple[int, Sequence[ExpectedSample]]  # epoch and samples
_POLL = 0.01  # seconds; stores shared between hosts offer no notification
KEPT = -1  # epoch of samples that are read repeatedly, such as held-out ones


@dataclass(frozen=True)
class Budget:
    """Limits on samples that are queued, produced or held at the same time."""

    max_bytes: int  # maximum number of bytes of features
    max_samples: int  # maximum number of samples
    low_water: float = 0.75  # refill once usage drops below this fraction

    def fits(self, nbytes: int, samples: int) -> bool:
        """Whether this much is within the limits."""
        return nbytes <= self.max_bytes and samples <= self.max_samples

    def is_low(self, nbytes: int, samples: int) -> bool:
        """Whether to refill at this usage."""
        return nbytes <= self.low_water * self.max_bytes and samples <= self.low_water * self.max_samples

    def window(self, batches: Iterable[Batch], stamp: str = "") -> Iterator[str]:
        """Keys of the first batches, as many as fit together, in a stream with this stamp."""
        nbytes = count = 0
        for epoch, samples in batches:
            nbytes, count = nbytes + sum(sample.nbytes for sample in samples), count + len(samples)
            if not self.fits(nbytes, count):
                return
            yield from (sample_key(sample.sample_id, epoch, stamp) for sample in samples)


@dataclass(eq=False)
class StreamedSamples(SampleStore[ExpectedSample]):
    """The trainer's side of the control plane."""

    controller: DataFlowController  # states and tensors
    provenance: Provenance  # target, and what producers are to capture
    budget: Budget  # this stream's share of the store
    _: KW_ONLY
    stamp: str = ""  # separates the samples of this run from those of runs with other features or training order
    kept: Collection[str] = ()  # keys of kept samples that start leaves queued
    rank: int = 0  # this process; the first one restores the control plane
    world_size: int = 1  # number of processes
    barrier: Callable[[str], object] = lambda name: None  # waits for all ranks
    claim: TrainerClaim | None = None  # this rank's claim on the metadata store, if it has one
    stall_seconds: float = 30.0  # report the reason when a sample has not arrived for this long
    wait_seconds: float = 3600.0  # give up when a sample has not arrived for this long
    # Called with a number of seconds while there is nothing to read; waits by default.
    wait: Callable[[float], object] | None = None

    readers = 2  # one checks and packs what has arrived while the other reads

    def __post_init__(self) -> None:
        self.kept = frozenset(self.kept)
        self._closed = threading.Event()
        self._wait = self.wait or self._closed.wait
        self._lock = threading.RLock()  # shared by the trainer's thread and the prefetching ones
        self._ahead: Iterator[Batch] = iter(())
        self._next: Batch | None = None
        self._epochs: dict[str, list[int]] = {}  # epochs for which a sample is queued but not read yet
        self._held: dict[str, int] = {}  # bytes of every key that takes space, in training order
        self._nbytes = 0
        self._trained: dict[str, int] = {}  # step of every key whose features wait for a checkpoint
        self._spent: list[str] = []  # trained keys whose features are to be deleted
        self._freeing = threading.Lock()
        self._extends = False  # whether the next read must free space for one more batch
        self._engine: str | None = None  # of the first sample
        self._delivered = 0
        self._mark = (time.monotonic(), 0, 0)
        self._warned = False
        self._quiet_until = 0.0  # no report of a stall before this time of the monotonic clock

    def key(self, sample_id: str, epoch: int) -> str:
        """Key of a sample of this stream in the control plane."""
        return sample_key(sample_id, epoch, self.stamp)

    # Reading.

    def start(self, step: int, ahead: Callable[[int], Iterator[Batch]]) -> None:
        """Restore the control plane to the checkpoint of ``step``, then queue this rank's next batches."""
        if self.rank == 0:
            wanted = set(self.kept)
            for rank in range(self.world_size):
                wanted.update(self.budget.window(ahead(rank), self.stamp))
            # Other queued prompts are queued again in their turn. Left queued, they would precede the held-out samples,
            # which a stopped run drops, and the first validation would wait until all of them are produced.
            self.controller.resume(step, keep=wanted, queued=self.kept)
        self.barrier("the control plane is at the step of the checkpoint")
        self.queue(ahead(self.rank))

    def queue(self, ahead: Iterator[Batch]) -> None:
        """Queue batches from here on, as many as fit, and more whenever there is room again."""
        with self._lock:
            self._ahead, self._next = ahead, None
            self._epochs, self._held, self._trained, self._spent, self._nbytes = {}, {}, {}, [], 0
            self._fill()

    def keep(self, samples: Sequence[ExpectedSample]) -> None:
        """Queue samples that are read any number of times and never trained."""
        with self._lock:
            self._queue(KEPT, [sample for sample in samples if sample.sample_id not in self._epochs])

    def reserve(self, samples: Sequence[ExpectedSample]) -> bool:
        """Queue what fits; returns whether these samples are queued."""
        self._closed.clear()
        with self._lock:
            self._fill()
            if self._are_queued(samples):
                self._extends = self._are_last(samples)
                return True
        self._free_space(extend=True)
        with self._lock:
            self._fill(at_once=True)
            return self._are_queued(samples)

    def get(self, sample: ExpectedSample) -> dict[str, Tensor]:
        """Wait for a sample and read its tensors; a damaged sample is produced again.

        Raises:
            BadSampleError: its prompt was given up, or its features are damaged every time or not the expected ones.
            UserError: the sample did not arrive.
        """
        name = sample.sample_id
        with self._lock:
            if not self._epochs.get(name):
                raise UserError(
                    f"the store is too small for the next batch: {self.budget.max_bytes:,} bytes and "
                    f"{self.budget.max_samples:,} samples per rank must hold a whole optimizer step and one more "
                    "batch; raise data.max_bytes and data.max_samples"
                )
            epoch = self._epochs[name][0]
            extend, self._extends = self._extends, False
        if extend or self._spent:
            self._free_space(extend)  # in this thread, so that no training step waits for it
        try:
            tensors = self._fetch(sample, epoch)
        except BadSampleError:
            self._forget_held([self.key(name, epoch)])
            raise
        finally:
            if epoch != KEPT:
                with self._lock:
                    self._epochs[name].remove(epoch)
        with self._lock:
            self._delivered += 1
        return tensors

    def _fetch(self, sample: ExpectedSample, epoch: int) -> dict[str, Tensor]:
        for attempt in range(self.controller.max_tries):
            found = self._await(sample, epoch)
            if not sample.matches(found):
                raise BadSampleError(sample.sample_id, "its features are not of the expected kind")
            self._check_engine(found.provenance.engine)
            try:
                started = time.monotonic()
                tensors = self.controller.features.get(found)
                if (seconds := time.monotonic() - started) >= self.stall_seconds:
                    logger.warning("the store is the bottleneck: it took %.0f s to read a sample", seconds)
                return tensors
            except BadSampleError as error:
                if attempt + 1 == self.controller.max_tries:
                    raise
                logger.warning("%s; it is produced again", error)
                with suppress(StateError):  # its record is gone, which the next wait handles
                    self.controller.lost([self.key(sample.sample_id, epoch)])
        raise AssertionError("max_tries is at least 1")

    def _check_engine(self, engine: str) -> None:
        """Reject the features of a second engine, such as those of a run that began before engines were claimed."""
        with self._lock:
            self._engine = engine if self._engine is None else self._engine
        if self.provenance.engine != ANY_ENGINE and engine != self._engine:
            raise UserError(
                f"data: the store holds features computed by {engine_label(engine)[:80]}, and this run has trained on "
                f"those of {engine_label(self._engine)[:80]}, which differ in their last bits; use new stores, or mix "
                "them with data.mix_engines: true"
            )

    def _await(self, sample: ExpectedSample, epoch: int) -> SampleRef:
        started, before, key = time.monotonic(), None, self.key(sample.sample_id, epoch)
        while True:
            try:
                for found in self.controller.deliver([key]):
                    self._quiet_until = 0.0
                    return found
                self.controller.lost([key])
            except StateError as error:
                if error.state == State.DEAD:
                    raise BadSampleError(sample.sample_id, self._failure_reason(key)) from None
                if error.state not in (State.QUEUED, State.LEASED):
                    self._restore(sample, epoch, error)
            waited = time.monotonic() - started
            if before is None:
                before = _count_produced(self.controller.counts())
            timed_out = waited >= self.wait_seconds or self._closed.is_set()
            if timed_out or self._should_report(waited):
                reason = self._stall_reason(before, waited)
                if timed_out:
                    raise UserError(f"no sample for {waited:.0f} s: {reason}")
                logger.warning("training has been waiting for samples for %.0f s: %s", waited, reason)
            self._wait(_POLL)

    def _restore(self, sample: ExpectedSample, epoch: int, error: StateError) -> None:
        """Queue a sample again whose record was lost or damaged: the checkpoint shows that it is not trained yet."""
        if not any(self.controller.counts().values()):
            raise _foreign_store(error) from error
        logger.warning(
            "sample %s is %s in the metadata store, but has not been trained yet; it is queued again",
            sample.sample_id,
            error.state or "missing",
        )
        self.controller.forget([self.key(sample.sample_id, epoch)])
        with self._lock:
            self._ingest([sample], epoch)

    def _stall_reason(self, before: int, waited: float) -> str:
        """Why no sample arrives; a store that cannot be written is detected first, as producers cannot report it."""
        try:
            if self.claim is not None:
                self.claim.renew()
        except UserError as error:
            return str(error)
        counts = self.controller.counts()
        rate = (_count_produced(counts) - before) / max(waited, 1e-9)
        return bottleneck(counts, rate, self.controller.unfinished(), self.controller.stalled())

    def _should_report(self, waited: float) -> bool:
        """Whether this thread reports the stall: one of the waiting threads does, at intervals that double."""
        with self._lock:
            now = time.monotonic()
            due = waited >= self.stall_seconds and now >= self._quiet_until
            if due:
                self._quiet_until = now + waited
            return due

    def _failure_reason(self, key: str) -> str:
        return next((x.reason for x in self.controller.given_up() if x.key == key), "it was given up")

    def interrupt(self) -> None:
        """End every wait for a sample."""
        self._closed.set()

    # Acknowledging.

    def trained(self, sample_ids: Sequence[str], epoch: int, step: int) -> None:
        """Record that optimizer step ``step`` uses these samples of ``epoch``.

        Raises:
            UserError: another trainer has claimed the store, a sample is in an impossible state, or all records are
                gone.
        """
        if self.claim is not None:
            self.claim.check()
        keys = [self.key(name, epoch) for name in sample_ids]
        left = list(keys)
        while True:
            try:
                self.controller.trained(left, step)
                break
            except StateError as error:
                if error.state or not any(self.controller.counts().values()):
                    raise _foreign_store(error) from error
                logger.warning("%s: its record is gone from the metadata store", error)
                left.remove(error.key)
        with self._lock:
            if self.controller.retain == "until_trained":
                self._spent += keys
            else:
                self._trained.update({key: step for key in keys if key in self._held})

    def durable(self, step: int) -> None:
        """Record that the checkpoint of ``step`` is complete, and delete the features that it covers."""
        try:
            if self.rank == 0:
                self.controller.durable(step)
                self.controller.remove_orphans()
        finally:  # the other ranks wait for the first one, whatever happens to it
            self.barrier("the features that the checkpoint covers are deleted")
        with self._lock:
            self._forget_held([key for key, trained in self._trained.items() if trained <= step])

    def replaced(self) -> bool:
        """Whether another trainer has taken over this rank's claim."""
        return self.claim is not None and self.claim.lost

    def close(self) -> None:
        """Stop queueing, and delete trained features that are not to be kept."""
        with self._lock:
            self._ahead, self._next = iter(()), None
        self._free_space()

    def flow(self) -> dict[str, float]:
        """Number of ready and queued samples, bytes of this rank, and rates since the last call."""
        counts, now = self.controller.counts(), time.monotonic()
        mark = (now, self._delivered, _count_produced(counts))
        seconds, delivered, produced = (new - old for new, old in zip(mark, self._mark, strict=True))
        self._mark = mark
        return {
            "ready": float(counts[State.COMMITTED]),
            "queued": float(counts[State.QUEUED] + counts[State.LEASED]),
            "bytes": float(self._nbytes),
            "read_per_second": delivered / max(seconds, 1e-9),
            "produced_per_second": max(0, produced) / max(seconds, 1e-9),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of features that are queued, produced or held."""
        return self._nbytes

    # Room.

    def _are_queued(self, samples: Sequence[ExpectedSample]) -> bool:
        return all(self._epochs.get(sample.sample_id) for sample in samples)

    def _are_last(self, samples: Sequence[ExpectedSample]) -> bool:
        """Whether nothing is queued after these samples."""
        last = next(reversed(self._held), "")
        return any(self.key(sample.sample_id, self._epochs[sample.sample_id][0]) == last for sample in samples)

    def _fill(self, at_once: bool = False) -> None:
        if not at_once and not self.budget.is_low(self._nbytes, len(self._held)):
            return
        while (batch := self._peek()) is not None:
            epoch, samples = batch
            size = sum(sample.nbytes for sample in samples)
            if not self.budget.fits(self._nbytes + size, len(self._held) + len(samples)):
                return
            self._queue(epoch, samples)
            self._held.update({self.key(sample.sample_id, epoch): sample.nbytes for sample in samples})
            self._nbytes += size
            self._next = None

    def _peek(self) -> Batch | None:
        if self._next is None:
            self._next = next(self._ahead, None)
        return self._next

    def _queue(self, epoch: int, samples: Sequence[ExpectedSample]) -> None:
        self._ingest(samples, epoch)
        for sample in samples:
            self._epochs.setdefault(sample.sample_id, []).append(epoch)

    def _ingest(self, samples: Sequence[ExpectedSample], epoch: int) -> None:
        tasks = {stamped(sample.sample_id, self.stamp): sample.task for sample in samples}
        self.controller.ingest(tasks, epoch, self.provenance)

    def _free_space(self, extend: bool = False) -> None:
        """Delete features that are not to be kept, then queue what fits. The slow deletion happens outside the lock.

        ``extend`` makes room for one more batch, at the cost of features that wait for a checkpoint.
        """
        with self._freeing:
            with self._lock:
                spent, self._spent = self._spent, []
                evicted = self._evictable() if extend else []
            if spent or evicted:
                self.controller.free([*spent, *evicted])
            with self._lock:
                self._forget_held([*spent, *evicted])
                self._fill(at_once=bool(evicted))

    def _evictable(self) -> list[str]:
        """Keys that wait for a checkpoint, as many as must be deleted to make space for the next batch.

        Without this, they could block the batches that lead to the next checkpoint.
        """
        batch = self._peek()
        if batch is None:
            return []
        size, count, evicted = sum(sample.nbytes for sample in batch[1]), len(batch[1]), []
        for key in self._trained:
            if self.budget.fits(self._nbytes + size, len(self._held) + count):
                break
            evicted.append(key)
            size, count = size - self._held[key], count - 1
        if evicted and not self._warned:
            self._warned = True
            logger.warning(
                "the store cannot hold all samples between two checkpoints: features of trained steps are deleted "
                "early, and produced again if the run resumes from an earlier step; raise max_bytes or checkpoint more "
                "often to keep them"
            )
        return evicted

    def _forget_held(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._nbytes -= self._held.pop(key, 0)
                self._trained.pop(key, None)


def _foreign_store(error: StateError) -> UserError:
    return UserError(
        f"{error}: the metadata store was emptied, or another run uses it; resume with --ckpt_path last, which loses "
        "nothing"
    )


def _count_produced(counts: Mapping[str, int]) -> int:
    return sum(counts[state] for state in (State.COMMITTED, State.DELIVERED, State.TRAINED, State.DURABLE))


class Limit(Enum):
    """What limits the speed of a run."""

    DEAD_PRODUCER = auto()
    STORE = auto()
    PRODUCERS = auto()
    NO_PRODUCER = auto()
    TRAINER = auto()
    NO_TRAINER = auto()
    FULL_STORE = auto()


def limit(counts: Mapping[str, int], unfinished: int = 0, stalled: int = 0) -> Limit:
    """What limits the speed of a run; the arguments are those of :func:`bottleneck`."""
    if stalled:
        return Limit.DEAD_PRODUCER
    if counts[State.LEASED]:
        return Limit.STORE if unfinished else Limit.PRODUCERS
    if counts[State.QUEUED]:
        return Limit.NO_PRODUCER
    if counts[State.COMMITTED]:
        return Limit.TRAINER
    return Limit.FULL_STORE if counts[State.DELIVERED] + counts[State.TRAINED] else Limit.NO_TRAINER


def bottleneck(counts: Mapping[str, int], rate: float, unfinished: int = 0, stalled: int = 0) -> str:
    """The part of the run that limits its speed, and what to do about it.

    Args:
        counts: number of samples in each state.
        rate: samples produced per second.
        unfinished: leased prompts whose features are partly written.
        stalled: leased prompts whose leases have expired.
    """
    queued, leased = counts[State.QUEUED], counts[State.LEASED]
    if leased and not stalled and not counts[State.TRAINED] + counts[State.DURABLE]:
        return (
            f"nothing is trained yet: {leased} prompts leased, {unfinished} of them partly written, {queued} queued, "
            f"{rate:.1f} samples/s produced; if this lasts, see what the producers report"
        )
    match limit(counts, unfinished, stalled):
        case Limit.DEAD_PRODUCER:
            return (
                f"a producer has stopped responding ({stalled} prompts leased): it died or cannot reach the metadata "
                f"store; another producer will take them over; {queued} are queued, {rate:.1f} samples/s produced"
            )
        case Limit.STORE:
            cause = (
                "the store, or a server that writes to it, is the bottleneck, with "
                f"{unfinished} of {leased} leased samples unfinished"
            )
            remedy = "see what the producers report, or use a faster disk"
        case Limit.PRODUCERS:
            cause, remedy = "the producers are the bottleneck", "start more of them"
        case Limit.NO_PRODUCER:
            return f"no producer takes the {queued} queued prompts; start one with `specforge produce`"
        case Limit.TRAINER:
            return f"the trainer is the bottleneck: {counts[State.COMMITTED]} samples are ready and nothing is queued"
        case Limit.NO_TRAINER:
            return "nothing is queued and nothing is being trained: no trainer is running, or it has finished"
        case Limit.FULL_STORE:
            return "the store is full of samples that wait to be trained or for a checkpoint; raise max_bytes"
    return (
        f"{cause}: {leased} prompts leased, {queued} queued, {rate:.1f} samples/s produced; {remedy} (prompts of a "
        "dead producer are taken over when their leases expire)"
    )
