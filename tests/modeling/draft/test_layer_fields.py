"""Drafts that are derived from a target: sensible layers for every family, and nothing that a draft does not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lightning_modules.dflash import DFlashModule
from lightning_modules.eagle3 import Eagle3Module
from lightning_modules.peagle import PEagleModule
from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft import build_draft
from specforge.modeling.draft.starting import layer_fields
from tests.families import BASE, FAMILIES, LLAMA3, YARN
from tests.tiny import write_target

CPU = torch.device("cpu")
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 5e5,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
}
# Of families whose configs have names of their own.
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 264, "n_embd": 32, "n_head": 4},
    "opt": {"vocab_size": 264, "hidden_size": 32, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    "falcon": {"vocab_size": 264, "hidden_size": 32, "num_attention_heads": 4},
    "bloom": {"vocab_size": 264, "hidden_size": 32, "n_head": 4},
}


def target_of(
    folder: Path, kind: str, fields: dict[str, Any], dropped: tuple[str, ...] = (), **written: Any
) -> TargetFiles:
    """A target's config alone."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    AutoConfig.for_model(kind, **fields).save_pretrained(folder)
    path = folder / "config.json"
    saved = {key: value for key, value in json.loads(path.read_text()).items() if key not in dropped}
    path.write_text(json.dumps({**saved, **written}))
    return TargetFiles("target", folder)


KNOWN = [name for name, family in FAMILIES.items() if family.written.get("model_type") != "baichuan"]


@pytest.mark.parametrize("name", KNOWN)
def test_a_derived_draft_has_the_dimensions_of_its_target(name, tmp_path):
    family = FAMILIES[name]
    target = target_of(tmp_path, family.kind, {**BASE, **family.fields}, family.dropped, **family.written)
    before = json.dumps(target.config, default=str)
    for module in (Eagle3Module, PEagleModule, DFlashModule):
        draft = build_draft(module.default_draft_config(target))
        config = draft.config
        assert (config.hidden_size, config.vocab_size) == (32, 264)
        assert config.num_attention_heads * config.head_dim >= 32
        assert config.num_attention_heads % config.num_key_value_heads == 0
        assert 2 * draft.rotary(3, CPU)[0].shape[1] == config.head_dim
    assert json.dumps(target.config, default=str) == before, "a target's config is not edited"


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("llama", {}, {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}),
        ("gpt2", {"n_inner": 96}, {"intermediate_size": 96, "num_attention_heads": 4}),
        ("gpt2", {}, {"intermediate_size": 128, "num_key_value_heads": 4}),
        ("opt", {"ffn_dim": 96}, {"intermediate_size": 96}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, {"num_key_value_heads": 2}),
        ("bloom", {}, {"intermediate_size": 128, "head_dim": 8}),
        ("qwen3", {"head_dim": 16}, {"head_dim": 16, "num_attention_heads": 4}),
        ("llama", {"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-5}),
        # Transformers has no Llama of 32 dimensions and 3 heads.
        (
            "qwen3",
            {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16},
            {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
        ),
        ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 3}, {"num_key_value_heads": 1}),
    ],
    ids=str,
)
def test_other_names_of_dimensions_are_understood(kind, fields, expected, tmp_path):
    found = layer_fields(target_of(tmp_path, kind, {**SIZES.get(kind, BASE), **fields}))
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (LLAMA3, LLAMA3),
        (YARN, YARN),
        (LINEAR, LINEAR),
        # They depend on the length of a text.
        ({**LINEAR, "rope_type": "dynamic"}, PLAIN),
        (LONGROPE, PLAIN),
        # Whole heads, which all servers rotate.
        ({**PLAIN, "partial_rotary_factor": 0.5}, PLAIN),
        # Text has no image positions.
        ({**PLAIN, "mrope_section": [1, 1, 2]}, PLAIN),
    ],
    ids=str,
)
def test_positions_are_those_of_the_target_unless_they_depend_on_the_length(rope, expected, tmp_path):
    target = target_of(tmp_path / "5", "llama", BASE, rope_parameters=rope)
    assert layer_fields(target)["rope_parameters"] == expected
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    target = target_of(tmp_path / "4", "llama", BASE, ("rope_parameters",), **older)
    assert layer_fields(target)["rope_parameters"] == expected


def test_positions_are_those_of_the_full_attention_layers(tmp_path):
    rope = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    target = target_of(tmp_path, "gemma3_text", {**BASE, "head_dim": 8}, rope_parameters=rope)
    assert layer_fields(target)["rope_parameters"] == LINEAR


def test_a_target_without_attention_heads_is_refused_in_one_line(tmp_path):
    fields = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 8}
    with pytest.raises(UserError, match="its config has no num_attention_heads"):
        layer_fields(target_of(tmp_path, "mamba", fields))


@pytest.mark.parametrize("module", [Eagle3Module, PEagleModule, DFlashModule])
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 6, 7, 8, 80])
def test_the_default_layers_of_every_target_are_layers_that_it_has_and_servers_can_capture(
    tmp_path: Path, module: Any, layers: int
) -> None:
    write_target(tmp_path, layers=layers, hidden=8)
    target = TargetFiles.find(str(tmp_path))
    chosen = module.capture_policy(target).layer_ids
    assert list(chosen) == sorted(set(chosen))
    assert chosen[-1] < max(1, layers - 1)
    assert len(chosen) == min(layers - 1 or 1, 5 if module is DFlashModule else 3)
    module(str(tmp_path), draft_config={"draft_vocab_size": 64})  # the draft reads what was captured


@pytest.mark.parametrize(("layers", "eagle3", "dflash"), [(30, [1, 14, 26], [1, 8, 14, 20, 27])])
def test_the_default_layers_of_a_usual_target_are_those_of_the_published_code(
    layers: int, eagle3: list[int], dflash: list[int]
) -> None:
    assert Eagle3Module.default_layers(layers) == eagle3
    assert DFlashModule.default_layers(layers) == dflash
