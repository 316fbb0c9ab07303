"""`specforge` in processes of its own, forked from one that has imported it: imports take longer than a tiny run.

Everything after the imports is as in a process that a user starts: its arguments, environment, signals and exit.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

SPECFORGE = str(Path(sys.executable).with_name("specforge"))
_started: list[subprocess.Popen] = []
_VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
_SERVE = "import sys; from tests.processes import serve; sys.exit(serve(int(sys.argv[1])))"


class Command:
    """A process that runs `specforge`; like :class:`subprocess.Popen`.

    Args:
        words: what follows `specforge` on its command line.
        environment: variables that differ from those of this process.
        call: the ``module:function`` that the process calls with these words.
        output: descriptor of a file for what it prints (default: ``stdout`` reads it).
        apart: what it prints on stderr is read from ``stderr``.
    """

    def __init__(
        self,
        *words: object,
        environment: dict[str, str] | None = None,
        call: str = "specforge.cli.main:main",
        output: int | None = None,
        apart: bool = False,
    ) -> None:
        self.args = [*map(str, words)]
        mine = {**os.environ, **_VARIABLES, **(environment or {})}
        request = {"words": self.args, "environment": mine, "folder": os.getcwd(), "call": call}
        (out, to_out), (err, to_err), (self._numbers, to_numbers) = os.pipe(), os.pipe(), os.pipe()
        first = to_out if output is None else output
        files = [first, to_err if apart else first, to_numbers]
        socket.send_fds(_server(), [json.dumps(request).encode()], files)
        for file in (to_out, to_err, to_numbers):
            os.close(file)
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)
        self.pid = _read(self._numbers)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended."""
        if self.returncode is None:
            ready = select.poll()  # unlike `select`, for descriptors beyond 1023 as well
            ready.register(self._numbers, select.POLLIN)
            if not ready.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = _read(self._numbers)
            os.close(self._numbers)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it prints until it has ended."""
        found: dict[int, str] = {}
        files = (self.stdout, self.stderr)
        readers = [threading.Thread(target=lambda i=i: found.update({i: files[i].read()}), daemon=True) for i in (0, 1)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout)
        if len(found) < 2:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        for file in files:
            file.close()
        self.wait(timeout)
        return found[0], found[1]

    def send_signal(self, number: int) -> None:
        """Nothing if it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _read(file: int) -> int:
    found = os.read(file, 4)
    assert len(found) == 4, "the process that forks has ended"
    return int.from_bytes(found, "little", signed=True)


def _write(file: int, number: int) -> None:
    os.write(file, number.to_bytes(4, "little", signed=True))


@cache
def _server() -> socket.socket:
    """Where to send requests to the process that forks, which ends with this one."""
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other:
        _started.append(
            subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=Path(__file__).parents[1],
                env={**os.environ, **_VARIABLES},
            )
        )
    return mine


def serve(number: int) -> int:
    """Fork for each request, in whose process this returns its exit status."""
    from transformers import LlamaForCausalLM  # noqa: F401

    import specforge.cli.fit
    import specforge.inference.producer
    import specforge.inference.target_server  # noqa: F401

    gc.collect()
    gc.freeze()  # otherwise the end of a fork touches, and so copies, everything
    requests = socket.socket(fileno=number)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            return 0
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _run(json.loads(message), *files)
        for file in files:
            os.close(file)


def _run(request: dict[str, Any], out: int, err: int, numbers: int) -> int:
    """Report the identity and the exit status of a fork, which does what is asked."""
    pid = os.fork()
    if pid:
        os.close(out)
        os.close(err)
        _write(numbers, pid)
        _, status = os.waitpid(pid, 0)
        _write(numbers, os.waitstatus_to_exitcode(status))
        os._exit(0)
    os.close(numbers)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = [SPECFORGE, *request["words"]]
    module, _, function = request["call"].partition(":")
    call: Callable[[list[str]], int] = getattr(import_module(module), function)
    return call(request["words"])
