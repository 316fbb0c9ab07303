"""Structured logs: with ``SPECFORGE_LOG=json``, every line that a command prints is a JSON object."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from typing import Any, TextIO

from specforge.errors import UserError

_VARIABLE, _FORMS = "SPECFORGE_LOG", ("plain", "json")
_ROLES = {"fit": "trainer", "produce": "producer", "launch": "driver"}  # of commands; of others their name
_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # variables that tell a trainer its rank

Send = Callable[[str, str], object]  # takes a level and a line


class _Log:
    """Where this process writes JSON lines, and who it is."""

    output: TextIO | None = None
    who: dict[str, Any] = {}  # noqa: RUF012 - one for the process


class Lines(io.TextIOBase):
    """A text stream that hands each line on.

    Args:
        send: takes a level and a line.
        level: level of the lines.
        file: the stream that it stands for, if it has one.
    """

    def __init__(self, send: Send, level: str, file: TextIO | None = None) -> None:
        self._send, self._level, self._file, self._rest = send, level, file, ""

    def writable(self) -> bool:
        """Yes."""
        return True

    def fileno(self) -> int:
        """That of the stream that it stands for; a child process that inherits it writes its own lines."""
        return super().fileno() if self._file is None else self._file.fileno()

    def write(self, text: str) -> int:
        """Send the complete lines."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._send(self._level, line)
        return len(text)

    def finish(self) -> None:
        """Send what has no end of line."""
        if self._rest:
            self.write("\n")


class Records(logging.Handler):
    """Hands log messages on, with their level."""

    def __init__(self, send: Send) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send a message."""
        self._send(record.levelname.lower(), self.format(record))


def check_form() -> None:
    """Raise UserError if the environment asks for a form of logs that does not exist."""
    form = os.environ.get(_VARIABLE, _FORMS[0])
    if form not in _FORMS:
        raise UserError(f"{_VARIABLE}: must be {' or '.join(_FORMS)}, not {form!r}")


@contextmanager
def structured(command: str) -> Iterator[None]:
    """Within the block, print JSON lines if the environment asks for them."""
    if os.environ.get(_VARIABLE) != "json":
        yield
        return
    ranks = [os.environ[name] for name in _RANKS if os.environ.get(name, "").isdecimal()]
    rank = int([*ranks, "0"][0]) if command == "fit" else None
    _Log.output, _Log.who = sys.stdout, {"run": None, "role": _ROLES.get(command, command), "rank": rank}
    handler = Records(write)
    logging.root.addHandler(handler)
    logging.captureWarnings(True)
    out, err = Lines(write, "info", sys.stdout), Lines(write, "error", sys.stderr)
    try:
        with redirect_stdout(out), redirect_stderr(err):  # type: ignore[type-var]
            yield
        out.finish()
        err.finish()
    except Exception:
        write("error", traceback.format_exc().rstrip())
        sys.exit(1)
    finally:
        logging.captureWarnings(False)
        logging.root.removeHandler(handler)
        _Log.output = None


def identify(run: str) -> None:
    """Name the run in the lines that follow."""
    _Log.who = _Log.who | {"run": run}


def is_structured() -> bool:
    """Whether this process prints JSON lines."""
    return _Log.output is not None


def write(level: str, message: str, **who: object) -> None:
    """Print a JSON line.

    Args:
        level: such as info, warning or error.
        message: text, of any number of lines.
        **who: ``role`` and ``rank``, if another process has said it.
    """
    assert _Log.output is not None
    _Log.output.write(_line(level, message, who))
    _Log.output.flush()


def write_last(message: str) -> None:
    """Print a line, JSON if asked for, from a handler of a signal that ends the process: nothing is buffered."""
    if _Log.output is None:
        os.write(2, f"specforge: {message}\n".encode())
    else:
        os.write(_Log.output.fileno(), _line("error", f"specforge: {message}", {}).encode())


def _line(level: str, message: str, who: Mapping[str, object]) -> str:
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, "level": level, **_Log.who, **who, "message": message}) + "\n"
