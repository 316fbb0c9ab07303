"""Shipped recipes: their heads, lookup by name, listing and copying. Imports nothing heavy.

A recipe starts with a comment block. Its first paragraph, the head, is YAML; the rest is for the reader:

    # summary: EAGLE-3, seven training-time steps
    # algorithm: eagle3
    # target: Qwen/Qwen3-8B
    # fit: {gpus: 1, gpu_gb: 18}
    # capture: {gpus: 1, gpu_gb: 40}
    # ram_gb: 32
    # disk_gb: 350
    # measured: [fit]
    #
    # Commands and remarks

GB are 10^9 bytes. The disk holds the target's files and the features (for large targets, those of 10M tokens).
Figures that ``measured`` does not list are estimates. A preset, which is added to a recipe, has a summary only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from specforge.cli.yaml_limits import limit_yaml
from specforge.errors import UserError
from specforge.files import write_file


@dataclass(frozen=True)
class GPUs:
    """GPUs that a step of a recipe needs, and the memory of each; no GPUs means that it runs on the CPU."""

    gpus: int
    gpu_gb: float = 0.0

    def __str__(self) -> str:
        """Such as ``8 x 141 GB``."""
        return f"{self.gpus} x {self.gpu_gb:g} GB" if self.gpus else "CPU"


@dataclass(frozen=True)
class Recipe:
    """A recipe's head."""

    summary: str
    algorithm: str
    target: str
    fit: GPUs
    capture: GPUs
    ram_gb: float
    disk_gb: float
    measured: tuple[str, ...]

    def describe(self) -> str:
        """The head as lines of text."""
        rows = {
            "algorithm": self.algorithm,
            "target": self.target,
            "fit": f"GPUs: {self.fit}",
            "capture": f"GPUs: {self.capture}",
            "ram_gb": f"{self.ram_gb:g} GB",
            "disk_gb": f"{self.disk_gb:g} GB",
        }
        titles = {"fit": "training", "ram_gb": "memory", "disk_gb": "disk"}
        figures = ("fit", "capture", "ram_gb", "disk_gb")
        lines = [self.summary]
        for key, text in rows.items():
            basis = f" ({'measured' if key in self.measured else 'estimated'})" if key in figures else ""
            lines.append(f"  {titles.get(key, key):<10} {text}{basis}")
        return "\n".join(lines)


def recipe_folder() -> Path:
    """Folder of the shipped recipes."""
    return Path(str(files("specforge.configs")))


def recipes() -> dict[str, Path]:
    """Shipped recipes and presets by file name; the presets are called ``debug/...``."""
    folder = recipe_folder()
    paths = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("debug/*.yaml"))]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def find_recipe(name: str) -> Path:
    """A shipped recipe by name, with or without ``.yaml``.

    Raises:
        UserError: no recipe has this name.
    """
    stems = {Path(shipped).with_suffix("").as_posix(): path for shipped, path in recipes().items()}
    stem = name.removesuffix(".yaml")
    if stem in stems:
        return stems[stem]
    close = get_close_matches(stem, stems, 1)
    hint = f"; did you mean {close[0]}.yaml?" if close else ""
    raise UserError(f"no recipe {name}{hint} (see `specforge recipes`)")


def resolve_recipes(argv: Sequence[str]) -> list[str]:
    """Replace recipe names after ``--config`` or ``-c`` by paths; a file in the current folder comes first.

    Raises:
        UserError: neither a file nor a recipe has this name.
    """
    resolved = list(argv)
    for i, argument in enumerate(resolved):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-c") and equals:
            resolved[i] = f"{flag}={_find_file(value)}"
        elif argument in ("--config", "-c") and i + 1 < len(resolved):
            resolved[i + 1] = _find_file(resolved[i + 1])
    return resolved


def _find_file(name: str, option: str = "--config") -> str:
    if Path(name).exists() and not Path(name).is_dir():
        return name
    try:
        return str(find_recipe(name))
    except UserError as error:
        raise UserError(f"{option} {name}: no such file, and {error}") from None


def read_recipe(name: Path) -> dict[str, Any]:
    """The content of a recipe: a file, or a shipped recipe by name.

    Raises:
        UserError: there is no such recipe, or it is not one.
    """
    path = _find_file(str(name), "--recipe")
    limit_yaml(["--config", path])
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"--recipe {name}: not a training recipe, because it has no model")
    return content


def read_comments(path: Path) -> tuple[dict[str, object], str]:
    """The head of a recipe, and the text after it."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    head, _, text = "\n".join(lines).partition("\n\n")
    return yaml.safe_load(head), text


def read_head(path: Path) -> Recipe | None:
    """The head of a recipe; None for a preset."""
    head, _ = read_comments(path)
    if path.parent.name == "debug":
        return None
    fit, capture = GPUs(**head.pop("fit")), GPUs(**head.pop("capture"))  # type: ignore[arg-type]
    return Recipe(**head, fit=fit, capture=capture)  # type: ignore[arg-type]


def table() -> str:
    """One line per recipe, at most 120 columns wide."""
    rows = [("RECIPE", "ALGORITHM", "TARGET", "GPUS", "SUMMARY")]
    presets = []
    for name, path in recipes().items():
        if recipe := read_head(path):
            largest = max(recipe.fit, recipe.capture, key=lambda x: (x.gpus, x.gpu_gb))
            rows.append((name, recipe.algorithm, Path(recipe.target).name, str(largest), recipe.summary))
        else:
            presets.append((name, read_comments(path)[0]["summary"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", "Presets, for a second --config:"] + [f"{name:<{widths[0]}}  {text}" for name, text in presets]
    return "\n".join(lines)


def main(name: str | None = None, copy: str | None = None, to: Path = Path()) -> int:
    """List the shipped recipes, show one, or copy one.

    Args:
        name: show the needs and the commands of this recipe.
        copy: name of the recipe to copy.
        to: folder or file to copy it to.
    """
    if copy is not None:
        print(_copy(find_recipe(copy), to))
    elif name is not None:
        path = find_recipe(name)
        recipe, (head, text) = read_head(path), read_comments(path)
        print(f"{path.name}: {recipe.describe() if recipe else head['summary']}\n\n{text}")
    else:
        print(f"{table()}\n\n`specforge recipes NAME` shows a recipe's needs and commands; --copy NAME copies it.")
    return 0


def _copy(source: Path, target: Path) -> Path:
    target = target / source.name if target.is_dir() else target
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: already exists; choose another with --to")
    write_file(target, source.read_bytes())
    return target
