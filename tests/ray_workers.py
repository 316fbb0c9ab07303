"""Workers of Ray in forks of a process that has imported what they need (``tests/forks.py``).

A node that has this file as its `worker_path` starts it for each worker; what is forked runs Ray's own.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

from tests import forks


def work(words: list[str]) -> int:
    """Be a worker, and say with which environment: the fork's own is that of the process it was forked from."""
    _environment(os.getpid()).write_text(json.dumps(dict(os.environ)))
    runpy.run_module("ray._private.workers.default_worker", run_name="__main__", alter_sys=True)
    return 0


def environment_of(worker: int) -> dict[str, str]:
    """The environment with which a process was started as a worker of Ray; OSError if it is none of these."""
    return json.loads(_environment(worker).read_text())


def _environment(worker: int) -> Path:
    return Path(os.environ[forks.FOLDER]) / f"environment-{worker}"


if __name__ == "__main__":
    program = Path(__file__).with_name("preloaded.py")
    sys.exit(forks.main(str(program), "tests.ray_workers:work", *sys.argv[1:]))
