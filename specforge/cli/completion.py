"""Shell completion from the command table: a static script, so that TAB never imports torch."""

from __future__ import annotations

from specforge.errors import UserError

_BASH = """_specforge() {
  local words="@WORDS@" word="${COMP_WORDS[COMP_CWORD]}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[1]}"))
  else
    case "${COMP_WORDS[COMP_CWORD-1]}" in
      --config|-c) COMPREPLY=($(compgen -W "@RECIPES@" -- "$word") $(compgen -f -- "$word")) ;;
@GROUPS@
      *) COMPREPLY=($(compgen -W "@OPTIONS@" -- "$word") $(compgen -f -- "$word")) ;;
    esac
  fi
}
complete -o filenames -F _specforge specforge
"""
_FISH = """complete -c specforge -f -n __fish_use_subcommand -a "@WORDS@"
complete -c specforge -n "not __fish_use_subcommand" -s c -l config -r -a "@RECIPES@"
complete -c specforge -n "not __fish_use_subcommand" -l print_config -l help
@FISH_GROUPS@
"""


def script(shell: str) -> str:
    """The completion script of a shell.

    Raises:
        UserError: another shell than bash, zsh and fish.
    """
    from specforge.cli.main import COMMANDS
    from specforge.cli.recipes import recipes

    templates = {"bash": _BASH, "zsh": "autoload -U +X bashcompinit && bashcompinit\n" + _BASH, "fish": _FISH}
    if shell not in templates:
        raise UserError(f"completion {shell}: use bash, zsh or fish")
    words = " ".join(dict.fromkeys(name.split()[0] for name in COMMANDS))
    groups: dict[str, list[str]] = {}
    for group, _, command in (name.partition(" ") for name in COMMANDS if " " in name):
        groups.setdefault(group, []).append(command)
    bash = [f'      {g}) COMPREPLY=($(compgen -W "{" ".join(c)}" -- "$word")) ;;' for g, c in groups.items()]
    fish = [f'complete -c specforge -n "__fish_seen_subcommand_from {g}" -a "{" ".join(c)}"' for g, c in groups.items()]
    text = templates[shell].replace("@GROUPS@", "\n".join(bash)).replace("@FISH_GROUPS@", "\n".join(fish))
    text = text.replace("@WORDS@", words).replace("@RECIPES@", " ".join(recipes()))
    return text.replace("@OPTIONS@", "--config --print_config --help")


def main(argv: list[str]) -> int:
    """`specforge completion SHELL`."""
    if len(argv) != 2 or argv[1] in ("-h", "--help"):
        print('usage: eval "$(specforge completion bash)"   (or zsh, fish)')
        return 0 if len(argv) == 2 else 2
    print(script(argv[1]), end="")
    return 0
