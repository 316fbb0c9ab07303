"""The `specforge` executable: a table of commands. Imports nothing heavy, so help is instant."""

from __future__ import annotations

import logging
import os
import sys
from difflib import get_close_matches
from importlib import import_module

from specforge import __version__
from specforge.cli.shadowing import check
from specforge.errors import UserError, escaped, mistake_behind

# Name: ("module:function", what it does). A function takes its own name and arguments and returns the exit status.
COMMANDS = {
    "target fetch": ("specforge.cli.commands:run", "Fetch a target model into a folder."),
    "target serve": ("specforge.cli.commands:run", "Serve a target's features over HTTP."),
    "store up": ("specforge.cli.commands:run", "Run a Mooncake store in this host's memory."),
    "prepare": ("specforge.cli.commands:run", "Turn conversations into token ids and loss masks."),
    "regenerate": ("specforge.cli.commands:run", "Let the target answer the prompts itself."),
    "capture": ("specforge.cli.commands:run", "Run the target over prompts and keep its hidden states."),
    "produce": ("specforge.cli.commands:run", "Make features for a trainer in another process."),
    "status": ("specforge.cli.commands:run", "Say how a disaggregated run is doing."),
    "fit": ("specforge.cli.fit:main", "Train a draft (LightningCLI)."),
    "validate": ("specforge.cli.fit:main", "Offline acceptance length of a checkpoint (LightningCLI)."),
    "test": ("specforge.cli.fit:main", "The same on the test data (LightningCLI)."),
    "evaluate": ("specforge.cli.commands:run", "Decode held-out prompts speculatively: tau, speed, losslessness."),
    "export": ("specforge.cli.commands:run", "Write a draft for SGLang, vLLM or transformers."),
    "doctor": ("specforge.cli.doctor:main", "Say what this machine can run."),
    "recipes": ("specforge.cli.recipes:main", "List or copy the shipped recipes."),
    "completion": ("specforge.cli.completion:main", "Print a completion script for bash, zsh or fish."),
}


def usage() -> str:
    """The help text."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"SpecForge {__version__}: train speculative-decoding drafts.",
            "",
            "usage: specforge COMMAND [options]      specforge COMMAND --help",
            "",
            *lines,
            "",
            "Every command takes --config FILE (YAML) and --print_config. Start with `specforge recipes`, or in a",
            "checkout with `make quickstart`.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status. A user's mistake is one line on stderr and status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"specforge {__version__}")
        return 0
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings are about its own interface
    if logging.lastResort is not None:  # which shows our warnings
        logging.lastResort.setFormatter(_Escaping())
    try:
        check()
        return _dispatch(argv)
    except KeyboardInterrupt:
        print("specforge: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        mistake = mistake_behind(error)
        if mistake is None:
            raise
        print(f"specforge: {' '.join(escaped(str(mistake)).split(chr(10)))}", file=sys.stderr)
        return 2


class _Escaping(logging.Formatter):
    """Shows log messages, which quote files and other processes, without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """The message as a terminal may show it."""
        return escaped(super().format(record))


def _dispatch(argv: list[str]) -> int:
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UserError(f"no command '{name}'{hint} (see `specforge --help`)")
    from specforge.cli.recipes import resolve_recipes

    module, function = COMMANDS[name][0].split(":")
    return int(getattr(import_module(module), function)([name, *resolve_recipes(rest)]))


if __name__ == "__main__":
    sys.exit(main())
