"""The Python API: lazy, typed, and each documented example runs."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import specforge
from specforge.cli.main import main
from specforge.errors import UserError
from tests.tiny import recipe

ROOT = Path(__file__).parents[1]
FUNCTIONS = ("capture", "load_draft", "evaluate")


@pytest.fixture(scope="module")
def folder(target, features, prompts, tmp_path_factory) -> Path:
    """A folder in which the quickstart seems to have run, on the tiny target."""
    folder = tmp_path_factory.mktemp("api")
    path = recipe(target, features, folder, trainer__default_root_dir=str(folder / "runs" / "quickstart"))
    assert main(["fit", "--config", str(path)]) == 0
    (folder / "runs" / "quickstart" / "prompts").symlink_to(prompts)
    (folder / "models").mkdir()
    (folder / "models" / "SmolLM2-135M-Instruct").symlink_to(target)
    return folder


def example(name: str) -> str:
    """The code of a docstring's example."""
    text = inspect.getdoc(getattr(specforge, name)) or ""
    return textwrap.dedent(text.partition("Example::\n")[2])


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, specforge; specforge.__version__; dir(specforge)\n"
        "print([m for m in ('torch', 'lightning', 'transformers', 'numpy', 'specforge.api') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_every_public_name_exists_and_is_listed():
    assert set(specforge.__all__) <= set(dir(specforge))
    assert all(getattr(specforge, name) for name in specforge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'evalute'"):
        _ = specforge.evalute


def test_signatures_are_typed_for_editors_and_mypy(tmp_path):
    for name in FUNCTIONS:
        signature = inspect.signature(getattr(specforge, name))
        types = [parameter.annotation for parameter in signature.parameters.values()] + [signature.return_annotation]
        assert inspect.Signature.empty not in types
        assert "Any" not in str(types)
    script = tmp_path / "script.py"
    script.write_text(
        "import specforge\n"
        "reveal_type(specforge.load_draft('draft'))\n"
        "reveal_type(specforge.evaluate('draft', 'prompts')['eagle3'].tau)\n"
        "specforge.capture('target', 'prompts')\n"
    )
    command = [sys.executable, "-m", "mypy", script]  # with the options, and so the cache, of `make lint`
    text = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout
    assert 'Revealed type is "lightning_modules.base.DraftModule"' in text
    assert 'Revealed type is "float"' in text or 'Revealed type is "builtins.float"' in text
    assert 'Missing positional argument "output"' in text


def test_the_examples_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for name in FUNCTIONS:
        code = example(name)
        assert "specforge." in code, name
        exec(code, {"specforge": specforge})
    splits, draft, results = capsys.readouterr().out.splitlines()[-3:]
    assert "'runs/features/train'), 32" in splits
    assert re.fullmatch(r"eagle3 \d+", draft)
    assert re.fullmatch(r"\d\.\d+ True", results)


def test_progress_is_shown_on_request(folder, target, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draft = specforge.load_draft(folder / "runs" / "quickstart" / "checkpoints" / "last.ckpt", target)
    options = specforge.EvaluateOptions(max_new_tokens=8, speed_prompts=0, baselines=["none"])
    for progress in (False, True):
        results = specforge.evaluate(draft, prompts, options, num_prompts=2, progress=progress)
        evaluation = capsys.readouterr().out
        splits = specforge.capture(target, prompts, tmp_path / str(progress), progress=progress)
        assert ("4/4 prompts decoded" in evaluation) == bool(evaluation) == progress
        assert bool(capsys.readouterr().out) == progress
        assert set(results) == {"none", "eagle3"}
        assert {split.folder.name: split.samples for split in splits} == {"train": 32, "heldout": 8}


def test_algorithms_are_the_modules_by_name():
    assert specforge.algorithms()["eagle3"].__name__ == "Eagle3Module"


def test_a_mistake_is_one_that_the_user_can_read(folder, target, prompts, tmp_path):
    checkpoint = folder / "runs" / "quickstart" / "checkpoints" / "last.ckpt"
    assert main(["export", "--draft", str(checkpoint), "--output", str(tmp_path / "draft"), "--to", "hf"]) == 0
    with pytest.raises(UserError, match="give it with --target"):
        specforge.load_draft(tmp_path / "draft")
    with pytest.raises(UserError, match="device 'tpu9'"):
        specforge.capture(target, prompts, tmp_path / "x", specforge.CaptureOptions(device="tpu9"))
