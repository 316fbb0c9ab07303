"""A Redis server for a run that names no metadata store: a child of the driver, with its data in the run's folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from filelock import FileLock, Timeout

from specforge.errors import UserError
from specforge.inference.target_server import make_token
from specforge.packages import install_hint, installed
from specforge.system import end_with_parent

_START = 20.0  # seconds


class RedisServer:
    """Redis on this host, reachable from the cluster's nodes with a password.

    Args:
        folder: its data and its password; must be visible on all nodes.
        host: address of this host in the cluster.

    Raises:
        UserError: Redis is not installed, or does not start.
    """

    def __init__(self, folder: Path, host: str) -> None:
        if shutil.which("redis-server") is None or installed("redis") is None:
            raise UserError(
                "data.metadata: a run on several nodes keeps its metadata in Redis, which is not installed here "
                f"(redis-server, and {install_hint('redis')}); or give the address of a server"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{folder}: the Redis server of another run keeps its data here") from error
        self._folder, self._host, self._port = folder.absolute(), host, _free_port()
        self._secret = folder / "password"
        make_token(self._secret)
        self._process = self._start()
        self._wait()

    @property
    def address(self) -> str:
        """What data.metadata takes."""
        return f"redis://{self._host}:{self._port}/0?password_file={self._secret.absolute()}"

    def keep(self) -> bool:
        """Start the server again, with its data, if it has died; returns whether it had."""
        if self._process.poll() is None:
            return False
        self._process = self._start()
        return True

    def end(self) -> None:
        """Stop the server; its data stays."""
        self._process.terminate()
        self._process.wait()
        self._lock.release()

    def _start(self) -> subprocess.Popen[bytes]:
        options = {
            "bind": " ".join(dict.fromkeys(["127.0.0.1", self._host])),
            "port": self._port,
            "dir": self._folder,
            "logfile": self._folder / "log",
            "appendonly": "yes",
            "appendfsync": "always",
            "save": '""',
            "requirepass": self._secret.read_text().strip(),
        }
        config = "".join(f"{name} {value}\n" for name, value in options.items())
        process = subprocess.Popen(
            ["redis-server", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=end_with_parent(os.getpid()),
            start_new_session=True,  # Ctrl-C is for the driver, which stops it last
        )
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(config.encode())
        return process

    def _wait(self) -> None:
        deadline = time.monotonic() + _START
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with socket.create_connection((self._host, self._port), 1.0):
                    return
            except OSError:
                time.sleep(0.05)
        self._process.kill()
        raise UserError(f"data.metadata: redis-server does not start; see {self._folder / 'log'}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
