"""Run a command: a typed function whose parameters, and the fields of its option dataclasses, are the command line."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, NamedTuple, get_type_hints

import jsonargparse

from specforge.cli.arguments import environment_help, expand
from specforge.cli.errors import explain
from specforge.cli.help_format import HelpFormatter
from specforge.errors import UserError
from specforge.system import keep_freed_memory, say_on_sigterm


class CommandLine(NamedTuple):
    """The parser of a command, and where its values go.

    Attributes:
        parser: accepts every parameter and every field as a top-level option.
        names: the function's plain parameters.
        groups: the function's dataclass parameters: the class, and the names of its fields.
        hints: type of every option.
    """

    parser: jsonargparse.ArgumentParser
    names: list[str]
    groups: dict[str, tuple[type, list[str]]]
    hints: dict[str, Any]


def command_line(name: str, function: Callable[..., Any]) -> CommandLine:
    """The parser of a function; a parameter whose type is a dataclass contributes that class's fields."""
    hints = {key: hint for key, hint in get_type_hints(function).items() if key != "return"}
    classes = {key: hint for key, hint in hints.items() if is_dataclass(hint) and isinstance(hint, type)}
    parser = jsonargparse.ArgumentParser(
        prog=f"specforge {name}",
        exit_on_error=False,
        description=(inspect.getdoc(function) or "").split("\n\nArgs:", 1)[0],
        epilog=environment_help(name),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with these options")
    names = parser.add_function_arguments(function, as_group=False, skip=set(classes))
    groups = {key: (cls, parser.add_class_arguments(cls)) for key, cls in classes.items()}
    for key, cls in classes.items():
        hints |= get_type_hints(cls)
        del hints[key]
    return CommandLine(parser, names, groups, hints)


def run(name: str, function: Callable[..., Any], words: list[str]) -> int:
    """Parse the words after a command's name and call its function; returns the exit status.

    A first word that is not an option is the value of the function's first parameter.

    Raises:
        UserError: an option is unknown or its value is not accepted.
    """
    line = command_line(name, function)
    if line.names and words and not words[0].startswith("-"):
        words = [f"--{line.names[0]}={words[0]}", *words[1:]]
    try:
        options = line.parser.parse_args(_join_lists(expand(name, words), line.hints))
    except (jsonargparse.ArgumentError, KeyError) as error:
        raise UserError(explain(str(error), [*line.hints, *_engine_options(line)])) from error
    keep_freed_memory()
    options = line.parser.instantiate(options)
    values = {key: options[key] for key in line.names}
    values |= {key: cls(**{field: options[field] for field in fields}) for key, (cls, fields) in line.groups.items()}
    with say_on_sigterm():
        return int(function(**values) or 0)


def _engine_options(line: CommandLine) -> list[str]:
    """Options of engines, where a command has one."""
    if "engine" not in line.hints:
        return []
    from specforge.inference.target_engine import engine_options  # imports torch

    return engine_options()


def _join_lists(words: list[str], hints: dict[str, Any]) -> list[str]:
    """Join the values of each option that takes a list: ``--data a b`` becomes ``--data ["a", "b"]``."""
    lists = {f"--{key}" for key, hint in hints.items() if "list[" in str(hint)}
    joined: list[str] = []
    values: dict[str, list[str]] = {}
    option = None
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            option = name if name in lists else None
            if option and option not in values:
                values[option] = []
                joined.append(option)  # its values are inserted here
        if not option:
            joined.append(word)
        elif not word.startswith("-"):
            values[option].append(word)
        elif equals:
            values[option].append(value)
    for option, given in values.items():
        if given and given != ["null"] and not any(value.startswith("[") for value in given):
            given = [json.dumps(given)]
        place = joined.index(option) + 1
        joined[place:place] = given[-1:]
    return joined
