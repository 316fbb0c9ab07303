"""The one exception whose message is for the user: printed as one line, without a stack trace."""


class UserError(Exception):
    """Something the user gave cannot be used; the message says what, where, and what to do."""
