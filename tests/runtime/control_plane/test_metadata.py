"""One contract for every metadata store and for the controller over it; what is particular to SQLite and Redis."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from specforge.contracts import CapturePolicy, PromptTask, Provenance, SampleRef
from specforge.errors import UserError
from specforge.runtime.control_plane.claim import Claim, claim, resign
from specforge.runtime.control_plane.controller import DataFlowController, GivenUpPrompt, LeasedPrompt
from specforge.runtime.control_plane.metadata import STATES, Conflict, MetadataStore, Move, Row, State, StateError
from specforge.runtime.control_plane.redis import RedisMetadataStore
from specforge.runtime.control_plane.sqlite import SQLiteMetadataStore
from specforge.runtime.data_plane.local import MemoryBackend
from specforge.runtime.data_plane.store import FeatureStore
from tests.fuzz import survives
from tests.runtime.control_plane.memory import MemoryMetadataStore
from tests.runtime.control_plane.redis_server import PASSWORD, make_certificates, redis_server

no_server = pytest.mark.skipif(shutil.which("redis-server") is None, reason="apt-get install redis-server")

QUEUED, LEASED, COMMITTED, DELIVERED, TRAINED, DURABLE, DEAD = STATES
PROVENANCE = Provenance("tiny", "f" * 8, "t" * 8, CapturePolicy((1,)), "float32")


def needs_redis(test):
    """Marks for a test that starts a server."""
    return pytest.mark.redis(no_server(test))


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory) -> Iterator[int]:
    with redis_server(tmp_path_factory.mktemp("redis"), "--requirepass", PASSWORD) as port:
        yield port


@pytest.fixture(params=["memory", "sqlite", pytest.param("redis", marks=[pytest.mark.redis, no_server])])
def store(request, tmp_path) -> Iterator[MetadataStore]:
    if request.param == "memory":
        made: MetadataStore = MemoryMetadataStore()
    elif request.param == "sqlite":
        made = SQLiteMetadataStore(tmp_path / "metadata.db")
    else:
        url = f"redis://127.0.0.1:{request.getfixturevalue('redis_port')}/0"
        made = RedisMetadataStore(url, namespace=tmp_path.name, password=PASSWORD)
    yield made
    made.close()


class Tensorless(MemoryBackend):
    """Holds the features of every reference, and stores nothing."""

    def holds(self, key: str, uri: str) -> bool:
        return True


class Control(DataFlowController):
    """A controller with a clock that tests set; leases last 10 seconds."""

    now = 0.0

    def __init__(self, store: MetadataStore, max_tries: int = 3) -> None:
        features = FeatureStore(Tensorless())
        super().__init__(store, features, clock=lambda: self.now, lease_seconds=10.0, max_tries=max_tries)

    def lent(self, owner: str, count: int, now: float) -> list[tuple[str, int]]:
        """Lease at a time; keys and how often they were tried before."""
        self.now = now
        return [(prompt.key, prompt.task.attempt) for prompt in self.lease(owner, count)]

    def renewed(self, owner: str, keys: list[str], now: float) -> list[bool]:
        self.now = now
        return self.renew(owner, [hand(key) for key in keys])


@pytest.fixture
def control(store) -> Control:
    return Control(store)


def task(name: str) -> PromptTask:
    return PromptTask(f"task of {name}", (1, 2, 3), (0, 1, 1))


def hand(key: str, attempt: int = 0) -> LeasedPrompt:
    """A prompt as a producer has it that leased it."""
    return LeasedPrompt(key, key.rpartition("@")[0], PromptTask("t", (1,), (1,), attempt=attempt))


def ref(key: str, uri: str = "") -> SampleRef:
    name = key.rpartition("@")[0]
    return SampleRef(name, 1, (), 3, 2, 24, "c", uri or f"ref of {key}", "s", PROVENANCE)


def filled(control: DataFlowController, count: int = 4) -> list[str]:
    names = [f"k{i}" for i in range(count)]
    assert control.ingest({name: task(name) for name in names}) == count
    return [f"{name}@0" for name in names]


def uris(control: DataFlowController, keys: list[str]) -> list[str | None]:
    """Of the references of samples."""
    return [found and found.uri for found in control._refs(keys)]


def advance(control: DataFlowController, keys: list[str], state: State, step: int = 1) -> None:
    """Take queued samples to a state."""
    if state == DEAD:
        for prompt in control.lease("w", len(keys)):
            assert control.fail("w", prompt, "broken", final=True) == DEAD
        return
    steps = [LEASED, COMMITTED, DELIVERED, TRAINED, DURABLE]
    for reached in steps[: steps.index(state) + 1 if state in steps else 0]:
        if reached == LEASED:
            assert [prompt.key for prompt in control.lease("w", len(keys))] == keys
        elif reached == COMMITTED:
            assert control.commit([(key, ref(key)) for key in keys]) == [True] * len(keys)
        elif reached == DELIVERED:
            assert control.deliver(keys) == [ref(key) for key in keys]
        elif reached == TRAINED:
            control.trained(keys, step)
        else:
            assert control.durable(step) == len(keys)


def states(store: MetadataStore) -> dict[str, str]:
    return {row.key: row.state for row in store.find(STATES)}


# Rows.


def test_rows_are_added_once_and_found_in_their_order(store):
    assert store.add([("k2", "a"), ("k1", "b"), ("k2", "twice")]) == [True, True, False]
    assert store.add([("k1", "other"), ("k0", "c")]) == [False, True]
    assert store.find((QUEUED,), text="task") == [
        Row("k2", QUEUED, text="a"),
        Row("k1", QUEUED, text="b"),
        Row("k0", QUEUED, text="c"),
    ]
    assert [row.key for row in store.find((QUEUED, LEASED), limit=2)] == ["k2", "k1"]
    assert store.find((QUEUED,), limit=0) == store.find((LEASED,)) == []
    assert store.get(["k0", "unknown", "k2"], "task") == [
        Row("k0", QUEUED, text="c"),
        None,
        Row("k2", QUEUED, text="a"),
    ]
    assert store.get(["k0"]) == store.get(["k0"], "ref") == [Row("k0", QUEUED)]


def test_rows_move_together_or_not_at_all(store):
    store.add([(f"k{i}", f"task {i}") for i in range(3)])
    lease = {"owner": "a", "deadline": 0.1 + 0.2, "tries": 1}
    leased = Move(["k1", "k0"], (QUEUED,), LEASED, lease, {"tries": 0})
    assert store.move([leased], "task") == {"k0": "task 0", "k1": "task 1"}
    before = store.find(STATES)
    assert before == [Row("k0", LEASED, "a", 0.1 + 0.2, 1), Row("k1", LEASED, "a", 0.1 + 0.2, 1), Row("k2", QUEUED)]
    done = {"ref": "r"}
    for wrong in (
        Move(["k2"], (LEASED, DEAD), COMMITTED, done),
        Move(["k1"], (LEASED,), COMMITTED, done, {"owner": "b"}),
        Move(["k1"], (LEASED,), COMMITTED, done, {"deadline": 0.3}),
        Move(["k1"], (LEASED,), COMMITTED, done, {"owner": "a", "tries": 2}),
        Move(["unknown", "k1"], (LEASED,), COMMITTED, done),
    ):
        with pytest.raises(Conflict) as conflict:
            store.move([Move(["k0"], (LEASED,), COMMITTED, done), wrong])
        keys = ["k0", *wrong.keys]
        assert conflict.value.rows == dict(zip(keys, store.get(keys), strict=True))
        assert store.find(STATES) == before
    exact = {"owner": "a", "deadline": 0.1 + 0.2, "tries": 1}
    moves = [Move(["k0"], (LEASED,), COMMITTED, done, exact), Move(["k1"], (QUEUED, LEASED), COMMITTED, done)]
    assert store.move(moves) == {}
    assert store.get(["k0", "k1"], "ref") == [Row(key, COMMITTED, "a", 0.0, 1, text="r") for key in ("k0", "k1")]
    with pytest.raises(Conflict) as conflict:
        store.move([Move(["k0"], (LEASED,), COMMITTED)], "ref")
    assert conflict.value.rows == {"k0": Row("k0", COMMITTED, "a", 0.0, 1, text="r")}


def test_the_first_queued_rows_are_leased_as_they_were_found(store):
    store.add([(f"k{i}", f"task {i}") for i in range(4)])
    store.move([Move(["k1"], (QUEUED,), QUEUED, {"tries": 2, "reason": "why"}), Move(["k0"], (QUEUED,), DEAD)])
    assert store.lease("a", 1.0, 0) == []
    first = Row("k1", QUEUED, tries=2, reason="why", text="task 1")
    assert store.lease("a", 0.1 + 0.2, 2) == [first, Row("k2", QUEUED, text="task 2")]
    assert store.get(["k1", "k2"]) == [
        Row("k1", LEASED, "a", 0.1 + 0.2, 3, reason="why"),
        Row("k2", LEASED, "a", 0.1 + 0.2, 1),
    ]
    assert store.find((LEASED,), until=0.3) == []
    assert [row.key for row in store.lease("b", 1.0, 2)] == ["k3"]
    assert store.lease("b", 1.0, 2) == []


def test_leases_are_found_by_their_deadline_and_trained_samples_by_their_step(store):
    store.add([(key, "") for key in "edcba"])
    for key, deadline in zip("abc", (30.0, 10.0, 20.0), strict=True):
        store.move([Move([key], (QUEUED,), LEASED, {"deadline": deadline})])
    for key, step in zip("de", (7, 8), strict=True):
        store.move([Move([key], (QUEUED,), TRAINED, {"step": step})])
    assert [row.key for row in store.find((LEASED,), until=20.0)] == ["c", "b"]
    assert [row.key for row in store.find((LEASED,), after=10.0, until=30.0)] == ["c", "a"]
    assert [row.key for row in store.find((TRAINED,), until=7)] == ["d"]
    store.move([Move(["d"], (TRAINED,), DURABLE)])
    assert [(row.key, row.step) for row in store.find((TRAINED, DURABLE), after=6)] == [("e", 8), ("d", 7)]
    assert [row.key for row in store.find((TRAINED, DURABLE), after=7)] == ["e"]
    store.move([Move(["a"], (LEASED,), LEASED, {"deadline": 5.0})])
    assert [row.key for row in store.find((LEASED,), until=5.0)] == ["a"]


def test_bounds_spare_states_without_a_deadline_or_step_and_a_limit_counts_per_state(store):
    store.add([(key, f"task {key}") for key in "abcdef"])
    for key, deadline in zip("bdf", (30.0, 10.0, 20.0), strict=True):
        store.move([Move([key], (QUEUED,), LEASED, {"deadline": deadline})])
    found = store.find((QUEUED, LEASED), until=20.0, limit=2, text="task")
    assert [(row.key, row.text) for row in found] == [(key, f"task {key}") for key in "acdf"]
    assert store.find((QUEUED, LEASED), until=20.0, limit=0) == []


def test_a_move_sets_a_reference_per_row_and_returns_texts_of_other_rows(store):
    store.add([(key, f"task {key}") for key in "abc"])
    refs = {"b": "ref b", "a": "ref a", "c": "not moved"}
    assert store.move([Move(["a", "b"], (QUEUED,), COMMITTED, refs=refs)], "task", ["c", "unknown"]) == {
        "c": "task c",
        "unknown": "",
    }
    assert [row and row.text for row in store.get(["a", "b", "c"], "ref")] == ["ref a", "ref b", ""]
    assert store.move([Move(["c"], (QUEUED,), LEASED)], "ref", ["b", ""]) == {"b": "ref b", "": ""}


def test_text_of_any_kind_comes_back(store):
    odd = "\"'\\ {} [1, 2] é 漢 \U0001f600 \n \x7f -- '); DROP TABLE samples; *"
    store.add([(odd, odd)])
    lease = {"owner": odd, "reason": odd, "ref": odd}
    assert store.move([Move([odd], (QUEUED,), LEASED, lease)], "task") == {odd: odd}
    assert store.move([Move([odd], (LEASED,), DEAD, {}, {"owner": odd})], "ref") == {odd: odd}
    assert store.find((DEAD,), text="ref") == [Row(odd, DEAD, owner=odd, reason=odd, text=odd)]
    with pytest.raises(Conflict):
        store.move([Move([odd + "x"], (DEAD,), QUEUED)])


def test_nothing_asked_is_nothing_done(store, control):
    filled(control, 1)
    assert store.add([]) == store.get([]) == store.find(()) == []
    assert store.move([]) == {}
    store.remove([])
    assert control.commit([]) == control.deliver([]) == control.renew("a", []) == []
    control.trained([], 1)
    control.revive([])
    control.forget([])
    assert store.counts()[QUEUED] == 1


def test_one_trainer_holds_the_store_until_it_resigns_or_is_silent(store):
    assert claim(store, "a", 0.0, 10.0) == Claim("a", 10.0)
    assert claim(store, "b", 9.9, 19.9) == Claim("a", 10.0)
    assert claim(store, "a", 9.9, 19.9) == Claim("a", 19.9)
    assert claim(store, "b", 10.0, 20.0, instead_of="x") == Claim("a", 19.9)
    assert claim(store, "b", 10.0, 20.0, instead_of="a") == Claim("b", 20.0)
    resign(store, "a")
    assert claim(store, "a", 19.0, 29.0) == Claim("b", 20.0)
    assert claim(store, "a", 20.0, 30.0) == Claim("a", 30.0)
    resign(store, "a")
    assert claim(store, "b", 20.0, 30.0) == Claim("b", 30.0)
    assert store.counts() == dict.fromkeys(STATES, 0)
    assert store.find(STATES) == []


def test_trainers_that_claim_at_once_agree_on_one(store):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: claim(store, name, 0.0, 10.0), "abcdefgh"))
    assert len(set(found)) == 1


# The state machine over them.


def test_prompts_are_lent_in_their_order_and_known_ones_left_alone(store, control):
    filled(control)
    assert control.ingest({"k1": task("other"), "k9": task("k9")}) == 1
    leased = control.lease("a", 2)
    assert [(x.key, x.task) for x in leased] == [("k0@0", task("k0")), ("k1@0", task("k1"))]
    assert [x.key for x in control.lease("b", 9)] == ["k2@0", "k3@0", "k9@0"]
    assert control.lease("c", 9) == []
    assert control.lease("c", 0) == []
    assert control.counts() == {**dict.fromkeys(STATES, 0), LEASED: 5}


@pytest.mark.parametrize("state", STATES)
def test_forgotten_samples_were_never_there(store, control, state):
    keys = filled(control)
    advance(control, keys, state)
    control.forget([*keys[:3], "unknown"])
    assert states(store) == {"k3@0": state}
    assert uris(control, keys[:3]) == [None, None, None]
    with pytest.raises(StateError, match="k0@0 is unknown"):
        control.commit([("k0@0", ref("k0@0"))])
    assert control.ingest({f"k{i}": task(f"again {i}") for i in range(4)}) == 3
    again = [x.task.task_id for x in control.lease("b", 3) if x.key != "k3@0"]
    assert again[:2] == ["task of again 0", "task of again 1"]
    assert sum(control.counts().values()) == 4


def test_expired_leases_are_taken_over_before_later_prompts(control):
    filled(control)
    control.lease("a", 2)
    assert control.lent("b", 1, 9.9) == [("k2@0", 0)]
    assert control.lent("c", 9, 10.0) == [("k0@0", 1), ("k1@0", 1), ("k3@0", 0)]
    assert control.renewed("a", ["k0@0", "k2@0"], 10.0) == [False, False]
    assert control.fail("a", hand("k0@0"), "late") == LEASED  # its lease was taken over: without effect
    assert control.fail("c", hand("k0@0"), "late") == LEASED  # an earlier attempt
    assert control.fail("c", hand("k0@0", 1), "in time") == QUEUED


def test_a_renewed_lease_does_not_expire(control):
    filled(control, 2)
    control.lease("a", 2)
    assert control.renewed("a", ["k0@0", "nobody's@0", "k0@0"], 15.0) == [True, False, True]
    assert control.lent("b", 9, 20.0) == [("k1@0", 1)]


def test_released_prompts_have_not_been_tried(control):
    control.max_tries = 1
    filled(control, 3)
    control.lease("a", 2)
    control.lease("b", 1)
    assert control.release("a") == 2
    assert control.release("a") == 0
    assert control.lent("c", 9, 0.0) == [("k0@0", 0), ("k1@0", 0)]


def test_tries_run_out_by_failure_and_by_expiry_and_are_given_anew(store, control):
    control.max_tries = 2
    filled(control, 2)
    control.lease("a", 2)
    assert control.fail("a", hand("k0@0"), "out of memory") == QUEUED
    assert control.lent("a", 2, 10.0) == [("k0@0", 1), ("k1@0", 1)]
    assert control.fail("a", hand("k0@0", 1), "NaN in layer 3") == DEAD
    assert [row.deadline for row in store.find((LEASED,))] == [20.0]
    assert control.lent("a", 2, 20.0) == []
    assert store.find((DEAD,), text="ref") == [
        Row("k0@0", DEAD, "a", 0.0, 2, 0, "NaN in layer 3"),
        Row("k1@0", DEAD, "a", 0.0, 2, 0, "the lease of a expired"),
    ]
    assert control.given_up()[0] == GivenUpPrompt("k0@0", 2, "NaN in layer 3")
    control.revive(["k0@0"])
    assert control.lent("a", 2, 30.0) == [("k0@0", 0)]


def test_the_first_commit_stands_whoever_comes_second(control):
    filled(control, 3)
    control.lease("a", 1)
    control.lent("b", 1, 10.0)
    assert control.commit([("k0@0", ref("k0@0", "from b")), ("k0@0", ref("k0@0", "again"))]) == [True, False]
    assert control.commit([("k0@0", ref("k0@0", "from a")), ("k1@0", ref("k1@0", "unasked"))]) == [False, True]
    assert uris(control, ["k1@0", "k0@0", "k2@0", "unknown"]) == ["unasked", "from b", None, None]
    assert control.lent("c", 9, 99.0) == [("k2@0", 0)]
    assert control.renewed("b", ["k0@0"], 99.0) == [False]


@pytest.mark.parametrize("state", [COMMITTED, DELIVERED, TRAINED, DURABLE])
def test_a_late_commit_changes_nothing(store, control, state):
    keys = filled(control, 1)
    advance(control, keys, state)
    assert control.commit([("k0@0", ref("k0@0", "late"))]) == [False]
    assert states(store) == {"k0@0": state}
    assert uris(control, keys) == ["ref of k0@0"]


def test_a_given_up_prompt_may_still_be_committed(store, control):
    keys = filled(control, 1)
    advance(control, keys, DEAD)
    assert control.commit([("k0@0", ref("k0@0", "late but good"))]) == [True]
    assert states(store) == {"k0@0": COMMITTED}


def test_samples_go_their_way_and_stepping_out_of_it_changes_nothing(store, control):
    keys = filled(control)
    k0, k1, k2, k3 = keys
    with pytest.raises(StateError, match="sample stranger is unknown and cannot be committed"):
        control.commit([(k0, ref(k0)), ("stranger", ref("stranger@0"))])
    with pytest.raises(StateError, match="sample k0@0 is queued and cannot be delivered"):
        control.deliver([k0])
    assert control.counts()[QUEUED] == 4
    advance(control, keys, COMMITTED)
    with pytest.raises(StateError, match="sample k0@0 is committed and cannot be trained"):
        control.trained([k0], 1)
    control.deliver(keys[:2])
    with pytest.raises(StateError, match="sample k2@0 is committed"):
        control.trained([k0, k2], 1)
    assert states(store) == {k0: DELIVERED, k1: DELIVERED, k2: COMMITTED, k3: COMMITTED}
    assert control.deliver([k1, k0, k1]) == [ref(k1), ref(k0), ref(k1)]
    control.trained([k0], 1)
    control.trained([k0, k1], 1)  # said twice
    for action in (lambda: control.trained([k0], 2), lambda: control.deliver([k2, k0])):
        with pytest.raises(StateError, match="sample k0@0 is trained"):
            action()
    with pytest.raises(StateError, match="sample k0@0 is trained and cannot be queued again"):
        control.revive([k2, k0])
    with pytest.raises(StateError, match="sample stranger is unknown and cannot be failed"):
        control.fail("w", hand("stranger"), "")
    assert states(store) == {k0: TRAINED, k1: TRAINED, k2: COMMITTED, k3: COMMITTED}


def test_a_checkpoint_makes_durable_what_it_covers_and_going_back_undoes_what_it_does_not(store, control):
    keys = filled(control, 5)
    k0, k1, k2, k3, k4 = keys
    advance(control, keys, DELIVERED)
    for step, key in enumerate(keys[:4], 1):
        control.trained([key], step * 5)  # 5, 10, 15, 20; the fifth is under way
    assert control.durable(10) == 2
    assert control.durable(10) == 0
    assert sorted(control.rewind(10)) == [k2, k3, k4]
    assert control.rewind(10) == []
    assert states(store) == {k0: DURABLE, k1: DURABLE, k2: COMMITTED, k3: COMMITTED, k4: COMMITTED}
    assert control.rewind(5) == [k1]  # an older checkpoint
    control.deliver([k1])
    control.trained([k1], 9)
    assert control.durable(100) == 1
    assert states(store)[k1] == DURABLE


def test_a_resumed_run_keeps_what_it_needs_next(store, control):
    keys = filled(control, 10)
    advance(control, keys[:6], DELIVERED)
    control.trained(keys[:1], 1)
    control.trained(keys[1:2], 2)
    control.lease("w", 2)  # the seventh and the eighth
    control.resume(1, keep=[*keys[2:5], keys[6], keys[8]], queued=keys[8:9])
    expected = {keys[0]: DURABLE} | dict.fromkeys(keys[2:5], COMMITTED) | {keys[6]: LEASED, keys[8]: QUEUED}
    assert states(store) == expected


def test_lost_samples_are_produced_again_in_their_old_place(store, control):
    keys = filled(control, 3)
    k0, k1, k2 = keys
    advance(control, keys[:2], DELIVERED)
    control.lost([k1])
    control.lost([k1])  # said twice
    assert uris(control, [k0, k1]) == ["ref of k0@0", None]
    assert control.lent("w", 9, 0.0) == [(k1, 0), (k2, 0)]
    control.lost([k1])  # said once more, when it is in work
    assert states(store) == {k0: DELIVERED, k1: LEASED, k2: LEASED}
    control.commit([(k1, ref(k1, "anew"))])
    assert control.deliver([k1]) == [ref(k1, "anew")]


@pytest.mark.parametrize("state", STATES)
def test_rows_and_counts_tell_the_state(store, control, state):
    keys = filled(control, 3)
    advance(control, keys, state)
    assert control.counts() == {**dict.fromkeys(STATES, 0), state: 3}
    assert [row.key for row in store.find((state,))] == keys
    assert store.find(set(STATES) - {state}) == []


def test_many_workers_at_once_never_share_a_prompt(store, control):
    keys = filled(control, 200)

    def work(owner: str) -> list[str]:
        got: list[str] = []
        mine = Control(store)
        while leased := mine.lease(owner, 7):
            mine.commit([(x.key, ref(x.key, owner)) for x in leased])
            got += [x.key for x in leased]
        return got

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(work, ["a", "b", "c", "d"]))
    assert sorted(key for part in parts for key in part) == sorted(keys)
    assert control.counts()[COMMITTED] == 200


def test_a_producer_that_comes_second_gets_the_next_prompts_at_once(store, control, monkeypatch):
    """Looking for the first prompts again after each of the others has taken them takes 64 producers seconds."""
    keys, other = filled(control), Control(store)
    find, looks = store.find, []

    def found_by_two(states, **options):
        rows = find(states, **options)
        looks.append(set(states) == {QUEUED, LEASED})
        if len(looks) == 1:
            assert [prompt.key for prompt in other.lease("b", 2)] == keys[:2]
        return rows

    monkeypatch.setattr(store, "find", found_by_two)
    assert [prompt.key for prompt in control.lease("a", 2)] == keys[2:]
    assert sum(looks) == 2  # one of each producer


def test_a_lease_renewed_while_it_is_taken_for_dead_stays(store, control):
    """Between reading the expired leases and ending them, the producer renews its own."""
    filled(control, 1)
    control.lease("slow", 1)
    find = store.find

    def renew_meanwhile(states, **options):
        rows = find(states, **options)
        store.find = find
        assert control.renewed("slow", ["k0@0"], 10.0) == [True]
        return rows

    store.find = renew_meanwhile
    assert control.lent("quick", 1, 10.0) == []
    assert control.renewed("slow", ["k0@0"], 11.0) == [True]


# SQLite.


def test_a_file_is_found_again_by_the_next_process(tmp_path):
    path = tmp_path / "deep" / "metadata.db"
    control = Control(SQLiteMetadataStore(path))
    keys = filled(control)
    advance(control, keys, TRAINED, step=7)
    again = SQLiteMetadataStore(path)  # while the first is open, as after a crash
    assert states(again) == dict.fromkeys(keys, TRAINED)
    assert Control(again).durable(7) == 4
    assert states(again) == dict.fromkeys(keys, DURABLE)


def test_a_process_killed_within_a_transaction_changes_nothing(tmp_path):
    path = tmp_path / "metadata.db"
    filled(Control(SQLiteMetadataStore(path)))
    code = (
        "import os, sys, pathlib\n"
        "from specforge.runtime.control_plane.sqlite import SQLiteMetadataStore\n"
        "store = SQLiteMetadataStore(pathlib.Path(sys.argv[1]))\n"
        "with store._transaction() as db:\n"
        "    db.execute('DELETE FROM samples')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ | {"PYTHONPATH": "."}, check=False)
    assert result.returncode == -9
    assert SQLiteMetadataStore(path).counts()[QUEUED] == 4


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    store = SQLiteMetadataStore(tmp_path / "metadata.db")
    advance(Control(store), filled(Control(store)), TRAINED)
    store._db.execute("PRAGMA max_page_count=1")  # no more than there are
    with pytest.raises(UserError, match=r"metadata .*metadata\.db: database or disk is full; once it works again"):
        store.add([(f"new {i}", "task" * 1000) for i in range(100)])
    assert store.counts() == {**dict.fromkeys(STATES, 0), TRAINED: 4}
    store._db.execute("PRAGMA max_page_count=1000")
    assert store.add([(f"new {i}", "task" * 1000) for i in range(100)]) == [True] * 100
    store.close()
    with pytest.raises(UserError, match="closed"):
        store.counts()


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "text.db").write_text("not a database, however one looks at it" * 100)
    with pytest.raises(UserError, match=r"text.db: cannot be opened as a metadata store"):
        SQLiteMetadataStore(tmp_path / "text.db")
    db = sqlite3.connect(tmp_path / "newer.db")
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(UserError, match="format 99; this version reads format 1"):
        SQLiteMetadataStore(tmp_path / "newer.db")


def test_another_programs_database_is_refused_and_stays_as_it_is(tmp_path):
    """With tables of any name; with our number, as others may have it too."""
    for name, statements in {
        "bookmarks": ["CREATE TABLE moz_places (id INTEGER)"],
        "samples": ["CREATE TABLE samples (id INTEGER)"],
        "number": ["PRAGMA user_version=1", "CREATE TABLE x (id INTEGER)"],
    }.items():
        db = sqlite3.connect(tmp_path / name)
        for statement in statements:
            db.execute(statement)
        db.close()
        before = (tmp_path / name).read_bytes()
        with pytest.raises(UserError, match="is another program's database"):
            SQLiteMetadataStore(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before


def test_who_only_reads_makes_no_file(tmp_path):
    with pytest.raises(UserError, match=r"no such file; a run creates it when it starts"):
        SQLiteMetadataStore(tmp_path / "mistyped" / "m.db", create=False)
    assert not list(tmp_path.iterdir())
    filled(Control(SQLiteMetadataStore(tmp_path / "m.db")))
    assert SQLiteMetadataStore(tmp_path / "m.db", create=False).counts()[QUEUED] == 4
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match=r"empty: holds no run"):
        SQLiteMetadataStore(tmp_path / "empty", create=False)
    assert not (tmp_path / "empty").stat().st_size


def test_a_file_of_an_earlier_revision_is_resumed(tmp_path):
    """Which kept the claim in a table of its own."""
    keys = filled(Control(SQLiteMetadataStore(tmp_path / "m.db")))
    db = sqlite3.connect(tmp_path / "m.db")
    db.execute("CREATE TABLE trainer (id INTEGER PRIMARY KEY, holder TEXT NOT NULL, deadline REAL NOT NULL) STRICT")
    db.execute("INSERT INTO trainer VALUES (1, 'a trainer that died', 9.0)")
    db.commit()
    db.close()
    assert states(SQLiteMetadataStore(tmp_path / "m.db", create=False)) == dict.fromkeys(keys, QUEUED)
    again = SQLiteMetadataStore(tmp_path / "m.db")
    assert claim(again, "a", 0.0, 9.0) == Claim("a", 9.0)
    assert states(again) == dict.fromkeys(keys, QUEUED)


def test_many_processes_may_make_the_file_at_once(tmp_path):
    """A connection stands for a process: SQLite's locks are per connection."""
    at_once = threading.Barrier(4)

    def make(path: Path) -> SQLiteMetadataStore:
        at_once.wait()
        return SQLiteMetadataStore(path)

    with ThreadPoolExecutor(4) as pool:
        for n in range(200):
            stores = list(pool.map(make, [tmp_path / f"{n}.db"] * 4))
            assert all(store.counts()[QUEUED] == 0 for store in stores)


def test_damaged_rows_are_one_line_or_left_out(tmp_path, fuzz):
    path = tmp_path / "in" / "m.db"
    plane = DataFlowController(SQLiteMetadataStore(path), FeatureStore(MemoryBackend()), max_tries=2)
    task = PromptTask("t", (1, 2), (0, 1))
    texts = [json.dumps(task.to_json()).encode(), json.dumps([PROVENANCE.to_json()]).encode()]

    def everything() -> None:
        leased = plane.lease("w", 9)
        for prompt in leased:
            plane.fail("w", prompt, "reason")
        plane.reconcile()
        plane.durable(1)
        plane.rewind(0)
        plane.given_up()
        plane.counts()

    for number, data in enumerate(fuzz.bytes(texts, 60)):
        plane.ingest({f"s{number}": task}, 0, PROVENANCE)
        with sqlite3.connect(path) as db:
            where = f"WHERE seq = (SELECT seq FROM samples WHERE key = 's{number}@0')"
            if fuzz.rng.random() < 0.5:
                db.execute(f"UPDATE tasks SET task = cast(? AS TEXT) {where}", (data,))
            else:
                column = fuzz.rng.choice(["ref", "state", "owner", "reason"])
                db.execute(f"UPDATE samples SET state = 'committed', {column} = cast(? AS TEXT) {where}", (data,))
        survives(everything, outside=tmp_path / "out")
        with sqlite3.connect(path) as db:
            db.execute("DELETE FROM samples")


def test_a_damaged_file_is_one_line(tmp_path, fuzz):
    path = tmp_path / "in" / "m.db"
    store = SQLiteMetadataStore(path)
    filled(Control(store), 40)
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    for data in fuzz.bytes([path.read_bytes()], 60):
        path.write_bytes(data)

        def read() -> None:
            found = SQLiteMetadataStore(path)
            try:
                Control(found).lease("w", 3)
                found.find(STATES, text="ref")
            finally:
                found.close()

        survives(read, outside=tmp_path / "out")
        for left in path.parent.glob("m.db-*"):
            left.unlink()


# Redis.


@needs_redis
def test_runs_on_one_server_do_not_see_each_other(redis_port, tmp_path):
    url = f"redis://127.0.0.1:{redis_port}/0"
    one, other = (RedisMetadataStore(url, namespace=tmp_path.name + x, password=PASSWORD) for x in "ab")
    filled(Control(one))
    assert other.counts()[QUEUED] == 0
    assert other.add([("k0@0", "task")]) == [True]


@needs_redis
@pytest.mark.parametrize("password", [None, "wrong"])
def test_a_wrong_password_is_refused_without_showing_the_right_one(redis_port, password):
    with pytest.raises(UserError, match=f"metadata in Redis at 127.0.0.1:{redis_port}/0: ") as found:
        RedisMetadataStore(f"redis://:{password or ''}@127.0.0.1:{redis_port}/0")
    assert "wrong@" not in str(found.value)


@needs_redis
def test_a_server_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match=r"metadata in Redis at 127\.0\.0\.1:1/0: "):
        RedisMetadataStore("redis://127.0.0.1:1/0")
    with pytest.raises(UserError, match="write the address as rediss://"):
        RedisMetadataStore("redis://127.0.0.1:1/0", ca_file="ca.pem")


@needs_redis
def test_tls_with_certificates_on_both_sides(tmp_path: Path):
    files = make_certificates(tmp_path)
    ca, certificate, key = files["ca.pem"], files["server.pem"], files["server.key"]
    options = ["--tls-ca-cert-file", ca, "--tls-cert-file", certificate, "--tls-key-file", key]
    with redis_server(tmp_path, *options, "--requirepass", PASSWORD, tls=True) as port:
        url = f"rediss://localhost:{port}/0"
        store = RedisMetadataStore(url, password=PASSWORD, ca_file=ca, cert_file=certificate, key_file=key)
        advance(Control(store), filled(Control(store)), DURABLE)
        store.close()
        with pytest.raises(UserError, match="certificate"):
            RedisMetadataStore(url, password=PASSWORD)  # this authority is nobody's by default
        with pytest.raises(UserError, match=f"at localhost:{port}"):
            RedisMetadataStore(url, password=PASSWORD, ca_file=ca)  # the server asks for a certificate
