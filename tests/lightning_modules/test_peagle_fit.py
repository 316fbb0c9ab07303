"""`specforge fit` of P-EAGLE on the tiny target: resuming, accumulation, and the whole way to an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from specforge.cli.main import main
from specforge.inference.target_files import TargetFiles
from tests.tiny import recipe

MODEL = {
    "class_path": "PEagleModule",
    "init_args": {
        "depths": 5,
        "draft_config": {"draft_vocab_size": 64, "num_hidden_layers": 2},
        "optimizer": {"lr": 1e-3},
    },
}


def options(target: Path, **changes: object) -> dict[str, object]:
    model = {**MODEL, "init_args": {**MODEL["init_args"], "target": str(target)}}
    return {"model": model, "trainer__max_steps": 6, "checkpoint": {"every_n_train_steps": 3}, **changes}


def fit(path: Path, *words: object) -> dict[str, torch.Tensor]:
    assert main(["fit", "--config", str(path), *map(str, words)]) == 0
    run = Path(yaml.safe_load(path.read_text())["trainer"]["default_root_dir"])
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_resumed_run_draws_the_same_elements(target, features, tmp_path):
    whole = fit(recipe(target, features, tmp_path / "whole", **options(target)))
    (half,) = (tmp_path / "whole" / "run" / "checkpoints").glob("step-*3.ckpt")
    resumed = fit(recipe(target, features, tmp_path / "cut", **options(target)), "--ckpt_path", half)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_muon_takes_the_matrices_only(target, features, tmp_path):
    words = ["--model.optimizer.name", "muon", "--trainer.max_steps", 2]
    trained = fit(recipe(target, features, tmp_path, **options(target)), *words)
    assert all(bool(x.isfinite().all()) for x in trained.values())


def test_an_embedding_of_its_own_starts_as_the_targets_and_is_trained(target, features, tmp_path):
    path = recipe(target, features, tmp_path, **options(target))
    words = ["--model.draft_config", "{draft_vocab_size: 64, num_hidden_layers: 1, embed_requires_grad: true}"]
    trained = fit(path, *words, "--trainer.max_steps", 2)["draft.embed_tokens.weight"]
    moved = (trained - TargetFiles.find(str(target)).embedding()).abs()
    assert 0 < float(moved.max()) < 0.01


def test_batch_of_4_is_accumulation_of_4(target, features, tmp_path):
    changes = {"trainer__accumulate_grad_batches": 4, "data__init_args__batch_size": 1}
    whole = fit(recipe(target, features, tmp_path / "whole", **options(target)))
    parts = fit(recipe(target, features, tmp_path / "parts", **options(target, **changes)))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_trained_draft_is_evaluated_and_exported(target, features, prompts, tmp_path, temperature):
    fit(recipe(target, features, tmp_path, **options(target)))
    draft = tmp_path / "run" / "checkpoints" / "last.ckpt"
    words = [
        "evaluate",
        "--draft",
        draft,
        "--prompts",
        prompts,
        "--json",
        tmp_path / "e.json",
        "--cache",
        tmp_path / "cache",
        "--max_new_tokens",
        12,
        "--speed_prompts",
        1,
        "--temperature",
        temperature,
    ]
    assert main([str(word) for word in words]) == 0
    row = json.loads((tmp_path / "e.json").read_text())["methods"][-1]
    assert row["method"] == "peagle"
    if temperature == 0:
        assert row["lossless"]
        assert row["tau"] == row["offline_tau"]
    words = ["export", "--draft", draft, "--output", tmp_path / "hf", "--to", "hf", "--dtype", "float32"]
    assert main([str(word) for word in words]) == 0
    assert main([str(w) for w in [*words[:4], tmp_path / "sglang", "--to", "sglang"]]) != 0
