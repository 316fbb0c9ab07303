"""The producers of a run: one actor each, started again when it dies."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from specforge.cli.produce import ProduceOptions, run_producers
from specforge.cluster.board import NAMESPACE, join
from specforge.cluster.options import ClusterOptions
from specforge.console import say
from specforge.errors import UserError, mistake_behind
from specforge.files import first_line
from specforge.inference.target_engine import on_device

_END = 60.0  # seconds in which producers finish their prompt when the run ends


class ProducerActor:
    """`specforge produce` in an actor.

    Args:
        board: the run's board.
        name: its name in the output.
        folder: the folder in which the user started the run.
        gpus: number of GPUs that it was given.
    """

    def __init__(self, board: Any, name: str, folder: str, gpus: int) -> None:
        self._place = board, name, folder, gpus
        self._stop = threading.Event()

    def run(self, options: ProduceOptions) -> str:
        """Produce until :meth:`stop`; returns the user's mistake that ended it, if any."""
        try:
            join(*self._place)
            options = replace(options, engine=on_device(options.engine, options.device), device="auto")
            run_producers(options, self._stop)
        except Exception as error:
            mistake = mistake_behind(error)
            if mistake is None:
                raise
            return str(mistake)
        return ""

    def stop(self) -> None:
        """Finish the current prompt and return the others."""
        self._stop.set()


@dataclass
class _Running:
    """A producer."""

    actor: Any
    result: Any  # reference of what `run` returns
    stops: bool = False


class Producers:
    """Starts producers, keeps as many as are wanted, and ends them.

    Args:
        run: name of the run; that of a producer, under which it leases prompts, is this name and a number.
        cluster: how many producers there are, and what each needs.
        options: what each of them does.
        board: the run's board.
        folder: the folder in which the user started the run.
    """

    def __init__(self, run: str, cluster: ClusterOptions, options: ProduceOptions, board: Any, folder: str) -> None:
        self._run, self._cluster, self._options = run, cluster, options
        self._board, self._folder = board, folder
        self._running: dict[int, _Running] = {}
        self._failures: dict[int, int] = {}

    def counts(self) -> tuple[int, int]:
        """Number of producers, and how often one was started again."""
        return len(self._running), sum(self._failures.values())

    def states(self) -> dict[str, str]:
        """Whether each producer goes on or stops, by name."""
        return {f"producer {n}": "stopping" if x.stops else "running" for n, x in sorted(self._running.items())}

    def keep(self, count: int) -> None:
        """Start, stop and replace producers so that this many run.

        Raises:
            UserError: one of them failed too often.
        """
        for number, running in list(self._running.items()):
            if number >= count and not running.stops:
                running.stops = True
                running.actor.stop.remote()
            if ray.wait([running.result], timeout=0)[0]:
                self._ended(number, running)
        for number in range(count):
            if number not in self._running:
                self._start(number)

    def _start(self, number: int) -> None:
        each = self._cluster.producers
        name = f"{self._run}-producer-{number}"
        actor = (
            ray.remote(ProducerActor)
            .options(
                name=name,
                namespace=NAMESPACE,
                num_cpus=each.cpus,
                num_gpus=each.gpus,
                max_concurrency=2,  # `stop` while `run` runs
                scheduling_strategy="SPREAD" if self._cluster.placement == "spread" else "DEFAULT",
            )
            .remote(self._board, f"producer {number}", self._folder, each.gpus)
        )
        self._running[number] = _Running(actor, actor.run.remote(replace(self._options, name=name)))

    def _ended(self, number: int, running: _Running) -> None:
        del self._running[number]
        reason = _reason(running.result)
        ray.kill(running.actor)
        if running.stops:
            return
        self._failures[number] = failures = self._failures.get(number, 0) + 1
        if failures > self._cluster.max_failures:
            raise UserError(f"producer {number} failed {failures} times, the last time because: {reason}")
        say(f"producer {number} ended ({reason}); it is started again")

    def end(self) -> None:
        """Have all producers finish their prompts and return the others; kill those that do not."""
        for running in self._running.values():
            running.stops = True
            running.actor.stop.remote()
        deadline = time.monotonic() + _END
        for running in self._running.values():
            ray.wait([running.result], timeout=max(0.0, deadline - time.monotonic()))
            ray.kill(running.actor)
        self._running = {}


def _reason(result: Any) -> str:
    """Why a producer ended."""
    try:
        return ray.get(result) or "it stopped"
    except ActorUnavailableError:
        return "its node does not answer"
    except ActorDiedError:
        return "its process died"
    except RayError as error:
        return first_line(getattr(error, "cause", None) or error)
