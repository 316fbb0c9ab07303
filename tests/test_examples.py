"""The script and the notebook of examples/, run on the tiny target."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def cells(notebook: Path, kind: str = "code") -> list[str]:
    return ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == kind]


def test_the_script_trains_evaluates_and_exports(target, conversations, tmp_path, monkeypatch, capsys):
    options = {"--target": target, "--data": conversations, "--output": tmp_path, "--samples": 20, "--steps": 4}
    words = [str(word) for pair in options.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--draft_vocab_size", "64"])
    runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert "eagle3   tau 1." in text
    assert "lossless True" in text
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["architectures"] == ["LlamaForCausalLMEagle3"]


def test_the_scripts_help_needs_no_model():
    command = [sys.executable, EXAMPLES / "train.py", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "--draft_vocab_size" in result.stdout


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stored_without_output_and_with_their_settings_first(notebook):
    for cell in json.loads(notebook.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    names: dict[str, object] = {}
    exec(cells(notebook)[0], names)
    assert all(name.isupper() for name in names if not name.startswith("__"))
    assert cells(notebook, "markdown")[0].startswith("# ")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_run_from_top_to_bottom(notebook, target, conversations, tmp_path, monkeypatch):
    """Each cell in turn, with settings for the tiny target after the first."""
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    settings, *rest = cells(notebook)
    names: dict[str, object] = {}
    exec(settings, names)
    tiny = {"TARGET": str(target), "DATA": str(conversations), "FOLDER": str(tmp_path / "run")}
    tiny |= {"SAMPLES": 20, "STEPS": 4, "DRAFT_VOCAB_SIZE": 64}
    assert set(tiny) == {name for name in names if name.isupper()}
    names |= tiny
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, cell in enumerate(rest, 2):
            exec(compile(cell, f"{notebook.name}, cell {number}", "exec"), names)
    assert "gamma 4: eagle3   tau 1." in printed.getvalue()
    assert "lossless: True" in printed.getvalue()
