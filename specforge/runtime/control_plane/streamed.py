"""Samples that other processes produce, in the order of training, and never more than the store has room for.

The trainer knows which samples it will ask for, and how many bytes each takes, before any of them is produced. So it
queues prompts in the order of its plan, as many as there is room for, and the producers do whatever is queued: a slow
trainer queues little and thereby slows them, the store cannot overflow, and what is wanted next is never locked out
by what is wanted later.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from specforge.contracts import PromptTask, Provenance, SampleRef
from specforge.errors import UserError
from specforge.runtime.control_plane.controller import DataFlowController, sample_key, stamped
from specforge.runtime.control_plane.metadata import (
    COMMITTED,
    DEAD,
    DELIVERED,
    DURABLE,
    LEASED,
    QUEUED,
    TRAINED,
    StateError,
)
from specforge.runtime.data_plane.store import BadSampleError, Lease

logger = logging.getLogger(__name__)

Batches = Iterator[tuple[int, Sequence[SampleRef]]]  # the epoch, and the samples, of one batch after the other
_POLL = 0.01  # seconds; stores of several hosts have nothing to wait on
KEPT = -1  # epoch of samples that are read again and again, such as held-out ones


@dataclass(frozen=True)
class Room:
    """How much may be queued, produced or held at once.

    Attributes:
        max_bytes: of features.
        max_samples: in number.
        low_water: what has filled up is filled again when no more than this part of it is taken.
    """

    max_bytes: int
    max_samples: int
    low_water: float = 0.75

    def fits(self, nbytes: int, samples: int) -> bool:
        """Whether so much may be held."""
        return nbytes <= self.max_bytes and samples <= self.max_samples

    def is_low(self, nbytes: int, samples: int) -> bool:
        """Whether it is time to fill up."""
        return nbytes <= self.low_water * self.max_bytes and samples <= self.low_water * self.max_samples

    def window(self, batches: Batches, stamp: str = "") -> Iterator[str]:
        """Keys of the batches that fit together from the first on, for a stream with such a stamp."""
        nbytes = samples = 0
        for epoch, refs in batches:
            nbytes, samples = nbytes + sum(ref.nbytes for ref in refs), samples + len(refs)
            if not self.fits(nbytes, samples):
                return
            yield from (sample_key(ref.sample_id, epoch, stamp) for ref in refs)


class StreamedSamples:
    """A :class:`~specforge.runtime.data_plane.store.SampleStore` over a control plane.

    Args:
        controller: states and tensors.
        tasks: prompts by the identity of their sample.
        provenance: what producers are to capture.
        room: this stream's part of the store.
        stamp: tells this run's samples from those of runs with other features, or another order of training.
        stall_seconds: say what is missing when a sample has not come for so long.
        wait_seconds: give up after so long.
        wait: what to do while there is nothing to read, for so many seconds; waits by default.
        probe: writes to the metadata store; asked first when a sample does not come, for producers cannot say so.
    """

    readers = 2  # one checks and packs what has arrived while the next arrives

    def __init__(
        self,
        controller: DataFlowController,
        tasks: Mapping[str, PromptTask],
        provenance: Provenance,
        room: Room,
        *,
        stamp: str = "",
        stall_seconds: float = 30.0,
        wait_seconds: float = 3600.0,
        wait: Callable[[float], object] | None = None,
        probe: Callable[[], object] = lambda: None,
    ) -> None:
        self.controller, self.tasks, self.provenance, self.room = controller, tasks, provenance, room
        self.stamp, self._probe = stamp, probe
        self.stall_seconds, self.wait_seconds = stall_seconds, wait_seconds
        self._closed = threading.Event()
        self._wait = wait or self._closed.wait
        self._lock = threading.RLock()  # between the trainer's thread and those that fetch ahead
        self._ahead: Batches = iter(())
        self._next: tuple[int, Sequence[SampleRef]] | None = None
        self._epochs: dict[str, list[int]] = {}  # in which a sample was queued and not read yet
        self._held: dict[str, int] = {}  # bytes of every key that takes room, in the order of training
        self._nbytes = 0
        self._trained: dict[str, int] = {}  # the step of those whose features wait for a checkpoint
        self._spent: list[str] = []  # trained, and not to be kept
        self._tidying = threading.Lock()
        self._extends = False  # whether whoever reads next is to make room for a batch more
        self._delivered = 0
        self._mark = (time.monotonic(), 0, 0)
        self._warned = False
        self._quiet_until = 0.0  # by the monotonic clock; of what is said of waiting

    def key(self, sample_id: str, epoch: int) -> str:
        """Key of a sample of this stream in the control plane."""
        return sample_key(sample_id, epoch, self.stamp)

    def start(self, ahead: Batches) -> None:
        """Begin, or begin again from another position.

        Args:
            ahead: the batches that will be asked for; ends where the run does.
        """
        with self._lock:
            self._ahead, self._next = ahead, None
            self._epochs, self._held, self._trained, self._spent, self._nbytes = {}, {}, {}, [], 0
            self._fill()

    def keep(self, refs: Sequence[SampleRef]) -> None:
        """Queue samples that are read any number of times and never trained."""
        with self._lock:
            self._queue(KEPT, [ref for ref in refs if ref.sample_id not in self._epochs])

    def reserve(self, refs: Sequence[SampleRef]) -> bool:
        """Queue what fits; whether these samples are on their way."""
        self._closed.clear()
        with self._lock:
            self._fill()
            if self._coming(refs):
                self._extends = self._is_last(refs)
                return True
        self._tidy(extend=True)
        with self._lock:
            self._fill(at_once=True)
            return self._coming(refs)

    def get(self, ref: SampleRef) -> Lease:
        """Wait for a sample and fetch its tensors; damaged ones are produced again.

        Raises:
            BadSampleError: its prompt was given up, or its features are damaged each time or not those expected.
            UserError: it did not come.
        """
        name = ref.sample_id
        with self._lock:
            if not self._epochs.get(name):
                raise UserError(
                    f"the store has no room for the next batch: {self.room.max_bytes:,} bytes and "
                    f"{self.room.max_samples:,} samples a rank must hold a whole optimizer step and a batch; raise "
                    "data.max_bytes and data.max_samples"
                )
            epoch = self._epochs[name][0]
            extend, self._extends = self._extends, False
        if extend or self._spent:
            self._tidy(extend)  # here, where no step waits for it
        key = self.key(name, epoch)
        try:
            lease = self._fetch(ref, epoch)
        except BadSampleError:
            self._let_go([key])
            raise
        finally:
            if epoch != KEPT:
                with self._lock:
                    self._epochs[name].remove(epoch)
        with self._lock:
            self._delivered += 1
        lease.store = self
        return lease

    def _fetch(self, ref: SampleRef, epoch: int) -> Lease:
        for attempt in range(self.controller.max_tries):
            found = self._await(ref, epoch)
            if (found.features, found.provenance.makes) != (ref.features, ref.provenance.makes):
                raise BadSampleError(ref.sample_id, "its features are not of the kind that was asked for")
            try:
                started = time.monotonic()
                lease = self.controller.features.get(found)
                if (seconds := time.monotonic() - started) >= self.stall_seconds:
                    logger.warning("the store is the bottleneck: it took %.0f s to read a sample", seconds)
                return lease
            except BadSampleError as error:
                if attempt + 1 == self.controller.max_tries:
                    raise
                logger.warning("%s; it is produced again", error)
                with suppress(StateError):  # gone meanwhile, which is noticed when it is waited for
                    self.controller.lost([self.key(ref.sample_id, epoch)])
        raise AssertionError("max_tries is at least 1")

    def _await(self, ref: SampleRef, epoch: int) -> SampleRef:
        started, before, key = time.monotonic(), None, self.key(ref.sample_id, epoch)
        while True:
            try:
                for found in self.controller.deliver([key]):
                    self._quiet_until = 0.0
                    return found
                self.controller.lost([key])
            except StateError as error:
                if error.state == DEAD:
                    raise BadSampleError(ref.sample_id, self._epitaph(key)) from None
                if error.state not in (QUEUED, LEASED):
                    self._restore(ref, epoch, error)
            waited = time.monotonic() - started
            if before is None:
                before = _produced(self.controller.counts())
            over = waited >= self.wait_seconds or self._closed.is_set()
            if over or self._speaks(waited):
                reason = self._reason(before, waited)
                if over:
                    raise UserError(f"no sample for {waited:.0f} s: {reason}")
                logger.warning("training waits for samples since %.0f s: %s", waited, reason)
            self._wait(_POLL)

    def _restore(self, ref: SampleRef, epoch: int, error: StateError) -> None:
        """Queue a sample again whose record was lost or damaged: that it is still to be trained the checkpoint says.

        Raises:
            UserError: all records are gone.
        """
        if not any(self.controller.counts().values()):
            raise _refusal(error) from error
        logger.warning(
            "sample %s is %s in the metadata store, but is yet to be trained; it is queued again",
            ref.sample_id,
            error.state or "missing",
        )
        self.controller.forget([self.key(ref.sample_id, epoch)])
        with self._lock:
            self._ingest([ref], epoch)

    def _reason(self, before: int, waited: float) -> str:
        """Why nothing comes."""
        try:
            self._probe()
        except UserError as error:
            return str(error)
        counts = self.controller.counts()
        produced = (_produced(counts) - before) / max(waited, 1e-9)
        return bottleneck(counts, produced, self.controller.unfinished(), self.controller.silent())

    def _speaks(self, waited: float) -> bool:
        """Whether to say that nothing comes: of all threads that wait one does, and each time at twice the time."""
        with self._lock:
            now = time.monotonic()
            speaks = waited >= self.stall_seconds and now >= self._quiet_until
            if speaks:
                self._quiet_until = now + waited
            return speaks

    def _epitaph(self, key: str) -> str:
        return next((x.reason for x in self.controller.dead_letters() if x.key == key), "it was given up")

    def release(self, lease: Lease) -> None:
        """End a lease."""
        self.controller.features.release(lease)

    def free(self, sample_ids: Sequence[str]) -> None:
        """Nothing: :meth:`trained` and :meth:`durable` say what may go."""

    def interrupt(self) -> None:
        """End all waiting."""
        self._closed.set()

    # The ledger.

    def trained(self, keys: Sequence[str], step: int) -> None:
        """Record the optimizer step that used samples.

        Raises:
            UserError: one is in a state in which it cannot be, or all records are gone.
        """
        left = list(keys)
        while True:
            try:
                self.controller.trained(left, step)
                break
            except StateError as error:
                if error.state or not any(self.controller.counts().values()):
                    raise _refusal(error) from error
                logger.warning("%s: its record is gone from the metadata store", error)
                left.remove(error.key)
        with self._lock:
            if self.controller.retain == "until_trained":
                self._spent += keys
            else:
                self._trained.update({key: step for key in keys if key in self._held})

    def durable(self, step: int) -> None:
        """The controller has recorded a checkpoint of ``step``: what it covers takes no more room."""
        with self._lock:
            self._let_go([key for key, trained in self._trained.items() if trained <= step])

    def close(self) -> None:
        """Queue nothing more, and delete what is trained and not to be kept."""
        with self._lock:
            self._ahead, self._next = iter(()), None
        self._tidy()

    def flow(self) -> dict[str, float]:
        """Samples that are ready and queued, bytes for this rank, and rates since the last call."""
        counts, now = self.controller.counts(), time.monotonic()
        mark = (now, self._delivered, _produced(counts))
        seconds, delivered, produced = (new - old for new, old in zip(mark, self._mark, strict=True))
        self._mark = mark
        return {
            "ready": float(counts[COMMITTED]),
            "queued": float(counts[QUEUED] + counts[LEASED]),
            "bytes": float(self._nbytes),
            "read_per_second": delivered / max(seconds, 1e-9),
            "produced_per_second": max(0, produced) / max(seconds, 1e-9),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of features that are queued, produced or held."""
        return self._nbytes

    # Room.

    def _coming(self, refs: Sequence[SampleRef]) -> bool:
        return all(self._epochs.get(ref.sample_id) for ref in refs)

    def _is_last(self, refs: Sequence[SampleRef]) -> bool:
        """Whether nothing is queued behind these samples, which are."""
        last = next(reversed(self._held), "")
        return any(self.key(ref.sample_id, self._epochs[ref.sample_id][0]) == last for ref in refs)

    def _fill(self, at_once: bool = False) -> None:
        if not at_once and not self.room.is_low(self._nbytes, len(self._held)):
            return
        while (batch := self._peek()) is not None:
            epoch, refs = batch
            size = sum(ref.nbytes for ref in refs)
            if not self.room.fits(self._nbytes + size, len(self._held) + len(refs)):
                return
            self._queue(epoch, refs)
            self._held.update({self.key(ref.sample_id, epoch): ref.nbytes for ref in refs})
            self._nbytes += size
            self._next = None

    def _peek(self) -> tuple[int, Sequence[SampleRef]] | None:
        if self._next is None:
            self._next = next(self._ahead, None)
        return self._next

    def _queue(self, epoch: int, refs: Sequence[SampleRef]) -> None:
        self._ingest(refs, epoch)
        for ref in refs:
            self._epochs.setdefault(ref.sample_id, []).append(epoch)

    def _ingest(self, refs: Sequence[SampleRef], epoch: int) -> None:
        tasks = {stamped(ref.sample_id, self.stamp): self.tasks[ref.sample_id] for ref in refs}
        self.controller.ingest(tasks, epoch, self.provenance)

    def _tidy(self, extend: bool = False) -> None:
        """Delete what is not to be kept, outside the lock, for it takes its time; queue what there is room for then.

        Args:
            extend: make room for one more batch, at the cost of what waits for a checkpoint.
        """
        with self._tidying:
            with self._lock:
                spent, self._spent = self._spent, []
                in_the_way = self._in_the_way() if extend else []
            if spent or in_the_way:
                self.controller.free([*spent, *in_the_way])
            with self._lock:
                self._let_go([*spent, *in_the_way])
                self._fill(at_once=bool(in_the_way))

    def _in_the_way(self) -> list[str]:
        """What waits for a checkpoint must not lock out what the next checkpoint needs."""
        batch = self._peek()
        if batch is None:
            return []
        size, count, gone = sum(ref.nbytes for ref in batch[1]), len(batch[1]), []
        for key in self._trained:
            if self.room.fits(self._nbytes + size, len(self._held) + count):
                break
            gone.append(key)
            size, count = size - self._held[key], count - 1
        if gone and not self._warned:
            self._warned = True
            logger.warning(
                "the store holds fewer steps than lie between checkpoints: features of trained steps are let go early "
                "and produced again if the run goes back; raise max_bytes or checkpoint more often to keep them"
            )
        return gone

    def _let_go(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._nbytes -= self._held.pop(key, 0)
                self._trained.pop(key, None)


def _refusal(error: StateError) -> UserError:
    return UserError(
        f"{error}: the metadata store was emptied, or another run uses it; resume with --ckpt_path last, which loses "
        "nothing"
    )


def _produced(counts: Mapping[str, int]) -> int:
    return sum(counts[state] for state in (COMMITTED, DELIVERED, TRAINED, DURABLE))


def bottleneck(counts: Mapping[str, int], produced: float, unfinished: int = 0, silent: int = 0) -> str:
    """Who keeps the others waiting.

    Args:
        counts: samples in each state.
        produced: samples a second that producers give.
        unfinished: samples in work of which the store has bytes already.
        silent: prompts in work whose leases are over.
    """
    queued, leased = counts[QUEUED], counts[LEASED]
    if silent:
        return (
            f"a producer is silent: it died, or cannot reach the metadata store, with {silent} prompts in hand, which "
            f"the next one that works takes over; {queued} are queued, {produced:.1f} samples/s produced"
        )
    if leased:
        what, cure = "the producers are the bottleneck", "start more of them"
        if unfinished:
            what = f"the store is the bottleneck, which is writing {unfinished} samples"
            cure = "a faster disk helps"
        return (
            f"{what}: {leased} prompts in work, {queued} queued, {produced:.1f} samples/s produced; {cure} (those of a "
            "dead producer are taken over when their leases expire)"
        )
    if queued:
        return f"no producer takes the {queued} queued prompts; start one with `specforge produce`"
    if counts[COMMITTED]:
        return f"the trainer is the bottleneck: {counts[COMMITTED]} samples are ready and nothing is queued"
    if not counts[DELIVERED] + counts[TRAINED]:
        return "nothing is queued and nothing is being trained: no trainer runs, or it is done"
    return "the store has no room: all it may hold waits for a checkpoint or to be trained; raise max_bytes"
