"""Limits on users' YAML: a small file that expands to a huge value, or is nested too deep, is rejected unread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from specforge.cli.engines import engines_in_yaml
from specforge.errors import UserError

_MAX_VALUES, _MAX_DEPTH = 100_000, 50


def limit_yaml(argv: Sequence[str]) -> None:
    """Check the configuration files of a command line, and every YAML value that is parsed later.

    Raises:
        UserError: a file cannot be read, is not YAML, or exceeds the limits.
    """
    for option, value in zip(argv, [*argv[1:], ""], strict=False):
        flag, equals, given = option.partition("=")
        if flag in ("--config", "-c"):
            _check_file(Path(given if equals else value))
    load = jsonargparse.get_loader("yaml")
    if load.__name__ == "limited":
        return

    def limited(text: str) -> Any:
        _check_yaml(text)
        return engines_in_yaml(load(text))

    jsonargparse.set_loader("yaml", limited, (yaml.YAMLError,))


def _check_file(path: Path) -> None:
    try:
        _check_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or getattr(error, "reason", "")
        raise UserError(f"--config {path}{line}: not valid YAML ({problem})") from error
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from error


def _check_yaml(text: str) -> None:
    """Count the values that a text expands to, without building them."""
    sizes: dict[str, int] = {}  # number of values by anchor
    parents: list[str | None] = [None]  # anchors of the open collections
    counts = [0]  # number of values in each open collection
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if counts[-1] > _MAX_VALUES or len(counts) > _MAX_DEPTH:
            raise UserError(
                f"the YAML expands to more than {_MAX_VALUES:,} values, or is nested more than {_MAX_DEPTH} levels deep"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            parents.append(event.anchor)
            counts.append(1)
            continue
        if isinstance(event, yaml.AliasEvent):
            anchor, size = None, sizes.get(event.anchor, 1)
            if event.anchor in parents:
                raise UserError(f"the YAML's anchor {event.anchor} contains itself")
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = parents.pop(), counts.pop()
        else:
            continue
        counts[-1] += size
        if anchor is not None:
            sizes[anchor] = size
