"""Damaged files of a run and of a draft: one line, or fine."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from lightning_modules.eagle3 import Eagle3Module
from lightning_modules.loading import load_module
from specforge.callbacks.metrics import read_history
from specforge.cli.fit import main
from specforge.errors import mistake_behind
from specforge.eval.report import write_report
from tests.fuzz import survives
from tests.tiny import recipe

HISTORY = [
    {"step": 1, "seconds": 1.5, "train/loss": 2.0, "train/lr": 1e-3},
    {"step": 2, "seconds": 2.5, "val/tau": 1.4, "val/tau_low": 1.2, "val/tau_high": 1.6, "val/acceptance_1": 0.4},
]


def parsed(path: Path) -> None:
    """What `specforge fit` makes of a configuration file before it builds anything."""
    with suppress(SystemExit):  # of --print_config
        try:
            main("fit", ["--config", str(path), "--print_config"])
        except Exception as error:
            raise mistake_behind(error) or error from None


def test_a_damaged_configuration(target, features, tmp_path, fuzz, capsys):
    path = recipe(target, features, tmp_path)
    original = path.read_bytes()
    for data in fuzz.bytes([original], 40):
        path.write_bytes(data)
        survives(lambda: parsed(path), outside=tmp_path)


def test_a_damaged_history(tmp_path, fuzz):
    path = tmp_path / "metrics.jsonl"
    original = "".join(json.dumps(row) + "\n" for row in HISTORY).encode()
    for data in fuzz.bytes([original], 200):
        path.write_bytes(data)
        survives(lambda: read_history(path))
    for row in fuzz.values(HISTORY, 5):
        path.write_text("".join(json.dumps(x) + "\n" for x in (*HISTORY, row)) + '{"step": ')
        (tmp_path / "evaluation.json").write_text(json.dumps({"run": {}, "methods": [row]}))
        survives(lambda: write_report(tmp_path))


@pytest.fixture
def draft(target, tmp_path) -> Path:
    """Folder of a draft in the field's own form."""
    module = Eagle3Module(str(target), draft_config={"draft_vocab_size": 64})
    module.draft.trained = True
    module.export_format.to_hf(module.draft, module.target, tmp_path / "draft", "float32")
    return tmp_path / "draft"


def test_a_damaged_draft_folder(target, draft, fuzz):
    for name in ("config.json", "model.safetensors"):
        path = draft / name
        original = path.read_bytes()
        for data in fuzz.bytes([original], 40):
            path.write_bytes(data)
            survives(lambda: load_module(draft, str(target)), outside=draft)
        path.write_bytes(original)
    config = json.loads((draft / "config.json").read_text())
    for value in fuzz.values([config], 60):
        (draft / "config.json").write_text(json.dumps(value))
        survives(lambda: load_module(draft, str(target)), outside=draft)
