"""The arrows of the house: which room may import which, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_modules

ROOT = Path(__file__).parents[1]
BASE = {
    "checkpoints",
    "console",
    "contracts",
    "errors",
    "files",
    "fusion",
    "logs",
    "options",
    "packages",
    "stopping",
    "system",
}
BASE.add("__init__")
TARGET = {f"specforge.inference.{name}" for name in ("target_files", "target_head", "target_layers", "float8_blocks")}
# Package -> what it may import, besides itself and the basic modules.
ALLOWED: dict[str, set[str]] = {
    "specforge.runtime": set(),
    "specforge.inference": {"specforge.runtime", "specforge.data"},
    "specforge.data": set(),
    "specforge.losses": TARGET,
    "specforge.decoding": {"specforge.inference"},
    "specforge.modeling": {"specforge.decoding", *TARGET},
    "specforge.eval": {"specforge.inference", "specforge.decoding", "specforge.data"},
    "lightning_modules": {
        "specforge.modeling",
        "specforge.losses",
        "specforge.decoding",
        "specforge.data",
        "specforge.eval",
        "specforge.inference",
    },
    "specforge.callbacks": {"specforge.eval", "specforge.runtime", "lightning_modules"},
    "datamodules": {"specforge.runtime", "specforge.data", "specforge.inference"},
}


def modules() -> Iterator[tuple[str, Path]]:
    for top in ("specforge", "lightning_modules", "datamodules"):
        for path in (ROOT / top).rglob("*.py"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def room(module: str) -> str | None:
    return next((r for r in ALLOWED if module == r or module.startswith(r + ".")), None)


def basic(module: str) -> bool:
    parts = module.split(".")
    return parts[0] == "specforge" and (len(parts) == 1 or parts[1] in BASE)


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules() if room(m)])
def test_a_room_imports_only_the_rooms_it_may(module, path):
    own = room(module)
    for imported in imports(path):
        ours = imported.split(".")[0] in ("specforge", "lightning_modules", "datamodules")
        if not ours or basic(imported) or room(imported) == own:
            continue
        allowed = any(imported == r or imported.startswith(r + ".") for r in ALLOWED[own])
        assert allowed, f"{module} imports {imported}"


def test_lightning_is_imported_only_where_training_is():
    for module, path in modules():
        if module.startswith(
            (
                "specforge.callbacks",
                "lightning_modules",
                "datamodules",
                "specforge.cli.fit",
                "specforge.cluster.trainers",
            )
        ):
            continue
        found = [name for name in imports(path) if name.split(".")[0] in ("lightning", "pytorch_lightning")]
        assert not found, f"{module} imports {found}"


def test_only_the_cluster_knows_ray_and_nothing_knows_the_cluster():
    for module, path in modules():
        if module.startswith("specforge.cluster"):
            continue
        found = [name for name in imports(path) if name.split(".")[0] == "ray" or name.startswith("specforge.cluster")]
        assert not found, f"{module} imports {found}"


def test_no_algorithm_is_named_outside_its_own_file():
    names = set(lightning_modules.algorithms())
    assert "eagle3" in names
    for module, path in modules():
        if module in {cls.__module__ for cls in lightning_modules.algorithms().values()}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not constants & names, f"{module}, line {node.lineno}"
