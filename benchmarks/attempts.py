"""Results of a benchmark that prints each when it is known, continues after a failure, and ends in time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import ROOT
from specforge.errors import UserError

SHOWN = 3  # lines of a failed command's output
WIDTH = 120  # characters of a reason in a table


class Failed(Exception):
    """A command that failed; the message says how."""


class Attempts:
    """The configurations of one call.

    Args:
        limit: seconds after which nothing is started, and what still runs is killed.

    Attributes:
        rows: the results so far.
    """

    def __init__(self, limit: float) -> None:
        self._end = time.monotonic() + limit
        self.rows: list[dict[str, Any]] = []

    def attempt(self, name: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Do some work and print its result as a line of JSON, or why it failed.

        Args:
            name: what is measured, the first entries of the line.
            work: returns the others.
        """
        try:
            row = {**name, **work()}
        except (Failed, UserError, OSError, torch.OutOfMemoryError) as error:
            row = {**name, "failed": str(error)}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        return row

    def failed(self) -> bool:
        """Whether a configuration failed."""
        return any("failed" in row for row in self.rows)

    def command(self, *words: object, env: Mapping[str, str] | None = None) -> str:
        """Run a Python module in a process group of its own, which ends with it.

        Args:
            words: module and arguments.
            env: changes of the environment.

        Returns:
            What it printed.

        Raises:
            Failed: it failed, or did not end in time.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise Failed("not started, because the time was over")
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, **(env or {})}
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
            try:
                status: int | None = process.wait(left)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            text = output.read()
        if status != 0:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            how = f"exit status {status}" if status is not None else "killed, because the time was over"
            raise Failed(": ".join([how, " | ".join(lines[-SHOWN:])]))
        return text

    def specforge(self, *words: object, **env: str) -> str:
        """Run a SpecForge command; ``env`` changes the environment."""
        return self.command("specforge.cli.main", *words, env=env)

    def finish(self, columns: Sequence[str], path: Path | None) -> int:
        """Print the results as a table, write them, and return the exit status: 1 if something failed."""
        print(table(self.rows, columns), flush=True)
        if path:
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            about = {"device": device, "devices": torch.cuda.device_count(), "torch": torch.__version__}
            path.write_text(json.dumps({**about, "rows": self.rows}, indent=1) + "\n")
        return int(self.failed())


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as a table in Markdown; a failed one has the beginning of its reason in the last column."""

    def cell(row: Mapping[str, Any], name: str) -> str:
        value = row.get(name, row.get("failed", "")[:WIDTH] if name == columns[-1] else "")
        return f"{value:.5g}" if isinstance(value, float) else str(value)

    lines = [[cell(row, name) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(columns), ["---"] * len(columns), *lines])
