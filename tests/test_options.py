"""Bounds of numeric options: refused where they are parsed, in one line that says what may be given."""

from __future__ import annotations

import jsonargparse
import pytest

from specforge.options import (
    NonNegativeFloat,
    NonNegativeInt,
    Port,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Share,
)
from specforge.training import explain

KINDS = {
    "count": (PositiveInt, ("0", "-1", "2.5", "x", "nan"), ("1", "64")),
    "seed": (NonNegativeInt, ("-1", "1e3"), ("0", "7")),
    "port": (Port, ("-1", "65536"), ("0", "65535")),
    "rate": (PositiveFloat, ("0", "-1", "nan", "inf", "x"), ("1e-9", "3")),
    "wait": (NonNegativeFloat, ("-0.1", "nan", "inf"), ("0", "2.5")),
    "share": (Share, ("-0.1", "1.1", "nan"), ("0", "1")),
    "water": (PositiveShare, ("0", "1.5"), ("0.1", "1")),
}


def _parser(kind: type) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    parser.add_argument("--maybe", type=kind | None)  # type: ignore[operator]
    return parser


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("option", ["value", "maybe"])
def test_out_of_range_is_one_line_that_says_what_may_be_given(name: str, option: str) -> None:
    kind, bad, good = KINDS[name]
    parser = _parser(kind)
    for text in bad:
        with pytest.raises(jsonargparse.ArgumentError) as caught:
            parser.parse_args([f"--{option}={text}"])
        said = explain(str(caught.value), [])
        assert said == f"{option}: must be {kind.__name__}, not {text}"
    for text in good:
        assert float(parser.parse_args([f"--{option}={text}"])[option]) == float(text)
