"""The arrows of the house: which room may import which, read from the source."""

from __future__ import annotations

import ast
import sys
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


def imports(where: Path | ast.AST) -> Iterator[str]:
    """Everything that a file, or a part of one, imports."""
    for node in ast.walk(ast.parse(where.read_text()) if isinstance(where, Path) else where):
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


def when_imported(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported, without what is for type checkers."""
    for node in body:
        if isinstance(node, ast.If):
            is_for_types = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            yield from when_imported([] if is_for_types else node.body)
            yield from when_imported(node.orelse)
        elif isinstance(node, ast.Try | ast.With):
            yield from when_imported(node.body)
        elif not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node


def test_what_runs_in_servers_needs_no_package_that_they_lack():
    """The environments of vLLM and SGLang have those that are named here (docs/servers.md)."""
    paths, seen, found = dict(modules()), set(), set()
    waiting = ["specforge.inference.vllm_connector", "specforge.inference.sglang_plugin"]
    while waiting:
        module = waiting.pop()
        parents = [".".join([*module.split(".")[:n], "__init__"]) for n in range(1, module.count(".") + 2)]
        for name in {module, *parents} & paths.keys() - seen:
            seen.add(name)
            for imported in imports(ast.Module([*when_imported(ast.parse(paths[name].read_text()).body)], [])):
                (waiting.append if imported.startswith("specforge") else found.add)(imported)
    assert "specforge.inference.handoff" in seen
    others = {name.split(".")[0] for name in found} - sys.stdlib_module_names
    assert others <= {"httpx", "huggingface_hub", "numpy", "safetensors", "torch", "transformers", "vllm", "xxhash"}


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
