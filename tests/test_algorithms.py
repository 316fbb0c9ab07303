"""What holds for every algorithm with a recipe of its own, from end to end on the tiny target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from specforge.callbacks.metrics import read_history
from specforge.cli.main import main
from specforge.cli.recipes import recipe_folder
from tests.ranks import train_on_ranks
from tests.tiny import TINY_OPTIONS, conversation

RECIPES = sorted(
    path.name
    for path in recipe_folder().glob("*-smollm2.yaml")
    if yaml.safe_load(path.read_text())["data"]["class_path"] == "OfflineDataModule"
)


def train(name: str, target: Path, features: Path, folder: Path, **changes: object) -> dict[str, torch.Tensor]:
    """Run a shipped recipe for four steps in fp32; returns the draft's weights."""
    module = yaml.safe_load((recipe_folder() / name).read_text())["model"]["class_path"]
    options = {
        "--trainer.accelerator": "cpu",
        "--trainer.max_steps": 4,
        "--trainer.precision": "32-true",
        "--trainer.default_root_dir": folder,
        "--trainer.enable_progress_bar": "false",
        "--trainer.limit_val_batches": 0,
        "--checkpoint.every_n_train_steps": 2,
        "--data.features": features,
        "--data.batch_size": 4,
        "--model.target": target,
        **{f"--model.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in TINY_OPTIONS[module].items()},
        **changes,
    }
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


LATENT = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {
    "moe": True,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "n_group": 4,
    "topk_group": 2,
    "num_key_value_heads": 4,
}
# What has a network or an optimizer of its own beside the recipes: the recipe that it changes, fields of the draft
# config, and other options of the model.
VARIANTS: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    **{name.removesuffix("-smollm2.yaml"): (name, {}, {}) for name in RECIPES},
    "eagle3": ("eagle3_1-smollm2.yaml", {"fc_norm": False, "norm_output": False}, {"init_from": None}),
    "eagle3-mla": (
        "eagle3_1-smollm2.yaml",
        {"architectures": ["Eagle3DeepseekV2ForCausalLM"], **LATENT},
        {"init_from": None},
    ),
    "mtp-nextn": (
        "mtp-smollm2.yaml",
        {"architectures": ["DeepseekMTPDraft"], "model_type": "deepseek_v3", **LATENT, **EXPERTS},
        {"init_from": None},
    ),
    "peagle-embedding": ("peagle-smollm2.yaml", {"embed_requires_grad": True}, {}),
    "standalone-embedding": ("standalone-smollm2.yaml", {}, {"train_embedding": True}),
    "dspark-rnn": ("dspark-smollm2.yaml", {"markov_head_type": "rnn", "markov_rank": 8}, {}),
    "dspark-muon": (
        "dspark-smollm2.yaml",
        {"markov_head_type": "gated", "markov_rank": 8},
        {"optimizer": {"name": "muon", "lr": 1e-3}},
    ),
}


@pytest.fixture(scope="module")
def uneven(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of 13 documents, every third without an anchor for a block, and of 3 held-out ones."""
    folder = tmp_path_factory.mktemp("uneven")
    documents = [conversation(i) for i in range(16)]
    for number, document in enumerate(documents):
        document["split"] = "train" if number < 13 else "heldout"
        if number % 3 == 0:
            document["messages"][1]["content"] = ""
    (folder / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    words = ["prepare", "--data", folder / "data.jsonl", "--target", target, "--output", folder / "prompts"]
    assert main([str(word) for word in words]) == 0
    words = ["capture", "--target", target, "--prompts", folder / "prompts", "--output", folder / "features"]
    assert main([str(word) for word in [*words, "--dtype", "float32"]]) == 0
    rows = [json.loads(line) for line in (folder / "features/train/manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 13
    assert sum(row["num_supervised"] == 1 for row in rows) == 5
    return folder / "features"


def epoch(variant: str, target: Path, features: Path, folder: Path, **changes: object) -> list[str]:
    """Words of a run of one epoch in fp32 that validates at its end."""
    recipe, fields, more = VARIANTS[variant]
    tiny = TINY_OPTIONS[yaml.safe_load((recipe_folder() / recipe).read_text())["model"]["class_path"]]
    model = {**tiny, **more, "draft_config": {"num_hidden_layers": 1, **tiny["draft_config"], **fields}}
    options = {
        "--trainer.accelerator": "cpu",
        "--trainer.max_epochs": 1,
        "--trainer.max_steps": -1,
        "--trainer.precision": "32-true",
        "--trainer.default_root_dir": folder,
        "--trainer.logger": "false",
        "--trainer.enable_progress_bar": "false",
        "--trainer.log_every_n_steps": 1,
        "--trainer.check_val_every_n_epoch": 1,
        "--trainer.val_check_interval": 1.0,
        "--data.val_batch_size": 1,
        "--data.features": features,
        "--model.target": target,
        "--checkpoint.every_n_train_steps": 2,
        **{f"--model.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in model.items()},
        **changes,
    }
    return ["--config", recipe, *(str(word) for pair in options.items() for word in pair)]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def finished(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """A run's weights and history."""
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
    assert saved["global_step"] == 4
    return saved["state_dict"], read_history(folder / "metrics.jsonl")


RESUMED = {"eagle3", "mtp-nextn", "dspark-muon"}  # what a sharded checkpoint may hold: layers, experts, momenta of Muon
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=TWO_GPUS)])
def test_two_ranks_are_one_whole_or_sharded(accelerator, target, uneven, tmp_path):
    """Windows of four documents, the last of one: on one rank, or in two micro-batches of one document on each of two.

    A rank meets documents without a block, and at the end no document at all. Sharded runs, resumed from their middle,
    end with their own weights: on CPUs bit for bit.
    """
    jobs = {}
    on = {"--trainer.accelerator": accelerator}
    two = {**on, "--trainer.devices": 2, "--data.batch_size": 1, "--trainer.accumulate_grad_batches": 2}
    one = {**on, "--trainer.devices": 1, "--data.batch_size": 4}
    for variant in VARIANTS:
        for strategy in ("ddp", "fsdp2"):
            run = tmp_path / variant / strategy
            jobs[f"{variant}, {strategy}"] = epoch(
                variant, target, uneven, run, **two, **{"--trainer.strategy": strategy}
            )
        if variant in RESUMED:
            half = {"--trainer.strategy": "fsdp2", "--ckpt_path": run / "checkpoints" / "step-00000002.ckpt"}
            jobs[f"{variant}, resumed"] = epoch(variant, target, uneven, tmp_path / variant / "resumed", **two, **half)
        alone = epoch(variant, target, uneven, tmp_path / variant / "one", **one)
        assert main(["fit", *alone]) == 0
    train_on_ranks(jobs, 2)
    for variant in VARIANTS:
        weights, history = finished(tmp_path / variant / "one")
        # Muon's iteration in bf16 magnifies the last bits of a gradient whose rank is small.
        atol = 1e-3 if variant.endswith("muon") else 1e-5 if accelerator == "cpu" else 1e-4
        for strategy in ("ddp", "fsdp2"):
            found, rows = finished(tmp_path / variant / strategy)
            assert_close(found, weights, 1e-4, atol)
            for row, alone in zip(rows, history, strict=True):
                for name in {"train/loss", "val/loss", "val/tau"} & alone.keys():
                    assert row[name] == pytest.approx(alone[name], rel=1e-4), (variant, strategy, name)
        if variant in RESUMED:
            assert_close(finished(tmp_path / variant / "resumed")[0], found, 0, 0 if accelerator == "cpu" else atol)
