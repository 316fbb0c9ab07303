"""One line for what the user set and another library refuses; and bounds for what the user's YAML may hold."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jsonargparse
import yaml

from specforge.errors import UserError

_OURS = ("specforge", "lightning_modules", "datamodules")
# Ours, but between Lightning and Lightning: what is raised through them was not called by an algorithm or callback.
_THROUGH = ("specforge.cli.fit", "specforge.callbacks.loop", "specforge.callbacks.strategies")
_LIGHTNING = ("lightning", "lightning_fabric", "lightning_utilities", "jsonargparse")
_ROOMS = {"loggers": "logger", "callbacks": "callbacks", "profilers": "profiler", "strategies": "strategy"}
_FUNCTIONS = {"seed_everything": "seed_everything", "_configure_timer_callback": "trainer.max_time"}
_YAML_VALUES, _YAML_DEPTH = 100_000, 50


def lightning_refusal(error: BaseException, keys: Iterable[str], set_up: bool) -> str | None:
    """The line for an error that Lightning raised over what the user set; None where it may be a fault of ours.

    It is the user's where a ``raise`` of Lightning's is its origin, and no code of ours, or the user's, was called in
    between. While everything is set up, the same goes for what the libraries under Lightning raise.

    Args:
        error: what was raised.
        keys: names of the trainer's options.
        set_up: whether training had begun.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    *_, origin = traceback.extract_tb(error.__traceback__)
    names = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    entry = max((i for i, name in enumerate(names) if name == _THROUGH[0]), default=len(names))
    inner, modules = frames[entry + 1 :], names[entry + 1 :]
    if not inner or any(_is_foreign(frame, name) for frame, name in zip(inner, modules, strict=True)):
        return None
    if not (origin.line or "").startswith("raise") and not isinstance(error, OSError):
        return None
    if set_up and modules[-1].split(".")[0] not in _LIGHTNING:
        return None
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    words = " ".join(str(message).split()) or type(error).__name__
    return f"{_key(words, inner, modules, sorted(keys, key=len, reverse=True))}: {_reason(str(message)) or words}"[:600]


def _reason(message: str) -> str:
    """The one of jsonargparse's reasons why a value is of none of the types it may have that is not about types."""
    reasons = re.split(r"^\s*- ", message, flags=re.MULTILINE)[1:]
    return next((" ".join(reason.split()) for reason in reasons if not reason.startswith("Expected ")), "")


def _is_foreign(frame: FrameType, name: str) -> bool:
    """Whether a frame is of an algorithm, a callback of ours, or the user's own code."""
    package = name.split(".")[0]
    if package in (*_OURS, *_LIGHTNING):
        return package in _OURS and name not in _THROUGH
    path = frame.f_code.co_filename
    return not path.startswith(("<", *(sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib"))))


def _key(words: str, frames: list[FrameType], modules: list[str], keys: list[str]) -> str:
    """The option that an error is about: the first that it names, or the part of Lightning that raised it."""
    for frame in reversed(frames):
        if frame.f_code.co_name in _FUNCTIONS:
            return _FUNCTIONS[frame.f_code.co_name]
    found = re.search(rf"\b({'|'.join(map(re.escape, keys))})\b", words)
    if found:
        return "--ckpt_path" if found[1] == "ckpt_path" else f"trainer.{found[1]}"
    rooms = [_ROOMS[part] for name in modules[::-1] for part in name.split(".") if part in _ROOMS]
    return f"trainer.{rooms[0]}" if rooms else "trainer"


def bound_yaml(argv: Sequence[str]) -> None:
    """Let every parser refuse YAML that is small and becomes huge, or is nested too deep, before it is built.

    Args:
        argv: a command line, whose configuration files are checked by name.

    Raises:
        UserError: one of them cannot be read, is no YAML, or too much.
    """
    for option, value in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, given = option.partition("=")
        if flag in ("--config", "-c"):
            _check_file(Path(given if equals else value))
    load = jsonargparse.get_loader("yaml")
    if load.__name__ == "bounded":
        return

    def bounded(text: str) -> Any:
        _check_yaml(text)
        return load(text)

    jsonargparse.set_loader("yaml", bounded, (yaml.YAMLError,))


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
    """Count the values that a text stands for, without building them."""
    sizes: dict[str, int] = {}  # of what has an anchor
    parents: list[str | None] = [None]  # anchors of the collections that are open
    counts = [0]  # of the values in each of them
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if counts[-1] > _YAML_VALUES or len(counts) > _YAML_DEPTH:
            raise UserError(
                f"the YAML stands for more than {_YAML_VALUES:,} values, or is nested more than {_YAML_DEPTH} deep"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            parents.append(event.anchor)
            counts.append(1)
            continue
        if isinstance(event, yaml.AliasEvent):
            anchor, size = None, sizes.get(event.anchor, 1)
            if event.anchor in parents:
                raise UserError(f"the YAML's anchor {event.anchor} holds itself")
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = parents.pop(), counts.pop()
        else:
            continue
        counts[-1] += size
        if anchor is not None:
            sizes[anchor] = size
