"""The whole way on the real SmolLM2-135M-Instruct, in small: run it with `specforge target fetch` done before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specforge.cli.main import main

TARGET = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct"
DATA = Path(__file__).parents[1] / "configs" / "quickstart" / "conversations.jsonl"

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(not TARGET.exists(), reason="specforge target fetch has not been run here"),
]


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def test_prepare_capture_fit_evaluate_export(tmp_path):
    lines = DATA.read_text().splitlines(keepends=True)
    data = tmp_path / "data.jsonl"
    data.write_text("".join([*lines[:2], *lines[49:69]]))
    run("prepare", "--data", data, "--target", TARGET, "--output", tmp_path / "prompts")
    run(
        "capture",
        "--target",
        TARGET,
        "--prompts",
        tmp_path / "prompts",
        "--output",
        tmp_path / "features",
        "--layer_ids",
        "[14, 22, 28]",
    )
    run(
        "fit",
        "--config",
        "quickstart.yaml",
        "--model.target",
        TARGET,
        "--data.features",
        tmp_path / "features",
        "--trainer.default_root_dir",
        tmp_path / "run",
        "--trainer.max_steps",
        24,
        "--trainer.val_check_interval",
        12,
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.accelerator",
        "cpu",
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0]
    run(
        "evaluate",
        "--draft",
        tmp_path / "run" / "checkpoints" / "last.ckpt",
        "--prompts",
        tmp_path / "prompts",
        "--json",
        tmp_path / "evaluation.json",
        "--max_new_tokens",
        12,
        "--speed_prompts",
        1,
        "--cache",
        tmp_path / "cache",
        "--device",
        "cpu",
    )
    for row in json.loads((tmp_path / "evaluation.json").read_text())["methods"]:
        assert row["lossless"] is True
        assert row["tau"] == pytest.approx(row["offline_tau"], abs=0.1)
    run("export", "--draft", tmp_path / "run" / "checkpoints" / "last.ckpt", "--output", tmp_path / "draft")
