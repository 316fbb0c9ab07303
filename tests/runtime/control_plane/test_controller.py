"""The controller against a simple model, its crashes and restarts, and what may not pass through it."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from specforge.contracts import CapturePolicy, PromptTask, Provenance, SampleRef
from specforge.errors import UserError
from specforge.runtime.control_plane.controller import (
    DataFlowController,
    GivenUpPrompt,
    LeasedPrompt,
    Reconciled,
    dump_ref,
    load_ref,
    sample_key,
)
from specforge.runtime.control_plane.metadata import STATES, State, StateError
from specforge.runtime.control_plane.sqlite import SQLiteMetadataStore
from specforge.runtime.data_plane.local import MemoryBackend
from specforge.runtime.data_plane.shared_dir import SharedDirBackend
from specforge.runtime.data_plane.store import BadSampleError, FeatureStore
from tests.runtime.control_plane.memory import MemoryMetadataStore

PROVENANCE = Provenance("tiny", "f" * 8, "t" * 8, CapturePolicy((1, 3)), "float32")
NAMES = [f"s{i}" for i in range(6)]
TASKS = {name: PromptTask(f"t-{name}", (1, 2, 3), (0, 1, 1), f"file, line {name}") for name in NAMES}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def put(features: FeatureStore, name: str, value: float = 0.0) -> SampleRef:
    ref = features.put(name, {"states": torch.full((3, 2), value)}, num_supervised=2, source="s", provenance=PROVENANCE)
    features.flush()
    return ref


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def control(clock) -> DataFlowController:
    return DataFlowController(
        MemoryMetadataStore(), FeatureStore(MemoryBackend()), clock=clock, lease_seconds=10.0, max_tries=2
    )


def produce(control: DataFlowController, owner: str = "w", count: int = 99) -> list[str]:
    """What a producer does; returns the keys."""
    leased = control.lease(owner, count)
    control.commit([(x.key, put(control.features, x.sample_id)) for x in leased])
    return [x.key for x in leased]


def test_a_sample_goes_from_prompt_to_durable_and_its_features_go(control):
    assert control.ingest(TASKS) == 6
    assert control.ingest(TASKS) == 0
    (first,) = control.lease("w", 1)
    assert (first.sample_id, first.task) == ("s0", TASKS["s0"])
    control.release("w")
    keys = produce(control)
    (ref, *_) = control.deliver(keys)
    tensors = control.features.get(ref)
    assert tensors["states"].shape == (3, 2)
    control.trained(keys[:4], 1)
    assert control.features.stat().samples == 6
    assert control.durable(1) == 4
    assert control.features.stat().samples == 2
    assert control.counts() == {**dict.fromkeys(STATES, 0), State.DURABLE: 4, State.DELIVERED: 2}


def test_features_kept_until_trained_are_produced_again_when_the_run_goes_back(control):
    control.retain = "until_trained"
    control.ingest(TASKS)
    keys = produce(control)
    control.deliver(keys)
    control.trained(keys[:2], 1)
    control.free(keys[:2])
    control.durable(1)
    control.trained(keys[2:4], 2)
    control.free(keys[2:4])
    assert control.features.stat().samples == 2
    assert sorted(control.rewind(1)) == keys[2:]
    assert control.counts() == {**dict.fromkeys(STATES, 0), State.DURABLE: 2, State.QUEUED: 2, State.COMMITTED: 2}
    assert produce(control) == keys[2:4]


def test_a_dead_producer_is_taken_over_and_its_late_commit_recognised(tmp_path, clock):
    metadata = MemoryMetadataStore()
    slow, quick = (
        DataFlowController(metadata, FeatureStore(SharedDirBackend(tmp_path)), clock=clock, lease_seconds=10.0)
        for _ in "ab"
    )
    slow.ingest({"s0": TASKS["s0"]})
    (mine,) = slow.lease("slow", 1)
    clock.now += 10.0
    (taken,) = quick.lease("quick", 1)
    assert (taken.key, taken.task.attempt) == (mine.key, 1)
    assert slow.fail("slow", mine, "too late to matter") == State.LEASED
    late = put(slow.features, "s0")
    assert slow.commit([(mine.key, late)]) == [True]
    assert quick.commit([(taken.key, put(quick.features, "s0"))]) == [False]
    assert quick.deliver([mine.key]) == [late]
    assert len(slow.features.backend.stored()) == 1


def test_features_of_a_duplicate_are_deleted(tmp_path, clock):
    """Two processes on one shared folder, the same sample: the second's file goes, the first's stays."""
    metadata = MemoryMetadataStore()
    mine, others = (DataFlowController(metadata, FeatureStore(SharedDirBackend(tmp_path)), clock=clock) for _ in "ab")
    mine.ingest({"s0": TASKS["s0"]})
    (leased,) = mine.lease("a", 1)
    first, second = put(mine.features, "s0"), put(others.features, "s0")
    assert first.uri != second.uri
    assert mine.commit([(leased.key, first)]) == [True]
    assert others.commit([(leased.key, second)]) == [False]
    assert mine.commit([(leased.key, first)]) == [False]  # the same one twice
    assert [uri for _, uri in mine.features.backend.stored()] == [first.uri]
    (ref,) = others.deliver([leased.key])
    tensors = others.features.get(ref)
    assert len(tensors["states"]) == 3


def test_features_of_a_duplicate_stay_if_another_epoch_has_the_same(tmp_path, clock):
    """A producer commits what it produced for two epochs, after another producer was faster in the first."""
    metadata = MemoryMetadataStore()
    mine, others = (DataFlowController(metadata, FeatureStore(SharedDirBackend(tmp_path)), clock=clock) for _ in "ab")
    mine.ingest({"s0": TASKS["s0"], "s1": TASKS["s1"]})
    first, second = (x.key for x in mine.lease("a", 2))
    mine.commit([(first, put(mine.features, "s0"))])
    ref = put(others.features, "s0")
    assert others.commit([(first, ref), (second, ref)]) == [False, True]
    assert mine.deliver([second]) == [ref]
    assert len(mine.features.get(ref)["states"]) == 3


def test_a_duplicate_takes_the_place_of_lost_features(control):
    control.ingest({"s0": TASKS["s0"]})
    (leased,) = control.lease("w", 1)
    control.commit([(leased.key, put(control.features, "s0"))])
    again = put(control.features, "s0")  # replaced the first in this store
    assert control.commit([(leased.key, again)]) == [False]
    assert control.deliver([leased.key]) == [again]


def test_a_late_duplicate_of_a_durable_sample_leaves_nothing(control):
    control.ingest({"s0": TASKS["s0"]})
    (key,) = produce(control)
    control.deliver([key])
    control.trained([key], 1)
    control.durable(1)
    assert control.commit([(key, put(control.features, "s0"))]) == [False]
    assert control.features.stat().samples == 0
    assert control.counts()[State.DURABLE] == 1


def test_the_next_epoch_uses_features_that_are_still_held(control):
    control.ingest(TASKS, 0)
    produce(control)
    first = [sample_key(name, 0) for name in NAMES]
    refs = control.deliver(first)
    control.trained(first[:3], 1)
    control.durable(1)
    control.trained(first[3:], 2)
    control.ingest(TASKS, 1)
    assert [x.sample_id for x in control.lease("w", 99)] == NAMES[:3]  # the others' features need no producing
    second = [sample_key(name, 1) for name in NAMES[3:]]
    assert control.deliver(second) == refs[3:]
    control.durable(2)
    assert control.features.stat().samples == 3  # epoch 1 still wants them
    control.trained(second, 3)
    control.durable(3)
    assert control.features.stat().samples == 0


def test_prompts_that_the_trainer_drops_while_held_features_are_committed_stop_no_producer(control, monkeypatch):
    control.ingest(TASKS, 0)
    produce(control)
    control.deliver([sample_key(name, 0) for name in NAMES])
    control.ingest(TASKS, 1)
    dropped, kept = sample_key("s0", 1), [sample_key(name, 1) for name in NAMES[1:]]
    holds = control.features.holds

    def forget_then_look(ref: SampleRef) -> bool:
        control.metadata.remove([dropped])  # the trainer restarts between the lease and the commit
        return holds(ref)

    monkeypatch.setattr(control.features, "holds", forget_then_look)
    assert control.lease("w", 99) == []
    assert [ref.sample_id for ref in control.deliver(kept)] == NAMES[1:]


def test_forgotten_samples_leave_nothing_and_may_come_again(control):
    control.ingest(TASKS)
    keys = produce(control, count=2)
    control.forget([*keys, "s5@0"])
    assert control.features.stat().samples == 0
    assert control.counts()[State.QUEUED] == 3
    assert control.ingest(TASKS) == 3


def test_features_freed_early_are_produced_again_when_the_run_goes_back(control):
    control.ingest(TASKS)
    keys = produce(control)
    control.deliver(keys)
    control.trained(keys[:3], 1)
    control.free(keys[:2])
    assert control.features.stat().samples == 4
    control.rewind(0)
    assert control.counts()[State.QUEUED] == 2
    assert sorted(produce(control)) == keys[:2]


def test_prompts_say_what_to_capture(control):
    control.ingest({"s0": TASKS["s0"]}, provenance=PROVENANCE)
    control.ingest({"s1": TASKS["s1"]})
    first, second = control.lease("w", 2)
    assert (first.task, first.provenance) == (TASKS["s0"], PROVENANCE)
    assert (second.task, second.provenance) == (TASKS["s1"], None)


def test_orphans_of_a_store_in_use_spare_what_came_meanwhile(tmp_path, clock):
    """Between the listing of the files and of the states, a producer leases, puts and commits: its file stays."""
    metadata = MemoryMetadataStore()
    mine, others = (DataFlowController(metadata, FeatureStore(SharedDirBackend(tmp_path)), clock=clock) for _ in "ab")
    mine.ingest(TASKS)
    orphan = put(others.features, "s5")
    (leased,) = others.lease("w", 1)
    ref = put(others.features, leased.sample_id)
    find = metadata.find

    def meanwhile(states, **options):
        found = find(states, **options)
        if states == (State.LEASED,):
            others.commit([(leased.key, ref)])
        return found

    metadata.find = meanwhile
    assert mine.remove_orphans() == 1
    assert mine.features.holds(ref)
    assert not mine.features.holds(orphan)


def test_failures_end_as_visible_given_up_prompts(control):
    control.ingest({"s0": TASKS["s0"]})
    for state in (State.QUEUED, State.DEAD):
        (leased,) = control.lease("w", 1)
        assert control.fail("w", leased, "s0: aux_hidden_states holds NaN") == state
    assert control.lease("w", 1) == []
    assert control.given_up() == [GivenUpPrompt("s0@0", 2, "s0: aux_hidden_states holds NaN")]
    control.revive(["s0@0"])
    assert control.lease("w", 1)[0].task.attempt == 0


def test_a_restart_queues_what_is_lost_and_deletes_what_nobody_committed(tmp_path, clock):
    path, folder = tmp_path / "metadata.db", tmp_path / "features"

    def start() -> DataFlowController:
        return DataFlowController(
            SQLiteMetadataStore(path), FeatureStore(SharedDirBackend(folder)), clock=clock, lease_seconds=10.0
        )

    before = start()
    before.ingest(TASKS)
    keys = produce(before, "w", 3)
    before.deliver(keys[:2])
    backend = before.features.backend
    backend.remove("s1.1", before._refs(keys[1:2])[0].uri)
    put(before.features, "s5")  # its producer died between put and commit, and its lease is over
    (busy,) = before.lease("busy", 1)
    put(before.features, busy.sample_id)  # about to be committed
    unfinished = folder / "s5" / ".s5.1-0123456789abcdef.tmp"
    unfinished.parent.mkdir(exist_ok=True)
    unfinished.write_bytes(b"half")

    after = start()
    assert after.reconcile() == Reconciled(lost=1, orphans=2)
    assert after.reconcile() == Reconciled(lost=0, orphans=0)
    assert not unfinished.exists()
    assert sorted(key for key, _ in backend.stored()) == ["s0.1", "s2.1", "s3.1"]
    clock.now += 10.0
    assert after.reconcile().orphans == 0  # the lease is over, but nobody has taken it yet
    assert [x.sample_id for x in after.lease("w", 9)] == ["s1", "s3", "s4", "s5"]


def test_whose_put_takes_long_and_whose_producer_is_silent(control, clock):
    control.ingest(TASKS)
    busy, *_ = control.lease("w", 3)
    put(control.features, busy.sample_id)
    assert (control.unfinished(), control.stalled()) == (1, 0)
    clock.now += 10.0
    assert (control.unfinished(), control.stalled()) == (0, 3)
    control.lease("v", 1)  # somebody works: what is over is queued again, and what had been put is deleted
    assert (control.unfinished(), control.stalled()) == (0, 0)


def test_damaged_features_are_produced_again(control):
    control.ingest({"s0": TASKS["s0"]})
    (key,) = produce(control)
    (ref,) = control.deliver([key])
    control.features.backend.read("s0.1", "")["states"].fill_(7.0)
    with pytest.raises(BadSampleError, match="checksum"):
        control.features.get(ref)
    control.lost([key])
    assert produce(control) == [key]
    (again,) = control.deliver([key])
    assert again.generation == 2


def test_senseless_limits_are_refused():
    for options in ({"lease_seconds": 0.0}, {"max_tries": 0}):
        with pytest.raises(UserError, match="control plane"):
            DataFlowController(MemoryMetadataStore(), FeatureStore(MemoryBackend()), **options)


# No tensor crosses.

REF = SampleRef("s0", 1, (), 3, 2, 24, "c", "", "s", PROVENANCE)
objects = st.sampled_from([torch.zeros(2), torch.tensor(3), np.zeros(2), np.int64(3), object(), b"bytes"])


@st.composite
def smuggled(draw, record):
    """The record, with an object somewhere in it."""
    name = draw(st.sampled_from([f.name for f in dataclasses.fields(record)]))
    thing, value = draw(objects), getattr(record, name)
    if isinstance(value, tuple):
        at = draw(st.integers(0, len(value)))
        return dataclasses.replace(record, **{name: (*value[:at], thing, *value[at:])})
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(record, **{name: draw(smuggled(value))})
    return dataclasses.replace(record, **{name: thing})


@settings(deadline=None)
@given(smuggled(TASKS["s0"]), smuggled(REF), objects)
def test_no_tensor_crosses_the_control_plane(task, ref, thing):
    control = DataFlowController(MemoryMetadataStore(), FeatureStore(MemoryBackend()))
    with pytest.raises(TypeError):
        control.ingest({"s1": TASKS["s1"], "s0": task})
    assert control.counts()[State.QUEUED] == 0
    control.ingest({"s0": TASKS["s0"]})
    (leased,) = control.lease("w", 1)
    with pytest.raises(TypeError):
        control.commit([(leased.key, ref)])
    for forbidden in (
        lambda: control.fail("w", leased, thing),
        lambda: control.fail(thing, leased, ""),
        lambda: control.lease(thing, 1),
        lambda: control.trained([], thing),
        lambda: control.durable(thing),
        lambda: control.rewind(thing),
    ):
        with pytest.raises(TypeError, match="cannot cross the control plane"):
            forbidden()
    assert control.counts()[State.LEASED] == 1


def test_references_survive_the_crossing():
    ref = put(FeatureStore(MemoryBackend()), "s0")
    assert load_ref(dump_ref(ref)) == ref


# A state machine against a model of a few lines.


class Machine(RuleBasedStateMachine):
    """Producers, a trainer, their deaths, and a store that loses things; the model is a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.features = FeatureStore(MemoryBackend())
        self.metadata = self.open()
        self.restart()
        self.state: dict[str, str] = {}
        self.tries: dict[str, int] = {}
        self.owner: dict[str, tuple[str, float]] = {}
        self.step_of: dict[str, int] = {}
        self.hands: list[LeasedPrompt] = []  # all that producers ever got, dead producers' too
        self.step, self.saved = 0, 0
        self.history: list[tuple[int, str]] = []
        assert self.control.ingest({name: TASKS[name] for name in NAMES[:4]}) == 4
        for name in NAMES[:4]:
            self.state[sample_key(name, 0)], self.tries[sample_key(name, 0)] = State.QUEUED, 0

    def open(self):
        return MemoryMetadataStore()

    def restart(self) -> None:
        self.control = DataFlowController(
            self.metadata, self.features, clock=self.clock, lease_seconds=10.0, max_tries=2
        )

    # Three rules, not one an action: hypothesis leaves rules out at random, and few runs would get far.

    @rule(
        data=st.data(),
        action=st.sampled_from(
            ["lease", "commit", "commit", "die_with_bytes", "fail", "renew", "release", "time_passes"]
        ),
    )
    def producers(self, data, action):
        owner = data.draw(st.sampled_from("ab"))
        if action in ("commit", "die_with_bytes", "fail") and not self.hands:
            action = "lease"
        getattr(self, action)(data, owner)

    @rule(data=st.data(), action=st.sampled_from(["deliver", "deliver", "train", "train", "save"]))
    def trainer(self, data, action):
        getattr(self, action)(data)

    @rule(
        data=st.data(),
        action=st.sampled_from(
            ["ingest", "a_wrong_delivery", "the_trainer_dies", "a_sample_is_lost", "everything_restarts"]
        ),
    )
    def disturbances(self, data, action):
        getattr(self, action)(data)

    def reopen(self) -> None:
        """Memory stays."""

    def of(self, *states: str) -> list[str]:
        return [key for key, state in self.state.items() if state in states]

    def ingest(self, data):
        names = data.draw(st.lists(st.sampled_from(NAMES), unique=True))
        keys = [sample_key(name, 0) for name in names]
        new = [key for key in keys if key not in self.state]
        assert self.control.ingest({name: TASKS[name] for name in names}) == len(new)
        self.state |= dict.fromkeys(new, State.QUEUED)
        self.tries |= dict.fromkeys(new, 0)

    def lease(self, data, owner):
        count = data.draw(st.integers(1, 4))
        for key in self.of(State.LEASED):
            if self.owner[key][1] <= self.clock.now:
                self.state[key] = State.DEAD if self.tries[key] >= 2 else State.QUEUED
        expected = self.of(State.QUEUED)[:count]
        leased = self.control.lease(owner, count)
        assert [x.key for x in leased] == expected
        assert [x.task.attempt for x in leased] == [self.tries[key] for key in expected]
        assert not self.stored() & {x.sample_id for x in leased if x.task.attempt}  # what the dead put is gone
        for key in expected:
            self.state[key], self.owner[key] = State.LEASED, (owner, self.clock.now + 10.0)
            self.tries[key] += 1
        self.hands += leased

    def time_passes(self, data, owner):
        self.clock.now += data.draw(st.sampled_from([1.0, 5.0, 10.0, 20.0, -30.0]))

    def renew(self, data, owner):
        held = self.control.renew(owner, self.hands)
        for leased, mine in zip(self.hands, held, strict=True):
            key = leased.key
            assert mine == (self.state[key] == State.LEASED and self.owner[key][0] == owner)
            if mine:
                self.owner[key] = (owner, self.clock.now + 10.0)

    def release(self, data, owner):
        mine = [key for key in self.of(State.LEASED) if self.owner[key][0] == owner]
        assert self.control.release(owner) == len(mine)
        assert not self.stored() & {key.rpartition("@")[0] for key in mine}
        for key in mine:
            self.state[key] = State.QUEUED
            self.tries[key] -= 1

    def fail(self, data, owner):
        leased = data.draw(st.sampled_from(self.hands))
        key = leased.key
        holds = self.state[key] == State.LEASED and self.owner[key][0] == owner
        if holds and self.tries[key] == leased.task.attempt + 1:
            self.state[key] = State.DEAD if self.tries[key] >= 2 else State.QUEUED
        assert self.control.fail(owner, leased, "failed") == self.state[key]

    def commit(self, data, owner):
        """By whoever ever had the prompt, however late; a sample that is there is not put again, as in the worker."""
        chosen = data.draw(st.lists(st.sampled_from(self.hands), min_size=1, unique_by=lambda x: x.key))
        chosen = [x for x in chosen if x.sample_id not in self.features]
        new = self.control.commit([(x.key, put(self.features, x.sample_id)) for x in chosen])
        for leased, fresh in zip(chosen, new, strict=True):
            assert fresh == (self.state[leased.key] in (State.QUEUED, State.LEASED, State.DEAD))
            if fresh:
                self.state[leased.key] = State.COMMITTED

    def die_with_bytes(self, data, owner):
        """Between put and commit."""
        leased = data.draw(st.sampled_from(self.hands))
        if self.state[leased.key] == State.LEASED and leased.sample_id not in self.features:
            put(self.features, leased.sample_id)

    def stored(self) -> set[str]:
        """Samples of which the store has bytes."""
        return {key.rpartition(".")[0] for key, _ in self.features.backend.stored()}

    def held(self, keys: list[str]) -> dict[str, str]:
        """Of those keys whose features are in the store, what these are called there."""
        refs = {row.key: load_ref(row.text) for row in self.metadata.get(keys, "ref") if row and row.text}
        names = {key: f"{ref.sample_id}.{ref.generation}" for key, ref in refs.items()}
        stored = {name for name, _ in self.features.backend.stored()}
        return {key: name for key, name in names.items() if name in stored}

    def deliver(self, data):
        if not self.of(State.COMMITTED):
            return
        keys = data.draw(st.lists(st.sampled_from(self.of(State.COMMITTED)), min_size=1, unique=True))
        refs = self.control.deliver(keys)
        assert [sample_key(ref.sample_id, 0) for ref in refs] == keys
        self.state |= dict.fromkeys(keys, State.DELIVERED)

    def a_wrong_delivery(self, data):
        wrong = self.of(State.QUEUED, State.LEASED, State.TRAINED, State.DURABLE, State.DEAD)
        if wrong:
            with pytest.raises(StateError):
                self.control.deliver([*self.of(State.COMMITTED), data.draw(st.sampled_from(wrong))])

    def train(self, data):
        if not self.of(State.DELIVERED):
            return
        keys = data.draw(st.lists(st.sampled_from(self.of(State.DELIVERED)), min_size=1, unique=True))
        self.step += 1
        self.control.trained(keys, self.step)
        for key in keys:
            self.state[key], self.step_of[key] = State.TRAINED, self.step
            self.history.append((self.step, key))

    def save(self, data):
        self.saved = self.step
        keys = self.of(State.TRAINED)
        assert self.control.durable(self.step) == len(keys)
        self.state |= dict.fromkeys(keys, State.DURABLE)

    def the_trainer_dies(self, data=None):
        self.step = self.saved
        self.history = [(step, key) for step, key in self.history if step <= self.saved]
        back = self.of(State.DELIVERED, State.TRAINED)
        held = self.held(back)
        assert sorted(self.control.rewind(self.saved)) == sorted(back)
        for key in back:
            self.state[key] = State.COMMITTED if key in held else State.QUEUED
            self.tries[key] = self.tries[key] if key in held else 0

    def a_sample_is_lost(self, data):
        if list(self.features):
            name = data.draw(st.sampled_from(sorted(self.features)))
            self.features.backend.remove(f"{name}.{self.features._entries[name].generation}", "")

    def everything_restarts(self, data):
        held = self.held(self.of(State.COMMITTED, State.DELIVERED, State.TRAINED))
        leased = {key.rpartition("@")[0] for key in self.of(State.LEASED)}
        stored = {name for name, _ in self.features.backend.stored() if name.rpartition(".")[0] not in leased}
        self.features = FeatureStore(self.features.backend)
        self.reopen()
        self.restart()
        found = self.control.reconcile()
        assert found.orphans == len(stored - set(held.values()))
        lost = [key for key in self.of(State.COMMITTED, State.DELIVERED) if key not in held]
        assert found.lost == len(lost)
        for key in lost:
            self.state[key], self.tries[key] = State.QUEUED, 0
        self.the_trainer_dies()

    @invariant()
    def the_states_are_the_models(self):
        counts = self.control.counts()
        assert counts == {s: len(self.of(s)) for s in STATES}
        assert [x.key for x in self.control.given_up()] == self.of(State.DEAD)

    @invariant()
    def nothing_is_trained_twice_in_the_surviving_history(self):
        keys = [key for _, key in self.history]
        assert len(keys) == len(set(keys))
        assert set(keys) == set(self.of(State.TRAINED, State.DURABLE))


class SQLiteMachine(Machine):
    """The same over a file, opened anew by every restart."""

    def open(self):
        self.folder = tempfile.TemporaryDirectory()
        return SQLiteMetadataStore(Path(self.folder.name) / "metadata.db")

    def reopen(self) -> None:
        self.metadata.close()
        self.metadata = SQLiteMetadataStore(Path(self.folder.name) / "metadata.db")

    def teardown(self) -> None:
        self.metadata.close()
        self.folder.cleanup()


Machine.TestCase.settings = SQLiteMachine.TestCase.settings = settings(
    deadline=None, max_examples=80, stateful_step_count=50
)
TestMemory = Machine.TestCase
TestSQLite = SQLiteMachine.TestCase
