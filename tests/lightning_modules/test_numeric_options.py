"""Numeric options of every algorithm and of the optimizer are refused out of their bounds, where they are parsed."""

from __future__ import annotations

import typing

import jsonargparse
import pytest
import torch

import lightning_modules
from lightning_modules.optimizers import OptimizerOptions, build_optimizer
from specforge import options
from specforge.errors import UserError

TYPES = {kind for name, kind in vars(options).items() if isinstance(kind, type) and name[0].isupper()}
# A value that each type refuses, whatever its bounds.
BAD = {int: ("-1", "0.5", "many"), float: ("-0.5", "nan", "much")}
# Any number is a seed.
FREE = {"anchor_seed"}


def numbers(kind: object) -> set[type]:
    """The numeric types in an annotation."""
    parts = typing.get_args(kind)
    if parts:
        return set().union(*map(numbers, parts)) if typing.get_origin(kind) is not typing.Literal else set()
    return {kind} if isinstance(kind, type) and issubclass(kind, int | float) and kind is not bool else set()


def annotations(cls: type) -> dict[str, object]:
    """The types of all parameters of a class and of its bases, whose options it inherits."""
    hints: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("lightning_modules"):
            hints |= typing.get_type_hints(base.__init__)
    return hints


OWNERS = [*lightning_modules.algorithms().items(), ("optimizer", OptimizerOptions)]


@pytest.mark.parametrize(("name", "cls"), OWNERS)
def test_a_number_out_of_bounds_is_refused_when_it_is_parsed(name, cls):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip={"target"} if name != "optimizer" else None)
    tried = 0
    offered = vars(parser.get_defaults())
    for option, kind in annotations(cls).items():
        found = numbers(kind) - {type(None)}
        if not found or option not in offered or option in FREE or "dict" in str(kind):
            continue
        assert found <= TYPES, f"{name}: {option} is {kind}, without bounds"
        (base,) = {int if issubclass(one, int) else float for one in found}
        for value in BAD[base]:
            text = f"[{value}, {value}]" if "tuple" in str(kind) or "list" in str(kind) else value
            with pytest.raises(jsonargparse.ArgumentError, match=option):
                parser.parse_args([f"--{option}={text}"])
            tried += 1
    assert tried >= 6


@pytest.mark.parametrize("field", ["name", "schedule"])
def test_an_unknown_optimizer_or_schedule_is_refused_by_name(field):
    with pytest.raises(UserError, match=f"optimizer: {field} is 'sgdd'; use "):
        build_optimizer(OptimizerOptions(**{field: "sgdd"}), torch.nn.Linear(2, 2), 10)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(OptimizerOptions)
    with pytest.raises(jsonargparse.ArgumentError, match=field):
        parser.parse_args([f"--{field}=sgdd"])


def test_parsed_numbers_are_plain_ints_and_floats_in_checkpoints():
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(OptimizerOptions)
    parsed = parser.parse_args(["--lr=0.1", "--betas=[0.5, 0.75]"])
    assert [type(x) for x in (parsed.lr, *parsed.betas)] == [float] * 3
