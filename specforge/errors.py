"""The one exception whose message is for the user: printed as one line, without a stack trace."""


class UserError(Exception):
    """Something the user gave cannot be used; the message says what, where, and what to do."""


def mistake_behind(error: BaseException | None) -> UserError | None:
    """The user's mistake that led to an error; jsonargparse wraps what a class raises when it is built."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
