"""`specforge capture --recipe`: target, algorithm, layers and folder come from a training recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_modules.loading import algorithms, captured_by
from specforge.cli.main import main
from specforge.cli.recipes import read_recipe, recipe_folder
from tests.tiny import TINY_OPTIONS, recipe

MODULES = {cls.__name__: cls for cls in algorithms().values()}


@pytest.mark.parametrize("path", sorted(recipe_folder().glob("*.yaml")), ids=lambda p: p.name)
def test_layers_are_those_that_the_recipe_s_model_reads(path, target):
    content = read_recipe(path)
    cls = MODULES[content["model"]["class_path"]]
    options = content["model"]["init_args"]
    options.pop("optimizer", None)
    options |= {"target": str(target), **TINY_OPTIONS[cls.__name__]}
    found = captured_by(content)
    assert found.algorithm == cls.algorithm
    assert found.target == str(target)
    reads = cls(**options).spec.capture.layer_ids
    assert tuple(found.layer_ids or cls.capture_policy(cls(**options).target).layer_ids) == tuple(reads)
    assert found.features == (Path(x) if (x := content["data"]["init_args"].get("features")) else None)


def test_captured_features_train(target, prompts, tmp_path, capsys):
    path = recipe(target, tmp_path / "features", tmp_path, trainer__max_steps=1)
    content = yaml.safe_load(path.read_text())
    content["model"]["init_args"]["layer_ids"] = [0, 2, 5]
    path.write_text(yaml.safe_dump(content))
    assert main(["capture", "--recipe", str(path), "--prompts", str(prompts)]) == 0
    assert main(["fit", "--config", str(path)]) == 0
    assert main(["capture", "--recipe", str(path), "--prompts", str(prompts), "--layer_ids", "[1]"]) == 2
    assert "layer_ids [0, 2, 5], not [1]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--recipe", "eagle3.yaml"], "no model.target; set --target"),
        (["--recipe", "eagel3"], "did you mean eagle3.yaml"),
        (["--recipe", "debug/fast.yaml"], "it has no model"),
        (["--config", "eagle3.yaml"], "a training recipe is given with --recipe, not --config"),
        ([], "no target; set --target, or --recipe"),
        (["--target", "tiny"], "no output; set --output, or --recipe"),
    ],
)
def test_what_is_missing_is_named(words, expected, prompts, capsys):
    assert main(["capture", "--prompts", str(prompts), *words]) == 2
    assert expected in capsys.readouterr().err
