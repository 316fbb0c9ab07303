"""Types of options: numbers with bounds, and dtypes.

A signature or a dataclass names the type (``batch_size: PositiveInt = 32``). jsonargparse then rejects values out of
range on the command line, in YAML files and in environment variables, and `specforge` reports them in one line. Python
callers pass ordinary numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

Dtype = Literal["float32", "bfloat16", "float16", "float64", "auto"]  # compute dtype of a target; auto: its files'


if TYPE_CHECKING:
    # One line each, because mypy treats chained assignments as a variable.
    PositiveInt = int
    NonNegativeInt = int
    Seed = int
    Port = int
    PositiveFloat = float
    NonNegativeFloat = float
    Seconds = float
    PositiveSeconds = float
    Share = float
    PositiveShare = float
    ShareBelowOne = float
    PresencePenalty = float
else:
    from jsonargparse.typing import restricted_number_type as _restricted

    def restricted_number_type(words, kind, bounds):
        """A restricted type whose values are plain numbers, because checkpoints cannot contain other classes."""
        made = _restricted(words, kind, bounds)
        checked = made.__new__
        made.__new__ = lambda cls, value: kind(checked(cls, value))
        return made

    # "> -1" instead of ">= 0": jsonargparse already defines that bound, under a less descriptive name.
    _FINITE, _LONG = ("<", float("inf")), ("<", 2**63)  # limits of databases and C
    PositiveInt = restricted_number_type("a whole number of at least 1", int, [(">=", 1), _LONG])
    NonNegativeInt = restricted_number_type("a whole number of at least 0", int, [(">", -1), _LONG])
    Seed = restricted_number_type("a whole number from 0 to 2^63 - 1", int, [(">=", 0), _LONG])
    Port = restricted_number_type("a port from 0 to 65535", int, [(">=", 0), ("<=", 65535)])
    PositiveFloat = restricted_number_type("a number above 0", float, [(">", 0), _FINITE])
    NonNegativeFloat = restricted_number_type("a number of at least 0", float, [(">=", 0), _FINITE])
    Seconds = restricted_number_type("a number of seconds from 0 to 1e9", float, [(">=", 0), ("<=", 1e9)])
    PositiveSeconds = restricted_number_type("a number of seconds above 0", float, [(">", 0), ("<=", 1e9)])
    Share = restricted_number_type("a number from 0 to 1", float, [(">=", 0), ("<=", 1), _FINITE])
    PositiveShare = restricted_number_type("a number above 0, at most 1", float, [(">", 0), ("<=", 1)])
    ShareBelowOne = restricted_number_type("a number of at least 0, below 1", float, [(">=", 0), ("<", 1)])
    PresencePenalty = restricted_number_type("a number from -2 to 2", float, [(">=", -2), ("<=", 2)])
