"""Samples on demand: produced once, freed when trained, within the byte limit however slow the trainer is."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from specforge.contracts import (
    CapturePolicy,
    ExpectedSample,
    FeatureSpec,
    PromptTask,
    Provenance,
    SampleRef,
    StrategySpec,
)
from specforge.errors import UserError
from specforge.runtime.data_plane.loader import FeatureDataLoader
from specforge.runtime.data_plane.local import MemoryBackend
from specforge.runtime.data_plane.on_demand import ProducedSamples
from specforge.runtime.data_plane.store import FeatureStore

PROVENANCE = Provenance("tiny", "f" * 8, "t" * 8, CapturePolicy(()), "float32")
SPEC = StrategySpec("any", CapturePolicy(()), ("states",), 1, 1)
LENGTH, BYTES = 10, 10 * (4 * 4 + 4 + 1)


def expected(count: int) -> list[ExpectedSample]:
    specs = (
        FeatureSpec("input_ids", "int32", (LENGTH,)),
        FeatureSpec("loss_mask", "uint8", (LENGTH,)),
        FeatureSpec("states", "float32", (LENGTH, 4)),
    )
    tasks = [PromptTask(f"t{i}", tuple(range(LENGTH)), (1,) * LENGTH, f"line {i}") for i in range(count)]
    return [ExpectedSample(f"s{i}", task, specs, BYTES, PROVENANCE) for i, task in enumerate(tasks)]


class Producer:
    """Counts what it produces; every value of sample i is i, or NaN where it is told so."""

    def __init__(self, max_bytes: int | None = None, bad: tuple[str, ...] = ()) -> None:
        self.store = FeatureStore(MemoryBackend(), max_bytes=max_bytes)
        self.made: list[str] = []
        self.bad = bad
        self.peak = 0

    def __call__(self, sample: ExpectedSample) -> SampleRef:
        name = sample.sample_id
        self.made.append(name)
        value = float("nan") if name in self.bad else float(name[1:])
        tensors = {
            "states": torch.full((LENGTH, 4), value),
            "input_ids": torch.arange(LENGTH, dtype=torch.int32),
            "loss_mask": torch.ones(LENGTH, dtype=torch.uint8),
        }
        ref = self.store.put(name, tensors, num_supervised=LENGTH, source="", provenance=PROVENANCE)
        self.peak = max(self.peak, self.store.stat().nbytes)
        return ref


def stream(producer: Producer, count: int = 12, keep: int = 0, **options) -> FeatureDataLoader:
    samples = ProducedSamples(producer.store, producer, keep_bytes=keep)
    return FeatureDataLoader(expected(count), samples, SPEC, batch_size=2, **options)


def train(loader: FeatureDataLoader) -> list[str]:
    seen: list[str] = []
    for batch in loader:
        for name, states in zip(batch.sample_ids, batch.features["states"].split(LENGTH), strict=True):
            assert bool((states == float(name[1:])).all())
        seen += batch.sample_ids
        loader.acknowledge(batch, 1)
    return seen


@pytest.mark.parametrize("prefetch", [0, 2])
def test_every_sample_is_produced_once_an_epoch_and_freed_when_trained(prefetch):
    producer = Producer()
    loader = stream(producer, prefetch=prefetch)
    for epoch in range(3):
        assert train(loader) == producer.made[12 * epoch :]
        assert producer.store.stat().samples == 0
    assert len(producer.made) == 36


def test_what_fits_is_kept_and_not_produced_again():
    producer = Producer()
    loader = stream(producer, keep=5 * BYTES + 3)
    train(loader)
    assert producer.store.stat().nbytes == 5 * BYTES
    train(loader)
    assert len(producer.made) == 12 + 7


@pytest.mark.parametrize(("room", "keep"), [(2, 0), (3, 0), (4, 0), (5, 3), (6, 0)])
def test_a_slow_trainer_holds_the_producer_back(room, keep):
    """However far ahead it may fetch, what waits to be trained stays under the limit."""
    producer = Producer(max_bytes=room * BYTES)
    loader = stream(producer, keep=keep * BYTES, prefetch=50)
    for _ in range(2):
        seen = []
        for batch in loader:
            seen += batch.sample_ids
            loader.acknowledge(batch, 1)
        assert len(set(seen)) == 12
    assert producer.peak <= room * BYTES


def test_a_batch_that_cannot_fit_stops_the_run_with_the_reason():
    with pytest.raises(UserError, match="does not fit into memory for features"):
        train(stream(Producer(max_bytes=2 * BYTES - 1)))


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_what_was_fetched_ahead_and_not_trained_is_let_go(taken):
    producer = Producer(max_bytes=6 * BYTES)
    loader = stream(producer, prefetch=2)
    batches = iter(loader)
    for _ in range(taken):
        loader.acknowledge(next(batches), 1)
    batches.close()
    assert producer.store.stat().samples == 0
    assert len(train(loader)) == 12


def test_bad_samples_are_tried_once_and_leave_no_reservation():
    producer = Producer(max_bytes=4 * BYTES, bad=("s3", "s7"))
    loader = stream(producer, bad_samples="skip", prefetch=3)
    for _ in range(3):
        assert sorted(train(loader)) == sorted({f"s{i}" for i in range(12)} - {"s3", "s7"})
    assert producer.made.count("s3") == 1
    assert loader.quarantined.keys() == {"s3", "s7"}
    with pytest.raises(UserError, match=r"sample s3: states holds NaN or infinity \(from line 3\)"):
        train(stream(Producer(bad=("s3",))))


def test_unacknowledged_streams_free_what_was_read():
    producer = Producer(max_bytes=4 * BYTES)
    samples = ProducedSamples(producer.store, producer)
    loader = FeatureDataLoader(expected(12), samples, SPEC, batch_size=2, shuffle=False, acknowledged=False)
    for _ in range(2):
        assert [name for batch in loader for name in batch.sample_ids] == [f"s{i}" for i in range(12)]
    assert producer.store.stat().samples == 0


def test_the_samples_of_a_batch_are_produced_at_the_same_time():
    """Each waits until the other is being produced; what was begun and never read leaves nothing."""
    producer, both = Producer(bad=("s3",)), threading.Barrier(2, timeout=60)

    def produce(sample: ExpectedSample) -> SampleRef:
        both.wait()
        return producer(sample)

    with ThreadPoolExecutor(2) as pool:
        samples = ProducedSamples(producer.store, produce, together=pool)
        loader = FeatureDataLoader(expected(6), samples, SPEC, batch_size=2, prefetch=0, bad_samples="skip")
        assert sorted(train(loader)) == ["s0", "s1", "s2", "s4", "s5"]
        assert sorted(producer.made) == [f"s{i}" for i in range(6)]
        again = expected(2)
        samples.reserve(again)
        samples.release([sample.sample_id for sample in again])
    assert producer.store.stat().samples == 0
