"""Recipes shipped in the wheel: found by bare name, listed, copied. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from specforge.errors import UserError
from specforge.files import write_file


def recipe_folder() -> Path:
    """Where the shipped recipes lie."""
    return Path(str(files("specforge.configs")))


def recipes() -> dict[str, Path]:
    """Shipped recipes by file name; the presets to lay over them are called ``debug/...``."""
    folder = recipe_folder()
    paths = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("debug/*.yaml"))]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def resolve_recipes(argv: Sequence[str]) -> list[str]:
    """Replace bare recipe names behind ``--config`` or ``-c`` by their paths.

    A file in the current folder comes first; then a shipped recipe of that name.

    Raises:
        UserError: there is neither.
    """
    resolved = list(argv)
    for i, argument in enumerate(resolved):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-c") and equals:
            resolved[i] = f"{flag}={_find(value)}"
        elif argument in ("--config", "-c") and i + 1 < len(resolved):
            resolved[i + 1] = _find(resolved[i + 1])
    return resolved


def _find(name: str) -> str:
    if Path(name).exists():
        return name
    shipped = recipes()
    if name in shipped:
        return str(shipped[name])
    close = get_close_matches(name, shipped, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"--config {name}: no such file, and no such recipe{hint} (see `specforge recipes`)")


def describe(path: Path) -> Iterator[str]:
    """The comment lines at the head of a recipe."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            return
        yield line.removeprefix("#").strip()


def main(copy: str | None = None, to: Path = Path()) -> int:
    """List the shipped recipes, or copy one.

    Args:
        copy: name of the recipe to copy.
        to: folder or file to copy it to.
    """
    if copy is None:
        for name, path in recipes().items():
            print(name)
            print("\n".join(f"    {line}" for line in describe(path)))
        return 0
    if copy not in recipes():
        raise UserError(f"--copy {copy}: no such recipe (there are {', '.join(recipes())})")
    target = to / Path(copy).name if to.is_dir() else to
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists already")
    write_file(target, recipes()[copy].read_bytes())
    print(target)
    return 0
