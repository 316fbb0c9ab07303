"""The executable: help without torch, recipes, configuration, environment."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import yaml
from lightning.pytorch.accelerators import CUDAAccelerator

from specforge.cli.main import COMMANDS, main
from specforge.cli.recipes import recipe_folder, recipes
from tests.disaggregated import places, producers
from tests.processes import Command
from tests.test_training import weights
from tests.tiny import TINY_OPTIONS, recipe


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from specforge.cli.main import main; main(['--help'])\n"
        "print([m for m in ('torch', 'lightning', 'transformers', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    try:
        status = main([*command.split(), "--help"])
    except SystemExit as end:
        status = end.code or 0
    assert status == 0
    text = capsys.readouterr().out
    assert "usage" in text.lower()
    assert not [word for word in ("``", "type: ", "<class", "known subclasses") if word in " ".join(text.split())]


def test_a_mistyped_command(capsys):
    assert main(["evalute"]) == 2
    assert "did you mean 'evaluate'" in capsys.readouterr().err


def test_a_removed_command_names_its_replacement(capsys):
    assert main(["test", "--config", "eagle3.yaml"]) == 2
    assert "use `specforge validate`" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["prepare", "status", "export", "recipes"])
def test_a_command_does_not_import_training(command):
    code = (
        f"import sys; from specforge.cli.main import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ('datamodules', 'specforge.callbacks', 'lightning', 'transformers', 'torch')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(json.loads(result.stderr.strip().replace("'", '"')))
    allowed = {"prepare": {"torch", "transformers"}, "status": {"torch", "transformers"}, "recipes": set()}
    assert imported <= allowed.get(command, {"torch", "transformers", "lightning"})


def test_the_environment_wins_over_the_file_and_the_command_line_over_both(capsys, monkeypatch, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("data: d\ntarget: t\noutput: o\nmax_length: 1\n")
    words = ["prepare", "--config", str(file), "--print_config"]

    def max_length(*more: str) -> int:
        with pytest.raises(SystemExit):
            main([*words, *more])
        return int(yaml.safe_load(capsys.readouterr().out)["max_length"])

    assert max_length() == 1
    monkeypatch.setenv("SPECFORGE_PREPARE_MAX_LENGTH", "2")
    assert max_length() == 2
    assert max_length("--max_length", "3") == 3
    monkeypatch.setenv("SPECFORGE_PREPARE_CONFIG", str(file))
    words[1:3] = []
    assert max_length() == 2


def test_the_environment_wins_over_the_recipe_of_fit(target, features, tmp_path, capsys, monkeypatch):
    path = recipe(target, features, tmp_path, trainer__max_steps=40)
    monkeypatch.setenv("SPECFORGE_FIT__TRAINER__MAX_STEPS", "7")
    monkeypatch.setenv("SPECFORGE_FIT__MODEL__STEPS", "4")
    for words, steps in (([], 7), (["--trainer.max_steps", "9"], 9)):
        with pytest.raises(SystemExit):
            main(["fit", *words, "--config", str(path), "--print_config"])
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["trainer"]["max_steps"] == steps
        assert config["model"]["init_args"]["steps"] == 4


def test_help_of_fit_starts_with_our_options(capsys):
    def text(*words: str) -> str:
        with pytest.raises(SystemExit):
            main(["fit", *words])
        return capsys.readouterr().out

    short, full = text("--help"), text("--help.trainer")
    headings = ["--model.help", "--data.help", "--checkpoint.keep", "--best_checkpoint.keep", "--trainer.max_steps"]
    assert [short.index(heading) for heading in headings] == sorted(short.index(heading) for heading in headings)
    assert "--trainer.barebones" not in short
    assert "--trainer.barebones" in full
    for help_text in (short, full):
        assert "ENV:" not in help_text
        assert "SPECFORGE_FIT__TRAINER__MAX_STEPS" in help_text
    assert len(short.splitlines()) < 200


@pytest.mark.parametrize("words", ["recipes", "recipes eagle3", "--help"])
def test_output_into_a_pipe_that_closes(words):
    """As in `specforge recipes | head -1`; the reader closes before anything is written."""
    code = "import sys; sys.stdin.readline(); from specforge.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *words.split()]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.close()
        assert process.communicate("\n")[1] == ""
    assert process.returncode == 141


def test_another_broken_pipe_keeps_its_trace(monkeypatch):
    def fails(*_: object) -> int:
        raise BrokenPipeError("the server's")

    monkeypatch.setattr("specforge.cli.main._dispatch", fails)
    with pytest.raises(BrokenPipeError, match="server"):
        main(["status"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    words = ("specforge", "prepare", "max_length", "trainer.max_steps", "model.steps", "eagle3.yaml")
    assert all(word in script for word in words)


def test_bash_completes_commands_and_their_options(capsys, tmp_path):
    main(["completion", "bash"])
    path = tmp_path / "completion.bash"
    path.write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        code = (
            f"source {path}; COMP_WORDS=({' '.join(words)} ''); COMP_WORDS[{len(words) - 1}]='{words[-1]}'; "
            f"COMP_CWORD={len(words) - 1}; _specforge; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        result = subprocess.run(["bash", "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
        return result.stdout.split()

    assert completed("specforge", "prep") == ["prepare"]
    assert completed("specforge", "target", "f") == ["fetch"]
    assert completed("specforge", "prepare", "--max_l") == ["--max_length"]
    assert completed("specforge", "target", "serve", "--po") == ["--port"]
    assert completed("specforge", "fit", "--trainer.max_s") == ["--trainer.max_steps"]
    assert "eagle3.yaml" in completed("specforge", "fit", "--config", "eagle3")


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
    environment = {"SPECFORGE_PREPARE_TARGET": str(target)}
    process = Command("prepare", "--data", conversations, "--output", tmp_path, environment=environment)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert (tmp_path / "train").is_dir()


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text
    assert "quickstart.yaml" in text


@pytest.mark.parametrize("words", [["--trainer.logger", "CSVLogger"], ["--trainer.logger=TensorBoardLogger"]])
def test_a_logger_by_name_writes_into_the_runs_folder(words, target, features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = recipe(target, features, tmp_path, trainer__max_steps=1)
    assert main(["fit", "--config", str(path), *words]) == 0
    assert (tmp_path / "run" / "lightning_logs" / "version_0").is_dir()
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize(
    "loggers",
    [
        "CSVLogger",
        {"class_path": "CSVLogger"},
        ["CSVLogger", {"class_path": "TensorBoardLogger", "init_args": {"name": "board"}}],
    ],
    ids=["name", "class", "list"],
)
def test_a_logger_by_name_in_a_recipe_writes_into_the_runs_folder(loggers, target, features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = recipe(target, features, tmp_path, trainer__max_steps=1, trainer__logger=loggers)
    assert main(["fit", "--config", str(path)]) == 0
    assert list((tmp_path / "run" / "lightning_logs").rglob("metrics.csv"))
    assert (tmp_path / "run" / "board").is_dir() == isinstance(loggers, list)
    assert not (tmp_path / "lightning_logs").exists()


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


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_a_cpu_without_bf16_trains_in_fp32(accelerator, target, features, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: False)
    found = {}
    for precision, has_bf16 in (("32-true", True), ("bf16-mixed", False), ("bf16-mixed", True)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda found=has_bf16: found)
        folder = tmp_path / f"{precision}-{has_bf16}"
        folder.mkdir()
        options = {"trainer__max_steps": 2, "trainer__precision": precision, "trainer__accelerator": accelerator}
        assert main(["fit", "--config", str(recipe(target, features, folder, **options))]) == 0
        found[folder.name] = weights(folder / "run")
        assert ("this CPU has no bf16 instructions" in caplog.text) == (not has_bf16)
        caplog.clear()
    expected, emulated, mixed = found.values()
    assert all(torch.equal(x, expected[name]) for name, x in emulated.items())
    assert not all(torch.equal(x, expected[name]) for name, x in mixed.items())
