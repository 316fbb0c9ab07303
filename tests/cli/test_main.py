"""The executable: help without torch, recipes, configuration, environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from specforge.cli.main import COMMANDS, main
from specforge.cli.recipes import recipe_folder, recipes
from tests.disaggregated import places, producers
from tests.tiny import TINY_OPTIONS, recipe


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from specforge.cli.main import main; main(['--help'])\n"
        "print([m for m in ('torch', 'lightning', 'transformers', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("completion",)])
def test_every_command_has_help(command, capsys):
    try:
        status = main([*command.split(), "--help"])
    except SystemExit as end:
        status = end.code or 0
    assert status == 0
    assert "usage" in capsys.readouterr().out.lower()


def test_a_mistyped_command(capsys):
    assert main(["evalute"]) == 2
    assert "did you mean 'evaluate'" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "specforge" in script
    assert "prepare" in script


def test_completion_is_valid_bash(capsys, tmp_path):
    main(["completion", "bash"])
    path = tmp_path / "completion.bash"
    path.write_text(capsys.readouterr().out)
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_recipes_are_listed_and_copied(capsys, tmp_path):
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("quickstart.yaml", "eagle3.yaml", "eagle3-llama3.1-8b.yaml"))
    assert main(["recipes", "--copy", "eagle3.yaml", "--to", str(tmp_path)]) == 0
    assert (tmp_path / "eagle3.yaml").read_bytes() == recipes()["eagle3.yaml"].read_bytes()
    assert main(["recipes", "--copy", "eagle3.yaml", "--to", str(tmp_path)]) == 2


def test_a_recipe_in_the_current_folder_comes_first(target, features, tmp_path, monkeypatch, capsys):
    path = recipe(target, features, tmp_path, trainer__max_steps=1)
    path.rename(tmp_path / "eagle3.yaml")
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "eagle3.yaml"]) == 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("path", sorted(recipe_folder().glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_trains_on_the_tiny_target(path, target, features, prompts, tmp_path):
    """As shipped, but for the target, the features or prompts, and the hardware."""
    text = path.read_text()
    assert text.startswith("#")
    config = yaml.safe_load(text)
    tiny = TINY_OPTIONS[config["model"]["class_path"]]
    data = {"features": features, "prompts": prompts}
    options = {
        "--trainer.accelerator": "cpu",
        "--trainer.devices": 1,
        "--trainer.strategy": "auto",
        "--trainer.max_steps": 2,
        "--trainer.precision": "32-true",
        "--trainer.default_root_dir": tmp_path,
        "--model.target": target,
        **{f"--data.{name}": data[name] for name in data if name in config["data"]["init_args"]},
        **{f"--model.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in tiny.items()},
    }
    where = places(tmp_path) if "store" in config["data"]["init_args"] else {}
    options |= {f"--data.{name}": place for name, place in where.items()}
    words = [str(word) for pair in options.items() for word in pair]
    with producers(target, where, dtype="bfloat16") if where else nullcontext():
        assert main(["fit", "--config", path.name, *words]) == 0


@pytest.mark.parametrize("name", [p.name for p in sorted((recipe_folder() / "debug").glob("*.yaml"))])
def test_debug_presets_lie_over_a_recipe(name, target, features, tmp_path):
    path = recipe(target, features, tmp_path)
    assert main(["fit", "--config", str(path), "--config", f"debug/{name}", "--trainer.max_steps", "2"]) == 0


def test_printed_configuration_can_be_run(target, features, tmp_path, capsys):
    path = recipe(target, features, tmp_path, trainer__max_steps=1)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(path), "--print_config"])
    assert not end.value.code
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert yaml.safe_load(printed.read_text())["model"]["init_args"]["steps"] == 3
    assert main(["fit", "--config", str(printed)]) == 0


def test_options_come_from_the_environment_too(target, conversations, tmp_path):
    environment = {**os.environ, "SPECFORGE_PREPARE_TARGET": str(target), "OMP_NUM_THREADS": "1"}
    words = [str(Path(sys.executable).with_name("specforge")), "prepare", "--data", conversations, "--output", tmp_path]
    subprocess.run([str(word) for word in words], env=environment, check=True, capture_output=True)
    assert (tmp_path / "train").is_dir()


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text
    assert "quickstart.yaml" in text


def test_callbacks_loggers_and_precision_are_swapped_in_config(target, features, tmp_path):
    path = recipe(
        target,
        features,
        tmp_path,
        trainer__max_steps=2,
        trainer__precision="bf16-mixed",
        trainer__logger={"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "csv")}},
        trainer__callbacks=[{"class_path": "LearningRateMonitor"}],
    )
    assert main(["fit", "--config", str(path)]) == 0
    assert list((tmp_path / "csv").rglob("metrics.csv"))
