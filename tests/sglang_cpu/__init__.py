"""What SGLang needs to run on a CPU in tests, and its server from outside."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

READY = "Uvicorn running on"  # SGLang's own "fired up" comes before it listens
LAUNCH = (str(Path(__file__).parent / "launch.py"),)  # instead of ``-m sglang.launch_server``
CAPTURE = [  # for servers that only read prompts
    "--device",
    "cpu",
    "--attention-backend",
    "intel_amx",
    "--disable-cuda-graph",
    "--disable-overlap-schedule",
    "--max-total-tokens",
    "2048",
    "--max-running-requests",
    "4",
    "--mem-fraction-static",
    "0.3",
    "--skip-server-warmup",
    "--sleep-on-idle",
]
OPTIONS = [*CAPTURE, "--dtype", "float32", "--chunked-prefill-size", "-1", "--disable-radix-cache"]


def environment() -> dict[str, str]:
    """Variables for SGLang's processes: one thread, nothing compiled, none of this environment's modules."""
    mine = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **mine}


class Server:
    """A running server.

    Args:
        port: where it listens.
    """

    def __init__(self, port: int) -> None:
        self.port = port

    def answer(self, prompt: Sequence[int], max_new_tokens: int, end_ids: Sequence[int]) -> dict[str, Any]:
        """Greedy ``output_ids``, and ``meta_info``, of one prompt."""
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "stop_token_ids": list(end_ids)}
        body = json.dumps({"input_ids": list(prompt), "sampling_params": sampling}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/generate", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Forks:
    """Runs SGLang from one import of it, for one draft after another (``fork.py``).

    Args:
        process: which reads commands.
        log: keeps what is said.
    """

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._log.open("w") as file:
            for line in self._process.stdout:
                file.write(line)
                file.flush()
                self._lines.put(line)
        self._lines.put("")

    def _start(self, *words: object) -> int:
        """Run a command; returns its process group."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        self._process.stdin.flush()
        return int(self._wait("process group").split()[2])

    def _wait(self, *words: str) -> str:
        """The next line that contains one of these."""
        while line := self._lines.get(timeout=300):
            if any(word in line for word in words):
                return line
        raise AssertionError(self._log.read_text()[-4000:])

    @contextmanager
    def serve(self, *options: object) -> Iterator[Server]:
        """Start a server and wait until it is ready."""
        port = free_port()
        group = self._start(*OPTIONS, "--port", port, *options)
        line, end = "", f"process group {group} ended"
        try:
            line = self._wait(READY, end)
            assert READY in line, self._log.read_text()[-4000:]
            yield Server(port)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            if READY in line:
                self._wait(end)

    def load(self, target: Path, *jobs: str) -> None:
        """Load drafts (``load.py``)."""
        group = self._start("load", target, *jobs)
        self._wait(f"process group {group} ended")
        assert all(Path(job.rpartition(":")[2]).exists() for job in jobs), self._log.read_text()[-4000:]


@contextmanager
def forks(python: str, log: Path) -> Iterator[Forks]:
    """Import SGLang; ``log`` keeps what it says."""
    process = subprocess.Popen(
        [python, Path(__file__).parent / "fork.py"],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield Forks(process, log)
    finally:
        process.kill()
        process.wait()


@contextmanager
def serve(python: str, log: Path, *options: object) -> Iterator[Server]:
    """Start a server and wait until it is ready; ``log`` keeps what it says."""
    port = free_port()
    command = [python, *LAUNCH, *OPTIONS, "--port", port, *options]
    process = subprocess.Popen(
        [str(word) for word in command],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        with log.open("w") as file:
            for line in process.stdout:
                file.write(line)
                if READY in line:
                    break
        assert READY in line, log.read_text()[-4000:]
        drain = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
        try:
            yield Server(port)
        finally:
            drain.kill()
            drain.wait()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
