"""Short names of target engines, on the command line and in YAML: ``--engine vllm`` stands for a class path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_OPTION = re.compile(r"--(data\.(init_args\.)?|cluster\.producers\.)?engine(\.class_path|\.help)?")


def resolve_engines(words: Sequence[str]) -> list[str]:
    """The words of a command with the class paths of its engines.

    Raises:
        UserError: there is no such engine.
    """
    resolved: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        option, equals, value = word.partition("=")
        if equals and _OPTION.fullmatch(option):
            word = f"{option}={_resolve(value)}"
        elif _OPTION.fullmatch(before) and not word.startswith("-"):
            word = _resolve(word)
        resolved.append(word)
    return resolved


def engines_in_yaml(loaded: Any) -> Any:
    """What a YAML file or an option's value holds, with the class paths of its engines.

    Raises:
        UserError: there is no such engine.
    """
    if isinstance(loaded, dict):
        data = loaded.get("data")
        cluster = loaded.get("cluster")
        producers = cluster.get("producers") if isinstance(cluster, dict) else None
        for part in (loaded, data, data.get("init_args") if isinstance(data, dict) else None, producers):
            if isinstance(part, dict) and part.get("engine"):
                part["engine"] = _resolve(part["engine"])
    return loaded


def _resolve(value: Any) -> Any:
    from specforge.inference.target_engine import engine_path  # imports torch

    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        return {**value, "class_path": engine_path(value["class_path"])}
    return engine_path(value) if isinstance(value, str) and not value.startswith("{") else value
