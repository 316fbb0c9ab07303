"""The toy algorithm of examples/ and docs/adding-an-algorithm.md, from outside the package and in fresh processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def specforge(folder: Path, *commands: tuple[object, ...]) -> None:
    """Run some commands in one fresh process that finds the reader's folder on its path."""
    lines = [[str(word) for word in words] for words in commands]
    code = f"from specforge.cli.main import main\nfor words in {lines!r}: assert main(words) == 0, words"
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_toy_is_captured_trained_evaluated_and_exported(folder, target, prompts):
    checkpoint, named = "runs/toy/checkpoints/last.ckpt", ("--algorithm", "toy.ToyModule")
    specforge(
        folder,
        (
            "capture",
            "--algorithm",
            "toy.ToyModule",
            "--target",
            target,
            "--prompts",
            prompts,
            "--output",
            "features",
            "--dtype",
            "float32",
        ),
        (
            "fit",
            "--config",
            "toy.yaml",
            "--model.target",
            target,
            "--data.features",
            "features",
            "--model.draft_config",
            '{"draft_vocab_size": 128}',
            "--trainer.accelerator",
            "cpu",
            "--trainer.max_steps",
            100,
            "--trainer.enable_progress_bar",
            "false",
        ),
    )
    specforge(
        folder,
        (
            "evaluate",
            "--draft",
            checkpoint,
            "--prompts",
            prompts,
            "--json",
            "e.json",
            "--max_new_tokens",
            20,
            "--speed_prompts",
            0,
            *named,
        ),
        ("export", "--draft", checkpoint, "--output", "exported", "--dtype", "float32", *named),
        ("export", "--draft", "exported", "--output", "again", "--dtype", "float32", "--target", target, *named),
    )
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
