"""Users' mistakes: one clear line that names file, line or key, an exit status other than 0, nothing half-written."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import specforge.callbacks.report
from lightning_modules.eagle3 import Eagle3Module
from specforge.cli.main import COMMANDS, main
from specforge.errors import UserError
from tests.tiny import conversation, recipe, write_target


@pytest.fixture
def refused(capfd):
    """Run a command that must fail; returns its one line."""

    def run(*arguments: object) -> str:
        capfd.readouterr()
        status = main([str(a) for a in arguments])
        error = capfd.readouterr().err
        assert status != 0
        assert "Traceback" not in error
        lines = [line for line in error.splitlines() if line.startswith("specforge:")]
        assert len(lines) == 1, error
        return lines[0]

    return run


@pytest.fixture
def broken(features, tmp_path):
    """A copy of the features, to damage."""
    return Path(shutil.copytree(features, tmp_path / "features"))


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def prepare(data: Path, target: Path, output: Path) -> list[object]:
    return ["prepare", "--data", data, "--target", target, "--output", output]


# Configuration.


def test_unknown_key_with_the_nearest_valid_one(refused, target, features, tmp_path):
    line = refused("fit", "--config", recipe(target, features, tmp_path, trainer__max_stepz=5))
    assert "max_stepz" in line
    assert "trainer.max_steps" in line


def test_a_missing_model_option_is_named(refused):
    line = refused("fit", "--config", "eagle3.yaml")
    assert line == "specforge: model.target: required; set it in the recipe or with --model.target"


def test_unknown_model_option_with_the_nearest_valid_one(refused, target, features, tmp_path):
    line = refused("fit", "--config", recipe(target, features, tmp_path, model__init_args__stepz=5))
    assert "stepz" in line
    assert "model.steps" in line


@pytest.mark.parametrize(
    ("key", "hint"),
    [("has_vocabular", None), ("optimizer.lrs", "model.optimizer.lr"), ("layer_idz", "model.layer_ids")],
)
def test_only_real_options_are_suggested(key, hint, refused, target, features, tmp_path):
    line = refused("fit", "--config", recipe(target, features, tmp_path), f"--model.{key}", 1)
    assert key in line
    assert ("did you mean" in line) == (hint is not None)
    assert f"'{hint}'" in line or hint is None


def test_unknown_option_of_a_command(refused, target, tmp_path):
    line = refused(*prepare(tmp_path, target, tmp_path), "--max_lenght", 10)
    assert "max_lenght" in line
    assert "max_length" in line


def test_value_of_the_wrong_type(refused, target, features, tmp_path):
    line = refused("fit", "--config", recipe(target, features, tmp_path), "--model.steps", "many")
    assert "steps" in line


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--layer_ids", "x", "layer_ids: must be a whole number of at least 0, not x"),
        ("--encoding", "zip", "encoding: must be one of 'raw', 'float8_e4m3fn', not zip"),
    ],
)
def test_what_an_option_takes_is_said_in_words(refused, target, prompts, tmp_path, option, value, words):
    capture = ["capture", "--target", target, "--prompts", prompts, "--output", tmp_path / "out"]
    assert refused(*capture, option, value) == f"specforge: {words}"


def test_a_switch_is_true_or_false(refused, target, tmp_path):
    line = refused(*prepare(tmp_path, target, tmp_path), "--last_turn_only", "maybe")
    assert line == "specforge: last_turn_only: must be true or false, not maybe"


def test_no_such_recipe_with_the_nearest_one(refused):
    assert "eagle3.yaml" in refused("fit", "--config", "eagle.yaml")


# The trainer's settings, as given on the command line.

BAD_SETTINGS = {
    "trainer.max_steps": (0, -5, 1.5, "many"),
    "trainer.max_epochs": (-5,),
    "trainer.max_time": ("soon",),
    "trainer.accumulate_grad_batches": (0, -1, 1.5),
    "trainer.gradient_clip_val": (-1, "nan"),
    "trainer.gradient_clip_algorithm": ("nonsense",),
    "trainer.log_every_n_steps": (-1,),
    "trainer.num_sanity_val_steps": (-2,),
    "trainer.val_check_interval": (0, 0.0, -1, 1.5, 1000, "soon"),
    "trainer.check_val_every_n_epoch": (0, -1),
    "trainer.limit_train_batches": (-1, 1.5, 0.01),
    "trainer.limit_val_batches": (-1, 1.5, 0.001),
    "trainer.overfit_batches": (-1, 1.5),
    "trainer.fast_dev_run": (-1, 1.5),
    "trainer.barebones": ("true",),  # together with log_every_n_steps, which the recipe has
    "trainer.accelerator": ("nonsense", "tpu", "mps", *([] if torch.cuda.is_available() else ["cuda"])),
    "trainer.devices": (0, -3, 2.5, "nonsense", "[]"),
    "trainer.num_nodes": (0, -1),
    "trainer.strategy": ("nonsense", "deepspeed", "fsdp", "ddp_spawn"),
    "trainer.precision": ("nonsense", 8, "transformer-engine"),
    "trainer.deterministic": ("nonsense",),
    "trainer.profiler": ("nonsense",),
    "trainer.logger": ("nonsense", "WandbLogger"),
    "trainer.plugins": ("nonsense",),
    "trainer.callbacks": ("nonsense", '[{"class_path": "EarlyStopping", "init_args": {"monitor": "x", "mode": "y"}}]'),
    "trainer.reload_dataloaders_every_n_epochs": (-1,),
    "trainer.enable_checkpointing": ("nonsense",),
    "seed_everything": (-1, 2**70),
    "ckpt_path": ("best", "hpc", "registry:x", "none.ckpt", "/", ""),
    "checkpoint.keep": (0, -2),
    "checkpoint.every_n_train_steps": (-1,),
    "model.init_from": ("nonsense", ""),
    "model.target": ("/nowhere",),
    "model.draft_config": ("{", "[1", "{a: &a [*a]}", 7),
}


@pytest.mark.parametrize("key", BAD_SETTINGS)
def test_a_bad_setting_is_one_line_and_changes_nothing(key, refused, target, features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = recipe(target, features, tmp_path)
    for value in BAD_SETTINGS[key]:
        line = refused("fit", "--config", path, f"--{key}", value)
        named = (key.rpartition(".")[2], "specforge: trainer: ", "no class", "YAML", f"{value}:", "config.json")
        assert any(name in line for name in named), line
        assert not (tmp_path / "run").exists(), value


def test_a_library_outside_of_site_packages_is_not_the_users_code(refused, target, features, tmp_path, monkeypatch):
    """Such as those that `pip --target` installs."""
    get_path = sysconfig.get_path
    monkeypatch.setattr(sysconfig, "get_path", lambda kind: get_path(kind) if kind == "stdlib" else "/nowhere")
    logger = "lightning.pytorch.loggers.WandbLogger"
    assert "wandb" in refused("fit", "--config", recipe(target, features, tmp_path), "--trainer.logger", logger)


GOOD_SETTINGS = (
    {"enable_checkpointing": False},
    {"barebones": True, "log_every_n_steps": None},
    {"fast_dev_run": True},
    {"val_check_interval": 0.5},
    {"val_check_interval": 3, "check_val_every_n_epoch": None},
    {"log_every_n_steps": 0},
    {"limit_val_batches": 0},
    {"num_sanity_val_steps": -1},
    {"logger": False},
    {"gradient_clip_val": None},
    {"max_time": "00:01:00:00"},
    {"precision": "bf16-true"},
    {"overfit_batches": 2},
    {"detect_anomaly": True, "deterministic": True},
    {"callbacks": [{"class_path": "ModelCheckpoint"}]},
)


@pytest.mark.parametrize("settings", GOOD_SETTINGS, ids=str)
def test_a_valid_setting_trains(settings, target, features, tmp_path, monkeypatch):
    monkeypatch.setattr(specforge.callbacks.report, "write_report", str)
    trained = []
    monkeypatch.setattr(Eagle3Module, "on_train_batch_end", lambda *_: trained.append(1), raising=False)
    path = recipe(target, features, tmp_path, trainer__max_steps=3)
    config = yaml.safe_load(path.read_text())
    config["trainer"] |= settings
    config["trainer"] = {key: x for key, x in config["trainer"].items() if x is not None or key != "log_every_n_steps"}
    path.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(path)]) == 0
    assert len(trained) == (1 if "fast_dev_run" in settings else 3)


@pytest.mark.parametrize("hook", ["configure_optimizers", "on_fit_start", "training_loss", "on_save_checkpoint"])
def test_a_fault_of_an_algorithm_keeps_its_stack_trace(hook, target, features, tmp_path, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug of ours")

    monkeypatch.setattr(Eagle3Module, hook, broken)
    with pytest.raises(ValueError, match="a bug of ours"):
        main(["fit", "--config", str(recipe(target, features, tmp_path, trainer__max_steps=2))])


def fails_while_it_refuses() -> int:
    """A command with a fault."""
    try:
        raise UserError("a mistake")
    except UserError:
        return {}["a bug of ours"]


def test_a_fault_while_a_mistake_is_handled_keeps_its_stack_trace(monkeypatch):
    monkeypatch.setitem(COMMANDS, "doctor", (f"{__name__}:fails_while_it_refuses", ""))
    with pytest.raises(KeyError, match="a bug of ours"):
        main(["doctor"])


# Devices and dtypes.

NEED_A_DEVICE = {
    "regenerate": ("--data", "c.jsonl", "--target", "{target}", "--output", "out"),
    "capture": ("--prompts", "{prompts}", "--target", "{target}", "--output", "out"),
    "evaluate": ("--prompts", "{prompts}", "--draft", "draft"),
    "target serve": ("--target", "{target}", "--token_file", "out"),
    "produce": ("--target", "{target}", "--store", "out", "--metadata", "out.sqlite"),
    "fit": ("--config", "online.yaml"),
}


@pytest.mark.parametrize("command", NEED_A_DEVICE)
def test_a_device_or_dtype_that_does_not_exist(command, refused, target, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"class_path": "OnlineDataModule", "init_args": {"prompts": str(prompts), "batch_size": 4}}
    recipe(target, prompts, tmp_path, data=data).rename("online.yaml")
    words = [word.format(target=target, prompts=prompts) for word in NEED_A_DEVICE[command]]
    before, prefix = sorted(tmp_path.iterdir()), "data." if command == "fit" else ""
    for device in ("nonsense", "cuda:99", "meta", "cpu:x", "cpu:3", "1", ""):
        line = refused(*command.split(), *words, f"--{prefix}device", device)
        assert f"device {device!r}: " in line
    for dtype in ("nonsense", "int8", "float8_e4m3fn", "float"):
        if command != "produce":  # the trainer says which
            line = refused(*command.split(), *words, f"--{prefix}dtype", dtype)
            assert line.startswith(f"specforge: {prefix}dtype: must be one of 'float32'")
    assert sorted(tmp_path.iterdir()) == before


# The terminal.


def test_foreign_text_does_not_control_the_terminal(refused, target, prompts, tmp_path):
    evil = "a\x1b]0;title\x07\x1b[2J\x9b31m\r\u202eb\nc"
    for words in (
        prepare(tmp_path / evil, target, tmp_path / "out"),
        [evil],
        ["fit", "--config", evil],
        ["capture", "--target", evil, "--prompts", prompts, "--output", tmp_path / "out"],
        ["evaluate", "--draft", tmp_path / evil, "--prompts", prompts],
    ):
        assert refused(*words).isprintable()
    record = logging.LogRecord("specforge", logging.WARNING, "", 0, "left out %s", (evil,), None)
    assert logging.lastResort.format(record).replace("\n", "").isprintable()


# Conversations.


def test_malformed_json_line(refused, target, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", conversation(9), '{"messages": [', conversation(10))
    line = refused(*prepare(data, target, tmp_path / "out"))
    assert f"{data}, line 2" in line
    assert not (tmp_path / "out").exists()


def test_nothing_to_learn(refused, target, tmp_path):
    asks = {"messages": [{"role": "user", "content": "Anyone there?"}]}
    data = write_lines(tmp_path / "d.jsonl", conversation(9), asks)
    line = refused(*prepare(data, target, tmp_path / "out"))
    assert f"{data}, line 2" in line
    assert not (tmp_path / "out").exists()


def test_sample_too_long(refused, target, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", conversation(9))
    line = refused(*prepare(data, target, tmp_path / "out"), "--max_length", 20)
    assert f"{data}, line 1" in line
    assert "max_length" in line
    assert not (tmp_path / "out").exists()


def test_missing_conversations(refused, target, tmp_path):
    assert "nowhere.jsonl" in refused(*prepare(tmp_path / "nowhere.jsonl", target, tmp_path / "out"))


# The target.


def test_missing_model(refused, conversations, tmp_path):
    assert "no-such-model" in refused(*prepare(conversations, tmp_path / "no-such-model", tmp_path / "out"))


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_pickle_where_safetensors_belongs(refused, target, prompts, tmp_path):
    pickled = Path(shutil.copytree(target, tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    line = refused("capture", "--target", pickled, "--prompts", prompts, "--output", tmp_path / "out")
    assert "pickle" in line
    assert not (tmp_path / "exploded").exists()


def test_a_pickled_draft_and_a_pickled_checkpoint(refused, target, prompts, tmp_path):
    for name in ("draft.ckpt", "model.safetensors"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        line = refused("evaluate", "--draft", path, "--prompts", prompts, "--target", target)
        assert name in line
    assert not (tmp_path / "exploded").exists()


# Features.


def test_features_of_another_target(refused, features, tmp_path):
    other = write_target(tmp_path / "other", seed=1)
    line = refused("fit", "--config", recipe(other, features, tmp_path))
    assert "captured from" in line
    assert str(other) in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_features_of_other_layers(refused, target, features, tmp_path):
    line = refused("fit", "--config", recipe(target, features, tmp_path, model__init_args__layer_ids=[0, 3, 5]))
    assert "[1, 3, 4]" in line.replace("(", "[").replace(")", "]")
    assert "[0, 3, 5]" in line.replace("(", "[").replace(")", "]")


def test_no_features(refused, target, tmp_path):
    assert "specforge capture" in refused("fit", "--config", recipe(target, tmp_path / "nothing", tmp_path))


def test_bit_flip_in_a_shard(refused, target, broken, tmp_path):
    shard = next((broken / "train").glob("*.safetensors"))
    shards = sorted((broken / "train").glob("shard-*.safetensors"))
    data = bytearray(shards[0].read_bytes())
    data[-1000] ^= 4
    shards[0].write_bytes(data)
    line = refused("fit", "--config", recipe(target, broken, tmp_path), "--trainer.max_steps", 8)
    assert "checksum" in line
    assert "sample " in line
    assert shard is not None


def test_truncated_shard(refused, target, broken, tmp_path):
    shard = next((broken / "train").glob("shard-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    line = refused("fit", "--config", recipe(target, broken, tmp_path))
    assert str(shard) in line


def test_damaged_samples_can_be_left_out(target, broken, tmp_path):
    shard = next((broken / "train").glob("shard-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 4
    shard.write_bytes(data)
    path = recipe(target, broken, tmp_path, data__init_args__bad_samples="skip")
    assert main(["fit", "--config", str(path), "--trainer.max_steps", "8"]) == 0


def test_damaged_manifest(refused, target, broken, tmp_path):
    manifest = broken / "train" / "manifest.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join([lines[0], "{}\n", *lines[1:]]))
    line = refused("fit", "--config", recipe(target, broken, tmp_path))
    assert f"{manifest}, line 2" in line


@pytest.mark.parametrize("shapes", [(263, 263), (264, 263), ((264, 1), (264, 1))])
def test_token_counts_of_another_vocabulary(refused, target, broken, tmp_path, shapes):
    supervised, context = (torch.ones(shape, dtype=torch.int64) for shape in shapes)
    save_file({"supervised": supervised, "context": context}, broken / "train" / "token_counts.safetensors")
    assert "tiny has 264" in refused("fit", "--config", recipe(target, broken, tmp_path)).replace(str(target), "tiny")


def test_capture_does_not_mix_layers_in_one_folder(refused, target, prompts, broken):
    line = refused(
        "capture",
        "--target",
        target,
        "--prompts",
        prompts,
        "--output",
        broken,
        "--dtype",
        "float32",
        "--layer_ids",
        "[0, 3, 5]",
    )
    assert "choose another folder" in line


def test_a_layer_that_the_target_does_not_have(refused, target, prompts, tmp_path):
    line = refused(
        "capture", "--target", target, "--prompts", prompts, "--output", tmp_path / "out", "--layer_ids", "[1, 3, 99]"
    )
    assert "99" in line
    assert not (tmp_path / "out").exists()


# Drafts and checkpoints.


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 64), ("vocab_size", 1000), ("draft_vocab_size", 9999), ("num_hidden_layers", 2)],
)
def test_draft_config_that_does_not_fit(refused, target, features, tmp_path, field, value):
    line = refused("fit", "--config", recipe(target, features, tmp_path, model__init_args__draft_config={field: value}))
    assert line.startswith("specforge: model.draft_config: ")
    assert field in line
    assert str(value) in line


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"init_from": "/nowhere/draft"}, "specforge: /nowhere/draft: no such checkpoint"),
        ({"layer_ids": [0, 1, 99]}, "specforge: layer 99: "),
        ({"draft_config": {"draft_vocab_sise": 1}}, "specforge: model.draft_config: draft_vocab_sise is 1, which "),
        ({"target": "/nowhere/target"}, "specforge: target '/nowhere/target': no such folder"),
    ],
)
def test_what_a_module_refuses_is_said_in_its_own_words(refused, target, features, tmp_path, options, wanted):
    changes = {f"model__init_args__{key}": value for key, value in options.items()}
    line = refused("fit", "--config", recipe(target, features, tmp_path, **changes))
    assert line.startswith(wanted)
    assert "<class" not in line


def test_checkpoint_of_another_algorithm(refused, target, features, tmp_path):
    path = recipe(target, features, tmp_path, trainer__max_steps=1)
    assert main(["fit", "--config", str(path)]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content["specforge"]["algorithm"] = "medusa"
    torch.save(content, tmp_path / "other.ckpt")
    line = refused("fit", "--config", path, "--ckpt_path", tmp_path / "other.ckpt")
    assert "medusa" in line
    assert "eagle3" in line


def test_missing_checkpoint(refused, target, features, tmp_path):
    line = refused("fit", "--config", recipe(target, features, tmp_path), "--ckpt_path", tmp_path / "none.ckpt")
    assert "none.ckpt" in line


def test_a_new_run_does_not_overwrite_an_old_one(refused, target, features, tmp_path):
    path = recipe(target, features, tmp_path, trainer__max_steps=1)
    assert main(["fit", "--config", str(path)]) == 0
    before = (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes()
    assert "--ckpt_path last" in refused("fit", "--config", path)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes() == before


def test_a_folder_that_is_no_draft(refused, target, prompts, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    line = refused("evaluate", "--draft", tmp_path, "--prompts", prompts, "--target", target)
    assert "config.json" in line


# The disk.


def test_full_disk(refused, target, prompts, conversations, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in refused(*prepare(conversations, target, tmp_path / "prompts"))
    line = refused("capture", "--target", target, "--prompts", prompts, "--output", tmp_path / "features")
    assert "No space left" in line
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not left, left
