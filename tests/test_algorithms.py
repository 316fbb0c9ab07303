"""What holds for every algorithm with a recipe of its own, from end to end on the tiny target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from specforge.cli import main
from specforge.recipes import recipe_folder
from tests.tiny import TINY_OPTIONS

RECIPES = sorted(
    path.name
    for path in recipe_folder().glob("*-smollm2.yaml")
    if yaml.safe_load(path.read_text())["data"]["class_path"] == "OfflineDataModule"
)


def train(
    name: str, target: Path, features: Path, folder: Path, **changes: object
) -> dict[str, torch.Tensor]:
    """Run a shipped recipe for four steps in fp32; returns the draft's weights."""
    module = yaml.safe_load((recipe_folder() / name).read_text())["model"]["class_path"]
    options = {
        "--trainer.accelerator": "cpu", "--trainer.max_steps": 4, "--trainer.precision": "32-true",
        "--trainer.default_root_dir": folder, "--trainer.enable_progress_bar": "false",
        "--trainer.limit_val_batches": 0, "--checkpoint.every_n_train_steps": 2,
        "--data.features": features, "--data.batch_size": 4, "--model.target": target,
        **{f"--model.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in TINY_OPTIONS[module].items()},
        **changes,
    }  # fmt: skip
    assert main(["fit", "--config", name, *(str(word) for pair in options.items() for word in pair)]) == 0
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    return dict(saved["state_dict"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_goes_on_from_its_middle_ends_with_the_same_weights(name, target, features, tmp_path):
    whole = train(name, target, features, tmp_path)
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.unlink()
    (tmp_path / "checkpoints" / "step-00000004.ckpt").unlink()
    last.symlink_to("step-00000002.ckpt")
    resumed = train(name, target, features, tmp_path, **{"--ckpt_path": "last"})
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key


@pytest.mark.parametrize("name", RECIPES)
def test_accumulating_two_batches_is_one_batch_of_both(name, target, features, tmp_path):
    one = train(name, target, features, tmp_path / "one")
    halves = {"--data.batch_size": 2, "--trainer.accumulate_grad_batches": 2}
    two = train(name, target, features, tmp_path / "two", **halves)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=2e-3, atol=2e-5, msg=key)
