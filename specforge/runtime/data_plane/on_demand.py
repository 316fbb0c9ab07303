"""Samples that are produced when the loader asks for them, and dropped once they are trained.

Planning batches takes only sample ids and lengths, which are known in advance. So the loader asks for samples in
training order, and the thread that prefetches batches produces the ones that are not held.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
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
    # Produces the samples of a batch at the same time; by default one by one, each when it is read.
    together: Executor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # shared by the prefetching thread and the trainer's
        self._held: dict[str, SampleRef] = {}
        self._kept: set[str] = set()
        self._kept_bytes = 0
        self._reserved: dict[str, int] = {}
        self._bad: dict[str, str] = {}
        self._started: dict[str, Future[SampleRef]] = {}

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
            started = self._started.pop(name, None)
            try:
                produced = self.produce(sample) if started is None else started.result()
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
            if self.together is not None:
                for sample in samples:
                    name = sample.sample_id
                    if not (name in self._held or name in self._bad or name in self._started):
                        self._started[name] = self.together.submit(self.produce, sample)
        return True

    def release(self, sample_ids: Sequence[str]) -> None:
        """Drop samples, except those that still fit into ``keep_bytes``."""
        with self._lock:
            for name in sample_ids:
                self._reserved.pop(name, None)
                started = self._started.pop(name, None)
                if started is not None and not started.cancel():  # nobody will read it
                    started.add_done_callback(self._drop)
                ref = self._held.get(name)
                if ref is None or name in self._kept:
                    continue
                if self._kept_bytes + ref.nbytes <= self.keep_bytes:
                    self._kept.add(name)
                    self._kept_bytes += ref.nbytes
                else:
                    self.store.delete(self._held.pop(name))

    def _drop(self, produced: Future[SampleRef]) -> None:
        if produced.exception() is None:
            self.store.delete(produced.result())

    def trained(self, sample_ids: Sequence[str], epoch: int, step: int) -> None:
        """Release trained samples."""
        self.release(sample_ids)
