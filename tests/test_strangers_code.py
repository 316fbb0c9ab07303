"""Files from strangers choose no code: what they name, or what lies beside them, is never imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import save_file

from lightning_modules.loading import load_module
from specforge.checkpoints import checkpoint_bytes
from specforge.cli.main import main
from specforge.errors import UserError
from tests.tiny import recipe

TRAP = "from pathlib import Path\nPath(__file__).with_suffix('.sprung').touch()\n"


@pytest.fixture(scope="module")
def checkpoint(target, features, tmp_path_factory) -> Path:
    """A checkpoint of a built-in algorithm after one step."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["fit", "--config", str(recipe(target, features, folder, trainer__max_steps=1))]) == 0
    return folder / "run" / "checkpoints" / "last.ckpt"


def changed(checkpoint: Path, path: Path, **fields: object) -> Path:
    """A copy of a checkpoint that says something else of its draft; None takes a field away."""
    content = torch.load(checkpoint, weights_only=True)
    saved = {**content["specforge"], **fields}
    content["specforge"] = {key: value for key, value in saved.items() if value is not None}
    path.write_bytes(checkpoint_bytes(content))
    return path


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module that Python finds; returns the file that shows that it was imported."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str = "") -> Path:
        (tmp_path / f"{name}.py").write_text(TRAP + text)
        return tmp_path / f"{name}.sprung"

    return write


def commands(draft: Path, target: Path, prompts: Path, features: Path, folder: Path) -> list[list[object]]:
    """Every command that reads a draft."""
    fit = ["fit", "--config", recipe(target, features, folder, trainer__max_steps=2)]
    return [
        ["evaluate", "--draft", draft, "--prompts", prompts, "--target", target],
        ["export", "--draft", draft, "--output", folder / "out", "--target", target],
        [*fit, "--ckpt_path", draft],
        [*fit, "--model.init_from", draft],
    ]


@pytest.mark.parametrize("algorithm", ["eagle3", "its_own", "trap.Algorithm"])
def test_a_class_that_only_a_checkpoint_names_is_not_imported(
    algorithm, checkpoint, target, prompts, features, tmp_path, module, capsys
):
    sprung = module("trap")
    stranger = changed(checkpoint, tmp_path / "s.ckpt", algorithm=algorithm, class_path="trap.Algorithm")
    for number, words in enumerate(commands(stranger, target, prompts, features, tmp_path / "run")):
        status = main([str(word) for word in words])
        error = capsys.readouterr().err
        assert not sprung.exists(), words
        if number < 2:
            assert status == 2
            assert "trap.Algorithm" in error
            assert "--algorithm my_module.MyModule" in error


def test_an_architecture_that_is_not_ours_is_not_imported(target, prompts, tmp_path, module, capsys):
    sprung, draft = module("trap"), tmp_path / "draft"
    draft.mkdir()
    config = {"architectures": ["trap.Draft"], "auto_map": {"AutoModel": "trap.Draft"}, "model_type": "trap"}
    (draft / "config.json").write_text(json.dumps(config))
    shutil.copy(tmp_path / "trap.py", draft)
    save_file({"x": torch.zeros(1)}, draft / "model.safetensors")
    words = ["export", "--draft", draft, "--target", target, "--output", tmp_path / "out"]
    assert main([str(word) for word in words]) == 2
    assert "--algorithm my_module.MyModule" in capsys.readouterr().err
    assert not sprung.exists()
    assert not (draft / "trap.sprung").exists()


def test_a_built_in_algorithm_is_found_by_name_wherever_its_class_was(checkpoint, target, tmp_path):
    for path in (None, "lightning_modules.moved.Eagle3Module"):
        found = load_module(changed(checkpoint, tmp_path / "a.ckpt", class_path=path), str(target))
        assert type(found).__name__ == "Eagle3Module"


def test_a_class_of_ones_own_is_imported_when_it_is_named(checkpoint, target, tmp_path, module):
    """It has a built-in's name, and takes the place of the built-in only where it is named."""
    code = """
        from lightning_modules.eagle3 import Eagle3Module
        class Mine(Eagle3Module):
            algorithm = "eagle3"
        class Other(Eagle3Module):
            algorithm = "other"
    """
    sprung = module("mine", dedent(code))
    mine = changed(checkpoint, tmp_path / "mine.ckpt", class_path="mine.Mine")
    with pytest.raises(UserError, match=r"mine\.Mine"):
        load_module(mine, str(target))
    assert not sprung.exists()
    assert type(load_module(mine, str(target), "mine.Mine")).__name__ == "Mine"
    assert type(load_module(checkpoint, str(target))).__name__ == "Eagle3Module"
    assert type(load_module(mine, str(target), "eagle3")).__name__ == "Eagle3Module"
    for name in ("mine.Other", "medusa"):
        with pytest.raises(UserError, match=f"not a draft of {name.rpartition('.')[2].lower()}"):
            load_module(mine, str(target), name)


def test_modules_of_the_current_folder_are_not_imported(checkpoint, target, prompts, tmp_path):
    """Under the names of packages that the commands use or look for."""
    names = (
        "lightning_modules",
        "datamodules",
        "specforge",
        "torch",
        "transformers",
        "yaml",
        "redis",
        "ray",
        "mooncake",
        "datasets",
        "gguf",
        "sitecustomize",
        "tensorboard",
        "matplotlib",
        "sglang",
        "accelerate",
        "kernels",
    )
    for name in names:
        (tmp_path / f"{name}.py").write_text(TRAP)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    executable = Path(sys.executable).with_name("specforge")
    words = [executable, "export", "--draft", checkpoint, "--target", target, "--output", tmp_path / "out"]
    result = subprocess.run(
        [str(word) for word in words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.glob("*.sprung"))
