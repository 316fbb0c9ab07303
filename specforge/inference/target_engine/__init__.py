"""Engines that run the frozen target, with a common interface; each is imported on first use.

An option ``engine`` is an engine whose target and dtype are still open: a class, or ``functools.partial`` of one with
its options. jsonargparse makes it from ``class_path`` and ``init_args``, and :data:`ENGINES` gives the built-in classes
short names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from specforge.errors import UserError
from specforge.inference.target_engine.base import TargetEngine
from specforge.inference.target_files import TargetFiles
from specforge.system import pick_device

if TYPE_CHECKING:
    from specforge.inference.target_engine.hf import HFTargetEngine
    from specforge.inference.target_engine.http import HTTPTargetEngine

Engine = Callable[[TargetFiles, str], TargetEngine]

# The class of each engine by its short name, which is also the name of its module in this package.
ENGINES = {
    "hf": "HFTargetEngine",
    "vllm": "VLLMTargetEngine",
    "sglang": "SGLangTargetEngine",
    "http": "HTTPTargetEngine",
}

__all__ = [
    "ENGINES",
    "Engine",
    "HFTargetEngine",
    "HTTPTargetEngine",
    "TargetEngine",
    "engine_class",
    "engine_config",
    "engine_options",
    "engine_path",
    "engine_summary",
    "on_device",
]


def __getattr__(name: str) -> Any:
    for module, cls in ENGINES.items():
        if name == cls:
            return getattr(import_module(f"{__name__}.{module}"), cls)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def engine_path(name: str) -> str:
    """The class path of an engine.

    Args:
        name: a short name, the name of a built-in class, or a class path, which is returned unchanged.

    Raises:
        UserError: there is no such engine.
    """
    cls = ENGINES.get(name, name)
    if "." not in name and cls not in ENGINES.values():
        raise UserError(f"engine {name}: use one of {', '.join(ENGINES)}, or the class path of your own engine")
    return f"{__name__}.{cls}" if "." not in name else name


def engine_config(engine: Engine) -> dict[str, Any]:
    """``class_path`` and ``init_args`` of an engine, as ``--engine`` takes them.

    Raises:
        UserError: it is neither a class nor ``functools.partial`` of one.
    """
    cls, options = _parts(engine)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": options}


def engine_class(engine: Engine) -> type[TargetEngine]:
    """The class of an engine.

    Raises:
        UserError: it is neither a class nor ``functools.partial`` of one.
    """
    return _parts(engine)[0]


def engine_options() -> list[str]:
    """Names of the options of all built-in engines, such as ``engine.url``."""
    classes = [getattr(import_module(f"{__name__}.{module}"), cls) for module, cls in ENGINES.items()]
    names = {name for cls in classes for name in inspect.signature(cls).parameters}
    return sorted(f"engine.{name}" for name in names - {"target", "dtype"})


def engine_summary(engine: Engine) -> str:
    """An engine as messages name it: short name or class, and the options that differ from their defaults."""
    cls, options = _parts(engine)
    short = {name: module for module, name in ENGINES.items()}
    name = short.get(cls.__name__, cls.__name__) if cls.__module__.startswith(__name__) else cls.__name__
    defaults = {key: parameter.default for key, parameter in inspect.signature(cls).parameters.items()}
    given = ", ".join(f"{key} {value}" for key, value in options.items() if value != defaults.get(key))
    return f"{name} ({given})" if given else name


def on_device(engine: Engine, device: str, auto: str = "auto") -> Engine:
    """An engine whose options are checked, on the device that a command was given, unless its own options name one.

    Args:
        engine: the engine.
        device: cpu, cuda, cuda:N, or ``auto``.
        auto: what ``auto`` stands for.

    Raises:
        UserError: this machine has no such device, the engine does not run in this process, or an option of it cannot
            be used.
    """
    cls, options = _parts(engine)
    cls.check_options(options)
    if "device" not in inspect.signature(cls).parameters:
        if device != "auto":
            raise UserError(f"device {device}: {cls.__name__} does not run in this process; leave the device out")
        return engine
    bound: Any = engine
    return engine if options.get("device") else partial(bound, device=pick_device(auto if device == "auto" else device))


def _parts(engine: Any) -> tuple[type[TargetEngine], dict[str, Any]]:
    """The class of an engine, and its options."""
    options: dict[str, Any] = {}
    while isinstance(engine, partial):
        options = engine.keywords | options
        # jsonargparse's partial calls a function of its own with the class as the last argument.
        engine = engine.args[-1] if engine.args else engine.func
    if not isinstance(engine, type):
        raise UserError(f"engine {engine!r}: must be a class, or functools.partial of a class and its options")
    return engine, options
