"""When producers are added and removed, by a simulated clock; a run that does is in tests/test_cluster.py."""

from __future__ import annotations

import pytest

pytest.importorskip("ray", reason="needs Ray (pip install -e '.[ray]')")

from specforge.cluster.scaling import Autoscaler, pressure
from specforge.runtime.control_plane.metadata import STATES, State
from specforge.runtime.control_plane.streamed import limit

WINDOW, DURABLE_EVERY = 400, 100  # samples in the store at most, and between two checkpoints


@pytest.mark.parametrize(
    ("counts", "unfinished", "stalled", "expected"),
    [
        ({State.LEASED: 8, State.QUEUED: 5}, 0, 0, 1),
        ({State.LEASED: 8, State.QUEUED: 5, State.COMMITTED: 13}, 0, 0, 0),  # training has enough for now
        ({State.LEASED: 8, State.QUEUED: 5}, 2, 0, 0),  # the store is slow
        ({State.LEASED: 8, State.QUEUED: 5}, 0, 1, 0),  # a producer is dead, and is started again
        ({State.QUEUED: 5}, 0, 0, 0),  # producers are starting
        ({State.COMMITTED: 5}, 0, 0, -1),
        ({State.TRAINED: 5}, 0, 0, -1),  # until the next checkpoint
        ({State.DURABLE: 5}, 0, 0, 0),  # trainers are starting, or have finished
    ],
)
def test_pressure(counts, unfinished, stalled, expected):
    counts = dict.fromkeys(STATES, 0) | counts
    assert pressure(limit(counts, unfinished, stalled), counts) == expected


def simulate(
    speed: float, hours: float, least: int = 1, most: int = 8, room: int = 99, slower_after: float | None = None
) -> list[tuple[int, int]]:
    """Times and numbers of producers that make a sample a second, for trainers of a speed in samples a second."""
    now = 0.0
    scaler = Autoscaler(least, lambda: now)
    counts = dict.fromkeys(STATES, 0) | {State.QUEUED: WINDOW}
    changes, made, used = [(0, least)], 0.0, 0.0
    while now < hours * 3600:
        now += 1.0
        speed = 0.3 if slower_after is not None and now > slower_after else speed
        number = changes[-1][1]
        made, used = min(made + number, counts[State.QUEUED]), min(used + speed, counts[State.COMMITTED] + 1)
        ready, trained = int(made), min(int(used), counts[State.COMMITTED])
        made, used = made - ready, used - trained
        counts[State.QUEUED] -= ready
        counts[State.COMMITTED] += ready - trained
        counts[State.TRAINED] += trained
        if counts[State.TRAINED] >= DURABLE_EVERY:
            counts[State.QUEUED] += counts[State.TRAINED]
            counts[State.TRAINED] = 0
        seen = counts | ({State.LEASED: 8, State.QUEUED: counts[State.QUEUED] - 8} if counts[State.QUEUED] > 8 else {})
        wanted = scaler.decide(least, most, pressure(limit(seen), seen), lambda: changes[-1][1] < room)
        if wanted != number:
            changes.append((int(now), wanted))
    return changes


def test_producers_are_added_until_training_has_samples():
    changes = simulate(speed=5.5, hours=2)
    assert [number for _, number in changes[:6]] == [1, 2, 3, 4, 5, 6]
    assert changes[5][0] < 600


@pytest.mark.parametrize("speed", [0.2, 1.0, 1.5, 2.5, 5.01, 5.5])
def test_the_number_does_not_flap(speed):
    changes = simulate(speed, hours=12)
    late = [number for seconds, number in changes if seconds > 6 * 3600]
    assert len(late) <= 12
    assert all(abs(number - speed) < 2 for number in late)


def test_the_number_stays_within_its_limits():
    assert max(number for _, number in simulate(speed=20, hours=1, most=3)) == 3
    numbers = [number for _, number in simulate(speed=0.1, hours=1, least=2)]
    assert min(numbers) == numbers[-1] == 2


def test_a_producer_without_room_is_not_asked_for():
    assert max(number for _, number in simulate(speed=20, hours=1, room=4)) == 4


def test_producers_are_removed_when_training_becomes_slower():
    changes = simulate(speed=5.5, hours=6, slower_after=2 * 3600)
    assert changes[-1][1] == 1


def test_a_minimum_that_is_raised_holds_at_once():
    scaler = Autoscaler(1, lambda: 0.0)
    assert scaler.decide(3, 3, 0, lambda: True) == 3
    assert scaler.decide(1, 2, 0, lambda: True) == 2
