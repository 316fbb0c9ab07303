"""One contract for every metadata store, and what is particular to SQLite's files and Redis's servers."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from specforge.contracts import CapturePolicy, PromptTask, Provenance
from specforge.errors import UserError
from specforge.runtime.control_plane.controller import DataFlowController
from specforge.runtime.control_plane.metadata import (
    COMMITTED,
    DEAD,
    DELIVERED,
    DURABLE,
    LEASED,
    QUEUED,
    STATES,
    TRAINED,
    Claim,
    Entry,
    Grant,
    MemoryMetadataStore,
    MetadataStore,
    NullMetadataStore,
    StateError,
)
from specforge.runtime.control_plane.redis import RedisMetadataStore
from specforge.runtime.control_plane.sqlite import SQLiteMetadataStore
from specforge.runtime.data_plane.local import MemoryBackend
from specforge.runtime.data_plane.store import FeatureStore
from tests.fuzz import survives
from tests.runtime.control_plane.redis_server import PASSWORD, make_certificates, redis_server

no_server = pytest.mark.skipif(shutil.which("redis-server") is None, reason="apt-get install redis-server")


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


def filled(store: MetadataStore, count: int = 4) -> list[str]:
    keys = [f"k{i}" for i in range(count)]
    assert store.ingest([(key, f"task of {key}") for key in keys]) == [True] * count
    return keys


def advance(store: MetadataStore, keys: list[str], state: str, step: int = 1) -> None:
    """Take queued samples to a state."""
    if state == DEAD:
        for grant in store.lease("w", len(keys), 0.0, 9.0, 1):
            assert store.fail("w", grant.key, grant.attempt, "broken", 1) == DEAD
        return
    steps = [LEASED, COMMITTED, DELIVERED, TRAINED, DURABLE]
    for reached in steps[: steps.index(state) + 1 if state in steps else 0]:
        if reached == LEASED:
            store.lease("w", len(keys), 0.0, 9.0, 3)
        elif reached == COMMITTED:
            assert store.commit([(key, f"ref of {key}") for key in keys]) == [True] * len(keys)
        elif reached == DELIVERED:
            assert store.deliver(keys) == [f"ref of {key}" for key in keys]
        elif reached == TRAINED:
            store.mark_trained(keys, step)
        else:
            assert sorted(store.mark_durable(step)) == sorted(keys)


def states(store: MetadataStore) -> dict[str, str]:
    return {entry.key: entry.state for entry in store.entries(STATES)}


def test_prompts_are_lent_in_their_order_and_known_ones_left_alone(store):
    filled(store)
    assert store.ingest([("k1", "other"), ("k9", "task of k9"), ("k9", "twice")]) == [False, True, False]
    assert store.lease("a", 2, 0.0, 10.0, 3) == [Grant("k0", "task of k0", 0), Grant("k1", "task of k1", 0)]
    assert [g.key for g in store.lease("b", 9, 0.0, 10.0, 3)] == ["k2", "k3", "k9"]
    assert store.lease("c", 9, 0.0, 10.0, 3) == []
    assert store.lease("c", 0, 0.0, 10.0, 3) == []
    assert store.counts() == {**dict.fromkeys(STATES, 0), LEASED: 5}


@pytest.mark.parametrize("state", STATES)
def test_forgotten_samples_were_never_there(store, state):
    keys = filled(store)
    advance(store, keys, state)
    store.forget([*keys[:3], "unknown"])
    assert states(store) == {"k3": state}
    assert store.refs(keys[:3]) == ["", "", ""]
    with pytest.raises(StateError, match="k0 is unknown"):
        store.commit([("k0", "late")])
    assert store.ingest([(key, f"again {key}") for key in keys]) == [True, True, True, False]
    assert [g.task for g in store.lease("b", 3, 0.0, 10.0, 3) if g.key != "k3"][:2] == ["again k0", "again k1"]
    assert sum(store.counts().values()) == 4


def test_expired_leases_are_taken_over_before_later_prompts(store):
    filled(store)
    store.lease("a", 2, 0.0, 10.0, 3)
    assert [g.key for g in store.lease("b", 1, 9.9, 20.0, 3)] == ["k2"]
    assert store.lease("c", 9, 10.0, 30.0, 3) == [
        Grant("k0", "task of k0", 1),
        Grant("k1", "task of k1", 1),
        Grant("k3", "task of k3", 0),
    ]
    assert store.renew("a", ["k0", "k2"], 99.0) == [False, False]
    assert store.fail("a", "k0", 0, "late", 3) == LEASED  # of an owner whose lease was taken over: without effect
    assert store.fail("c", "k0", 0, "late", 3) == LEASED  # of an earlier attempt


def test_a_renewed_lease_does_not_expire(store):
    filled(store, 2)
    store.lease("a", 2, 0.0, 10.0, 3)
    assert store.renew("a", ["k0", "nobody's"], 25.0) == [True, False]
    assert [g.key for g in store.lease("b", 9, 20.0, 40.0, 3)] == ["k1"]


def test_released_prompts_have_not_been_tried(store):
    filled(store, 3)
    store.lease("a", 2, 0.0, 10.0, 1)
    store.lease("b", 1, 0.0, 10.0, 1)
    assert sorted(store.release("a")) == ["k0", "k1"]
    assert store.release("a") == []
    assert store.lease("c", 9, 0.0, 10.0, 1) == [Grant("k0", "task of k0", 0), Grant("k1", "task of k1", 0)]


def test_tries_run_out_by_failure_and_by_expiry_and_are_given_anew(store):
    filled(store, 2)
    store.lease("a", 2, 0.0, 10.0, 2)
    assert store.fail("a", "k0", 0, "out of memory", 2) == QUEUED
    assert [(g.key, g.attempt) for g in store.lease("a", 2, 10.0, 20.0, 2)] == [("k0", 1), ("k1", 1)]
    assert store.fail("a", "k0", 1, "NaN in layer 3", 2) == DEAD
    assert [entry.deadline for entry in store.entries((LEASED,))] == [20.0]
    assert store.lease("a", 2, 20.0, 30.0, 2) == []
    assert list(store.entries((DEAD,))) == [
        Entry("k0", DEAD, "", 2, "NaN in layer 3"),
        Entry("k1", DEAD, "", 2, "the lease of a expired"),
    ]
    store.requeue(["k0"])
    assert store.lease("a", 2, 30.0, 40.0, 2) == [Grant("k0", "task of k0", 0)]


def test_the_first_commit_stands_whoever_comes_second(store):
    filled(store, 3)
    store.lease("a", 1, 0.0, 10.0, 3)
    store.lease("b", 1, 10.0, 20.0, 3)
    assert store.commit([("k0", "from b"), ("k0", "again")]) == [True, False]
    assert store.commit([("k0", "from a"), ("k1", "unasked")]) == [False, True]
    assert store.refs(["k1", "k0", "k2", "unknown"]) == ["unasked", "from b", "", ""]
    assert store.lease("c", 9, 99.0, 199.0, 3) == [Grant("k2", "task of k2", 0)]
    assert store.renew("b", ["k0"], 99.0) == [False]


@pytest.mark.parametrize("state", [COMMITTED, DELIVERED, TRAINED, DURABLE])
def test_a_late_commit_changes_nothing(store, state):
    keys = filled(store, 1)
    advance(store, keys, state)
    assert store.commit([("k0", "late")]) == [False]
    assert states(store) == {"k0": state}
    assert store.refs(["k0"]) == ["ref of k0"]


def test_a_dead_letter_may_still_be_committed(store):
    keys = filled(store, 1)
    advance(store, keys, DEAD)
    assert store.commit([("k0", "late but good")]) == [True]
    assert states(store) == {"k0": COMMITTED}


def test_samples_go_their_way_and_stepping_out_of_it_changes_nothing(store):
    keys = filled(store)
    with pytest.raises(StateError, match="sample stranger is unknown and cannot be committed"):
        store.commit([("k0", "ref"), ("stranger", "ref")])
    with pytest.raises(StateError, match="sample k0 is queued and cannot be delivered"):
        store.deliver(["k0"])
    assert store.counts()[QUEUED] == 4
    advance(store, keys, COMMITTED)
    with pytest.raises(StateError, match="sample k0 is committed and cannot be trained"):
        store.mark_trained(["k0"], 1)
    store.deliver(keys[:2])
    with pytest.raises(StateError, match="sample k2 is committed"):
        store.mark_trained(["k0", "k2"], 1)
    assert states(store) == {"k0": DELIVERED, "k1": DELIVERED, "k2": COMMITTED, "k3": COMMITTED}
    assert store.deliver(["k1", "k0"]) == ["ref of k1", "ref of k0"]
    store.mark_trained(["k0"], 1)
    store.mark_trained(["k0", "k1"], 1)  # said twice
    for action in (lambda: store.mark_trained(["k0"], 2), lambda: store.deliver(["k2", "k0"])):
        with pytest.raises(StateError, match="sample k0 is trained"):
            action()
    with pytest.raises(StateError, match="sample k0 is trained and cannot be queued again"):
        store.requeue(["k2", "k0"])
    with pytest.raises(StateError, match="sample stranger is unknown and cannot be failed"):
        store.fail("w", "stranger", 0, "", 1)
    assert states(store) == {"k0": TRAINED, "k1": TRAINED, "k2": COMMITTED, "k3": COMMITTED}


def test_a_checkpoint_makes_durable_what_it_covers_and_going_back_undoes_what_it_does_not(store):
    keys = filled(store, 5)
    advance(store, keys, DELIVERED)
    for step, key in enumerate(keys[:4], 1):
        store.mark_trained([key], step * 5)  # 5, 10, 15, 20; the fifth is under way
    assert sorted(store.mark_durable(10)) == ["k0", "k1"]
    assert store.mark_durable(10) == []
    assert sorted(store.rewind(10)) == ["k2", "k3", "k4"]
    assert store.rewind(10) == []
    assert states(store) == {"k0": DURABLE, "k1": DURABLE, "k2": COMMITTED, "k3": COMMITTED, "k4": COMMITTED}
    assert store.rewind(5) == ["k1"]  # an older checkpoint
    store.deliver(["k1"])
    store.mark_trained(["k1"], 9)
    assert store.mark_durable(100) == ["k1"]


def test_lost_samples_are_produced_again_in_their_old_place(store):
    keys = filled(store, 3)
    advance(store, keys[:2], DELIVERED)
    store.requeue(["k1"])
    store.requeue(["k1"])  # said twice
    assert store.refs(["k0", "k1"]) == ["ref of k0", ""]
    assert [g.key for g in store.lease("w", 9, 0.0, 9.0, 3)] == ["k1", "k2"]
    store.requeue(["k1"])  # said once more, when it is in work
    assert states(store) == {"k0": DELIVERED, "k1": LEASED, "k2": LEASED}
    store.commit([("k1", "anew")])
    assert store.deliver(["k1"]) == ["anew"]


@pytest.mark.parametrize("state", STATES)
def test_entries_and_counts_tell_the_state(store, state):
    keys = filled(store, 3)
    advance(store, keys, state)
    assert store.counts() == {**dict.fromkeys(STATES, 0), state: 3}
    assert [e.key for e in store.entries((state,))] == keys
    assert list(store.entries(set(STATES) - {state})) == []


def test_nothing_asked_is_nothing_done(store):
    filled(store, 1)
    assert store.ingest([]) == store.commit([]) == store.deliver([]) == store.refs([]) == []
    assert store.renew("a", [], 1.0) == []
    store.mark_trained([], 1)
    store.requeue([])
    assert list(store.entries(())) == []
    assert store.counts()[QUEUED] == 1


def test_text_of_any_kind_comes_back(store):
    odd = "\"'\\ {} [1, 2] é 漢 \U0001f600 \n -- '); DROP TABLE samples; *"
    store.ingest([(odd, odd)])
    assert store.lease(odd, 1, 0.0, 9.0, 1) == [Grant(odd, odd, 0)]
    assert store.fail(odd, odd, 0, odd, 1) == DEAD
    assert list(store.entries((DEAD,))) == [Entry(odd, DEAD, "", 1, odd)]
    store.commit([(odd, odd)])
    assert store.deliver([odd]) == [odd]
    with pytest.raises(StateError) as found:
        store.requeue([odd + "x"])
    assert (found.value.key, found.value.state) == (odd + "x", "")


def test_many_workers_at_once_never_share_a_prompt(store):
    keys = filled(store, 200)

    def work(owner: str) -> list[str]:
        got: list[str] = []
        while grants := store.lease(owner, 7, 0.0, 9.0, 3):
            store.commit([(grant.key, owner) for grant in grants])
            got += [grant.key for grant in grants]
        return got

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(work, ["a", "b", "c", "d"]))
    assert sorted(key for part in parts for key in part) == sorted(keys)
    assert store.counts()[COMMITTED] == 200


def test_one_trainer_holds_the_store_until_it_resigns_or_is_silent(store):
    assert store.claim("a", 0.0, 10.0) == Claim("a", 10.0)
    assert store.claim("b", 9.9, 19.9) == Claim("a", 10.0)
    assert store.claim("a", 9.9, 19.9) == Claim("a", 19.9)
    assert store.claim("b", 10.0, 20.0, instead_of="x") == Claim("a", 19.9)
    assert store.claim("b", 10.0, 20.0, instead_of="a") == Claim("b", 20.0)
    store.resign("a")
    assert store.claim("a", 19.0, 29.0) == Claim("b", 20.0)
    assert store.claim("a", 20.0, 30.0) == Claim("a", 30.0)
    store.resign("a")
    assert store.claim("b", 20.0, 30.0) == Claim("b", 30.0)
    assert store.counts() == dict.fromkeys(STATES, 0)


def test_the_null_store_keeps_nothing():
    store = NullMetadataStore()
    assert store.claim("a", 0.0, 9.0) == Claim("a", 9.0)
    store.resign("b")
    assert store.claim("b", 0.0, 9.0) == Claim("b", 9.0)
    filled(store)
    assert store.lease("a", 9, 0.0, 9.0, 3) == []
    assert store.commit([("k0", "r")]) == [True]
    assert store.deliver(["k0"]) == store.refs(["k0"]) == [""]
    store.mark_trained(["k0"], 1)
    store.requeue(["k0"])
    assert store.mark_durable(1) == store.rewind(0) == list(store.entries(STATES)) == []
    assert store.renew("a", ["k0"], 1.0) == [False]
    assert (store.release("a"), store.fail("a", "k0", 0, "", 1)) == ([], QUEUED)
    assert store.counts() == dict.fromkeys(STATES, 0)
    store.close()


# SQLite.


def test_a_file_is_found_again_by_the_next_process(tmp_path):
    path = tmp_path / "deep" / "metadata.db"
    store = SQLiteMetadataStore(path)
    keys = filled(store)
    advance(store, keys, TRAINED, step=7)
    again = SQLiteMetadataStore(path)  # while the first is open, as after a crash
    assert states(again) == dict.fromkeys(keys, TRAINED)
    assert sorted(again.mark_durable(7)) == keys


def test_a_process_killed_within_a_transaction_changes_nothing(tmp_path):
    path = tmp_path / "metadata.db"
    filled(SQLiteMetadataStore(path))
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
    advance(store, filled(store), TRAINED)
    store._db.execute("PRAGMA max_page_count=1")  # no more than there are
    with pytest.raises(UserError, match=r"metadata .*metadata\.db: database or disk is full; when it works again"):
        store.ingest([(f"new {i}", "task" * 1000) for i in range(100)])
    assert store.counts() == {**dict.fromkeys(STATES, 0), TRAINED: 4}
    store._db.execute("PRAGMA max_page_count=1000")
    assert store.ingest([(f"new {i}", "task" * 1000) for i in range(100)]) == [True] * 100
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
    with pytest.raises(UserError, match="format 99; this version reads 1"):
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
    with pytest.raises(UserError, match=r"no such file; a run makes it when it starts"):
        SQLiteMetadataStore(tmp_path / "mistyped" / "m.db", create=False)
    assert not list(tmp_path.iterdir())
    filled(SQLiteMetadataStore(tmp_path / "m.db"))
    assert SQLiteMetadataStore(tmp_path / "m.db", create=False).counts()[QUEUED] == 4
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match=r"empty: holds no run"):
        SQLiteMetadataStore(tmp_path / "empty", create=False)
    assert not (tmp_path / "empty").stat().st_size


def test_a_file_of_the_first_version_is_gone_on_with(tmp_path):
    keys = filled(SQLiteMetadataStore(tmp_path / "m.db"))
    db = sqlite3.connect(tmp_path / "m.db")
    db.execute("DROP TABLE trainer")  # which it did not have
    db.close()
    assert states(SQLiteMetadataStore(tmp_path / "m.db", create=False)) == dict.fromkeys(keys, QUEUED)
    again = SQLiteMetadataStore(tmp_path / "m.db")
    assert again.claim("a", 0.0, 9.0) == Claim("a", 9.0)
    assert states(again) == dict.fromkeys(keys, QUEUED)


def test_many_processes_may_make_the_file_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: SQLiteMetadataStore(tmp_path / "m.db"), range(24)))
    filled(stores[0])
    assert {store.counts()[QUEUED] for store in stores} == {4}


def test_damaged_rows_are_one_line_or_left_out(tmp_path, fuzz):
    path = tmp_path / "in" / "m.db"
    plane = DataFlowController(SQLiteMetadataStore(path), FeatureStore(MemoryBackend()), max_tries=2)
    provenance = Provenance("tiny", "f" * 8, "t" * 8, CapturePolicy((1,)), "float32")
    task = PromptTask("t", (1, 2), (0, 1))
    texts = [json.dumps(task.to_json()).encode(), json.dumps([provenance.to_json()]).encode()]

    def everything() -> None:
        leased = plane.lease("w", 9)
        for prompt in leased:
            plane.fail("w", prompt, "reason")
        plane.reconcile()
        plane.durable(1)
        plane.rewind(0)
        plane.dead_letters()
        plane.counts()

    for number, data in enumerate(fuzz.bytes(texts, 60)):
        plane.ingest({f"s{number}": task}, 0, provenance)
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
    filled(store, 40)
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    for data in fuzz.bytes([path.read_bytes()], 60):
        path.write_bytes(data)

        def read() -> None:
            found = SQLiteMetadataStore(path)
            try:
                found.lease("w", 3, 0.0, 9.0, 3)
                list(found.entries(STATES))
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
    filled(one)
    assert other.counts()[QUEUED] == 0
    assert other.ingest([("k0", "task")]) == [True]


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
        advance(store, filled(store), DURABLE)
        store.close()
        with pytest.raises(UserError, match="certificate"):
            RedisMetadataStore(url, password=PASSWORD)  # this authority is nobody's by default
        with pytest.raises(UserError, match=f"at localhost:{port}"):
            RedisMetadataStore(url, password=PASSWORD, ca_file=ca)  # the server asks for a certificate
