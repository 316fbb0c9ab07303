"""The distribution: its name, its extras, its files, and packages of other projects with the same names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from specforge.cli import shadowing
from specforge.errors import UserError
from specforge.packages import EXTRAS, install_hint, installed

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [path for top in ("specforge", "lightning_modules", "datamodules") for path in (ROOT / top).rglob("*.py")]


def run(*words: object, path: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(str(word) for word in words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_distribution_has_a_name_of_its_own_and_the_executable_its_old_one():
    assert PROJECT["project"]["name"] == "specforge-lightning"
    assert set(PROJECT["project"]["scripts"]) == {"specforge"}


def test_nothing_installs_or_looks_up_a_distribution_called_specforge():
    for path in SOURCES:
        assert not re.search(r"pip install '?specforge\b(?!-)|version\(.specforge.\)", path.read_text()), path


def test_every_package_and_its_types_are_shipped():
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in SOURCES
        if path.name == "__init__.py" and "configs" not in path.parts
    }
    assert packages | {"specforge.configs"} == set(PROJECT["tool"]["setuptools"]["packages"])
    assert all((ROOT / top / "py.typed").exists() for top in ("specforge", "lightning_modules", "datamodules"))


def test_extras_in_hints_and_doctor_are_those_of_the_project():
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(extras) == {*EXTRAS, "mooncake-cpu", "docs", "dev"}
    for name, extra in EXTRAS.items():
        assert extra.requirement in [requirement.split(";")[0] for requirement in extras[name]]
        assert extra.requirement in install_hint(name)
    assert extras["mooncake-cpu"][0].split(";")[0] == EXTRAS["mooncake"].without_cuda
    assert "'.[mooncake-cpu]'" in install_hint("mooncake")


@pytest.mark.parametrize("build", ["mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda"])
def test_either_build_of_mooncake_is_found_and_named(build, tmp_path):
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").touch()
    info = tmp_path / f"{build.replace('-', '_')}-0.3.13.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {build}\nVersion: 0.3.13\n")
    (info / "top_level.txt").write_text("mooncake\n")
    code = "import sys; sys.path = [x for x in sys.path if 'site-packages' not in x]\n"
    result = run(
        "-c",
        code + "from specforge.packages import installed; print(installed('mooncake'))",
        path=f"{tmp_path}:{ROOT}",
        cwd=ROOT,
    )
    assert result.stdout == f"{build} 0.3.13\n", result.stderr


def test_an_absent_module_is_not_installed():
    assert installed("no_such_module") is None


@pytest.mark.parametrize("name", ["specforge", "lightning_modules", "datamodules"])
def test_a_package_of_another_project_is_rejected_by_name(name, tmp_path):
    foreign = tmp_path / "foreign" / name
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("raise RuntimeError('imported')\n")
    start = "import sys; from specforge_lightning import main; sys.exit(main())"
    for command in ("doctor", "recipes"):
        result = run("-c", start, command, path=f"{foreign.parent}:{ROOT}", cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"specforge: {foreign}: this package of another project hides {ROOT / name}; rename it")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("/other/datamodules", "/other/datamodules: this package of another project hides"),
        (None, "package datamodules is not installed next to"),
    ],
)
def test_a_folder_that_hides_an_editable_install_and_a_missing_package_are_reported(found, message, monkeypatch):
    find = shadowing.find_spec
    spec = None if found is None else SimpleNamespace(submodule_search_locations=[found])
    monkeypatch.setattr(shadowing, "find_spec", lambda name: spec if name == "datamodules" else find(name))
    with pytest.raises(UserError, match=message):
        shadowing.check()


def test_the_executable_starts_specforges_own_packages(tmp_path):
    result = run("-c", "from specforge_lightning import main; main()", "--version", path=str(ROOT), cwd=tmp_path)
    assert result.stdout.startswith("specforge 0."), result.stderr
