"""Types of numeric options: each holds its bounds, so that a value out of range is refused where it is parsed.

A command's or a module's signature names the type (``batch_size: PositiveInt = 32``); jsonargparse then refuses what is
out of range, on the command line, in a YAML file and in the environment alike, and `specforge` says it in one line.
Whoever calls the function from Python passes ordinary numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    PositiveInt = int
    NonNegativeInt = int
    Port = int
    PositiveFloat = float
    NonNegativeFloat = float
    Share = float
    PositiveShare = float
else:
    from jsonargparse.typing import restricted_number_type

    # jsonargparse has some of these bounds under names that say less, and takes a definition once; hence "> -1".
    _FINITE = ("<", float("inf"))
    PositiveInt = restricted_number_type("a whole number of at least 1", int, (">=", 1))
    NonNegativeInt = restricted_number_type("a whole number of at least 0", int, (">", -1))
    Port = restricted_number_type("a port from 0 to 65535", int, [(">=", 0), ("<=", 65535)])
    PositiveFloat = restricted_number_type("a number above 0", float, [(">", 0), _FINITE])
    NonNegativeFloat = restricted_number_type("a number of at least 0", float, [(">=", 0), _FINITE])
    Share = restricted_number_type("a number from 0 to 1", float, [(">=", 0), ("<=", 1), _FINITE])
    PositiveShare = restricted_number_type("a number above 0, at most 1", float, [(">", 0), ("<=", 1)])
