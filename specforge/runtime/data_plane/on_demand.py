"""Samples that are produced when the stream asks for them, and let go when they are trained.

What a plan of batches needs is known before: identities and lengths. So the stream asks for samples in the order in
which it trains them, and a sample that is not held is produced on the spot, by the stream's own prefetching thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from specforge.contracts import SampleRef
from specforge.runtime.data_plane.store import BadSampleError, FeatureStore, Lease


class ProducedSamples:
    """A :class:`SampleStore` over a producer.

    Args:
        store: holds what was produced; its ``max_bytes`` bounds what is fetched ahead and kept together.
        produce: puts a sample into ``store`` and returns its reference.
        keep_bytes: keep trained samples for the next epochs, as far as they fit into so many bytes.
        until_read: let go of a sample once its batch is made, for streams whose batches nobody acknowledges.
    """

    readers = 1

    def __init__(
        self, store: FeatureStore, produce: Callable[[str], SampleRef], *, keep_bytes: int = 0, until_read: bool = False
    ) -> None:
        self.store, self.produce = store, produce
        self.keep_bytes, self.until_read = keep_bytes, until_read
        self._lock = threading.Lock()  # between the prefetching thread and the trainer's
        self._held: dict[str, SampleRef] = {}
        self._kept: set[str] = set()
        self._kept_bytes = 0
        self._reserved: dict[str, int] = {}
        self._bad: dict[str, str] = {}

    def get(self, ref: SampleRef) -> Lease:
        """Fetch a sample's tensors, producing it first where it is not held.

        Raises:
            BadSampleError: what the target made of it must not be trained on.
            StoreFullError: it does not fit beside the rest of its batch and what is kept.
        """
        name = ref.sample_id
        if name in self._bad:
            raise BadSampleError(name, self._bad[name])
        if name not in self._held:
            try:
                produced = self.produce(name)
            except BadSampleError as error:
                self._bad[name] = error.reason
                self.free([name])
                raise
            with self._lock:
                self._held[name] = produced
        lease = self.store.get(self._held[name])
        lease.store = self
        return lease

    def release(self, lease: Lease) -> None:
        """End a lease."""
        self.store.release(lease)
        if self.until_read:
            self.free([lease.ref.sample_id])

    def reserve(self, refs: Sequence[SampleRef]) -> bool:
        """Keep room for samples beside those that are kept and those that wait to be trained, if there is any."""
        wanted = {ref.sample_id: ref.nbytes for ref in refs}
        with self._lock:
            waiting = self._reserved | wanted
            total = self._kept_bytes + sum(n for name, n in waiting.items() if name not in self._kept)
            if self.store.max_bytes is not None and total > self.store.max_bytes:
                return False
            self._reserved = waiting
        return True

    def free(self, sample_ids: Sequence[str]) -> None:
        """Let go of samples, or keep those that still fit into ``keep_bytes``."""
        with self._lock:
            for name in sample_ids:
                self._reserved.pop(name, None)
                ref = self._held.get(name)
                if ref is None or name in self._kept:
                    continue
                if self._kept_bytes + ref.nbytes <= self.keep_bytes:
                    self._kept.add(name)
                    self._kept_bytes += ref.nbytes
                else:
                    self.store.delete(self._held.pop(name))

    def interrupt(self) -> None:
        """Nothing: what is wanted is produced, not waited for."""
