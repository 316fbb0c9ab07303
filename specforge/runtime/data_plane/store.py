"""The feature store: the only component that holds tensors.

Generations, checksums, encodings and byte limits are implemented once, here; a backend only moves bytes
(:class:`FeatureBackend`: memory, shards on disk, a shared directory, Mooncake). Storing a sample again gives it a new
generation and invalidates references to the old one. Tensors that were read stay valid after their sample is deleted,
because every backend returns memory that outlives its entry.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, Protocol

import torch
import xxhash
from torch import Tensor

from specforge.contracts import SAMPLE_ID, FeatureSpec, Provenance, SampleRef, SampleT
from specforge.errors import UserError
from specforge.runtime.data_plane.encoding import decode, encode
from specforge.runtime.data_plane.safetensors_io import bytes_of

CHECKSUM = ".checksum"  # [8] uint8; no feature has such a name

logger = logging.getLogger(__name__)


class BadSampleError(Exception):
    """A sample that must not be used for training; the message names it and gives the reason."""

    def __init__(self, sample_id: str, reason: str) -> None:
        super().__init__(f"sample {sample_id}: {reason}")
        self.sample_id, self.reason = sample_id, reason


class StoreFullError(UserError):
    """The store is full at the moment; its contents are unchanged."""


class FeatureBackend(Protocol):
    """Moves the bytes of named groups of tensors."""

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> str:
        """Store a group; returns the URI for reading it once :meth:`flush` has returned."""

    def read(self, key: str, uri: str) -> dict[str, Tensor]:
        """Read a group, without a copy where the medium allows it. The tensors stay valid after :meth:`remove`.

        Raises:
            KeyError: there is no such group.
            OSError: the group is damaged or cannot be read.
        """

    def remove(self, key: str, uri: str) -> None:
        """Delete a group; unknown keys are ignored."""

    def holds(self, key: str, uri: str) -> bool:
        """Whether there is such a group; it may be damaged."""

    def stored(self) -> list[tuple[str, str]]:
        """Key and URI of every group, including the leftovers of killed writers."""

    def flush(self) -> None:
        """Make everything written so far durable and readable.

        Raises:
            StoreFullError: some of it did not fit; backends that write asynchronously report lack of space here.
        """

    def pending(self) -> int:
        """Bytes written but not yet flushed."""


class SharedBackend(FeatureBackend, Protocol):
    """A backend for several processes, in which a reader can name a group before another process writes it."""

    def new_uri(self, key: str, tensors: Mapping[str, Tensor]) -> str:
        """A URI that no other group has, for tensors of these shapes and dtypes; those may be on the meta device."""

    def write(self, key: str, tensors: Mapping[str, Tensor], uri: str | None = None) -> str:
        """Store a group, under a URI from :meth:`new_uri` if there is one."""


class SampleStore(ABC, Generic[SampleT]):
    """Where the loader reads samples: stored before the run, or produced during it.

    Stores that need not know what training does with their samples implement :meth:`get` alone.

    Attributes:
        readers: number of threads in which calling :meth:`get` concurrently pays off.
    """

    readers = 1

    @abstractmethod
    def get(self, sample: SampleT) -> dict[str, Tensor]:
        """Read a sample's tensors; they stay valid whatever happens to the sample.

        Raises:
            BadSampleError: the sample must not be used for training.
        """

    def start(self, step: int, ahead: Callable[[int], Iterator[tuple[int, Sequence[SampleT]]]]) -> None:
        """Start training after the checkpoint of ``step``; called on every rank.

        Args:
            step: optimizer step of the checkpoint, 0 for a new run.
            ahead: for a rank, the epoch and the samples of each batch that it will train, up to the end of the run.
        """

    def reserve(self, samples: Sequence[SampleT]) -> bool:
        """Reserve room for samples next to those that are not trained yet; False if there is none at the moment."""
        return True

    def release(self, sample_ids: Sequence[str]) -> None:
        """Drop samples that were read but will not be reported to :meth:`trained`."""

    def trained(self, sample_ids: Sequence[str], epoch: int, step: int) -> None:
        """Record that optimizer step ``step`` uses these samples of ``epoch``."""

    def durable(self, step: int) -> None:
        """Record that the checkpoint of ``step`` is complete; called on every rank."""

    def replaced(self) -> bool:
        """Whether another trainer has replaced this one."""
        return False

    def interrupt(self) -> None:
        """End every wait in :meth:`get`: nobody will use the samples."""

    def flow(self) -> dict[str, float]:
        """Figures to log since the last call; empty where nothing flows."""
        return {}


class StoreStat(NamedTuple):
    """Number of samples in a store, and their stored bytes."""

    samples: int
    nbytes: int


class _Entry(NamedTuple):
    generation: int
    nbytes: int
    uri: str


class Sealed(NamedTuple):
    """A sample as it is stored: its encoded tensors, their checksum, and its number of tokens."""

    tensors: dict[str, Tensor]
    checksum: str
    num_tokens: int


def seal(sample_id: str, tensors: Mapping[str, Tensor], encoding: str) -> Sealed:
    """Encode a sample for storing.

    Raises:
        BadSampleError: the first dimensions differ, a value is not finite, or the id could name a path.
    """
    num_tokens = _check_tensors(sample_id, tensors)
    stored = encode(tensors, encoding)
    return Sealed(stored, checksum(stored), num_tokens)  # while the bytes are still in the cache


def _check_tensors(sample_id: str, tensors: Mapping[str, Tensor]) -> int:
    """Number of tokens of a sample, once it is known to be fit for storing."""
    check_id(sample_id)
    lengths = {name: len(x) for name, x in tensors.items()}
    if len(set(lengths.values())) != 1:
        raise BadSampleError(sample_id, f"features disagree about the number of tokens: {lengths}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise BadSampleError(sample_id, f"{name} holds NaN or infinity")
    return next(iter(lengths.values()))


def _is_finite(tensor: Tensor) -> bool:
    # NaN and infinity propagate through a sum, which is 15 times faster than checking each value. If the sum itself
    # overflows, as in fp16, each value is checked.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """xxh3-64, in hex, of the tensors' bytes in the order of their names."""
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


def with_checksum(sealed: Sealed) -> dict[str, Tensor]:
    """The stored tensors and their checksum, as one more tensor."""
    return {**sealed.tensors, CHECKSUM: torch.frombuffer(bytearray.fromhex(sealed.checksum), dtype=torch.uint8)}


def as_text(written: Tensor | None) -> str:
    """The checksum in hex; empty if there is none."""
    return "" if written is None else bytes(bytes_of(written)).hex()


class FeatureStore(SampleStore[SampleRef]):
    """Samples by id and generation, over a backend.

    Checksums are verified the first time this process reads a sample.

    Args:
        backend: moves the bytes.
        max_bytes: maximum number of bytes to hold at once; None for no limit.
    """

    def __init__(self, backend: FeatureBackend, *, max_bytes: int | None = None) -> None:
        self.backend, self.max_bytes = backend, max_bytes
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._generations: dict[str, int] = {}
        self._verified: set[str] = set()
        self._nbytes = 0

    def adopt(self, refs: Iterable[SampleRef]) -> None:
        """Take over samples that the backend holds already, such as those of a manifest."""
        with self._lock:
            for ref in refs:
                check_id(ref.sample_id)
                self._remember(ref.sample_id, _Entry(ref.generation, ref.nbytes, ref.uri))

    def put(
        self, sample_id: str, tensors: Mapping[str, Tensor], *, num_supervised: int, source: str, provenance: Provenance
    ) -> SampleRef:
        """Store a sample; its reference may be handed out after :meth:`flush`.

        Args:
            sample_id: id of the sample.
            tensors: CPU tensors with the same number of tokens in their first dimension.
            num_supervised: tokens under the loss mask.
            source: file and line of the conversation.
            provenance: origin of the features, and the encoding to store them in.

        Raises:
            BadSampleError: the first dimensions differ, a value is not finite, or the id could name a path.
            StoreFullError: the sample would exceed the byte limit.
        """
        stored, digest, num_tokens = seal(sample_id, tensors, provenance.encoding)
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

    def get(self, sample: SampleRef) -> dict[str, Tensor]:
        """Read a sample's tensors.

        Raises:
            BadSampleError: it is missing, replaced by another generation, damaged, or not as the reference describes.
        """
        with self._lock:
            entry = self._entries.get(sample.sample_id)
        if entry is None:
            raise BadSampleError(sample.sample_id, "not in the store")
        if entry.generation != sample.generation:
            raise BadSampleError(sample.sample_id, f"generation {sample.generation} was replaced by {entry.generation}")
        tensors = self._read(_key(sample.sample_id, sample.generation), sample)
        for spec in sample.features:
            tensor = tensors.get(spec.name)
            if tensor is None:
                raise BadSampleError(sample.sample_id, f"{spec.name} is missing")
            found = str(tensor.dtype).removeprefix("torch.")
            if tuple(tensor.shape) != spec.shape or found != spec.dtype:
                raise BadSampleError(
                    sample.sample_id, f"{spec.name} is {found} {tuple(tensor.shape)}, not {spec.dtype} {spec.shape}"
                )
        return tensors

    def _read(self, key: str, ref: SampleRef) -> dict[str, Tensor]:
        try:
            stored = self.backend.read(key, ref.uri)
        except KeyError as error:
            raise BadSampleError(ref.sample_id, f"not in {ref.uri or 'the store'}") from error
        except OSError as error:
            raise BadSampleError(ref.sample_id, str(error)) from error
        written = stored.pop(CHECKSUM, None)  # by a server that could not return it with the reference
        if key not in self._verified:
            if checksum(stored) != (ref.checksum or as_text(written)):
                raise BadSampleError(ref.sample_id, f"checksum does not match in {ref.uri or 'the store'}")
            self._verified.add(key)
        try:
            return decode(stored, {f.name: f.dtype for f in ref.features})
        except ValueError as error:
            raise BadSampleError(ref.sample_id, str(error)) from error

    def delete(self, ref: SampleRef) -> bool:
        """Delete a sample; False if the store holds no such generation."""
        with self._lock:
            entry = self._entries.get(ref.sample_id)
            if entry is None or entry.generation != ref.generation:
                return False
            self._drop(ref.sample_id, entry)
            return True

    def discard(self, ref: SampleRef) -> None:
        """Delete the bytes that a reference names, even if another process wrote them."""
        with self._lock:
            entry = self._entries.get(ref.sample_id)
            if entry is not None and (entry.generation, entry.uri) == (ref.generation, ref.uri):
                self._drop(ref.sample_id, entry)
                return
        check_id(ref.sample_id)
        self._remove(_key(ref.sample_id, ref.generation), ref.uri)

    def holds(self, ref: SampleRef) -> bool:
        """Whether the bytes that a reference names are there; damage shows only when they are read."""
        try:
            return self.backend.holds(_key(ref.sample_id, ref.generation), ref.uri)
        except OSError:  # the URI does not belong to this store
            return False

    def disown(self, refs: Iterable[SampleRef]) -> None:
        """Leave samples to another process: the bytes stay, but are no longer counted or deleted here."""
        with self._lock:
            for ref in refs:
                entry = self._entries.pop(ref.sample_id, None)
                if entry is not None:
                    self._nbytes -= entry.nbytes

    def remove_orphans(
        self, refs: Iterable[SampleRef], spare: Collection[str] = (), stored: Sequence[tuple[str, str]] | None = None
    ) -> int:
        """Delete groups of tensors that no reference names.

        Args:
            refs: references of everything to keep.
            spare: ids of samples to leave alone.
            stored: the backend's contents from before ``refs`` and ``spare`` were collected. Pass it while other
                processes write: what they have added since is then left alone.

        Returns:
            Number of deleted groups.
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
                    self._drop(sample_id, entry)
                else:
                    self._remove(key, uri)
            count += 1
        return count

    def flush(self) -> None:
        """Make all puts durable and readable; see :meth:`FeatureBackend.flush`. What did not fit is to be discarded."""
        self.backend.flush()

    def pending(self) -> int:
        """Bytes put but not yet flushed."""
        return self.backend.pending()

    def stat(self) -> StoreStat:
        """Number of samples, and their bytes."""
        with self._lock:
            return StoreStat(len(self._entries), self._nbytes)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._entries))

    def _remember(self, sample_id: str, entry: _Entry) -> None:
        old = self._entries.get(sample_id)
        if old is not None and (old.generation, old.uri) == (entry.generation, entry.uri):
            return
        if old is not None:
            self._drop(sample_id, old)
        self._entries[sample_id] = entry
        self._generations[sample_id] = max(entry.generation, self._generations.get(sample_id, 0))
        self._nbytes += entry.nbytes

    def _drop(self, sample_id: str, entry: _Entry) -> None:
        del self._entries[sample_id]
        self._nbytes -= entry.nbytes
        key = _key(sample_id, entry.generation)
        self._verified.discard(key)
        self._remove(key, entry.uri)

    def _remove(self, key: str, uri: str) -> None:
        try:
            self.backend.remove(key, uri)
        except OSError as error:
            logger.warning("sample %s could not be deleted: %s", key, error)


def check_id(sample_id: str) -> None:
    """Reject a sample id that could name a path outside a store's folder.

    Raises:
        BadSampleError: it contains characters other than letters, digits, ``_``, ``-`` and inner dots, or is too long.
    """
    if not SAMPLE_ID.fullmatch(sample_id):
        raise BadSampleError(repr(sample_id)[:80], "its id could name a path")


def _key(sample_id: str, generation: int) -> str:
    return f"{sample_id}.{generation}"
