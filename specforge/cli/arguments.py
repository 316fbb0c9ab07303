"""The words of a command as they are parsed: recipes found by name, and options from environment variables."""

from __future__ import annotations

import os
from collections.abc import Sequence

from specforge.cli.engines import resolve_engines
from specforge.cli.recipes import resolve_recipes
from specforge.cli.yaml_limits import limit_yaml

_CONFIG = ("--config", "-c")


def environment_prefix(name: str) -> str:
    """What the environment variables of a command begin with; two underscores where options have dots."""
    return f"SPECFORGE_{name.upper().replace(' ', '_')}" + ("__" if name in ("fit", "launch", "validate") else "_")


def environment_help(name: str) -> str:
    """How environment variables set a command's options, for its help."""
    prefix = environment_prefix(name)
    example = "TRAINER__MAX_STEPS=9 for --trainer.max_steps 9" if prefix.endswith("__") else "OPTION=x for --option x"
    return (
        f"Every option can also be set by an environment variable: {prefix}{example}. The command line takes "
        "precedence over environment variables, these over --config, and --config over the defaults."
    )


def expand(name: str, words: Sequence[str]) -> list[str]:
    """A command's words in order of increasing precedence: ``--config`` files, environment variables, command line.

    Raises:
        UserError: a configuration file does not exist, cannot be read, or exceeds the limits of YAML.
    """
    prefix = environment_prefix(name)
    found = {key.removeprefix(prefix): value for key, value in sorted(os.environ.items()) if key.startswith(prefix)}
    environment = [f"--{key.lower().replace('__', '.')}={value}" for key, value in found.items()]
    files: list[str] = []
    options: list[str] = []
    for word in [*environment, *words]:
        is_file = word.partition("=")[0] in _CONFIG or (files and files[-1] in _CONFIG)
        (files if is_file else options).append(word)
    expanded = resolve_recipes([*files, *resolve_engines(options)])
    limit_yaml(expanded)
    return expanded
