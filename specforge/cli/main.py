"""The `specforge` executable: the table of commands. Imports nothing heavy, so that help is instant."""

from __future__ import annotations

import logging
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module

from specforge.cli.shadowing import check
from specforge.errors import UserError, escaped, mistake_behind
from specforge.logs import check_form, structured
from specforge.packages import VERSION

# Name: ("module:function", description). A function's parameters are the command's options, except in LIGHTNING.
COMMANDS = {
    "target fetch": ("specforge.cli.data:fetch_target", "Download a target model."),
    "target serve": ("specforge.cli.serve:serve_target", "Serve a target's features over HTTP."),
    "store up": ("specforge.cli.serve:store_up", "Run a Mooncake store in this host's memory."),
    "prepare": ("specforge.cli.data:prepare", "Turn conversations into token ids and loss masks."),
    "regenerate": ("specforge.cli.data:regenerate", "Replace the answers in conversations with the target's own."),
    "capture": ("specforge.cli.produce:capture", "Run the target over prompts and keep its hidden states."),
    "produce": ("specforge.cli.produce:produce", "Produce features for a trainer in another process."),
    "status": ("specforge.cli.status:status", "Show the state of a disaggregated run."),
    "fit": ("specforge.cli.fit:main", "Train a draft."),
    "launch": ("specforge.cluster.command:main", "Train a draft on a Ray cluster: producers and trainers together."),
    "validate": ("specforge.cli.fit:main", "Compute loss and offline tau of a checkpoint on held-out data."),
    "evaluate": ("specforge.cli.evaluate:evaluate", "Decode speculatively: tau, speed, and lossless or not."),
    "export": ("specforge.cli.evaluate:export", "Write a draft for SGLang, vLLM or transformers."),
    "bench": ("specforge.cli.bench:bench", "Measure a server: speed, tau and speed-up, by load."),
    "parity": ("specforge.cli.bench:parity", "Check that a server runs a draft as it was trained."),
    "doctor": ("specforge.cli.doctor:main", "Show what this machine can run."),
    "recipes": ("specforge.cli.recipes:main", "List, show or copy the shipped recipes."),
    "completion": ("specforge.cli.completion:completion", "Print a completion script for bash, zsh or fish."),
}
# Modules that pass their words to LightningCLI, and their subclass of it.
LIGHTNING = {"specforge.cli.fit": "TrainingCLI", "specforge.cluster.command": "LaunchCLI"}
_REMOVED = {"test": "use `specforge validate`, which evaluates the same held-out data"}


def usage() -> str:
    """The help text."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"SpecForge {VERSION}: train speculative-decoding drafts.",
            "",
            "usage: specforge COMMAND [options]      specforge COMMAND --help",
            "",
            *lines,
            "",
            "Every command accepts --config FILE (YAML), --print_config and environment variables. To start, see",
            "`specforge recipes`, or run `make quickstart` in a checkout.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status. A user's mistake is reported in one line on stderr, with status 2."""
    words = sys.argv[1:] if argv is None else argv
    with _output_may_close(), structured(words[0] if words else ""):
        return _main(words)


@contextmanager
def _output_may_close() -> Iterator[None]:
    """Exit quietly, with status 141, if the reader of the output has exited, as in ``specforge recipes | head -1``."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        events = select.poll()
        events.register(1, 0)  # reports a closed pipe only
        if not events.poll(0):  # another connection is broken
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more when it exits
        sys.exit(141)


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"specforge {VERSION}")
        return 0
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings concern its own API
    if logging.lastResort is not None:  # the handler that prints our warnings
        logging.lastResort.setFormatter(_Escaping())
    try:
        check()
        check_form()
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
    """Formats log messages, which quote files and other processes, without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, safe to print on a terminal."""
        return escaped(super().format(record))


def _dispatch(argv: list[str]) -> int:
    length = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name, words = " ".join(argv[:length]), argv[length:]
    if name not in COMMANDS:
        close = [f"'{known}'" for known in COMMANDS if known.startswith(f"{name} ")]
        close = close or [f"'{known}'" for known in get_close_matches(name, COMMANDS, 1)]
        hint = _REMOVED.get(name) or (f"did you mean {' or '.join(close)}?" if close else "")
        raise UserError(f"no command '{name}'{'; ' * bool(hint)}{hint} (see `specforge --help`)")
    module, function = COMMANDS[name][0].split(":")
    command = getattr(import_module(module), function)
    if module in LIGHTNING:
        return int(command(name, words))
    from specforge.cli.command import run

    return run(name, command, words)


if __name__ == "__main__":
    sys.exit(main())
