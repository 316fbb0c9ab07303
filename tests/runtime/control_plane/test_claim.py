"""One trainer at a time: refused, taken over, renewed, lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from specforge.errors import UserError
from specforge.runtime.control_plane import claim as claim_module
from specforge.runtime.control_plane.claim import TrainerClaim
from specforge.runtime.control_plane.metadata import unusable
from tests.runtime.control_plane.memory import MemoryMetadataStore


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> MemoryMetadataStore:
    return MemoryMetadataStore()


def claim(store, clock, run: str = "runs/a", seconds: float = 60.0) -> TrainerClaim:
    return TrainerClaim(store, "redis://host/0", run, seconds, clock)


def held_by(store, clock, deadline: float = 1060.0, **changes: object) -> None:
    """Another process holds the claim; by default one that lives, on this machine."""
    own = json.loads(claim(store, clock, "runs/other")._holder)
    parent = os.getppid()
    other = own | {"pid": parent, "began": claim_module._start_time(parent), "host": "node7"} | changes
    assert claim_module.claim(store, json.dumps(other), clock.now, deadline).deadline == deadline


def refusal(store, clock) -> str:
    with pytest.raises(UserError) as found:
        claim(store, clock).take()
    return str(found.value)


def test_a_trainer_at_work_is_named(store, clock):
    held_by(store, clock)
    words = refusal(store, clock)
    assert words.startswith("metadata redis://host/0: the trainer of runs/other (process ")
    assert f"(process {os.getppid()} on node7) is using it" in words
    assert "its claim expires in 60 s" in words


@pytest.mark.parametrize(
    "changes",
    [{"machine": "another boot"}, {"machine": ""}, {"pid": "x"}, {"pid": None}, {"began": None, "machine": "x"}],
)
def test_who_cannot_be_seen_from_here_is_waited_for_until_its_claim_ends(store, clock, changes):
    held_by(store, clock, **changes)
    refusal(store, clock)
    clock.now = 1060.0
    claim(store, clock).take()


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"began": "1"}, {"pid": os.getpid()}])
def test_a_process_that_is_gone_or_is_this_one_is_replaced_at_once(store, clock, changes):
    held_by(store, clock, **changes)
    claim(store, clock).take()


def test_a_killed_process_is_replaced_at_once_though_nobody_has_asked_for_its_status(store, clock):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    held_by(store, clock, pid=process.pid, began=claim_module._start_time(process.pid))
    refusal(store, clock)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    claim(store, clock).take()
    process.wait()


@pytest.mark.parametrize("holder", ["", "text", "[]", "[" * 3000, "{}", "null"])
def test_a_claim_that_nobody_can_read_is_replaced(store, clock, holder):
    claim_module.claim(store, holder, clock.now, 9999.0)
    claim(store, clock).take()


def test_a_claim_is_renewed_and_ends(store, clock):
    renewed = threading.Semaphore(0)
    mine = claim(store, clock, seconds=0.03)
    move = store.move

    def watched(*words):
        renewed.release()
        return move(*words)

    store.move = watched
    mine.take()
    for _ in range(4):
        assert renewed.acquire(timeout=60)
    mine.check()
    mine.end()
    store.move = move
    held_by(store, clock)


def test_who_was_silent_too_long_is_told_that_another_one_trains(store, clock):
    mine = claim(store, clock)
    mine.take()
    clock.now = 1060.0
    held_by(store, clock, deadline=1120.0)
    mine.check()  # nobody has told it yet
    mine.renew()
    with pytest.raises(UserError, match=r"the trainer of runs/other .* has replaced this trainer"):
        mine.check()
    mine.end()
    refusal(store, clock)  # the other's claim stays


def test_a_store_that_cannot_be_written_is_said_where_it_is_asked(store, clock, caplog):
    mine = claim(store, clock)
    mine.take()

    def full(*words):
        raise unusable("m.db", "database or disk is full")

    store.move = full
    with pytest.raises(UserError, match="disk is full"):
        mine.renew()
    mine.end()
    assert "disk is full" in caplog.text
