"""A draft is loaded with the target it was trained on; any other is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lightning_modules.eagle3 import Eagle3Module
from lightning_modules.loading import load_module
from specforge.checkpoints import checkpoint_bytes
from specforge.errors import UserError
from tests.tiny import write_target


@pytest.fixture
def module(target) -> Eagle3Module:
    made = Eagle3Module(str(target), layer_ids=[1, 3, 4])
    torch.nn.init.normal_(made.draft.norm.weight, 1.0, 0.1)  # as if it had been trained
    return made


def checkpoint(module: Eagle3Module, path: Path, **fields: object) -> Path:
    content = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    path.write_bytes(checkpoint_bytes(content | {"specforge": content["specforge"] | fields}))
    return path


def test_a_draft_of_another_target_is_refused_by_both_names(module, target, tmp_path):
    saved, draft = checkpoint(module, tmp_path / "x.ckpt"), tmp_path / "draft"
    other = str(write_target(tmp_path / "other", vocab_size=300))
    own = f"{target} ({module.target.fingerprint[:8]})"
    with pytest.raises(UserError, match=re.escape(f"{saved}: was trained on {own}, not on {other} (")):
        load_module(saved, other)
    module.export_format.to_sglang(module.draft, module.target, draft, "float32")
    words = f"{draft / 'config.json'}: vocab_size is 264, but the target {other} has 300"
    with pytest.raises(UserError, match=re.escape(words)):
        load_module(draft, other)
    assert load_module(saved, str(target)).target.fingerprint == module.target.fingerprint


def test_a_target_that_is_not_found_from_this_folder_is_named_with_the_option(module, tmp_path, monkeypatch):
    saved = checkpoint(module, tmp_path / "x.ckpt", target="models/tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = f"{saved}: was trained on models/tiny, which is not found; name its folder with --target"
    with pytest.raises(UserError, match=re.escape(message)):
        load_module(saved, None)
