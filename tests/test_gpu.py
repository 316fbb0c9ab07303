"""Every shipped recipe on a GPU: it trains in its own precision, and what it drafts there is lossless."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
import yaml

from specforge.cli.main import main
from specforge.cli.recipes import recipe_folder
from specforge.contracts import CapturePolicy
from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_files import TargetFiles
from specforge.runtime.data_plane.local import MemoryBackend
from tests.disaggregated import places, producers
from tests.tiny import TINY_OPTIONS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("path", sorted(recipe_folder().glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_trains_and_decodes_on_a_gpu(path, target, features, prompts, tmp_path):
    config = yaml.safe_load(path.read_text())
    data = {"features": features, "prompts": prompts}
    options = {
        "--trainer.accelerator": "gpu",
        "--trainer.devices": 1,
        "--trainer.strategy": "auto",
        "--trainer.max_steps": 3,
        "--trainer.default_root_dir": tmp_path,
        "--model.target": target,
        **{f"--data.{name}": data[name] for name in data if name in config["data"]["init_args"]},
        **{
            f"--model.{k}": v if isinstance(v, str) else json.dumps(v)
            for k, v in TINY_OPTIONS[config["model"]["class_path"]].items()
        },
    }
    where = places(tmp_path) if "store" in config["data"]["init_args"] else {}
    options |= {f"--data.{name}": place for name, place in where.items()}
    words = [str(word) for pair in options.items() for word in pair]
    with producers(target, where, dtype="bfloat16") if where else nullcontext():
        assert main(["fit", "--config", path.name, *words]) == 0
    evaluate = {
        "--draft": tmp_path / "checkpoints" / "last.ckpt",
        "--prompts": prompts,
        "--num_prompts": 3,
        "--device": "cuda",
        "--max_new_tokens": 16,
        "--speed_prompts": 1,
        "--json": tmp_path / "evaluation.json",
        "--cache": tmp_path,
    }
    assert main(["evaluate", *(str(word) for pair in evaluate.items() for word in pair)]) == 0
    methods = json.loads((tmp_path / "evaluation.json").read_text())["methods"]
    assert all(m["lossless"] for m in methods)
    assert methods[-1]["tau"] == pytest.approx(methods[-1]["offline_tau"])


def test_features_leave_the_gpu_through_page_locked_memory(target):
    engine = HFTargetEngine(TargetFiles.find(str(target)), "float32", "cuda")
    policy = CapturePolicy((0, 1), last_hidden_states=True)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    for _ in range(3):  # in blocks that were used before
        for ids, features in zip(prompts, engine.capture(prompts, policy), strict=True):
            (alone,) = engine.capture([ids], policy)
            for name, x in features.items():
                assert x.is_pinned()
                assert x.shape[0] == len(ids)
                torch.testing.assert_close(x, alone[name])
            kept = MemoryBackend()
            kept.write("a.1", features)
            assert not any(x.is_pinned() for x in kept.read("a.1", "").values())


LATENT = {
    "architectures": ["Eagle3DeepseekV2ForCausalLM"],
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("eagle3.yaml", {"head_dim": 16}),
        ("eagle3.yaml", LATENT),
        ("mtp-smollm2.yaml", {"head_dim": 16}),
        ("peagle-smollm2.yaml", {"head_dim": 16}),
        ("dflash-smollm2.yaml", {"head_dim": 16}),
    ],
    ids=["eagle3", "latent", "mtp", "peagle", "dflash"],
)
def test_flex_attention_trains_to_the_same_weights(name, fields, target, features, tmp_path):
    module = yaml.safe_load((recipe_folder() / name).read_text())["model"]["class_path"]
    weights = []
    for kernel in ("sdpa", "flex_attention"):
        model = {**TINY_OPTIONS[module], "init_from": None}
        model["draft_config"] = {**model["draft_config"], **fields, "attn_implementation": kernel}
        options = {
            "--trainer.accelerator": "gpu",
            "--trainer.devices": 1,
            "--trainer.precision": "32-true",
            "--trainer.max_steps": 3,
            "--trainer.default_root_dir": tmp_path / kernel,
            "--data.features": features,
            "--model.target": target,
            "--trainer.limit_val_batches": 0,
            **{f"--model.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in model.items()},
        }
        assert main(["fit", "--config", name, *(str(x) for pair in options.items() for x in pair)]) == 0
        saved = torch.load(tmp_path / kernel / "checkpoints" / "last.ckpt", weights_only=True)
        weights.append(saved["state_dict"])
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=2e-3, atol=2e-5, msg=key)
