"""How many producers a run has: more while training waits for them, fewer while they wait for the trainers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from specforge.console import say
from specforge.errors import UserError
from specforge.runtime.addresses import is_there, open_backend, open_metadata
from specforge.runtime.control_plane.controller import DataFlowController
from specforge.runtime.control_plane.metadata import State
from specforge.runtime.control_plane.streamed import Limit, limit
from specforge.runtime.data_plane.store import FeatureStore

_LOOK = 5.0  # seconds between two looks at the control plane
_GROW = 30.0  # seconds for which training has to be starved before a producer is added
_SHRINK = 60.0  # seconds for which producers have to be blocked before one is removed
_LONGEST = 3600.0  # seconds; the wait before a removal doubles whenever one was regretted


def pressure(found: Limit, counts: Mapping[str, int]) -> int:
    """1 if more producers would help, -1 if there are too many, 0 if neither is certain.

    Args:
        found: what limits the run's speed.
        counts: number of samples in each state.
    """
    if found is Limit.PRODUCERS:  # while they fill an empty store, training may have all that it needs
        return int(counts[State.COMMITTED] < counts[State.QUEUED] + counts[State.LEASED])
    return -int(found in (Limit.TRAINER, Limit.FULL_STORE))


class Autoscaler:
    """Turns pressure that lasts into a number of producers.

    Args:
        count: the first number.
        clock: current time in seconds.
    """

    def __init__(self, count: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._count, self._clock, self._last = count, clock, clock()
        self._balance = 0.0  # seconds of pressure upwards, less those downwards
        self._patience, self._shrank = _SHRINK, False

    def decide(self, least: int, most: int, pressure: int, has_room: Callable[[], bool]) -> int:
        """The number of producers from now on.

        Args:
            least: at least so many.
            most: at most so many.
            pressure: as :func:`pressure` returns it.
            has_room: whether the cluster has room for one more.
        """
        now = self._clock()
        self._balance += pressure * (now - self._last)
        self._last, self._count = now, min(max(self._count, least), most)
        self._balance = min(max(self._balance, -self._patience), _GROW)
        if self._balance >= _GROW and self._count < most and has_room():
            if self._shrank:
                self._patience = min(2 * self._patience, _LONGEST)
            self._count, self._balance, self._shrank = self._count + 1, 0.0, False
        elif self._balance <= -self._patience and self._count > least:
            self._count, self._balance, self._shrank = self._count - 1, 0.0, True
        return self._count


class Scaling:
    """The number of producers of a run; looks at the control plane in a thread of its own, which may have to wait.

    Args:
        store: address of the feature store.
        metadata: address of the metadata store.
        least: at least so many producers, at first.
        most: at most so many.
    """

    def __init__(self, store: str, metadata: str, least: int, most: int) -> None:
        self._store, self._metadata, self._most = store, metadata, most
        self._autoscaler, self._count, self._pressure = Autoscaler(least), least, 0
        self._end = threading.Event()
        if most > least:
            threading.Thread(target=self._watch, name="scaling", daemon=True).start()

    def wanted(self, least: int, has_room: Callable[[], bool]) -> int:
        """How many producers are to run; the arguments are those of :meth:`Autoscaler.decide`."""
        most = max(least, self._most)
        before = min(max(self._count, least), most)
        self._count = self._autoscaler.decide(least, most, self._pressure, has_room)
        if self._count > before:
            say(f"training waits for samples: producer {before} is added")
        elif self._count < before:
            say(f"producers wait for training: producer {self._count} is removed")
        return self._count

    def close(self) -> None:
        """Stop looking."""
        self._end.set()

    def _watch(self) -> None:
        controller = None
        while not self._end.wait(_LOOK):
            try:
                controller = controller or self._open()
                if controller is not None:
                    counts = controller.counts()
                    self._pressure = pressure(limit(counts, controller.unfinished(), controller.stalled()), counts)
            except UserError:  # a store does not answer, which the processes of the run report
                self._pressure = 0
        if controller is not None:
            controller.metadata.close()

    def _open(self) -> DataFlowController | None:
        if not is_there(self._metadata) or not is_there(self._store):
            return None
        metadata = open_metadata(self._metadata, create=False)
        return DataFlowController(metadata, FeatureStore(open_backend(self._store, create=False)))
