"""What SGLang needs to run on a CPU in tests, and its server from outside."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import forks

READY = "Uvicorn running on"  # SGLang's own "fired up" comes before it listens
LAUNCH, DRAFTS = ((forks.__file__, str(Path(__file__).with_name(name))) for name in ("launch.py", "drafts.py"))
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


def load(python: str, log: Path, target: Path, *jobs: str) -> None:
    """Load drafts (``load.py``); ``log`` keeps what is said."""
    with log.open("w") as file:
        command = [python, *DRAFTS, "load", target, *jobs]
        subprocess.run([str(word) for word in command], env=environment(), stdout=file, stderr=file, check=False)
    assert all(Path(job.rpartition(":")[2]).exists() for job in jobs), log.read_text()[-4000:]


@contextmanager
def serve(python: str, log: Path, *options: object, program: Sequence[str] = LAUNCH) -> Iterator[Server]:
    """Start a server and wait until it is ready; ``log`` keeps what it says."""
    port = free_port()
    command = [python, *program, *OPTIONS, "--port", port, *options]
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
