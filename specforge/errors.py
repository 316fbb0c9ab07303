"""The one exception whose message is for the user: printed as one line, without a stack trace."""

from __future__ import annotations

import traceback


class UserError(Exception):
    """Something the user gave cannot be used; the message says what, where, and what to do."""


def mistake_behind(error: BaseException | None) -> UserError | None:
    """The user's mistake that an error was made of, if it was one.

    jsonargparse does so with what a class raises when it is built. What merely happens while a mistake is handled is a
    fault of ours, and keeps its stack trace.
    """
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or (error.__context__ if _is_of_parser(error) else None)
    return error


def _is_of_parser(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).split(".")[0] == "jsonargparse"


def escaped(text: str) -> str:
    """Text as a terminal may show it: control characters, which files of others may hold, written out."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
