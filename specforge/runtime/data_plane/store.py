"""The feature store: the only thing that holds tensors.

Leases, generations, checksums, encodings and limits are written once, here; a backend only moves bytes
(:class:`FeatureBackend`: memory, shards on disk, a shared directory, Mooncake). A sample that was put
again has a new generation, and references to the old one are refused; a sample that is being read is
not deleted until its last reader has let go of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import torch
import xxhash
from torch import Tensor

from specforge.contracts import SAMPLE_ID, FeatureSpec, Provenance, SampleRef
from specforge.runtime.data_plane.encoding import decode, encode
from specforge.runtime.data_plane.safetensors_io import bytes_of

logger = logging.getLogger(__name__)


class BadSampleError(Exception):
    """A sample that must not be trained on; the message names it and says what is wrong."""

    def __init__(self, sample_id: str, reason: str) -> None:
        super().__init__(f"sample {sample_id}: {reason}")
        self.sample_id, self.reason = sample_id, reason


class StoreFullError(Exception):
    """There is no room in the store at the moment; what was there before still is."""


class FeatureBackend(Protocol):
    """Moves the bytes of keyed groups of tensors."""

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> str:
        """Store a group; returns the uri by which it can be read once :meth:`flush` has returned."""
        ...

    def read(self, key: str, uri: str) -> dict[str, Tensor]:
        """Fetch a group without copying where the medium allows it.

        Raises:
            KeyError: there is no such group.
            OSError: it cannot be read, or what is there is damaged.
        """
        ...

    def remove(self, key: str, uri: str) -> None:
        """Forget a group; unknown keys are ignored."""
        ...

    def holds(self, key: str, uri: str) -> bool:
        """Whether there is such a group; it may be damaged."""
        ...

    def stored(self) -> list[tuple[str, str]]:
        """Key and uri of every group, and of what dead writers left behind."""
        ...

    def flush(self) -> None:
        """Make everything written so far durable and readable.

        Raises:
            StoreFullError: the medium had no room for some of it, as one says that takes a while to write.
        """
        ...

    def pending(self) -> int:
        """Bytes written but not yet flushed."""
        ...


class SampleStore(Protocol):
    """What the stream of batches reads from: a store of samples, or one that produces them when they are asked for.

    Attributes:
        readers: threads in which :meth:`get` may be called side by side, and is worth it.
    """

    readers: int

    def get(self, ref: SampleRef) -> Lease:
        """Fetch a sample's tensors under a lease.

        Raises:
            BadSampleError: they must not be trained on.
        """
        ...

    def release(self, lease: Lease) -> None:
        """End a lease."""
        ...

    def reserve(self, refs: Sequence[SampleRef]) -> bool:
        """Whether there is room for samples beside those that wait to be trained; if so, it is kept for them."""
        ...

    def free(self, sample_ids: Sequence[str]) -> None:
        """The samples are trained, or will not be: whatever room they take is no longer needed."""
        ...

    def interrupt(self) -> None:
        """Whoever waits in :meth:`get` for a sample need not wait any longer: nobody will use it."""
        ...


@dataclass
class Lease:
    """A sample's tensors while somebody reads them; use it as a context manager."""

    ref: SampleRef
    tensors: dict[str, Tensor]
    token: int
    store: SampleStore = field(repr=False)

    def __enter__(self) -> dict[str, Tensor]:
        return self.tensors

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.store.release(self)


@dataclass(frozen=True)
class StoreStat:
    """What a store holds.

    Attributes:
        samples: live samples.
        nbytes: their stored bytes.
        leases: readers at the moment.
        max_bytes: the limit, None without one.
    """

    samples: int
    nbytes: int
    leases: int
    max_bytes: int | None


@dataclass
class _Entry:
    generation: int
    nbytes: int
    uri: str
    leases: int = 0
    doomed: bool = False


def _checked(sample_id: str, tensors: Mapping[str, Tensor]) -> int:
    """The number of tokens of a sample that may be stored."""
    check_id(sample_id)
    lengths = {name: len(x) for name, x in tensors.items()}
    if len(set(lengths.values())) != 1:
        raise BadSampleError(sample_id, f"features disagree about the number of tokens: {lengths}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise BadSampleError(sample_id, f"{name} holds NaN or infinity")
    return next(iter(lengths.values()))


def _is_finite(tensor: Tensor) -> bool:
    # NaN and infinity survive a sum, which is fifteen times faster than looking at each value. Where a sum overflows
    # (as fp16's may), each value is looked at.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """xxh3-64 in hex over the tensors' bytes, in the order of their names."""
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


class FeatureStore:
    """Samples by identity and generation over a backend.

    Args:
        backend: moves the bytes.
        max_bytes: most bytes to hold at once; None for no limit.
        lease_seconds: a lease older than this is taken for abandoned by :meth:`sweep`.
        verify: compare checksums at the first read of each sample in this process.
    """

    readers = 1

    def __init__(
        self,
        backend: FeatureBackend,
        *,
        max_bytes: int | None = None,
        lease_seconds: float = 600.0,
        verify: bool = True,
    ) -> None:
        self.backend, self.max_bytes = backend, max_bytes
        self.lease_seconds, self.verify = lease_seconds, verify
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._generations: dict[str, int] = {}
        self._leases: dict[int, tuple[str, int, float]] = {}
        self._verified: set[str] = set()
        self._nbytes = 0
        self._next_token = 0

    def adopt(self, refs: Iterable[SampleRef]) -> None:
        """Take over samples that lie in the backend already, such as those of a manifest."""
        with self._lock:
            for ref in refs:
                check_id(ref.sample_id)
                self._remember(ref.sample_id, _Entry(ref.generation, ref.nbytes, ref.uri))

    def put(
        self, sample_id: str, tensors: Mapping[str, Tensor], *, num_supervised: int, source: str, provenance: Provenance
    ) -> SampleRef:
        """Store a sample; the reference may be handed out after :meth:`flush`.

        Args:
            sample_id: its identity.
            tensors: CPU tensors whose first dimension counts tokens, the same in all of them.
            num_supervised: tokens under the loss mask.
            source: file and line of the conversation.
            provenance: where the features come from, and how they are to be stored.

        Raises:
            BadSampleError: a tensor has a wrong first dimension, or a value that is not finite; or the identity could
                name a path.
            StoreFullError: the byte limit would be exceeded.
        """
        num_tokens = _checked(sample_id, tensors)
        stored = encode(tensors, provenance.encoding)
        digest = checksum(stored)  # while the look for NaN has left them in the cache
        nbytes = sum(x.nbytes for x in stored.values())
        with self._lock:
            if self.max_bytes is not None and self._nbytes + nbytes > self.max_bytes:
                raise StoreFullError(f"{self._nbytes + nbytes} bytes would exceed the limit of {self.max_bytes}")
            generation = self._generations.get(sample_id, 0) + 1
            self._generations[sample_id] = generation
            self._nbytes += nbytes
        try:
            uri = self.backend.write(_key(sample_id, generation), stored)
        except BaseException:
            with self._lock:
                self._nbytes -= nbytes
            raise
        with self._lock:
            self._nbytes -= nbytes
            self._remember(sample_id, _Entry(generation, nbytes, uri))
        return SampleRef(
            sample_id=sample_id,
            generation=generation,
            features=tuple(
                FeatureSpec(name, str(x.dtype).removeprefix("torch."), tuple(x.shape))
                for name, x in sorted(tensors.items())
            ),
            num_tokens=num_tokens,
            num_supervised=num_supervised,
            nbytes=nbytes,
            checksum=digest,
            uri=uri,
            source=source,
            provenance=provenance,
        )

    def get(self, ref: SampleRef) -> Lease:
        """Fetch a sample's tensors under a lease.

        Raises:
            BadSampleError: it is gone, of another generation, damaged, or not what the reference says.
        """
        key = _key(ref.sample_id, ref.generation)
        with self._lock:
            entry = self._entries.get(ref.sample_id)
            if entry is None or entry.doomed:
                raise BadSampleError(ref.sample_id, "not in the store")
            if entry.generation != ref.generation:
                raise BadSampleError(ref.sample_id, f"generation {ref.generation} was replaced by {entry.generation}")
            entry.leases += 1
            self._next_token += 1
            token = self._next_token
            self._leases[token] = (ref.sample_id, ref.generation, time.monotonic() + self.lease_seconds)
        lease = Lease(ref, {}, token, self)
        try:
            lease.tensors = self._read(key, ref)
        except BaseException:
            self.release(lease)
            raise
        return lease

    def _read(self, key: str, ref: SampleRef) -> dict[str, Tensor]:
        try:
            stored = self.backend.read(key, ref.uri)
        except KeyError as error:
            raise BadSampleError(ref.sample_id, f"not in {ref.uri or 'the store'}") from error
        except OSError as error:
            raise BadSampleError(ref.sample_id, str(error)) from error
        if self.verify and key not in self._verified:
            if checksum(stored) != ref.checksum:
                raise BadSampleError(ref.sample_id, f"checksum does not match in {ref.uri or 'the store'}")
            self._verified.add(key)
        try:
            tensors = decode(stored, {f.name: f.dtype for f in ref.features})
        except ValueError as error:
            raise BadSampleError(ref.sample_id, str(error)) from error
        for spec in ref.features:
            tensor = tensors.get(spec.name)
            if tensor is None:
                raise BadSampleError(ref.sample_id, f"{spec.name} is missing")
            found = str(tensor.dtype).removeprefix("torch.")
            if tuple(tensor.shape) != spec.shape or found != spec.dtype:
                raise BadSampleError(
                    ref.sample_id, f"{spec.name} is {found} {tuple(tensor.shape)}, not {spec.dtype} {spec.shape}"
                )
        return tensors

    def release(self, lease: Lease) -> None:
        """End a lease; releasing twice is harmless."""
        with self._lock:
            self._end(lease.token)

    def delete(self, ref: SampleRef) -> bool:
        """Delete a sample, at once or when its last lease ends.

        Returns:
            False where the store holds no such generation (it was replaced or deleted before).
        """
        with self._lock:
            entry = self._entries.get(ref.sample_id)
            if entry is None or entry.generation != ref.generation or entry.doomed:
                return False
            entry.doomed = True
            self._collect(ref.sample_id, entry)
            return True

    def discard(self, ref: SampleRef) -> None:
        """Delete the bytes that a reference names, whether or not this store knows them."""
        with self._lock:
            entry = self._entries.get(ref.sample_id)
            known = entry is not None and (entry.generation, entry.uri) == (ref.generation, ref.uri)
        if known:
            self.delete(ref)
        else:
            check_id(ref.sample_id)
            self._remove(_key(ref.sample_id, ref.generation), ref.uri)

    def holds(self, ref: SampleRef) -> bool:
        """Whether the bytes that a reference names are there; whether they are whole shows when they are read."""
        try:
            return self.backend.holds(_key(ref.sample_id, ref.generation), ref.uri)
        except OSError:  # it names something else than a sample of this store
            return False

    def disown(self, refs: Iterable[SampleRef]) -> None:
        """Leave samples to another process: their bytes stay, this one neither counts nor deletes them any more."""
        with self._lock:
            for ref in refs:
                entry = self._entries.pop(ref.sample_id, None)
                if entry is not None:
                    self._nbytes -= entry.nbytes

    def remove_orphans(
        self, refs: Iterable[SampleRef], spare: Collection[str] = (), stored: Sequence[tuple[str, str]] | None = None
    ) -> int:
        """Delete what no reference names.

        Args:
            refs: references of everything that is to stay.
            spare: samples that are left alone.
            stored: what the backend had stored before ``refs`` and ``spare`` were looked up, where others go on
                putting; what they put since is left alone.

        Returns:
            How many groups of tensors went.
        """
        wanted = {(_key(ref.sample_id, ref.generation), ref.uri) for ref in refs}
        count = 0
        for key, uri in self.backend.stored() if stored is None else stored:
            sample_id, _, generation = key.rpartition(".")
            if (key, uri) in wanted or sample_id in spare:
                continue
            with self._lock:
                entry = self._entries.get(sample_id)
                if entry is not None and (str(entry.generation), entry.uri) == (generation, uri):
                    entry.doomed = True
                    self._collect(sample_id, entry)
                else:
                    self._remove(key, uri)
            count += 1
        return count

    def reserve(self, refs: Sequence[SampleRef]) -> bool:
        """Always: what is stored takes no further room."""
        return True

    def free(self, sample_ids: Sequence[str]) -> None:
        """Nothing: stored samples are read again in the next epoch."""

    def interrupt(self) -> None:
        """Nothing: nobody waits here."""

    def sweep(self, now: float | None = None) -> int:
        """End leases that are older than ``lease_seconds``; returns how many."""
        now = time.monotonic() if now is None else now
        with self._lock:
            expired = [token for token, (*_, deadline) in self._leases.items() if deadline <= now]
            for token in expired:
                self._end(token)
        return len(expired)

    def flush(self) -> None:
        """Make all puts durable and readable.

        Raises:
            StoreFullError: the backend had no room for some of them; they must be discarded.
        """
        self.backend.flush()

    def pending(self) -> int:
        """Bytes put but not yet flushed."""
        return self.backend.pending()

    def stat(self) -> StoreStat:
        """Counts and bytes."""
        with self._lock:
            return StoreStat(len(self._entries), self._nbytes, len(self._leases), self.max_bytes)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._entries))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def _remember(self, sample_id: str, entry: _Entry) -> None:
        old = self._entries.get(sample_id)
        if old is not None and (old.generation, old.uri) == (entry.generation, entry.uri):
            return
        if old is not None:
            # Readers of the old generation keep their tensors; nothing new can reach it.
            self._nbytes -= old.nbytes
            self._forget(sample_id, old)
        self._entries[sample_id] = entry
        self._generations[sample_id] = max(entry.generation, self._generations.get(sample_id, 0))
        self._nbytes += entry.nbytes

    def _end(self, token: int) -> None:
        sample_id, generation, _ = self._leases.pop(token, ("", 0, 0.0))
        entry = self._entries.get(sample_id)
        if entry is not None and entry.generation == generation:
            entry.leases -= 1
            self._collect(sample_id, entry)

    def _collect(self, sample_id: str, entry: _Entry) -> None:
        if entry.doomed and entry.leases == 0:
            del self._entries[sample_id]
            self._nbytes -= entry.nbytes
            self._forget(sample_id, entry)

    def _forget(self, sample_id: str, entry: _Entry) -> None:
        key = _key(sample_id, entry.generation)
        self._verified.discard(key)
        self._remove(key, entry.uri)

    def _remove(self, key: str, uri: str) -> None:
        try:
            self.backend.remove(key, uri)
        except OSError as error:
            logger.warning("sample %s could not be deleted: %s", key, error)


def check_id(sample_id: str) -> None:
    """Refuse an identity that could name a path outside a store's folder.

    Raises:
        BadSampleError: it has other characters than letters, digits, ``_``, ``-`` and inner dots, or is too long.
    """
    if not SAMPLE_ID.fullmatch(sample_id):
        raise BadSampleError(repr(sample_id)[:80], "its identity could name a path")


def _key(sample_id: str, generation: int) -> str:
    return f"{sample_id}.{generation}"
