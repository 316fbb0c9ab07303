"""Redis servers as people have them: full, read-only, evicting, shared, damaged; one line each, or put right."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import redis

from specforge.contracts import PromptTask
from specforge.errors import UserError
from specforge.runtime.addresses import open_metadata
from specforge.runtime.control_plane.claim import Claim, claim, resign
from specforge.runtime.control_plane.controller import DataFlowController
from specforge.runtime.control_plane.metadata import STATES, State, StateError
from specforge.runtime.control_plane.redis import RedisMetadataStore
from specforge.runtime.data_plane.local import MemoryBackend
from specforge.runtime.data_plane.store import FeatureStore
from tests.fuzz import survives
from tests.runtime.control_plane.redis_server import redis_server
from tests.runtime.control_plane.test_metadata import PROVENANCE, Control, advance, filled, no_server, ref, states, uris

pytestmark = [pytest.mark.redis, no_server]


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Iterator[int]:
    with redis_server(tmp_path_factory.mktemp("redis")) as found:
        yield found


@pytest.fixture
def client(port) -> Iterator[redis.Redis]:
    found = redis.Redis(port=port, decode_responses=True)
    yield found
    for name, value in (("maxmemory", 0), ("maxmemory-policy", "noeviction")):
        found.config_set(name, value)
    found.close()


@pytest.fixture
def space(tmp_path) -> str:
    return "{" + tmp_path.name + "}"


@pytest.fixture
def store(port, tmp_path) -> RedisMetadataStore:
    return RedisMetadataStore(f"redis://127.0.0.1:{port}/0", namespace=tmp_path.name)


def one_line(action) -> str:
    with pytest.raises(UserError) as found:
        action()
    text = str(found.value)
    assert "\n" not in text
    assert "user_script" not in text
    return text


# At connect.


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random"])
def test_a_server_that_evicts_is_refused(port, client, policy):
    client.config_set("maxmemory", "100mb")
    client.config_set("maxmemory-policy", policy)
    words = one_line(lambda: RedisMetadataStore(f"redis://127.0.0.1:{port}/0"))
    assert f"maxmemory-policy {policy}); set maxmemory-policy to noeviction" in words


@pytest.mark.parametrize(
    ("limit", "policy"), [("100mb", "noeviction"), ("100mb", "volatile-lru"), ("0", "allkeys-lru")]
)
def test_a_server_that_never_evicts_what_does_not_expire_is_taken(port, client, limit, policy):
    client.config_set("maxmemory", limit)
    client.config_set("maxmemory-policy", policy)
    RedisMetadataStore(f"redis://127.0.0.1:{port}/0").close()


def test_a_user_that_may_not_ask_for_the_policy_is_let_in_and_one_that_may_not_write_is_told(port, client):
    may = ["+@scripting", "+@hash", "+@sortedset", "+@keyspace", "+incr", "+@connection", "-info", "-config"]
    client.acl_setuser("writer", enabled=True, nopass=True, keys=["*"], commands=may)
    client.acl_setuser(
        "reader", enabled=True, nopass=True, keys=["*"], commands=["+@read", "+@scripting", "+@connection"]
    )
    client.acl_setuser("nobody", enabled=True, nopass=True, keys=["*"], commands=["+ping", "+@connection"])
    writer = RedisMetadataStore(f"redis://writer:x@127.0.0.1:{port}/0", namespace="acl")
    advance(Control(writer), filled(Control(writer)), State.COMMITTED)
    reader = RedisMetadataStore(f"redis://reader:x@127.0.0.1:{port}/0", namespace="acl")
    assert reader.counts()[State.COMMITTED] == 4
    words = one_line(lambda: reader.add([("k", "task")]))
    assert "this user lacks a permission that is needed" in words
    words = one_line(lambda: RedisMetadataStore(f"redis://nobody:x@127.0.0.1:{port}/0"))
    assert "this user lacks a permission that is needed" in words


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("redis://127.0.0.1:1/0?foo=1", "has no option foo"),
        ("redis://127.0.0.1:1/0?ssl_ca_certs=x", "write the address as rediss://"),
        ("redis://127.0.0.1:1/0?retry_on_error=x", "has no option retry_on_error"),
        ("redis://[::1", "is not an address"),
        ("redis://127.0.0.1:99999/0", "is not an address"),
        ("redis://127.0.0.1:port/0", "is not an address"),
        ("redis://127.0.0.1:1/main", "a database of Redis is a number"),
        ("redis://127.0.0.1:1/0/1", "a database of Redis is a number"),
        ("redis://127.0.0.1:1/0?socket_timeout=soon", "Invalid value for 'socket_timeout'"),
        ("redis://127.0.0.1:1/0?password_file=", "cannot be read"),
        ("rediss://127.0.0.1:1/0?ssl_ca_certs=nowhere", "metadata in Redis at"),
        ("redi://user:secret@host", "give a file"),
        ("", "is empty"),
        ("redis://", "is empty"),
    ],
)
def test_a_bad_address_is_one_line_without_a_password(address, words):
    found = one_line(lambda: open_metadata(address))
    assert words in found
    assert "secret" not in found


def test_a_database_that_the_server_does_not_have(port):
    assert "DB index is out of range" in one_line(lambda: RedisMetadataStore(f"redis://127.0.0.1:{port}/99"))


def test_something_else_under_the_namespace_is_said_at_connect(port, client, tmp_path, space):
    client.set(f"{space}:queued", "text")
    words = one_line(lambda: RedisMetadataStore(f"redis://127.0.0.1:{port}/0", namespace=tmp_path.name))
    assert "choose another namespace, after #" in words


# In the middle of a run.


def test_a_full_memory_is_one_line_and_loses_nothing(client, store):
    advance(Control(store), filled(Control(store)), State.COMMITTED)
    client.config_set("maxmemory", 1)
    for action in (lambda: store.add([("new", "task")]), lambda: claim(store, "me", 0.0, 9.0)):
        assert "its memory is full" in one_line(action)
    client.config_set("maxmemory", 0)
    assert store.counts()[State.COMMITTED] == 4


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (redis.exceptions.ReadOnlyError("You can't write against a read only replica."), "it is a read-only replica"),
        (redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), "memory is full"),
        (redis.exceptions.NoPermissionError("User x has no permissions"), "this user lacks"),
        (redis.exceptions.AuthenticationError("Authentication required."), "it requires a password"),
        (redis.exceptions.ResponseError("WRONGTYPE Operation against a key"), "choose another namespace, after #"),
        (redis.exceptions.BusyLoadingError("Redis is loading the dataset in memory"), "still loading its data"),
        (redis.exceptions.MasterDownError("Link with MASTER is down"), "has lost its master"),
        (redis.exceptions.ClusterDownError("The cluster is down"), "its cluster is down"),
        (redis.exceptions.ClusterCrossSlotError("Keys in request don't hash to the same slot"), "cluster node"),
        (redis.exceptions.MovedError("3999 127.0.0.1:6381"), "this run are on another"),
        (redis.exceptions.ResponseError("BUSY Redis is busy running a script"), "BUSY Redis is busy"),
        (redis.exceptions.ResponseError("ERR x script: 12ab, on @user_script:3.\nmore"), "ERR x; once"),
        (redis.exceptions.InvalidResponse("Protocol Error"), "Protocol Error"),
        (redis.exceptions.TimeoutError("Timeout reading from socket"), "Timeout reading"),
    ],
)
def test_what_a_server_says_is_one_line(store, monkeypatch, error, words):
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setitem(store._scripts, "counts", fail)
    found = one_line(store.counts)
    assert words in found
    assert "resume with --ckpt_path last" in found


def test_a_replica_is_said_at_the_first_write(store, client, tmp_path):
    with redis_server(tmp_path, "--replicaof", "127.0.0.1", "1") as replica:
        words = one_line(lambda: claim(RedisMetadataStore(f"redis://127.0.0.1:{replica}/0"), "me", 0.0, 9.0))
        assert "replica" in words


# Entries that were made up, damaged or deleted.


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("score", [0, float("inf")])
def test_a_ghost_in_a_set_is_left_out_with_a_warning(store, client, space, caplog, state, score):
    control = Control(store)
    keys = filled(control)
    client.zadd(f"{space}:{state}", {"ghost@0": score, "x\x00\x1b[31m": score})
    assert control.release("nobody") == 0
    assert [prompt.key for prompt in control.lease("w", 9)] == keys
    control.durable(5)
    control.rewind(0)
    assert states(store) == dict.fromkeys(keys, State.LEASED)
    assert client.zcard(f"{space}:{state}") == (4 if state == State.LEASED else 0)
    assert "left out 2 keys that are not in the state they were listed in: " in caplog.text
    assert "ghost@0" in caplog.text
    assert "\x1b" not in caplog.text


def test_ghosts_before_all_prompts_hide_none_of_them(store, client, space):
    control = Control(store)
    keys = filled(control)
    client.zadd(f"{space}:queued", {f"ghost{i}@0": -i for i in range(2786)})
    assert [prompt.key for prompt in control.lease("w", 3)] == keys[:3]


DAMAGES = {
    "deleted": lambda client, key: client.delete(key),
    "text": lambda client, key: client.delete(key) and client.set(key, "text"),
    "a set": lambda client, key: client.delete(key) and client.sadd(key, "text"),
    "no state": lambda client, key: client.hdel(key, "state"),
    "another state": lambda client, key: client.hset(key, "state", "x"),
    "no number": lambda client, key: client.hdel(key, "seq"),
    "a damaged number": lambda client, key: client.hset(key, "tries", "many"),
    "a huge number": lambda client, key: client.hset(key, "tries", "9" * 30),
    "only a task": lambda client, key: client.delete(key) and client.hset(key, "task", "t"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("state", STATES)
def test_a_damaged_sample_is_as_if_it_had_never_been_there(store, client, space, state, damage):
    """Whoever asks for it is told so, and may queue it again; the others are what they were."""
    control = Control(store)
    keys = filled(control)
    advance(control, keys, state)
    DAMAGES[damage](client, f"{space}:sample:k1@0")
    for action in (control.deliver, control.revive, lambda keys: control.commit([(key, ref(key)) for key in keys])):
        with pytest.raises(StateError, match="k1@0 is unknown"):
            action(["k1@0"])
    assert control.renewed("w", ["k1@0"], 0.0) == [False]
    assert uris(control, ["k1@0"]) == [None]
    assert store.add([("k1@0", "again")]) == [True]
    expected = {key: State.QUEUED if key == "k1@0" else state for key in keys}
    assert states(store) == expected
    assert {name: n for name, n in store.counts().items() if n} == (
        {State.QUEUED: 4} if state == State.QUEUED else {State.QUEUED: 1, state: 3}
    )


@pytest.mark.parametrize("state", [State.QUEUED, State.LEASED, State.COMMITTED])
def test_a_sample_that_was_taken_out_of_its_set_comes_back_when_it_is_asked_for(store, client, space, state):
    control = Control(store)
    keys = filled(control)
    advance(control, keys, state)
    client.delete(f"{space}:{state}")
    if state == State.COMMITTED:
        assert control.deliver(keys) == [ref(key) for key in keys]
        return
    for key in keys:
        with pytest.raises(StateError, match=f"{key} is {state}"):
            control.deliver([key])
    assert [key for key, _ in control.lent("other", 9, 1.0)] == keys


def control(store) -> DataFlowController:
    return DataFlowController(store, FeatureStore(MemoryBackend()), max_tries=2)


@pytest.mark.parametrize(
    "text", ["", "text", "{}", '{"task_id": 3}', "[]\n[]", "[" * 5000, b"\xff\xfe", '{"input_ids": [1.5]}']
)
def test_a_prompt_that_cannot_be_read_is_dropped_and_the_others_go_on(store, client, space, caplog, text):
    plane = control(store)
    plane.ingest({f"s{i}": PromptTask(f"t{i}", (1, 2), (0, 1)) for i in range(3)}, 0, PROVENANCE)
    client.hset(f"{space}:sample:s1@0", "task", text)
    assert [prompt.sample_id for prompt in plane.lease("w", 9)] == ["s0", "s2"]
    assert "prompt 's1@0' in the metadata store is damaged" in caplog.text
    assert plane.ingest({"s1": PromptTask("t1", (1, 2), (0, 1))}, 0, PROVENANCE) == 1


def test_a_key_that_is_no_samples_is_dropped(store, client, caplog):
    store.add([("nobody", "task"), ("../x@0", "task"), ("s@x", "task")])
    assert control(store).lease("w", 9) == []
    assert sum(store.counts().values()) == 0


def test_damaged_values_are_one_line_or_left_out(store, client, space, fuzz, caplog):
    caplog.set_level(logging.CRITICAL)
    plane = control(store)
    task = PromptTask("t", (1, 2), (0, 1))
    texts = [json.dumps(task.to_json()).encode(), json.dumps([PROVENANCE.to_json()]).encode()]

    def everything() -> None:
        leased = plane.lease("w", 9)
        plane.renew("w", leased)
        for prompt in leased:
            plane.fail("w", prompt, "reason")
        plane.reconcile()
        plane.durable(1)
        plane.rewind(0)
        plane.given_up()
        plane.counts()

    for number, data in enumerate(fuzz.bytes(texts, 60)):
        plane.ingest({f"s{number}": task}, 0, PROVENANCE)
        field = fuzz.rng.choice(["task", "ref", "state", "seq", "tries", "owner", "reason", "step"])
        client.hset(f"{space}:sample:s{number}@0", field, data)
        if field == "ref":
            client.hset(f"{space}:sample:s{number}@0", "state", "committed")
            client.zadd(f"{space}:committed", {f"s{number}@0": number})
        survives(everything, refusals=(UserError, StateError))
    store.remove([row.key for row in store.find(STATES)])


def test_a_counter_that_is_no_number_is_one_line(store, client, space):
    client.set(f"{space}:seq", "text")
    assert "not an integer" in one_line(lambda: store.add([("k", "task")]))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_claim_is_replaced(store, client, space, damage):
    claim(store, "other", 0.0, 9.0)
    DAMAGES[damage](client, f"{space}:sample:trainer")
    resign(store, "me")
    assert claim(store, "me", 0.0, 9.0) == Claim("me", 9.0)


def test_the_rows_of_an_earlier_revision_are_read(store, client, space):
    """Their hashes have no owner before a lease, and no step before training; the deadline is a score."""
    row = {"task": "t", "tries": 1, "ref": "r", "reason": ""}
    for seq, state in enumerate(STATES, 1):
        more = {"leased": {"owner": "w"}, "trained": {"step": 7}, "durable": {"step": 6}}.get(state, {})
        client.hset(f"{space}:sample:s@{seq}", mapping=row | {"state": state, "seq": seq} | more)
        client.zadd(f"{space}:{state}", {f"s@{seq}": {"leased": 12.5, "trained": 7, "durable": 6}.get(state, seq)})
    client.set(f"{space}:seq", len(STATES))
    client.hset(f"{space}:trainer", mapping={"holder": "one that died", "deadline": 3.0})
    assert [(row.key, row.state) for row in store.find(STATES)] == [(f"s@{i}", x) for i, x in enumerate(STATES, 1)]
    assert [(row.owner, row.deadline, row.tries, row.text) for row in store.find((State.LEASED,), text="ref")] == [
        ("w", 12.5, 1, "r")
    ]
    assert claim(store, "me", 0.0, 9.0) == Claim("me", 9.0)
    control = Control(store)
    assert control.durable(7) == 1
    assert control.rewind(6) == ["s@4", "s@5"]
    assert store.add([("new", "task")]) == [True]
    assert store.find(STATES)[-1].key == "new"
