"""Room in the cluster for a run's processes: producers give theirs to trainers that wait, and get it back."""

from __future__ import annotations

import time

from specforge.cluster.nodes import free_nodes, trainers_wait
from specforge.cluster.options import ClusterOptions, ProducerOptions, TrainerOptions
from specforge.cluster.plan import amount, capacity, count, freed, give_up, named
from specforge.cluster.producers import Producers
from specforge.console import say

_PATIENCE = 5.0  # seconds for which trainers may wait; Ray takes about one to place them
_LOOK = 1.0  # seconds between two looks at the cluster
_SETTLE = 3.0  # seconds until the cluster reports what a process took or left
_SILENCE = 30.0  # seconds until a wait for a producer's room is reported: its process may just be starting
_REPEAT = 300.0  # seconds until a line about the same wait is printed again; then twice as long, and so on


class Room:
    """Decides which producers may run.

    Args:
        cluster: what each process needs.
        producers: the producers.
    """

    def __init__(self, cluster: ClusterOptions, producers: Producers) -> None:
        self._cluster, self._producers = cluster, producers
        self._withheld: set[int] = set()  # producers that are wanted but may not run
        self._since: float | None = None  # when the trainers began to wait
        self._next = 0.0  # time of the next look
        self._trainers, self._others = Reminder(0.0), Reminder(_SILENCE)

    def allow(self, wanted: int) -> set[int]:
        """Numbers of the producers that may run, if this many are wanted."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _LOOK
            self._look(now, set(range(wanted)))
        return set(range(wanted)) - self._withheld

    def fits_another(self) -> bool:
        """Whether there is room for one more producer."""
        waits = self._since is not None or self._withheld
        return not waits and capacity(free_nodes(), self._cluster.producers) > 0

    def _look(self, now: float, wanted: set[int]) -> None:
        waits = trainers_wait()
        if waits is False:
            self._since = None
        elif waits and self._since is None:
            self._since = now
        if self._producers.stopping():
            self._next = now + _SETTLE
        elif self._since is None:
            self._trainers.tell("")
            self._give_back(now, wanted)
        elif now - self._since >= _PATIENCE:
            self._take(now, wanted)

    def _take(self, now: float, wanted: set[int]) -> None:
        """Have producers stop so that the trainers get a place."""
        placed = self._producers.placed()
        if waiting := wanted - set(placed) - self._withheld:  # they would take what becomes free
            self._withheld |= waiting
            self._next = now + _SETTLE
            return
        trainers, free = self._cluster.trainers, free_nodes()
        numbers = give_up(free, placed, self._cluster)
        if numbers is None:
            missing = trainers.count - capacity(freed(free, [*placed.values()], self._cluster.producers), trainers)
            self._trainers.tell(
                f"{_waiting(missing, trainers)} for {count(missing, 'trainer')}; add nodes, or end other jobs"
            )
        elif numbers:
            self._withheld |= set(numbers)
            self._next = now + _SETTLE
            missing = trainers.count - capacity(free, trainers)
            say(f"{_waiting(missing, trainers)} for {count(missing, 'trainer')}: {named(numbers)} stopped meanwhile")

    def _give_back(self, now: float, wanted: set[int]) -> None:
        """Let producers start again for which there is room."""
        each = self._cluster.producers
        missing = sorted(wanted - set(self._producers.placed()))
        self._withheld &= wanted
        back = sorted(self._withheld)[: capacity(free_nodes(), each)] if self._withheld else []
        if back:
            self._withheld -= set(back)
            self._next = now + _SETTLE
            say(f"there is room again for {named(back)}")
        self._others.tell(f"{_waiting(len(missing), each)} for {named(missing)}" if missing else "")


class Reminder:
    """Prints a line about something that lasts, and again at intervals that double.

    Args:
        seconds: how long it has to last before the first line.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due: float | None = None
        self._interval = _REPEAT

    def tell(self, line: str) -> None:
        """Print the line if it is time; an empty one ends what lasts."""
        now = time.monotonic()
        if not line:
            self._due = None
            return
        if self._due is None:
            self._due, self._interval = now + self._seconds, _REPEAT
        if now >= self._due:
            say(line)
            self._due, self._interval = now + self._interval, 2 * self._interval


def _waiting(number: int, each: ProducerOptions | TrainerOptions) -> str:
    return f"waiting for {amount(number * each.cpus, number * each.gpus)}"
