"""The stream of batches: every sample once an epoch, an exact position, damaged samples by policy."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy, StrategySpec
from specforge.errors import UserError
from specforge.runtime.data_plane.feature_folder import FeatureFolder
from specforge.runtime.data_plane.loader import FeatureDataLoader
from specforge.runtime.data_plane.packing import BatchPlan
from specforge.runtime.data_plane.store import BadSampleError

SPEC = StrategySpec("eagle3", CapturePolicy((1, 3, 4)), (AUX_HIDDEN_STATES, LAST_HIDDEN_STATES), 3, 3)


@pytest.fixture
def folder(features) -> FeatureFolder:
    return FeatureFolder.open(features / "train")


def loader(folder: FeatureFolder, **options) -> FeatureDataLoader:
    options = {"batch_size": 3, "prefetch": 0, **options}
    return FeatureDataLoader(folder.refs, folder.store, SPEC, **options)


def names(batches) -> list[tuple[str, ...]]:
    return [batch.sample_ids for batch in batches]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(0, 3), st.sampled_from([50, 64, 300, 1000]))
def test_every_epoch_has_every_sample_once_within_the_budget(lengths, epoch, budget):
    plan = BatchPlan(lengths, max_tokens=budget)
    batches = plan.epoch(epoch)
    assert len(batches) == len(plan)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= budget for batch in batches)


def test_a_sample_longer_than_the_budget_is_refused(folder):
    with pytest.raises(UserError, match="more than max_tokens 20"):
        loader(folder, batch_size=None, max_tokens=20)


def test_epochs_differ_and_seeds_repeat_them(folder):
    stream = loader(folder)
    first, second = names(stream), names(stream)
    assert first != second
    assert Counter(sum(first, ())) == Counter(sum(second, ()))
    assert names(loader(folder)) == first
    assert names(loader(folder, seed=1)) != first


def test_prefetching_changes_nothing(folder):
    assert names(loader(folder, prefetch=3)) == names(loader(folder))


def test_batches_are_fetched_side_by_side_where_the_store_says_so(folder, monkeypatch):
    expected = names(loader(folder))
    together, get = Barrier(2, timeout=60), folder.store.get

    def get_with_another(ref):
        if ref.sample_id in (expected[0][0], expected[1][0]):
            together.wait()
        return get(ref)

    monkeypatch.setattr(folder.store, "readers", 2)
    monkeypatch.setattr(folder.store, "get", get_with_another)
    assert names(loader(folder, prefetch=2)) == expected


def test_batches_are_the_samples_end_to_end(folder):
    batch = next(iter(loader(folder, pad_to=64)))
    assert batch.num_tokens % 64 == 0
    by_id = {ref.sample_id: ref for ref in folder.refs}
    start = 0
    for name, length in zip(batch.sample_ids, batch.lengths, strict=True):
        tensors = folder.store.get(by_id[name])
        for key in SPEC.features:
            assert torch.equal(batch.features[key][start : start + length], tensors[key])
        assert torch.equal(batch.input_ids[start : start + length], tensors["input_ids"].long())
        start += length
    assert not batch.loss_mask[start:].any()
    assert sum(batch.lengths) == start


@pytest.mark.parametrize("trained", [0, 1, 5, 10, 11, 12, 15])
def test_a_resumed_stream_goes_on_with_the_first_batch_that_was_not_trained(folder, trained):
    stream = loader(folder, prefetch=2)
    whole = names(stream) + names(stream)
    again = loader(folder, prefetch=2)
    seen = 0
    for _ in range(2):
        for batch in again:
            if seen == trained:
                break  # fetched, and more are fetched ahead, but not trained
            again.acknowledge(batch, 1)
            seen += 1
    state = again.state_dict()
    resumed = loader(folder, prefetch=2)
    resumed.load_state_dict(state)
    rest = names(resumed)
    if trained < len(whole) and len(rest) + trained < len(whole):
        rest += names(resumed)
    assert rest == whole[trained:][: len(rest)]
    assert rest


def test_seeking_reads_nothing_that_it_skips(folder, monkeypatch):
    stream = loader(folder)
    state = {**stream.state_dict(), "epoch": 0, "batch": 9}
    read: list[str] = []
    original = folder.store.get
    monkeypatch.setattr(folder.store, "get", lambda ref: (read.append(ref.sample_id), original(ref))[1])
    stream.load_state_dict(state)
    seen = names(stream)
    assert read == [name for batch in seen for name in batch]


def test_an_iterator_that_nobody_draws_from_moves_nothing(folder):
    stream = loader(folder)
    iter(stream)
    iter(stream)
    assert names(stream) == names(loader(folder))


def test_a_state_of_other_data_is_refused(folder):
    state = loader(folder).state_dict()
    with pytest.raises(UserError, match="batch_size"):
        loader(folder, batch_size=4).load_state_dict(state)
    fewer = FeatureDataLoader(folder.refs[:-1], folder.store, SPEC, batch_size=3, prefetch=0)
    with pytest.raises(UserError, match="the training samples"):
        fewer.load_state_dict(state)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_get_equal_counts_of_disjoint_samples(folder, world):
    parts = [names(loader(folder, rank=rank, world_size=world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    everything = [name for part in parts for batch in part for name in batch]
    assert sorted(everything) == sorted(ref.sample_id for ref in folder.refs)


def test_a_damaged_sample_stops_the_run_or_is_left_out_by_policy(folder, monkeypatch):
    bad = folder.refs[4].sample_id
    original = folder.store.get

    def get(ref):
        if ref.sample_id == bad:
            raise BadSampleError(bad, "checksum does not match")
        return original(ref)

    monkeypatch.setattr(folder.store, "get", get)
    with pytest.raises(UserError, match=f"sample {bad}: checksum does not match .from .*line"):
        list(loader(folder))
    stream = loader(folder, bad_samples="skip")
    assert sorted(sum(names(stream), ())) == sorted(r.sample_id for r in folder.refs if r.sample_id != bad)
    assert list(stream.quarantined) == [bad]


def test_a_position_among_other_features_is_refused_and_one_that_does_not_say_is_taken(folder):
    """Checkpoints of the first version do not say which features were trained on."""
    state = loader(folder).state_dict()
    assert (state["dtype"], state["encoding"]) == ("float32", "raw")
    for key in ("dtype", "encoding"):
        with pytest.raises(UserError, match=rf"{key} \(other, now .*changed since the checkpoint"):
            loader(folder).load_state_dict({**state, key: "other"})
    loader(folder).load_state_dict({k: v for k, v in state.items() if k not in ("dtype", "encoding")})


def test_features_that_disagree_are_refused_by_name(folder):
    """In what they hold, in width, in dtype; before any of them is read."""
    first, second, *rest = folder.refs
    for change, words in (
        (lambda f: [x for x in f if x.name != "input_ids"], "lack input_ids"),
        (lambda f: [replace(x, dtype="float16") for x in f], "capture them again"),
        (lambda f: [replace(x, shape=(*x.shape, 2)) for x in f], "capture them again"),
    ):
        other = replace(second, features=tuple(change(second.features)))
        with pytest.raises(UserError, match=f"sample {second.sample_id} .*{words}"):
            FeatureDataLoader([first, other, *rest], folder.store, SPEC, batch_size=3)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"batch_size": -1}, {"batch_size": None, "max_tokens": -5}, {"prefetch": -3}, {"pad_to": 0}],
)
def test_numbers_that_would_hang_or_train_nothing_are_refused(folder, options):
    with pytest.raises(UserError, match="batches: "):
        next(iter(loader(folder, **options)))
