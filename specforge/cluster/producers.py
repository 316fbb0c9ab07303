"""The producers of a run: one actor each, started again when it dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from specforge.cli.produce import ProduceOptions, run_producers
from specforge.cluster.board import NAMESPACE, join
from specforge.cluster.nodes import all_nodes, trainer_nodes
from specforge.cluster.options import BESIDE_TRAINERS, ClusterOptions
from specforge.cluster.plan import beside, left, named
from specforge.console import say
from specforge.errors import UserError, mistake_behind
from specforge.files import first_line
from specforge.inference.target_engine import on_device

_PATIENCE = 60.0  # seconds for which a producer waits for room beside a trainer; its process may just be starting
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

    def node(self) -> str:
        """Identity of the node on which it runs."""
        return str(ray.get_runtime_context().get_node_id())

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
        finally:
            ray.get(self._place[0].stops.remote())  # the board has all lines by then
        return ""

    def stop(self) -> None:
        """Finish the current prompt and return the others."""
        self._stop.set()


@dataclass
class _Running:
    """A producer."""

    actor: Any
    place: Any  # reference of what `node` returns
    result: Any  # reference of what `run` returns
    meant: str  # the node for which it is meant, if for one
    node: str = ""  # once it has one
    stops: float | None = None  # when it was told to stop
    since: float = field(default_factory=time.monotonic)


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
        self._elsewhere: set[int] = set()  # producers that waited in vain for room beside a trainer

    def counts(self) -> tuple[int, int]:
        """Number of producers, and how often one was started again."""
        return len(self._running), sum(self._failures.values())

    def states(self) -> dict[str, str]:
        """Whether each producer goes on or stops, by name."""
        return {
            f"producer {n}": "stopping" if x.stops is not None else "running" for n, x in sorted(self._running.items())
        }

    def placed(self) -> dict[int, str]:
        """The node of each producer that has one and is to go on, by number."""
        return {number: x.node for number, x in self._running.items() if x.node and x.stops is None}

    def stopping(self) -> bool:
        """Whether a producer was told to stop and has not ended yet."""
        return any(running.stops is not None for running in self._running.values())

    def keep(self, wanted: Collection[int]) -> None:
        """Start, stop and replace producers so that those with these numbers run.

        Raises:
            UserError: one of them failed too often.
        """
        for number, running in list(self._running.items()):
            if not running.node and ray.wait([running.place], timeout=0)[0]:
                running.node = _node(running.place)
            self._give_up_meant(number, running)
            if number not in wanted and running.stops is None:
                self._stop(running)
            late = running.stops is not None and time.monotonic() - running.stops > _END
            if late or (running.stops is not None and not running.node):
                ray.kill(running.actor)  # it has leased nothing, or its leases expire
            if ray.wait([running.result], timeout=0)[0]:
                self._ended(number, running)
        missing = sorted(set(wanted) - self._running.keys())
        if missing and self._cluster.placement == BESIDE_TRAINERS:
            self._start_beside(missing, trainer_nodes())
        else:
            for number in missing:
                self._start(number)

    def _start_beside(self, numbers: Collection[int], trainers: list[str] | None) -> None:
        """Start producers next to the trainers as long as there is room, once these have their places."""
        if trainers is None:
            return
        nodes, without = all_nodes(), []
        for number in numbers:
            taken = [x.node or x.meant for x in self._running.values()]
            node = beside(left(nodes, trainers, taken, self._cluster), trainers, self._cluster.producers)
            if node is None:
                without.append(number)
            self._start(number, None if number in self._elsewhere else node)
        if without:
            say(f"nodes with trainers have no room for {named(without)}; any node will do")

    def _give_up_meant(self, number: int, running: _Running) -> None:
        """Stop a producer that waits for room beside a trainer that something else has; it starts elsewhere."""
        if running.node:
            self._elsewhere.discard(number)
        elif running.meant and running.stops is None and time.monotonic() - running.since > _PATIENCE:
            say(f"producer {number} has waited {_PATIENCE:.0f} s for room beside a trainer; it starts on any node")
            self._elsewhere.add(number)
            self._stop(running)

    def _stop(self, running: _Running) -> None:
        running.stops = time.monotonic()
        running.actor.stop.remote()

    def _start(self, number: int, node: str | None = None) -> None:
        anywhere = "SPREAD" if self._cluster.placement == "spread" else "DEFAULT"
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
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True) if node else anywhere,
            )
            .remote(self._board, f"producer {number}", self._folder, each.gpus)
        )
        place = actor.node.remote()
        result = actor.run.remote(replace(self._options, name=name))
        self._running[number] = _Running(actor, place, result, node or "")

    def _ended(self, number: int, running: _Running) -> None:
        del self._running[number]
        reason = _reason(running.result)
        ray.kill(running.actor)
        if running.stops is not None:
            return
        self._failures[number] = failures = self._failures.get(number, 0) + 1
        if failures > self._cluster.max_failures:
            raise UserError(f"producer {number} failed {failures} times, the last time because: {reason}")
        say(f"producer {number} ended ({reason}); it is started again")

    def stop(self, seconds: float) -> None:
        """Have all producers finish their prompts and return the others, and wait for them for this long."""
        running = list(self._running.values())
        for each in running:
            self._stop(each)
        if running:
            ray.wait([each.result for each in running], num_returns=len(running), timeout=seconds)

    def end(self) -> None:
        """Stop all producers; kill those that do not."""
        self.stop(_END)
        for running in self._running.values():
            ray.kill(running.actor)
        self._running = {}


def _node(place: Any) -> str:
    """The node of a producer; empty if it has died."""
    try:
        return str(ray.get(place))
    except RayError:
        return ""


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
