"""`specforge launch`: starts the processes of a run on a Ray cluster, watches them, and ends them."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private.services import canonicalize_bootstrap_address_or_die  # nothing public tells what `auto` means
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from specforge.cli.produce import stopped_by_signals
from specforge.cli.status import ClusterRun
from specforge.cluster.board import NAMESPACE, Board
from specforge.cluster.head import Head
from specforge.cluster.launch import Launch
from specforge.cluster.metadata import RedisActor
from specforge.cluster.metrics import MetricsServer, RunMetrics
from specforge.cluster.options import MADE
from specforge.cluster.plan import Node, count, describe, place
from specforge.cluster.producers import Producers
from specforge.cluster.room import Room
from specforge.cluster.scaling import Scaling
from specforge.cluster.store import MooncakeStore
from specforge.console import console, say
from specforge.errors import UserError
from specforge.files import first_line
from specforge.inference.target_server import make_token
from specforge.logs import identify, is_structured, write
from specforge.runtime.addresses import is_there, open_backend, open_metadata, shown
from specforge.runtime.control_plane.claim import live_trainer
from specforge.system import cores

_ANSWER = 5.0  # seconds in which a cluster has to answer
_POLL = 0.25  # seconds between two looks at the processes
_NEWS = 5.0  # seconds between two notes for `specforge status`
_PATIENCE = 120.0  # seconds in which the trainers save and stop; then they are killed
_OBJECTS = 100 << 20  # bytes of Ray's object store, which a run hardly uses
# How Ray is to behave, unless the user has set it.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning; SpecForge hides GPUs itself
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it would print every line twice
}


def plan(launch: Launch) -> list[str]:
    """What :func:`run` would start where, in lines; starts nothing.

    Raises:
        UserError: the processes do not fit into the cluster, which does not answer, or the model is rejected.
    """
    if launch.cluster.address is None:
        nodes = [_this_machine()]
    else:
        with _connected(launch.cluster.address):
            nodes = _nodes()
    _check_stores(launch)
    metadata = launch.producer.metadata
    metadata = "Redis, which starts and ends with the run" if metadata == MADE else shown(metadata)
    store = launch.cluster.store_bytes
    features = f"a Mooncake store in {store:,} bytes of each node's memory" if store else shown(launch.producer.store)
    where = {"features": features, "metadata": metadata}
    return describe(launch.cluster, nodes, yaml.safe_load(launch.recipe), where)


def scale(launch: Launch, producers: int) -> int:
    """Change the number of producers of a run that is going on.

    Raises:
        UserError: there is no such run, or so many producers do not fit.
    """
    with _connected(launch.cluster.address or "auto"):
        wanted = replace(launch.cluster, producers=replace(launch.cluster.producers, count=producers))
        place(_nodes(), wanted)
        try:
            board = ray.get_actor(launch.name, namespace=NAMESPACE)
        except ValueError as error:
            raise UserError(f"no run {launch.name} in this cluster; set cluster.name, or cluster.address") from error
        before = ray.get(board.scale.remote(producers))
    say(f"{launch.name}: {count(producers, 'producer')} instead of {before}")
    return 0


def run(launch: Launch) -> int:
    """Run producers and trainers until the training ends.

    Returns:
        The exit status: 143 after a signal, else 0.

    Raises:
        UserError: the run cannot be started or has failed.
    """
    identify(launch.name)
    _check_stores(launch)
    if launch.cluster.address is None:
        place([_this_machine()], launch.cluster)
    with ExitStack() as stack:
        stack.enter_context(_connected(launch.cluster.address))
        _check(launch)
        launch, store = _with_store(launch, stack)
        launch, redis = _with_redis(launch, stack)
        board = _make_board(launch)
        stack.callback(ray.kill, board)
        return _Run(launch, board, redis, store, stack).watch()


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Be a driver in a cluster, or start Ray on this machine."""
    if ray.is_initialized():
        yield
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
    try:
        if address is None:
            here = _this_machine()
            ray.init(
                "local",
                num_cpus=int(here.cpus),
                num_gpus=int(here.gpus),
                include_dashboard=False,
                object_store_memory=_OBJECTS,
                **quiet,
            )
        else:
            ray.init(resolve(address), **quiet)
    except UserError:
        raise
    except Exception as error:  # Ray raises no class of its own, such as when its processes start too slowly
        ray.shutdown()
        which = "Ray cannot be started here" if address is None else f"cluster.address {address}: cannot be used"
        asks = (
            address is not None and "RAY_AUTH_MODE" not in os.environ and (Path.home() / ".ray" / "auth_token").exists()
        )
        hint = "; ~/.ray/auth_token exists, so the cluster may ask for it: set RAY_AUTH_MODE=token" * asks
        raise UserError(f"{which} ({first_line(error)}){hint}") from error
    try:
        yield
    finally:
        ray.shutdown()


def resolve(address: str) -> str:
    """The ``host:port`` of a cluster that answers; Ray itself would try for minutes.

    Raises:
        UserError: no cluster answers.
    """
    try:
        found = canonicalize_bootstrap_address_or_die(address)
        host, _, port = found.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), _ANSWER):
            return str(found)
    except (OSError, ValueError) as error:
        reason = f"no Ray cluster answers ({first_line(error)}); start one with `ray start --head`"
        raise UserError(f"cluster.address {address}: {reason}") from error


def _this_machine() -> Node:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Node("this machine", cores(), gpus)


def _nodes() -> list[Node]:
    """The nodes of the cluster."""
    return [
        Node(
            f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}",
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _check(launch: Launch) -> None:
    """Refuse a run that does not fit, or has the name of another one."""
    place(_nodes(), launch.cluster)
    try:
        ray.get_actor(launch.name, namespace=NAMESPACE)
    except ValueError:
        return
    raise UserError(f"cluster.name: a run named {launch.name} is going on in this cluster; give this one another name")


def _check_stores(launch: Launch) -> None:
    """Refuse stores that do not answer, or that another run uses; creates nothing."""
    store, address = launch.producer.store, launch.producer.metadata
    if store != MADE and is_there(store):
        open_backend(store, create=False)
    if address == MADE or not is_there(address):
        return
    metadata = open_metadata(address, create=False)
    other = live_trainer(metadata, time.time())
    metadata.close()
    if other:
        raise UserError(f"metadata {shown(address)}: {other} is using it; give this run its own stores")


def _with_redis(launch: Launch, stack: ExitStack) -> tuple[Launch, RedisActor | None]:
    """The run with the address of its metadata; starts Redis if the run names none and may have several nodes."""
    if launch.producer.metadata != MADE:
        return launch, None
    redis = RedisActor(Path(launch.run) / "redis", ray.util.get_node_ip_address())
    stack.callback(redis.end)
    return launch.at(metadata=redis.address), redis


def _with_store(launch: Launch, stack: ExitStack) -> tuple[Launch, MooncakeStore | None]:
    """The run with the address of its store; starts a Mooncake store if the run asks for one."""
    cluster = launch.cluster
    if cluster.store_bytes is None:
        return launch, None
    here = ray.util.get_node_ip_address()
    store = MooncakeStore(launch.name, here, cluster.store_bytes, cluster.store_owners, launch.max_bytes)
    stack.callback(store.end)
    return launch.at(store=store.address), store


def _make_board(launch: Launch) -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Board).options(name=launch.name, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=here)
    return actor.remote(launch.cluster.producers.count)


@contextmanager
def _ray_output(path: Path) -> Iterator[None]:
    """Write what Ray prints in this process, such as the log of a node that died, into a file; ours is printed."""
    terminal = sys.stdout
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file, redirect_stdout(file):
        console.file = terminal
        try:
            yield
        finally:
            console.file = None  # type: ignore[assignment]


class _Run:
    """The processes of a run."""

    def __init__(
        self, launch: Launch, board: Any, redis: RedisActor | None, store: MooncakeStore | None, stack: ExitStack
    ) -> None:
        from specforge.cluster.trainers import Trainers  # imports Lightning

        self._launch, self._board, self._redis, self._store = launch, board, redis, store
        self._files = Path(launch.run).absolute() / "ray"
        self._trainers = Trainers(launch, board, self._files)
        self._producers = Producers(launch.name, launch.cluster, launch.producer, board, launch.folder)
        self._room = Room(launch.cluster, self._producers)
        produced, each = launch.producer, launch.cluster.producers
        self._scaling = Scaling(produced.store, produced.metadata, each.count, each.max_count or each.count)
        stack.callback(self._scaling.close)
        self._head = Head(ray.get_runtime_context().gcs_address, self._save)
        stack.callback(self._head.close)
        self._refusal, self._noted, self._trainer_restarts = "", 0.0, 0
        self._metrics = self._open_metrics()
        if self._metrics is not None:
            stack.callback(self._metrics.close)

    def _open_metrics(self) -> MetricsServer | None:
        port, run = self._launch.cluster.metrics_port, Path(self._launch.run)
        if port is None:
            return None
        where = self._launch.producer
        metrics = RunMetrics(run, where.store, where.metadata, self._launch.max_bytes, self._counts)
        return MetricsServer(port, make_token(run / "metrics-token"), metrics)

    def _counts(self) -> tuple[int, int, int]:
        """What the metrics tell of the processes."""
        return *self._producers.counts(), self._trainer_restarts

    def watch(self) -> int:
        """Start everything, keep it running until the training ends, and end it; returns the exit status."""
        stop = threading.Event()
        cluster = self._launch.cluster
        say(
            f"{self._launch.name}: starting {count(cluster.producers.count, 'producer')} and "
            f"{count(cluster.trainers.count, 'trainer')} on {count(len(_nodes()), 'node')}; metadata in "
            f"{shown(self._launch.producer.metadata)}"
        )
        self._head.start()
        try:
            with _ray_output(Path(self._launch.run) / "ray.log"), stopped_by_signals(stop.set):
                try:
                    self._trainers.start()
                    self._keep_until_trained(stop)
                finally:
                    self._end()
        except RayError as error:
            self._head.join_if_lost()
            raise UserError(f"Ray failed ({first_line(error)}); resume with --ckpt_path last") from error
        if self._refusal:
            raise UserError(self._refusal)
        if self._trainers.error is not None:
            self._head.join_if_lost()
            raise UserError(self._trainers.failure()) from self._trainers.error
        return 143 if stop.is_set() else 0

    def _keep_until_trained(self, stop: threading.Event) -> None:
        while self._trainers.is_alive() and not stop.is_set():
            least = self._show()
            self._note()
            if self._metrics is not None:
                self._metrics.alive()
            self._keep_redis()
            if self._store is not None and self._head.answers:
                self._store.keep()
            if not self._refusal and self._head.answers:
                wanted = self._scaling.wanted(least, self._room.fits_another)
                self._producers.keep(self._room.allow(wanted))
            self._trainers.join(_POLL)
        if stop.is_set():
            say(f"{self._launch.name}: stopping; the trainers save, then the producers finish")

    def _keep_redis(self) -> None:
        if self._redis is None or not self._head.answers:
            return
        try:
            if self._redis.keep():
                say("the Redis server died and was started again, with its data")
        except UserError:
            self._redis = None  # it would not start the next time either
            raise

    def _note(self, ended: bool = False) -> None:
        """Tell `specforge status` what runs where, every few seconds."""
        now = time.time()
        if now - self._noted < _NEWS and not ended:
            return
        self._noted, launch, processes = now, self._launch, []
        if not ended:
            nodes = ray.get(self._board.nodes.remote())
            states = self._producers.states()
            states |= {f"trainer {rank}": "running" for rank in range(launch.cluster.trainers.count)}
            processes = [[x, nodes.get(x, ""), states[x] if x in nodes else "starting"] for x in states]
        store, metadata = (_absolute(launch, x) for x in (launch.producer.store, launch.producer.metadata))
        ClusterRun(launch.name, store, metadata, processes, now).save(Path(launch.run))

    def _show(self) -> int:
        """Print what the processes say; returns the wanted number of producers."""
        lines, producers, self._refusal, self._trainer_restarts = ray.get(self._board.read.remote())
        for name, level, text in lines:
            if is_structured():
                role, _, rank = name.rpartition(" ")
                write(level, text, role=role, rank=int(rank))
            else:
                say("\n".join(f"{name} | {line}" for line in text.split("\n")))
        return producers

    def _save(self, seconds: float) -> None:
        """Have the trainers save and the producers return their prompts; works without the head of the cluster."""
        deadline = time.monotonic() + seconds
        self._board.stop.remote()
        with suppress(UserError):
            metadata = open_metadata(self._launch.producer.metadata, create=False)
            while live_trainer(metadata, time.time()) and time.monotonic() < deadline:
                time.sleep(_POLL)
        self._producers.stop(max(0.0, deadline - time.monotonic()))

    def _end(self) -> None:
        """Let the trainers save, then the producers finish."""
        ray.get(self._board.stop.remote())
        deadline = time.monotonic() + _PATIENCE
        while self._trainers.is_alive() and time.monotonic() < deadline:
            self._show()
            with suppress(UserError):  # the run may end because of it
                self._keep_redis()
            self._trainers.join(_POLL)
        if self._trainers.is_alive():
            say(f"the trainers have not stopped for {_PATIENCE:.0f} s and are killed; resume with --ckpt_path last")
        self._producers.end()
        self._show()
        self._note(ended=True)
        shutil.rmtree(self._files, ignore_errors=True)


def _absolute(launch: Launch, address: str) -> str:
    """An address that does not depend on the current folder."""
    return address if "://" in address else str(Path(launch.folder) / Path(address).expanduser())
