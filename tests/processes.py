"""`specforge` in processes of its own, forked from one that has imported it: imports take longer than a tiny run.

Everything after the imports is as in a process that a user starts: its arguments, environment, signals and exit.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from tests import forks

SPECFORGE = str(Path(sys.executable).with_name("specforge"))
_VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
_PRELOADED = Path(__file__).with_name("preloaded.py")
_PYTHON = """#!/bin/sh
case "$*" in
{specforge}" "*) shift; exec {fork} "$@" ;;
"-P -m specforge.cli.main "*) shift 3; exec {fork} "$@" ;;
*) exec {real} "$@" ;;
esac
"""


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
        (out, to_out), (err, to_err) = os.pipe(), os.pipe()
        first = to_out if output is None else output
        with open(os.devnull) as nothing:
            files = [nothing.fileno(), first, to_err if apart else first]
            self._process = forks.start(_PRELOADED, [call, *self.args], mine, files)
        os.close(to_out)
        os.close(to_err)
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)
        self.pid = forks.read(self._process)
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
            ready.register(self._process, select.POLLIN)
            if not ready.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = forks.read(self._process)
            self._process.close()
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


def python() -> str:
    """A Python interpreter whose processes of `specforge`, and no others, are forks as well."""
    return str(Path(os.environ[forks.FOLDER]) / "python")


def make_python() -> None:
    """Write that interpreter's file, once in a session."""
    fork = shlex.join([sys.executable, "-I", forks.__file__, str(_PRELOADED), "specforge.cli.main:main"])
    text = _PYTHON.format(real=shlex.quote(sys.executable), specforge=shlex.quote(SPECFORGE), fork=fork)
    Path(python()).write_text(text)
    Path(python()).chmod(0o755)
