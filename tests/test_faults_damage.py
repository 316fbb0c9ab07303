# ruff: noqa: F811 - fixtures of other modules
"""Records of the metadata store that are deleted, damaged or made up in the middle of a run: it goes on."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable

import pytest
import redis

from specforge.runtime.addresses import open_metadata
from specforge.runtime.control_plane.metadata import DURABLE, STATES
from tests.runtime.control_plane.redis_server import redis_server
from tests.test_faults import World, dying, expected  # noqa: F401 - fixtures

pytestmark = pytest.mark.faults

ODD = ("", "x", "-1", "1e400", "null", "[]\n[]\n[]", '{"input_ids": 3}\n', "[" * 3000, "\x00", "9" * 40)


def damage_redis(client: redis.Redis, space: str, dice: random.Random) -> None:
    """One of a run's keys, or of a set's members, is deleted, replaced or made up."""
    keys = sorted(key for key in client.scan_iter(f"{space}:*") if not key.endswith(":seq"))
    key = dice.choice(keys)
    if ":sample:" not in key:
        match dice.randrange(4):
            case 0:
                client.delete(key)
            case 1:
                client.zadd(key, {dice.choice(("ghost", "ghost@0", "../x@0", "a-b@-1", "\x00@1")): 0})
            case 2:
                client.zrem(key, *client.zrange(key, 0, 0))
            case _:  # a member of two sets
                client.zadd(f"{space}:{dice.choice(STATES)}", {m: dice.randrange(9) for m in client.zrange(key, 0, 0)})
        return
    match dice.randrange(4) if client.type(key) == "hash" else 0:
        case 0:
            client.delete(key)
        case 1:
            client.delete(key)
            client.set(key, "text")
        case 2:
            client.hdel(key, dice.choice(("state", "seq", "task", "ref", "tries", "reason", "owner", "step")))
        case _:
            client.hset(key, dice.choice(("state", "seq", "task", "ref", "tries", "reason", "owner")), dice.choice(ODD))


def damage_sqlite(db: sqlite3.Connection, dice: random.Random) -> None:
    """One row is deleted, changed, or made up."""
    (count,) = db.execute("SELECT count(*) FROM samples").fetchone()
    seqs = [seq for (seq,) in db.execute("SELECT seq FROM samples")]
    if not count:
        return
    seq, odd = dice.choice(seqs), dice.choice(ODD)
    match dice.randrange(6):
        case 0:
            db.execute("DELETE FROM samples WHERE seq = ?", (seq,))
        case 1:
            db.execute("DELETE FROM tasks WHERE seq = ?", (seq,))
        case 2:
            db.execute("UPDATE tasks SET task = ? WHERE seq = ?", (odd, seq))
        case 3:
            column = dice.choice(("state", "ref", "owner", "reason"))
            db.execute(f"UPDATE samples SET {column} = ? WHERE seq = ?", (odd, seq))
        case 4:
            column = dice.choice(("tries", "step", "deadline"))
            db.execute(f"UPDATE samples SET {column} = ? WHERE seq = ?", (dice.choice((-5, 0, 10**12)), seq))
        case _:
            insert = "INSERT OR IGNORE INTO samples (key, state) VALUES (?, ?)"
            db.execute(insert, (dice.choice(("ghost", "ghost@0", "../x@0", "")), dice.choice(STATES)))


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory):
    if shutil.which("redis-server") is None:
        pytest.skip("apt-get install redis-server")
    with redis_server(tmp_path_factory.mktemp("redis")) as port:
        yield port


def damaged(world: World, damage: Callable[[random.Random], None], times: int) -> None:
    """Damage something while the trainer waits, so many times."""
    left = [times]

    def strike() -> None:
        if left[0] and world.random.random() < 0.4:
            left[0] -= 1
            damage(world.random)

    world.events.append(strike)


def check(world: World, weights, expected) -> None:
    """As at the end of any run, but for records that were made up in states that nobody takes them out of."""
    metadata = open_metadata(world.where["metadata"])
    metadata.remove([row.key for row in metadata.find(set(STATES) - {DURABLE})])
    metadata.close()
    world.check(weights, expected, durable=None)


@pytest.mark.redis
@pytest.mark.parametrize("seed", range(8))
def test_a_run_over_redis_goes_on(tmp_path, expected, dying, redis_port, seed):
    address = f"redis://127.0.0.1:{redis_port}/0"
    world = World(tmp_path, seed, max_tries=99, metadata=f"{address}#{tmp_path.name}")
    client = redis.Redis.from_url(address, decode_responses=True)
    damaged(world, lambda dice: damage_redis(client, "{" + tmp_path.name + "}", dice), 6)
    check(world, world.train(), expected)


@pytest.mark.parametrize("seed", range(8))
def test_a_run_over_sqlite_goes_on(tmp_path, expected, dying, seed):
    world = World(tmp_path, seed, max_tries=99)

    def damage(dice: random.Random) -> None:
        with sqlite3.connect(world.where["metadata"]) as db:
            damage_sqlite(db, dice)

    damaged(world, damage, 6)
    check(world, world.train(), expected)
