"""The exception whose message is for the user: printed as one line, without a stack trace."""

from __future__ import annotations


class UserError(Exception):
    """Input from the user cannot be used; the message says what, where, and what to do."""


def mistake_behind(error: BaseException | None) -> UserError | None:
    """The user's mistake that an error was explicitly raised from, if any.

    An error that merely occurs while a mistake is being handled is a bug, and keeps its stack trace.
    """
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def escaped(text: str) -> str:
    """Text that is safe to print: control characters, which foreign files may contain, are written as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def option(name: str, value: str) -> str:
    """How a user sets an option of a target's engine, in `fit` and in the other commands."""
    return f"set --{name} {value} (in `fit`: --data.{name})"
