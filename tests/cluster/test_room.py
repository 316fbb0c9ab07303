"""Who gets the room of a cluster that is too small, by a simulated clock; lost nodes are in tests/test_cluster.py."""

from __future__ import annotations

import pytest

pytest.importorskip("ray", reason="needs Ray (pip install -e '.[ray]')")

import specforge.cluster.room as module
from specforge.cluster.options import ClusterOptions, ProducerOptions, TrainerOptions
from specforge.cluster.plan import Node


class World:
    """One node, on which trainers and producers are placed at once where there is room, trainers first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cpus: int, trainers: int, producers: int) -> None:
        self.now, self.cpus, self.trainers, self.wanted = 0.0, cpus, trainers, producers
        self.running: set[int] = set()  # producers
        self.training = False
        self.lines: list[tuple[int, str]] = []
        cluster = ClusterOptions(producers=ProducerOptions(producers), trainers=TrainerOptions(trainers))
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module, "free_nodes", lambda: [Node("a", self.free(), 0)])
        monkeypatch.setattr(module, "trainers_wait", lambda: not self.training)
        monkeypatch.setattr(module, "say", lambda line: self.lines.append((int(self.now), line)))
        self.room = module.Room(cluster, self)

    def free(self) -> int:
        return self.cpus - len(self.running) - self.trainers * self.training

    def placed(self) -> dict[int, str]:
        return dict.fromkeys(self.running, "a")

    def stopping(self) -> bool:
        return False

    def go_on(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.25
            allowed = self.room.allow(self.wanted)
            self.running &= allowed
            self.training = self.training or self.free() >= self.trainers
            self.running |= set(sorted(allowed - self.running)[: self.free()])


def test_the_last_producers_make_room_and_come_back(monkeypatch):
    world = World(monkeypatch, cpus=3, trainers=2, producers=3)
    world.running = {0, 1, 2}  # they were faster
    world.go_on(20)
    assert (world.training, world.running) == (True, {0})
    world.cpus += 1
    world.go_on(10)
    assert world.running == {0, 1}
    assert [line for _, line in world.lines] == [
        "waiting for 2 CPUs for 2 trainers: producers 1 and 2 stopped meanwhile",
        "there is room again for producer 1",
    ]


def test_what_no_producer_can_give_is_said_now_and_then(monkeypatch):
    world = World(monkeypatch, cpus=2, trainers=3, producers=1)
    world.go_on(4)
    assert world.lines == []
    world.go_on(3600)
    assert [line for _, line in world.lines] == ["waiting for 1 CPU for 1 trainer; add nodes, or end other jobs"] * 4
    assert world.lines[0][0] < 10
    assert world.running == {0}  # it works as long as its room is of no use
    world.cpus += 1
    world.go_on(10)
    assert (world.training, world.running) == (True, set())


def test_producers_without_room_are_named(monkeypatch):
    world = World(monkeypatch, cpus=3, trainers=2, producers=3)
    world.go_on(20)
    assert (world.training, world.running, world.lines) == (True, {0}, [])
    world.go_on(20)
    assert [line for _, line in world.lines] == ["waiting for 2 CPUs for producers 1 and 2"]
    assert not world.room.fits_another()
