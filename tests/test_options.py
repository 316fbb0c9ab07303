"""Bounds of numeric options: refused where they are parsed, in one line that says what may be given."""

from __future__ import annotations

from importlib import import_module
from typing import get_args, get_type_hints

import jsonargparse
import pytest

from datamodules import DisaggregatedDataModule, OfflineDataModule, OnlineDataModule
from specforge.cli.command import command_line
from specforge.cli.errors import explain
from specforge.cli.main import COMMANDS, main
from specforge.options import (
    NonNegativeFloat,
    NonNegativeInt,
    Port,
    PositiveFloat,
    PositiveInt,
    PositiveSeconds,
    PositiveShare,
    PresencePenalty,
    Seconds,
    Seed,
    Share,
)

KINDS = {
    "count": (PositiveInt, ("0", "-1", "2.5", "x", "nan", "9" * 19), ("1", "64")),
    "limit": (NonNegativeInt, ("-1", "1e3"), ("0", "7")),
    "seed": (Seed, ("-1", "9223372036854775808"), ("0", "9223372036854775807")),
    "pause": (Seconds, ("-1", "nan", "inf", "1e300"), ("0", "1e9")),
    "lease": (PositiveSeconds, ("0", "-1", "1e10"), ("1e-3", "60")),
    "port": (Port, ("-1", "65536"), ("0", "65535")),
    "rate": (PositiveFloat, ("0", "-1", "nan", "inf", "x"), ("1e-9", "3")),
    "wait": (NonNegativeFloat, ("-0.1", "nan", "inf"), ("0", "2.5")),
    "share": (Share, ("-0.1", "1.1", "nan"), ("0", "1")),
    "penalty": (PresencePenalty, ("-2.1", "3", "inf", "nan"), ("-2", "0.5")),
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


def _numbers(hints: dict[str, object]) -> dict[str, object]:
    """The options that are numbers without bounds."""
    parts = {
        name: [hint, *get_args(hint), *(y for x in get_args(hint) for y in get_args(x))] for name, hint in hints.items()
    }
    return {name: hints[name] for name, found in parts.items() if int in found or float in found}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("fit", "validate")])
def test_every_number_that_a_command_takes_has_its_bounds(name) -> None:
    module, function = COMMANDS[name][0].split(":")
    hints = command_line(name, getattr(import_module(module), function)).hints
    assert hints or name == "doctor"
    assert not _numbers(hints)


@pytest.mark.parametrize("module", [OfflineDataModule, OnlineDataModule, DisaggregatedDataModule])
def test_every_number_that_data_takes_has_its_bounds(module) -> None:
    assert not _numbers({name: hint for name, hint in get_type_hints(module.__init__).items() if name != "return"})


@pytest.mark.parametrize(
    "words",
    [
        "produce --target t --store s --metadata m --workers 0",
        "produce --target t --store s --metadata m --max_tries 99999999999999999999",
        "status --store s --metadata m --seconds -1",
        "status --store s --metadata m --seconds 1e300",
        "target serve --target t --port 65536",
        "store up --size 0",
        "store up --protocol pigeon",
        "capture --target t --prompts p --output o --layer_ids [-1]",
        "evaluate --draft d --prompts p --gamma 0",
        "regenerate --data d --target t --output o --top_p 0",
        "prepare --data d --target t --output o --holdout -3",
    ],
)
def test_a_number_out_of_range_is_one_line(tmp_path, monkeypatch, capsys, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ": must be a" in line or "pigeon" in line
    assert not list(tmp_path.iterdir())
