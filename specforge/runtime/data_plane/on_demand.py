"""Samples that are produced when the loader asks for them, and dropped once they are trained.

Planning batches takes only sample ids and lengths, which are known in advance. So the loader asks for samples in
training order, and the thread that prefetches batches produces the ones that are not held.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from specforge.contracts import ExpectedSample, SampleRef
from specforge.runtime.data_plane.store import BadSampleError, FeatureStore, SampleStore


@dataclass(eq=False)
class ProducedSamples(SampleStore[ExpectedSample]):
    """Samples on demand."""

    store: FeatureStore  # holds the produced samples; max_bytes limits prefetched and kept samples together
    produce: Callable[[ExpectedSample], SampleRef]  # captures a sample into store
    keep_bytes: int = field(default=0, kw_only=True)  # most bytes of trained samples to keep for the next epochs

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # shared by the prefetching thread and the trainer's
        self._held: dict[str, SampleRef] = {}
        self._kept: set[str] = set()
        self._kept_bytes = 0
        self._reserved: dict[str, int] = {}
        self._bad: dict[str, str] = {}

    def get(self, sample: ExpectedSample) -> dict[str, Tensor]:
        """Read a sample's tensors, after producing the sample if it is not held.

        Raises:
            BadSampleError: the target's output must not be used for training.
            StoreFullError: the sample does not fit next to the rest of its batch and the kept samples.
        """
        name = sample.sample_id
        if name in self._bad:
            raise BadSampleError(name, self._bad[name])
        if name not in self._held:
            try:
                produced = self.produce(sample)
            except BadSampleError as error:
                self._bad[name] = error.reason
                self.release([name])
                raise
            with self._lock:
                self._held[name] = produced
        return self.store.get(self._held[name])

    def reserve(self, samples: Sequence[ExpectedSample]) -> bool:
        """Reserve space next to the kept samples and those that are not trained yet, if there is any."""
        wanted = {sample.sample_id: sample.nbytes for sample in samples}
        with self._lock:
            waiting = self._reserved | wanted
            total = self._kept_bytes + sum(n for name, n in waiting.items() if name not in self._kept)
            if self.store.max_bytes is not None and total > self.store.max_bytes:
                return False
            self._reserved = waiting
        return True

    def release(self, sample_ids: Sequence[str]) -> None:
        """Drop samples, except those that still fit into ``keep_bytes``."""
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

    def trained(self, sample_ids: Sequence[str], epoch: int, step: int) -> None:
        """Release trained samples."""
        self.release(sample_ids)
