"""The trainer's end of the control plane: what is queued when, and what comes out."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain

import pytest
import torch

from specforge.contracts import CapturePolicy, PromptTask, Provenance, SampleRef, StrategySpec
from specforge.errors import UserError
from specforge.inference.rollout_worker import expect, sample_id
from specforge.runtime.control_plane.controller import DataFlowController, sample_key
from specforge.runtime.control_plane.metadata import STATES, State
from specforge.runtime.control_plane.streamed import Budget, StreamedSamples
from specforge.runtime.data_plane.loader import FeatureDataLoader
from specforge.runtime.data_plane.local import MemoryBackend
from specforge.runtime.data_plane.shared_dir import SharedDirBackend
from specforge.runtime.data_plane.store import BadSampleError, FeatureStore
from tests.runtime.control_plane.memory import MemoryMetadataStore

PROVENANCE = Provenance("tiny", "f" * 8, "t" * 8, CapturePolicy((1,), last_hidden_states=False), "float32")
SPEC = StrategySpec("any", PROVENANCE.capture, ("aux_hidden_states",), 1, 1)
TASKS = {
    sample_id(task, PROVENANCE): task
    for task in (PromptTask(f"t{i}", (i, 1, 2), (0, 1, 1), f"line {i}") for i in range(8))
}
REFS = expect(list(TASKS.values()), PROVENANCE, 4)
BYTES = 3 * (4 * 4 + 4 + 1)


def stream(max_samples: int = 4, **options) -> StreamedSamples:
    budget = Budget(max_samples * BYTES, 99, options.pop("low_water", 1.0))
    control = DataFlowController(
        MemoryMetadataStore(), FeatureStore(MemoryBackend()), retain=options.pop("retain", "until_durable"), max_tries=2
    )
    return StreamedSamples(control, PROVENANCE, budget, **{"wait_seconds": 5.0, **options})


def batches(count: int = 4, epoch: int = 0):
    return iter([(epoch, REFS[2 * i : 2 * i + 2]) for i in range(count)])


def produce(samples: StreamedSamples, count: int = 99) -> list[str]:
    control = samples.controller
    leased = control.lease("w", count)
    refs = {name: put(control.features, name) for name in dict.fromkeys(x.sample_id for x in leased)}
    for prompt in leased:
        assert prompt.provenance == PROVENANCE
        control.commit([(prompt.key, refs[prompt.sample_id])])
    return [prompt.sample_id for prompt in leased]


def put(features: FeatureStore, name: str, width: int = 4) -> SampleRef:
    tensors = {
        "aux_hidden_states": torch.ones(3, width),
        "input_ids": torch.tensor(TASKS[name].input_ids, dtype=torch.int32),
        "loss_mask": torch.tensor(TASKS[name].loss_mask, dtype=torch.uint8),
    }
    return features.put(name, tensors, num_supervised=2, source="", provenance=PROVENANCE)


def test_what_is_expected_is_what_is_produced():
    control = stream().controller
    for ref in REFS:
        made = put(control.features, ref.sample_id)
        assert ref.matches(made)
        assert (made.num_tokens, made.num_supervised, made.nbytes) == (ref.num_tokens, ref.num_supervised, ref.nbytes)


def test_prompts_are_queued_in_order_as_far_as_they_fit():
    samples = stream(max_samples=5)
    samples.queue(batches())
    assert produce(samples) == [ref.sample_id for ref in REFS[:4]]
    assert samples.nbytes == 4 * BYTES
    assert not samples.reserve(REFS[4:6])
    assert list(samples.budget.window(batches())) == [sample_key(ref.sample_id, 0) for ref in REFS[:4]]


def test_room_is_filled_again_when_it_is_low():
    samples = stream(max_samples=4, low_water=0.5, retain="until_trained")
    samples.queue(iter([(0, [ref]) for ref in REFS]))
    names = produce(samples)
    for step, waiting in enumerate([0, 0, 2, 0], 1):  # what is trained is let go when the next is read
        assert samples.reserve([REFS[step - 1]])
        samples.get(REFS[step - 1])
        samples.trained(names[step - 1 : step], 0, step)
        samples.reserve([])
        assert samples.controller.counts()[State.QUEUED] == waiting
        names += produce(samples)


def test_trained_samples_are_deleted_where_others_are_fetched_not_where_training_goes_on(monkeypatch):
    samples = stream(max_samples=8, retain="until_trained")
    backend, threads = samples.controller.features.backend, []
    remove = backend.remove

    def watched(key, uri):
        threads.append(threading.current_thread())
        queued = samples.controller.counts()[State.QUEUED]
        assert len(backend.stored()) + queued <= 8  # room is given away afterwards
        remove(key, uri)

    monkeypatch.setattr(backend, "remove", watched)
    loader = FeatureDataLoader(REFS, samples, SPEC, batch_size=2, shuffle=False, prefetch=1)
    samples.queue((epoch, refs) for epoch, _, refs in loader.upcoming(0))
    produce(samples)
    for step, batch in enumerate(loader, 1):
        samples.trained(batch.sample_ids, 0, step)
    fetching, queued = len(threads), samples.controller.counts()[State.QUEUED]
    assert 4 <= fetching < 8
    assert {thread.name.partition("_")[0] for thread in threads} == {"features"}
    samples.close()
    assert threads[fetching:] == (8 - fetching) * [threading.current_thread()]
    assert samples.controller.counts()[State.QUEUED] == queued
    assert samples.controller.features.stat().samples == 0


def test_what_waits_for_a_checkpoint_does_not_lock_out_the_next_batch(caplog):
    samples = stream(max_samples=4)
    samples.queue(batches())
    produce(samples)
    for n in range(2):
        for ref in REFS[2 * n : 2 * n + 2]:
            samples.get(ref)
        samples.trained([ref.sample_id for ref in REFS[2 * n : 2 * n + 2]], 0, n + 1)
    assert samples.nbytes == 4 * BYTES
    assert samples.reserve(REFS[4:6])
    assert samples.nbytes == 4 * BYTES
    assert samples.controller.features.stat().samples == 2
    assert "deleted early" in caplog.text
    samples.controller.rewind(1)
    assert samples.controller.counts()[State.COMMITTED] == 2


def test_who_reads_the_last_batch_that_is_queued_makes_room_for_one_more(caplog):
    """Until then everything that waits for a checkpoint stays."""
    samples = stream(max_samples=6)
    samples.queue(chain(batches(), batches(epoch=1)))
    produce(samples)
    for n, (stored, queued) in enumerate([(6, 0), (6, 0), (4, 2)]):
        assert "deleted early" not in caplog.text
        assert samples.reserve(REFS[2 * n : 2 * n + 2])
        for ref in REFS[2 * n : 2 * n + 2]:
            samples.get(ref)
        samples.trained([ref.sample_id for ref in REFS[2 * n : 2 * n + 2]], 0, n + 1)
        assert samples.controller.features.stat().samples == stored
        assert samples.controller.counts()[State.QUEUED] == queued
    assert "deleted early" in caplog.text


def test_a_plan_without_room_is_refused():
    samples = stream(max_samples=1)
    samples.queue(batches())
    with pytest.raises(UserError, match=r"raise data\.max_bytes"):
        samples.get(REFS[0])


def test_features_of_another_kind_are_refused_by_name():
    samples = stream()
    samples.queue(batches())
    for prompt in samples.controller.lease("w", 1):
        samples.controller.commit([(prompt.key, put(samples.controller.features, prompt.sample_id, width=5))])
    with pytest.raises(BadSampleError, match="not of the expected kind"):
        samples.get(REFS[0])


def test_a_sample_that_is_damaged_each_time_is_refused():
    damages = 0

    def wait(seconds: float) -> None:
        nonlocal damages
        (leased,) = samples.controller.lease("w", 1)
        ref = put(samples.controller.features, leased.sample_id)
        samples.controller.commit([(leased.key, replace(ref, checksum="0" * 16))])
        damages += 1

    samples = stream(wait=wait)
    samples.queue(batches(1))
    with pytest.raises(BadSampleError, match="checksum"):
        samples.get(REFS[0])
    assert damages == 2


def test_a_disk_that_stalls_is_named(tmp_path, caplog):
    """A producer hangs between the write and the sync; then the read takes long."""
    hanging: list[tuple[str, SampleRef]] = []

    def wait(seconds: float) -> None:
        if not hanging:
            leased = samples.controller.lease("w", 2)
            hanging.append((leased[0].key, put(samples.controller.features, leased[0].sample_id)))
        elif "2 prompts leased, 1 of them partly written, 6 queued" in caplog.text:
            samples.controller.commit(hanging)

    samples = stream(max_samples=8, wait=wait, stall_seconds=0.01)
    backend = samples.controller.features.backend = SharedDirBackend(tmp_path)
    samples.queue(batches())
    read = backend.read

    def slow_read(key, uri):
        assert "to read a sample" not in caplog.text
        started = time.monotonic()
        while time.monotonic() - started < 0.01:
            found = read(key, uri)
        return found

    backend.read = slow_read
    samples.get(REFS[0])
    assert "the store is the bottleneck: it took 0 s to read a sample" in caplog.text


def test_of_several_threads_that_wait_one_says_so_at_twice_the_time_each_time(monkeypatch, caplog):
    now = 0.0

    def pass_time() -> None:
        nonlocal now
        now += 10.0
        if now in (130.0, 170.0):
            produce(samples, 2)

    steps = threading.Barrier(2, pass_time, timeout=60)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    samples = stream(wait=lambda _: steps.wait(), wait_seconds=1000.0)
    samples.queue(batches())
    with ThreadPoolExecutor(2) as pool:
        for first in (0, 2):
            list(pool.map(samples.get, REFS[first : first + 2]))
    assert [int(n) for n in re.findall(r"waiting for samples for (\d+) s", caplog.text)] == [30, 60, 120, 30]


def test_a_sample_is_read_once_in_each_epoch_and_kept_ones_at_any_time():
    samples = stream(max_samples=8)
    samples.queue(iter([(0, REFS[:1]), (1, REFS[:1])]))
    samples.keep(REFS[1:2])
    samples.keep(REFS[1:2])
    assert len(produce(samples)) == 3
    for _ in range(2):
        for ref in REFS[:2]:
            samples.get(ref)
    samples.get(REFS[1])
    flow = samples.flow()
    assert (flow["ready"], flow["queued"], flow["bytes"]) == (0.0, 0.0, 2.0 * BYTES)
    assert flow["read_per_second"] > 0
    assert samples.flow()["read_per_second"] == 0
    with pytest.raises(UserError):
        samples.get(REFS[0])


def test_a_stream_that_is_left_does_not_wait_for_what_never_comes():
    samples = stream(max_samples=8, wait_seconds=600.0)
    loader = FeatureDataLoader(REFS, samples, SPEC, batch_size=2, shuffle=False, prefetch=2)
    samples.queue((epoch, refs) for epoch, _, refs in loader.upcoming(0))
    produce(samples, 2)
    batch_stream = iter(loader)
    assert next(batch_stream).sample_ids == tuple(ref.sample_id for ref in REFS[:2])
    started = time.monotonic()
    batch_stream.close()
    assert time.monotonic() - started < 30


def test_what_is_upcoming_is_what_every_rank_gets():
    for rank in range(2):
        samples = stream(max_samples=99)
        loader = FeatureDataLoader(REFS[:7], samples, SPEC, batch_size=2, rank=rank, world_size=2, prefetch=0, seed=3)
        loader.load_state_dict({**loader.state_dict(), "epoch": 1, "batch": 1})
        ahead = loader.upcoming(rank)
        expected = [next(ahead) for _ in range(5)]
        samples.queue(iter([(epoch, refs) for epoch, _, refs in expected]))
        produce(samples)
        found = [(x.cursor["epoch"], x.cursor["batch"] - 1, x.sample_ids) for _ in "abc" for x in loader]
        assert found[:5] == [(e, n, tuple(ref.sample_id for ref in refs)) for e, n, refs in expected]
        assert [n for _, n, _ in expected] == [1, 0, 1, 0, 1]


def damaged_record(samples: StreamedSamples, key: str, change) -> None:
    metadata = samples.controller.metadata
    if change is None:
        metadata.remove([key])
    else:
        metadata._rows[key].update(change)


@pytest.mark.parametrize(
    "change",
    [
        None,
        {"state": "nonsense"},
        {"state": "trained"},
        {"state": "durable"},
        {"state": "committed", "ref": "damaged"},
        {"state": "committed", "ref": ""},
    ],
)
def test_a_sample_whose_record_is_lost_or_damaged_is_queued_again(change):
    """That it is still to be trained, the checkpoint says; the run goes on."""
    samples = stream(wait=lambda seconds: produce(samples, 1))
    samples.queue(batches())
    damaged_record(samples, sample_key(REFS[0].sample_id, 0), change)
    for ref in REFS[:2]:
        tensors = samples.get(ref)
        assert len(tensors["input_ids"]) == 3


def test_a_sample_whose_record_is_lost_before_its_step_is_recorded_stops_nothing(caplog):
    samples = stream(max_samples=8)
    samples.queue(batches())
    produce(samples)
    names = [ref.sample_id for ref in REFS[:2]]
    for ref in REFS[:2]:
        samples.get(ref)
    samples.controller.metadata.remove([sample_key(names[0], 0)])
    samples.trained(names, 0, 1)
    assert "its record is gone from the metadata store" in caplog.text
    assert samples.controller.counts()[State.TRAINED] == 1
    samples.controller.metadata.remove([row.key for row in samples.controller.metadata.find(STATES)])
    with pytest.raises(UserError, match=r"resume with --ckpt_path last"):
        samples.trained(names, 0, 1)
    with pytest.raises(UserError, match=r"resume with --ckpt_path last"):
        samples.get(REFS[2])


def test_a_metadata_store_that_cannot_be_written_is_blamed_before_producers_are(caplog):
    class Claim:
        def renew(self) -> None:
            raise UserError("metadata m.db: database or disk is full")

    samples = stream(wait_seconds=0.05, stall_seconds=0.01, claim=Claim())
    samples.queue(batches())
    samples.controller.lease("silent", 9)
    with pytest.raises(UserError, match=r"no sample for 0 s: metadata m\.db: database or disk is full"):
        samples.get(REFS[0])
    assert "training has been waiting for samples for 0 s: metadata m.db: database or disk is full" in caplog.text


def test_samples_of_streams_with_other_stamps_are_told_apart():
    one = stream(max_samples=8)
    other = StreamedSamples(one.controller, PROVENANCE, one.budget, stamp="b" * 16)
    for samples in (one, other):
        samples.queue(batches())
    assert len(one.controller.lease("w", 99)) == 16
    assert other.key(REFS[0].sample_id, 0) == f"{REFS[0].sample_id}-{'b' * 16}@0"
    assert list(other.budget.window(batches(1), other.stamp)) == [other.key(ref.sample_id, 0) for ref in REFS[:2]]
