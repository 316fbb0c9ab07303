"""One rank of several that train one run after the other: `python -m tests.ranks JOBS`, the rank in LOCAL_RANK.

Starting processes takes longer than a tiny run, so all runs share them. JOBS is a JSON file of ``[name, words]``.
"""

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

END = "finished "


def train_on_ranks(jobs: dict[str, list[str]], ranks: int, timeout: float) -> None:
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
            "OMP_NUM_THREADS": "1",
        }
        outputs = [Path(folder) / str(rank) for rank in range(ranks)]
        processes = []
        for rank, output in enumerate(outputs):
            with output.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.ranks", str(path)],
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, **shared, "LOCAL_RANK": str(rank)},
                    )
                )
        deadline = time.monotonic() + timeout
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


def run(path: Path) -> None:
    """What a rank does."""
    specforge.callbacks.report.write_report = str  # its pictures take longer than a tiny run
    for name, words in json.loads(path.read_text()):
        print(f"starting {name}", flush=True)
        assert main(["fit", *words]) == 0, name
        print(f"{END}{name}", flush=True)


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # not waiting for the others, as leaving the process group would
