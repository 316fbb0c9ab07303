"""`specforge completion`: a static script, so that TAB never imports torch."""

from __future__ import annotations

from importlib import import_module
from typing import Literal

from specforge.cli.main import COMMANDS, LIGHTNING
from specforge.cli.recipes import recipes

_BASH = """_specforge() {
  local word="${COMP_WORDS[COMP_CWORD]}" words
  case "${COMP_WORDS[1]} ${COMP_WORDS[2]}" in
@OPTIONS@
@GROUPS@
  esac
  [ "$COMP_CWORD" -eq 1 ] && words="@COMMANDS@"
  case "${COMP_WORDS[COMP_CWORD-1]}" in
    --config|-c|--copy) words="@RECIPES@" ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [ "$COMP_CWORD" -eq 1 ] || COMPREPLY+=($(compgen -f -- "$word"))
}
complete -o filenames -F _specforge specforge
"""
_FISH = """complete -c specforge -n __fish_use_subcommand -f -a "@COMMANDS@"
complete -c specforge -n "not __fish_use_subcommand" -s c -l config -r -a "@RECIPES@"
@GROUPS@
@OPTIONS@
"""


def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print a completion script: commands, options and recipes.

    It takes seconds to generate, so write it to a file:
    specforge completion bash > ~/.local/share/bash-completion/completions/specforge

    Args:
        shell: bash, zsh or fish.
    """
    print(script(shell), end="")


def script(shell: Literal["bash", "zsh", "fish"]) -> str:
    """The completion script of a shell."""
    groups: dict[str, list[str]] = {}
    for name in COMMANDS:
        groups.setdefault(name.split()[0], []).extend(name.split()[1:])
    named = {group: names for group, names in groups.items() if names}
    if shell == "fish":
        text = _FISH
        under = [
            f'complete -c specforge -n "__fish_seen_subcommand_from {g}" -a "{" ".join(x)}"' for g, x in named.items()
        ]
        options = [
            f'complete -c specforge -n "__fish_seen_subcommand_from {name.split()[-1]}" -l {option}'
            for name in COMMANDS
            for option in option_names(name)
        ]
    else:
        text = "autoload -U +X bashcompinit && bashcompinit\n" * (shell == "zsh") + _BASH
        under = [f'    "{group} "*) words="{" ".join(names)}" ;;' for group, names in named.items()]
        patterns = {name: f'"{name}"' if " " in name else f'"{name} "*' for name in COMMANDS}
        options = [f'    {x}) words="--{" --".join(option_names(name))}" ;;' for name, x in patterns.items()]
    fields = {
        "OPTIONS": "\n".join(options),
        "GROUPS": "\n".join(under),
        "COMMANDS": " ".join(groups),
        "RECIPES": " ".join(recipes()),
    }
    for field, value in fields.items():
        text = text.replace(f"@{field}@", value)
    return text


def option_names(name: str) -> list[str]:
    """The options of a command, without dashes."""
    module, function = COMMANDS[name][0].split(":")
    if module in LIGHTNING:
        cli = getattr(import_module(module), LIGHTNING[module])
        own = [key.replace(".init_args", "") for key in cli.option_names()]
    else:
        from specforge.cli.command import command_line

        own = list(command_line(name, getattr(import_module(module), function)).hints)
    return list(dict.fromkeys(["help", "config", "print_config", *own]))
