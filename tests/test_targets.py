"""The family matrix: what works with targets of many architectures, from conversations to an exported draft.

Each family is a tiny random target, taken through every command on the line of `docs/targets.md` that it has there, or
refused there by name. `pytest tests/test_targets.py --write-docs` writes the page (in one process).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge.cli.main import main
from specforge.decoding.runners import runs_in_lockstep
from specforge.inference.target_engine.hf import HFTargetEngine, can_roll_back
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft import build_draft
from tests.families import FAMILIES, write_family
from tests.tiny import recipe, write_conversations

PAGE = Path(__file__).parents[1] / "docs" / "targets.md"
# Targets whose head or whose layers are of a kind of their own, and drafts that depend on that beside EAGLE-3's.
OTHERS = {
    "cohere": "mtp",
    "gemma2": "dflash",
    "phi": "dspark",
    "phimoe": "mtp",
    "minicpm3": "dflash",
    "granite": "medusa",
    "lfm2": "hydra",
    "nanochat": "domino",
    "ernie4_5_moe": "dflash2",
    "gpt_oss": "peagle",
}
MODULES = {
    "mtp": ("MTPModule", {}),
    "medusa": ("MedusaModule", {}),
    "hydra": ("HydraModule", {}),
    "dflash": ("DFlashModule", {"num_hidden_layers": 1, "block_size": 4}),
    "dspark": ("DSparkModule", {"num_hidden_layers": 1, "block_size": 4, "markov_rank": 8}),
    "dflash2": ("DFlash2Module", {"num_hidden_layers": 1, "block_size": 4, "dflash_config": {"selector_rank": 8}}),
    "domino": (
        "DominoModule",
        {"num_hidden_layers": 1, "block_size": 4, "dflash_config": {"gru_hidden_dim": 16, "emb_dim": 8}},
    ),
    "peagle": ("PEagleModule", {"num_hidden_layers": 2}),
}


def call(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def evaluate(run: Path, prompts: Path, output: Path, batch_size: int) -> list[dict[str, Any]]:
    call(
        "evaluate",
        "--draft",
        run / "checkpoints" / "last.ckpt",
        "--prompts",
        prompts,
        "--json",
        output,
        "--cache",
        output.parent / "cache",
        "--num_prompts",
        4,
        "--max_new_tokens",
        6,
        "--gamma",
        2,
        "--speed_prompts",
        0,
        "--baselines",
        "[ngram]",
        "--batch_size",
        batch_size,
    )
    return json.loads(output.read_text())["methods"]


def train(target: Path, prompts: Path, folder: Path, algorithm: str = "eagle3", **model: object) -> Path:
    call(
        "capture",
        "--target",
        target,
        "--prompts",
        prompts,
        "--output",
        folder / "features",
        "--dtype",
        "float32",
        "--algorithm",
        algorithm,
    )
    call("fit", "--config", recipe(target, folder / "features", folder, trainer__max_steps=4, **model))
    return folder / "run"


def assert_its_answers_are_the_targets(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["identical"] == row["prompts"] == 4, row["method"]
        assert row["tau"] == pytest.approx(row["offline_tau"], abs=1e-9), row["method"]


def assert_the_export_says_what_was_trained(run: Path, output: Path) -> None:
    call("export", "--draft", run / "checkpoints" / "last.ckpt", "--output", output, "--to", "hf")
    written = json.loads((output / "config.json").read_text())
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["specforge"]["draft_config"]
    mine, theirs = (build_draft(config).rotary(40, torch.device("cpu")) for config in (saved, written))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    rotated = written["head_dim"] * written["rope_parameters"].get("partial_rotary_factor", 1.0)
    assert 2 * theirs[0].shape[1] == int(rotated)
    assert written["eagle_aux_hidden_state_layer_ids"] == [
        layer + 1 for layer in written["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    ]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.refusal is None])
def test_a_family_from_conversations_to_a_draft(name, tmp_path, request):
    target, prompts = write_family(name, tmp_path / "target", layers=6), tmp_path / "prompts"
    conversations = write_conversations(tmp_path / "conversations.jsonl", 24)
    call("prepare", "--data", conversations, "--target", target, "--output", prompts)
    run = train(target, prompts, tmp_path / "eagle3", model__init_args__steps=2)
    together = evaluate(run, prompts, tmp_path / "together.json", 32)
    assert_its_answers_are_the_targets(together)
    assert evaluate(run, prompts, tmp_path / "alone.json", 1) == together
    assert_the_export_says_what_was_trained(run, tmp_path / "draft")
    compare_with_the_page(request, row(name, target, "works"))


@pytest.mark.parametrize("name", OTHERS)
def test_other_drafts_of_unusual_families(name, tmp_path):
    algorithm = OTHERS[name]
    kind, fields = MODULES[algorithm]
    target, prompts = write_family(name, tmp_path / "target", layers=6), tmp_path / "prompts"
    call("prepare", "--data", write_conversations(tmp_path / "c.jsonl", 24), "--target", target, "--output", prompts)
    arguments = {"target": str(target), "draft_config": {"draft_vocab_size": 64, **fields}, "gamma": 2}
    model = {"class_path": kind, "init_args": {**arguments, "optimizer": {"lr": 1e-3}}}
    run = train(target, prompts, tmp_path, algorithm, model=model)
    assert_its_answers_are_the_targets(evaluate(run, prompts, tmp_path / "e.json", 32))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.refusal is not None])
def test_a_family_that_is_refused_by_name(name, tmp_path, capsys, request):
    """In one line, before anything is captured, by the first command that can detect it."""
    family, target, prompts = FAMILIES[name], write_family(name, tmp_path / "target", layers=6), tmp_path / "prompts"
    conversations = write_conversations(tmp_path / "conversations.jsonl", 24)
    commands = {
        "prepare": ["--data", conversations, "--target", target, "--output", prompts],
        "capture": ["--target", target, "--prompts", prompts, "--output", tmp_path / "features", "--dtype", "float32"],
    }
    for command, words in commands.items():
        status = main([command, *map(str, words)])
        said = capsys.readouterr().err.strip()
        if status:
            break
    assert status == 2
    assert "\n" not in said
    assert family.refusal in said
    assert not (tmp_path / "features" / "train" / "manifest.jsonl").exists()
    compare_with_the_page(request, row(name, target, f"rejected by `{command}`: {family.why}"))


def row(name: str, target: Path, result: str) -> str:
    """The family's line of the page."""
    kind = f"`{FAMILIES[name].kind}`"
    if result != "works":
        return f"| {name} | {kind} | | | | {result} |"
    files = TargetFiles.find(str(target))
    model = HFTargetEngine(files, "float32").model
    return f"| {name} | {kind} | {_head(files)} | {_attention(files)} | {_decoding(model)} | {result} |"


def _head(files: TargetFiles) -> str:
    parts = ["its own" if files.has_own_head() and not files.config["tie_word_embeddings"] else "tied to the embedding"]
    if files.logit_scale != 1.0:
        parts.append(f"logits x {files.logit_scale:g}")
    if files.lm_head_bias() is not None:
        parts.append("bias")
    if files.softcap is not None:
        parts.append(f"cap {files.softcap:g}")
    return ", ".join(parts)


def _attention(files: TargetFiles) -> str:
    config = files.config
    rope = config.get("rope_parameters") or {}
    kinds = {x.get("rope_type", "default") for x in ([rope] if "rope_type" in rope else rope.values())}
    parts = sorted(kinds - {"default"})
    parts += sorted(set(config.get("layer_types") or []) - {"full_attention"})
    if not config.get("layer_types") and config.get("sliding_window"):
        parts.append("sliding_attention")
    return ", ".join(parts)


def _decoding(model: Any) -> str:
    if not can_roll_back(model):
        return "whole text each round"
    return "in lockstep" if runs_in_lockstep(model) else "one prompt at a time"


HEAD = """# Targets

Every architecture that transformers runs as a causal language model is tested in the same way, on a tiny random model
with that architecture's own config: `prepare`, `capture`, `fit` (EAGLE-3), `evaluate` (every answer equals the
target's, both in a batch and alone, and offline τ equals decoded τ), and `export`. `pytest tests/test_targets.py` runs
this, and `pytest tests/test_targets.py --write-docs` writes this page.

* **Output head**: the matrix that turns the last hidden state into logits, and any bias, scale or cap applied to them.
  Drafts learn the distribution after all of it. At the start of each capture two tokens verify it; a target whose
  logits are computed in another way is rejected.
* **Decoding** is how `specforge evaluate` runs the target. *In lockstep*: many prompts at a time. *One prompt at a
  time*: the model derives positions from cache slots, or changes them with the length of the text. *Whole text each
  round*: the model has states that cannot be rolled back (recurrent layers, convolutions); its speed in `evaluate` says
  nothing about a server.

| family | `model_type` | output head | attention other than full | decoding | result |
|---|---|---|---|---|---|
"""


def compare_with_the_page(request: pytest.FixtureRequest, line: str) -> None:
    if request.config.getoption("--write-docs"):
        lines = PAGE.read_text().removeprefix(HEAD).splitlines() if PAGE.exists() else []
        name = line.split(" | ")[0]
        kept = [old for old in lines if old.split(" | ")[0] != name]
        order = {f"| {family}": i for i, family in enumerate(FAMILIES)}
        kept = sorted([x for x in [*kept, line] if x.split(" | ")[0] in order], key=lambda x: order[x.split(" | ")[0]])
        PAGE.write_text(HEAD + "".join(f"{x}\n" for x in kept))
    assert PAGE.read_text().startswith(HEAD)
    assert line in PAGE.read_text().splitlines()
