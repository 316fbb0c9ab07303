"""A Redis server for a run that names no metadata store: in an actor, with its data in the run's folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from specforge.errors import UserError, mistake_behind
from specforge.inference.target_server import make_token
from specforge.packages import install_hint, installed
from specforge.system import end_with_parent

_START = 20.0  # seconds
_ANSWER = 5.0  # seconds in which an actor that runs answers
_GONE = 10.0  # seconds in which the actor of a run that was killed dies too


class RedisServer:
    """Redis on this host, reachable from the cluster's nodes with a password.

    Args:
        folder: its data and its password; must be visible on all nodes.
        host: address of this host in the cluster.
        port: where it listens; a free one by default.
    """

    def __init__(self, folder: Path, host: str, port: int | None = None) -> None:
        self._folder, self._host, self._port = folder.absolute(), host, port or _free_port()
        self._lock = FileLock(self._folder / "lock")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """What data.metadata takes."""
        return f"redis://{self._host}:{self._port}/0?password_file={self._folder / 'password'}"

    def keep(self) -> bool:
        """Start the server if it does not run; returns whether it had died.

        Raises:
            UserError: it does not start, or the server of another run has this folder.
        """
        if self._process is None:
            self._take_folder()
            self._process = self._start()
            self._wait()
            return False
        if self._process.poll() is None:
            return False
        self._process = self._start()
        self._wait()
        return True

    def end(self) -> None:
        """Stop the server; its data stays."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._lock.release()

    def _take_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=_GONE)
        except Timeout as error:
            raise UserError(f"{self._folder}: the Redis server of another run keeps its data here") from error
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be used ({error.strerror})") from error
        make_token(self._folder / "password")

    def _start(self) -> subprocess.Popen[bytes]:
        options = {
            "bind": " ".join(dict.fromkeys(["127.0.0.1", self._host])),
            "port": self._port,
            "dir": self._folder,
            "logfile": self._folder / "log",
            "appendonly": "yes",
            "appendfsync": "always",
            "save": '""',
            "requirepass": self._password(),
        }
        config = "".join(f"{name} {value}\n" for name, value in options.items())
        process = subprocess.Popen(
            ["redis-server", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=end_with_parent(os.getpid()),
            start_new_session=True,  # Ctrl-C is for the run, which stops it last
        )
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(config.encode())
        return process

    def _password(self) -> str:
        return (self._folder / "password").read_text().strip()

    def _wait(self) -> None:
        """Return once the server answers; it takes connections before it has read its data, which may be damaged."""
        from redis import BusyLoadingError, Redis, RedisError

        assert self._process is not None
        client = Redis(self._host, self._port, password=self._password(), socket_timeout=1.0)
        deadline = time.monotonic() + _START
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                client.ping()
                client.close()
                return
            except BusyLoadingError:
                deadline = time.monotonic() + _START  # it is reading its data
            except RedisError:
                pass
            time.sleep(0.05)
        self._process.kill()
        raise UserError(f"data.metadata: redis-server does not start; see {self._folder / 'log'}")


class RedisActor:
    """A :class:`RedisServer` in an actor on the driver's node; both are started again, with their data, when they die.

    Args:
        folder: as of the server.
        host: address of the driver's host in the cluster.

    Attributes:
        address: what data.metadata takes.

    Raises:
        UserError: Redis is not installed here, or as of the server.
    """

    def __init__(self, folder: Path, host: str) -> None:
        why = "redis-server is not installed here" if shutil.which("redis-server") is None else ""
        why = why or ("" if installed("redis") else f"its client is not installed: {install_hint('redis')}")
        if why:
            raise UserError(
                f"data.metadata: a run on a Ray cluster keeps its metadata in Redis, but {why}; or give the address of "
                "a server"
            )
        self._arguments = folder, host, _free_port()
        self.address = RedisServer(*self._arguments).address
        self._actor = self._start()
        self.keep(None)

    def keep(self, seconds: float | None = _ANSWER) -> bool:
        """Start what has died again, and wait for that; returns whether anything had died.

        Raises:
            UserError: the server does not start.
        """
        try:
            return bool(ray.get(self._actor.keep.remote(), timeout=seconds))
        except (ActorUnavailableError, GetTimeoutError):
            return False  # it is not known yet whether it has died
        except ActorDiedError:
            self._actor = self._start()
            return True
        except RayTaskError as error:
            if (mistake := mistake_behind(error.cause)) is None:
                raise
            raise mistake from error

    def end(self) -> None:
        """Stop the server; its data stays."""
        with suppress(RayError):
            ray.get(self._actor.end.remote(), timeout=_GONE)
        ray.kill(self._actor)

    def _start(self) -> Any:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return ray.remote(RedisServer).options(num_cpus=0, scheduling_strategy=here).remote(*self._arguments)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
