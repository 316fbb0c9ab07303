"""Ranks that train one run after the other: starting processes takes longer than a tiny run, so all runs share them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from lightning.fabric.plugins.environments.lightning import find_free_network_port

import specforge.callbacks.report
from specforge.cli.main import main
from tests.processes import Command

END = "finished "
PATIENCE = 600  # seconds that all jobs may take; ranks that take longer wait for each other


def train_on_ranks(jobs: dict[str, list[str]], ranks: int) -> None:
    """Run `specforge fit` with the words of each job, in order, on ranks that stay.

    Raises:
        AssertionError: a rank failed, or they wait for each other; says in which job, and what the ranks printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jobs.json"
        path.write_text(json.dumps(list(jobs.items())))
        shared = {
            "NODE_RANK": "0",
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(find_free_network_port()),
        }
        outputs = [Path(folder) / str(rank) for rank in range(ranks)]
        processes = []
        for rank, output in enumerate(outputs):
            with output.open("w") as file:
                environment = {**shared, "LOCAL_RANK": str(rank)}
                processes.append(Command(path, environment=environment, call="tests.ranks:run", output=file.fileno()))
        deadline = time.monotonic() + PATIENCE
        try:
            for process in processes:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass  # the one that is killed below has failed
        finally:
            for process in processes:
                process.kill()
                process.wait()
        texts = [output.read_text() for output in outputs]
    failed = any(process.returncode for process in processes)
    done = min(text.count(END) for text in texts)
    tail = "\n".join(f"--- rank {rank}\n{text[-6000:]}" for rank, text in enumerate(texts))
    assert not failed, f"in {[*jobs, 'nothing'][done]}:\n{tail}"


def run(words: list[str]) -> int:
    """What a rank does with the name of the file of jobs."""
    specforge.callbacks.report.write_report = str  # its pictures take longer than a tiny run
    try:
        for name, options in json.loads(Path(words[0]).read_text()):
            print(f"starting {name}", flush=True)
            assert main(["fit", *options]) == 0, name
            print(f"{END}{name}", flush=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # not waiting for the others, as leaving the process group would
    return 0
