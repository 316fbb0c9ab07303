"""One-line messages for what jsonargparse and Lightning reject.

The regular expressions below match other libraries' messages, and nothing else in the project does. Where none of them
matches, the user sees the library's own words.
"""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import product
from types import FrameType

# jsonargparse's messages.
_UNKNOWN_OPTION = (
    r"does not accept option '([\w.]+)'",
    r"Option '([\w.]+)' is not accepted",
    r"[Kk]ey '([\w.]+)' is not",
    r"[Uu]nrecognized arguments: --?([\w.]+)",
    r"No action for key \"?'?([\w.]+)",
)
# An unknown option of an engine: the message gives its name without the prefix.
_OF_ENGINE = r'Parser key "((?:\w+\.)*engine)":\s+(?:Type .*: )?Option '
_UNKNOWN_CLASS = r"Expected a dot import path string: (\w+)"
_REQUIRED = r"the following arguments are required: (\w+(?:\.\w+)*)"
_KEY = r'Parser key "([\w.]+)"'
_OUT_OF_RANGE = r"Not of type (an? .+?): "  # a type of specforge.options
_CALLABLE = r"Type collections\.abc\.Callable\[.*?\] expects a function or a callable class: "
_NOT_IMPORTED = r"^(No module named .*?|.* has no attribute .*?|cannot import name .*?)(?:\. Got value: (.*))?$"
_NOT_SUBCLASS = r"Expected '([\w.]+)' to be .*<class '(?:\w+\.)*(\w+)'>"
_GIVEN = r": (\S+) does not conform|with base 10: (\S+)|to float: (\S+)|Given value: ([^\s(]+)$"
_TYPES = {
    "list": "a list, such as [1, 2]",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "dict": "fields with values",
}

_OURS = ("specforge", "lightning_modules", "datamodules")
_LIGHTNING = ("lightning", "lightning_fabric", "lightning_utilities", "jsonargparse")
_ENTRY = "specforge.cli.fit"
# Our code that Lightning calls and that calls Lightning: an error raised through it is not an algorithm's.
_ADAPTERS = (
    _ENTRY,
    "specforge.callbacks.lightning_internals",
    "specforge.callbacks.loop",
    "specforge.callbacks.strategies",
)
# Options by the part of Lightning that raises.
_PACKAGES = {"loggers": "logger", "callbacks": "callbacks", "profilers": "profiler", "strategies": "strategy"}
_FUNCTIONS = {"seed_everything": "seed_everything", "_configure_timer_callback": "trainer.max_time"}


def explain(message: str, keys: Sequence[str], classes: Sequence[str] = ()) -> str:
    """The useful line of a parser's error, with the closest valid name where one is unknown.

    Args:
        message: the parser's message, of any number of lines.
        keys: names of all options.
        classes: names of the classes that an option may take.
    """
    message = re.sub(_CALLABLE, "", message)
    message = re.sub(r"\.* Got value: Namespace\(.*", "", message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for line, pattern in product(lines, _UNKNOWN_OPTION):
        if unknown := re.search(pattern, line):
            engine = re.search(_OF_ENGINE, message)
            return _unknown_engine_option(engine[1], unknown[1], keys) if engine else _unknown_option(unknown[1], keys)
    if found := re.search(_UNKNOWN_CLASS, message):
        close = get_close_matches(found[1], classes, 1, 0.5)
        return f"no class '{found[1]}'" + (f"; did you mean '{close[0]}'?" if close else "")
    named = [(i, m[1]) for i, line in enumerate(lines) if (m := re.search(_KEY, line))]
    if named:
        key = ".".join(name for _, name in named)
        if missing := re.search(_REQUIRED, message):
            return f"{key}.{missing[1]}: required; set it in the recipe or with --{key}.{missing[1]}"
        return _bad_value(key, lines[named[-1][0] + 1 :])[:400]
    return (re.sub(r"^error: ", "", lines[0]) if lines else "unknown error")[:400]


def _unknown_option(name: str, keys: Sequence[str]) -> str:
    if "recipe" in keys and name.split(".")[0] in ("seed_everything", "trainer", "model", "data"):
        return f"unknown option '{name}'; a training recipe is given with --recipe, not --config"
    last = name.rsplit(".", 1)[-1]
    close = get_close_matches(name, keys, 1, 0.75) or [
        key for key in keys if get_close_matches(last, [key.rsplit(".", 1)[-1]], 1, 0.7)
    ]
    hint = f"; did you mean '{close[0].replace('.init_args', '')}'?" if close else ""
    return f"unknown option '{name}'{hint}"


def _unknown_engine_option(engine: str, name: str, keys: Sequence[str]) -> str:
    """An option of an engine, whose message gives the option's name without the engine's."""
    names = {key.rsplit("engine.", 1)[1]: f"{engine}." for key in keys if "engine." in key}
    if name in names:
        return f"{engine}.{name}: this engine has no such option; --{engine}.help NAME lists those of an engine"
    names = {key: "" for key in keys if "." not in key} | names
    close = [name] if name in names else get_close_matches(name, names, 1, 0.65)
    hint = f"did you mean '{names[close[0]]}{close[0]}'?" if close else f"--{engine}.help NAME lists those of an engine"
    return f"unknown option '{engine}.{name}'; {hint}"


def _bad_value(key: str, lines: Sequence[str]) -> str:
    """What an option accepts, in words instead of Python's types."""
    bounds = next((m[1] for line in lines if (m := re.search(_OUT_OF_RANGE, line))), None)
    if bounds is not None:
        value = next((x.strip("'") for line in lines for x in (re.findall(_GIVEN, line) or [()])[0] if x), None)
        return f"{key}: must be {bounds}" + (f", not {value}" if value else "")
    for line in lines:
        if found := re.search(_NOT_IMPORTED, line):
            return f"{key}: {found[2] or 'the class'} cannot be imported ({found[1]})"
        if found := re.search(_NOT_SUBCLASS, line):
            return f"{key}: {found[1]} is not a {found[2]}"
    detail = next((line.lstrip("- ") for line in lines if "Expected" in line), "not valid")
    detail = re.sub(r"\. Got value: (.*)", r", not \1", detail)
    detail = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"must be one of \1", detail)
    expected = re.match(r"Expected an? <class '(\w+)'>", detail)
    if expected is not None and expected[1] in _TYPES:
        detail = f"must be {_TYPES[expected[1]]}{detail[expected.end() :]}"
    return f"{key}: {detail}"


def lightning_refusal(error: BaseException, keys: Iterable[str], set_up: bool) -> str | None:
    """The line for an error that Lightning raised because of a setting; None if it may be a bug.

    It is about a setting if a ``raise`` statement of Lightning is its origin, and no algorithm, callback or user code
    was called in between. Before training begins, ``raise`` statements of the libraries under Lightning count too.

    Args:
        error: what was raised.
        keys: names of the trainer's options.
        set_up: whether training had begun.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    *_, origin = traceback.extract_tb(error.__traceback__)
    names = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    entry = max((i for i, name in enumerate(names) if name == _ENTRY), default=len(names))
    inner, modules = frames[entry + 1 :], names[entry + 1 :]
    if not inner or any(_is_foreign(frame, name) for frame, name in zip(inner, modules, strict=True)):
        return None
    if not (origin.line or "").startswith("raise") and not isinstance(error, OSError):
        return None
    if set_up and modules[-1].split(".")[0] not in _LIGHTNING:
        return None
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    words = " ".join(str(message).split()) or type(error).__name__
    option = _option(words, inner, modules, sorted(keys, key=len, reverse=True))
    return f"{option}: {_reason(str(message)) or words}"[:600]


def _reason(message: str) -> str:
    """Of the reasons why a value fits none of an option's types, the first that is not about its type."""
    reasons = re.split(r"^\s*- ", message, flags=re.MULTILINE)[1:]
    return next((" ".join(reason.split()) for reason in reasons if not reason.startswith("Expected ")), "")


def _is_foreign(frame: FrameType, name: str) -> bool:
    """Whether a frame belongs to an algorithm, a callback of ours, or the user's code."""
    package = name.split(".")[0]
    if package in (*_OURS, *_LIGHTNING):
        return package in _OURS and name not in _ADAPTERS
    path = frame.f_code.co_filename
    return not path.startswith(("<", *(sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib"))))


def _option(words: str, frames: list[FrameType], modules: list[str], keys: list[str]) -> str:
    """The option that an error is about: the first that it names, or that of the part of Lightning that raised it."""
    for frame in reversed(frames):
        if frame.f_code.co_name in _FUNCTIONS:
            return _FUNCTIONS[frame.f_code.co_name]
    found = re.search(rf"\b({'|'.join(map(re.escape, keys))})\b", words)
    if found:
        return "--ckpt_path" if found[1] == "ckpt_path" else f"trainer.{found[1]}"
    packages = [_PACKAGES[part] for name in modules[::-1] for part in name.split(".") if part in _PACKAGES]
    return f"trainer.{packages[0]}" if packages else "trainer"
