"""Every shipped recipe on a GPU: it trains in its own precision, and what it drafts there is lossless."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
import yaml

from specforge.cli import main
from specforge.recipes import recipe_folder
from tests.disaggregated import places, producers
from tests.tiny import TINY_OPTIONS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("path", sorted(recipe_folder().glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_trains_and_decodes_on_a_gpu(path, target, features, prompts, tmp_path):
    config = yaml.safe_load(path.read_text())
    data = {"features": features, "prompts": prompts}
    options = {
        "--trainer.accelerator": "gpu", "--trainer.devices": 1, "--trainer.strategy": "auto", "--trainer.max_steps": 3,
        "--trainer.default_root_dir": tmp_path,
        "--model.target": target,
        **{f"--data.{name}": data[name] for name in data if name in config["data"]["init_args"]},
        **{
            f"--model.{k}": v if isinstance(v, str) else json.dumps(v)
            for k, v in TINY_OPTIONS[config["model"]["class_path"]].items()
        },
    }  # fmt: skip
    where = places(tmp_path) if "store" in config["data"]["init_args"] else {}
    options |= {f"--data.{name}": place for name, place in where.items()}
    words = [str(word) for pair in options.items() for word in pair]
    with producers(target, where, dtype="bfloat16") if where else nullcontext():
        assert main(["fit", "--config", path.name, *words]) == 0
    evaluate = {
        "--draft": tmp_path / "checkpoints" / "last.ckpt", "--prompts": prompts, "--num_prompts": 3, "--device": "cuda",
        "--max_new_tokens": 16, "--speed_prompts": 1, "--json": tmp_path / "evaluation.json", "--cache": tmp_path,
    }  # fmt: skip
    assert main(["evaluate", *(str(word) for pair in evaluate.items() for word in pair)]) == 0
    methods = json.loads((tmp_path / "evaluation.json").read_text())["methods"]
    assert all(m["lossless"] for m in methods)
    assert methods[-1]["tau"] == pytest.approx(methods[-1]["offline_tau"])
