"""The quickstart's conversations through SmolLM2's own tokenizer are the same samples as ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from specforge.cli.main import main
from specforge.data.prompts import identity, load_splits

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "models" / "SmolLM2-135M-Instruct"

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not TARGET.exists(), reason="specforge target fetch has not been run here"),
]


def test_the_quickstart_has_the_samples_that_its_first_version_had(tmp_path):
    data = ROOT / "configs" / "quickstart" / "conversations.jsonl"
    words = ["prepare", "--data", data, "--target", TARGET, "--output", tmp_path]
    assert main([str(word) for word in words]) == 0
    sets = load_splits(tmp_path)
    assert {name: len(prompts.tasks) for name, prompts in sets.items()} == {"train": 1920, "heldout": 49}
    assert identity(sets) == "02bb39876d2edb0fcab753d28b89818e"
