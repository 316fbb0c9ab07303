"""On which nodes producers start; what happens when they die is in tests/test_cluster.py."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="needs Ray (pip install -e '.[ray]')")

import specforge.cluster.producers as module
from specforge.cluster.options import ClusterOptions
from specforge.cluster.plan import Node


def test_a_producer_does_not_import_lightning():
    """Its process starts in a third of the time."""
    code = "import sys, specforge.cluster.producers; print('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_producers_start_beside_trainers_or_anywhere(monkeypatch):
    """Room on nodes a and b for a producer next to each trainer, as far as this run knows."""
    now, trainers, started = [0.0], [], []
    ray = SimpleNamespace(
        wait=lambda refs, timeout: ([x for x in refs if getattr(x, "killed", False)], []),
        kill=lambda actor: setattr(actor, "killed", True),
    )

    def start(self, number: int, node: str | None = None) -> None:
        started.append((number, node))
        actor = SimpleNamespace(stop=SimpleNamespace(remote=lambda: None))
        self._running[number] = module._Running(actor, "place", actor, node or "", since=now[0])

    monkeypatch.setattr(module, "ray", ray)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "all_nodes", lambda: [Node(name, 2, 0) for name in "abc"])
    monkeypatch.setattr(module, "trainer_nodes", lambda: trainers or None)
    monkeypatch.setattr(module, "_reason", lambda result: "killed")
    monkeypatch.setattr(module.Producers, "_start", start)
    producers = module.Producers("run", ClusterOptions(placement="beside_trainers"), None, None, "")
    producers.keep(range(3))
    assert started == []
    trainers += ["a", "b"]
    producers.keep(range(3))
    assert started == [(0, "a"), (1, "b"), (2, None)]
    now[0] += module._PATIENCE + 1  # another job has the room
    producers._running[1].node = "b"
    producers.keep(range(3))
    assert started[3:] == [(0, None)]
