"""Users' mistakes: one clear line that names file, line or key, an exit status other than 0, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specforge.cli import main
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


def test_unknown_model_option_with_the_nearest_valid_one(refused, target, features, tmp_path):
    line = refused("fit", "--config", recipe(target, features, tmp_path, model__init_args__stepz=5))
    assert "stepz" in line
    assert "model.steps" in line


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
        ("--layer_ids", "5", "layer_ids: must be a list, such as [1, 2]"),
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
    line = refused(
        "fit", "--config", recipe(target, features, tmp_path, model__init_args__layer_ids=[0, 3, 5])
    )
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
    assert "tiny has 264" in refused("fit", "--config", recipe(target, broken, tmp_path)).replace(
        str(target), "tiny"
    )


def test_capture_does_not_mix_layers_in_one_folder(refused, target, prompts, broken):
    line = refused(
        "capture", "--target", target, "--prompts", prompts, "--output", broken, "--dtype", "float32",
        "--layer_ids", "[0, 3, 5]",
    )  # fmt: skip
    assert "choose another folder" in line


def test_a_layer_that_the_target_does_not_have(refused, target, prompts, tmp_path):
    line = refused(
        "capture",
        "--target",
        target,
        "--prompts",
        prompts,
        "--output",
        tmp_path / "out",
        "--layer_ids",
        "[1, 3, 99]",
    )
    assert "99" in line
    assert not (tmp_path / "out").exists()


# Drafts and checkpoints.


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 64), ("vocab_size", 1000), ("draft_vocab_size", 9999), ("num_hidden_layers", 2)],
)
def test_draft_config_that_does_not_fit(refused, target, features, tmp_path, field, value):
    line = refused(
        "fit", "--config", recipe(target, features, tmp_path, model__init_args__draft_config={field: value})
    )
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
)  # fmt: skip
def test_what_a_module_refuses_is_said_in_its_own_words(refused, target, features, tmp_path, options, wanted):
    changes = {f"model__init_args__{key}": value for key, value in options.items()}
    line = refused("fit", "--config", recipe(target, features, tmp_path, **changes))
    assert line.startswith(wanted)
    assert "<class" not in line


@pytest.mark.parametrize("device", ["abc", "1", "nan", "cuda:99", "cpu:3", "meta"])
def test_a_device_that_this_machine_does_not_have(refused, target, prompts, tmp_path, device):
    capture = ["capture", "--target", target, "--prompts", prompts, "--output", tmp_path / "out"]
    assert device in refused(*capture, "--device", device)
    assert not (tmp_path / "out").exists()


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
    line = refused(
        "fit", "--config", recipe(target, features, tmp_path), "--ckpt_path", tmp_path / "none.ckpt"
    )
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
