"""The toy algorithm of examples/ and docs/adding-an-algorithm.md, from outside the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.processes import SPECFORGE, python

ROOT = Path(__file__).parents[1]
PAGE, EXAMPLES = ROOT / "docs" / "adding-an-algorithm.md", ROOT / "examples"


@pytest.mark.parametrize(("language", "name"), [("python", "toy.py"), ("yaml", "toy.yaml")])
def test_the_page_prints_the_example(language, name):
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert block == (EXAMPLES / name).read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A reader's folder with the module and the recipe."""
    folder = tmp_path_factory.mktemp("outside")
    for name in ("toy.py", "toy.yaml"):
        shutil.copyfile(EXAMPLES / name, folder / name)
    return folder


def specforge(folder: Path, *words: object) -> None:
    """Run a command that finds the reader's folder on its path."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [python(), SPECFORGE, *map(str, words)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_toy_is_captured_trained_evaluated_and_exported(folder, target, prompts):
    checkpoint, named = "runs/toy/checkpoints/last.ckpt", ["--algorithm", "toy.ToyModule"]
    data = ["--target", target, "--prompts", prompts]
    specforge(folder, "capture", *named, *data, "--output", "features", "--dtype", "float32")
    fit = ["--model.target", target, "--data.features", "features", "--model.draft_config", '{"draft_vocab_size": 128}']
    fit += ["--trainer.accelerator", "cpu", "--trainer.max_steps", 100, "--trainer.enable_progress_bar", "false"]
    specforge(folder, "fit", "--config", "toy.yaml", *fit)
    evaluate = ["--json", "e.json", "--max_new_tokens", 20, "--speed_prompts", 0]
    specforge(folder, "evaluate", "--draft", checkpoint, "--prompts", prompts, *evaluate, *named)
    export = ["--dtype", "float32", *named]
    specforge(folder, "export", "--draft", checkpoint, "--output", "exported", *export)
    specforge(folder, "export", "--draft", "exported", "--output", "again", "--target", target, *export)
    rows = {row["method"]: row for row in json.loads((folder / "e.json").read_text())["methods"]}
    assert rows["toy"]["lossless"] is True
    assert rows["toy"]["tau"] == rows["toy"]["offline_tau"]
    assert rows["toy"]["tau"] > 1.0
    assert json.loads((folder / "exported" / "config.json").read_text())["architectures"] == ["ToyDraft"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy.NoModule", "algorithm toy.NoModule: cannot be imported"),
        ("no_such_file.ToyModule", "algorithm no_such_file.ToyModule: cannot be imported"),
        ("pathlib.Path", "algorithm pathlib.Path: is not a DraftModule"),
        ("lightning_modules.DraftModule", "algorithm lightning_modules.DraftModule: is not a DraftModule"),
        ("..", r"algorithm \.\.: is not a class path"),
        ("toy.", r"algorithm toy\.: is not a class path"),
    ],
)
def test_a_class_path_that_is_no_algorithm_is_refused_by_name(name, message):
    from lightning_modules.loading import find_algorithm
    from specforge.errors import UserError

    with pytest.raises(UserError, match=message):
        find_algorithm(name)
