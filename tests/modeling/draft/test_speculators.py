"""The speculators form as SpecForge writes it; tests/test_vllm.py serves it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import specforge
from lightning_modules import algorithms
from specforge.cli.main import main
from specforge.errors import UserError
from tests.modeling.draft.eagle3.test_export import LATENT

SMALL = {"draft_vocab_size": 64}
BLOCK = {"num_hidden_layers": 2, "block_size": 5}
SLIDING = {**BLOCK, "layer_types": ["sliding_attention"] * 2, "sliding_window": 8, "use_sliding_window": True}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
FORMS = {
    "eagle3": ("eagle3", SMALL),
    "eagle3 of the whole vocabulary": ("eagle3", {"draft_vocab_size": 264, "norm_before_residual": True}),
    "eagle3.1 with Qwen3's attention": ("eagle3", {**SMALL, "fc_norm": True, "norm_output": True, "qk_norm": True}),
    "eagle3 with a norm before fc": ("eagle3", {**SMALL, "eagle_config": {"norm_before_fc": True}}),
    "peagle": ("peagle", {**SMALL, "num_hidden_layers": 2}),
    "peagle with its own embedding": ("peagle", {**SMALL, "num_hidden_layers": 2, "embed_requires_grad": True}),
    "dflash": ("dflash", BLOCK),
    "dflash of a draft vocabulary": ("dflash", {**BLOCK, **SMALL}),
    "dflash with sliding layers": ("dflash", SLIDING),
    "dflash with sliding layers in both directions": ("dflash", {**MIXED, "is_causal": False}),
    "dflash2": ("dflash2", BLOCK),
    "dspark": ("dspark", {**BLOCK, **SMALL, "markov_rank": 8}),
    "dspark with sliding and full layers": ("dspark", {**MIXED, "enable_confidence_head": False}),
}


def trained(name: str, target: Path, config: dict):
    """A draft that looks trained."""
    torch.manual_seed(0)
    module = algorithms()[name](str(target), layer_ids=[1, 3, 4], draft_config=config)
    if len(module.draft.d2t) == 64:
        module.draft.set_vocabulary(torch.arange(64) * 4)
    with torch.no_grad():
        for parameter in module.draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def write(module, folder: Path) -> tuple[dict, dict]:
    module.export_format.to_speculators(module.draft, module.target, folder, "float32")
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("form", FORMS)
def test_a_draft_comes_back_as_it_was(form, target, tmp_path):
    module = trained(FORMS[form][0], target, FORMS[form][1])
    write(module, tmp_path / "draft")
    again = specforge.load_draft(tmp_path / "draft", target)
    assert again.algorithm == module.algorithm
    assert module.draft.difference(again.draft.config.to_dict(), "again") is None
    assert again.draft.state_dict().keys() == module.draft.state_dict().keys()
    assert all(torch.equal(again.draft.state_dict()[n], x) for n, x in module.draft.state_dict().items())


def test_an_eagle3_draft_states_every_field_whose_default_differs(target, tmp_path):
    config, tensors = write(trained("eagle3", target, SMALL), tmp_path / "draft")
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == "eagle3"
    assert config["norm_before_residual"] is False
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": str(target),
        "architectures": ["LlamaForCausalLM"],
    }
    assert config["speculators_config"]["proposal_methods"] == [{"proposal_type": "greedy", "speculative_tokens": 4}]
    layers = config["transformer_layer_config"]
    assert (layers["model_type"], layers["num_hidden_layers"], layers["vocab_size"]) == ("llama", 1, 264)
    assert {"layers.0.hidden_norm.weight", "embed_tokens.weight", "d2t", "t2d"} <= tensors.keys()
    assert not any(name.startswith("midlayer.") for name in tensors)


def test_block_drafters_name_layers_by_their_inputs_and_the_directions_of_attention(target, tmp_path):
    for form, both in (
        ("dflash", True),
        ("dflash with sliding layers", False),
        ("dflash with sliding layers in both directions", True),
        ("dspark with sliding and full layers", False),
    ):
        name, fields = FORMS[form]
        config, tensors = write(trained(name, target, fields), tmp_path / form)
        assert config["aux_hidden_state_layer_ids"] == [2, 4, 5]
        assert config["sample_from_anchor"] is (name == "dspark")
        assert config["sliding_window_non_causal"] is both
        assert (config["block_size"], config["mask_token_id"]) == (5, 263)
        assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4 + (name == "dspark")
        assert config["transformer_layer_config"]["model_type"] == "qwen3"
        assert not {"d2t", "t2d", "lm_head.weight", "embed_tokens.weight"} & tensors.keys()


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("eagle3", {**SMALL, **LATENT}, "the speculators form has no Eagle3DeepseekV2ForCausalLM; it has eagle3"),
        ("eagle3", {**SMALL, "fc_norm": True, "norm_before_fc": True}, "does not have with norm_before_fc"),
        ("peagle", {**SMALL, "fc_norm": True}, "does not have for P-EAGLE in vLLM; use --to vllm"),
        ("domino", BLOCK, "the speculators form has no DominoDraftModel"),
        ("dflash", MIXED, "layer_types has sliding and full layers; vLLM would make both causal"),
        ("dspark", {**SLIDING, "is_causal": False}, "is_causal is false, which vLLM does not read"),
        ("dspark", {**BLOCK, "markov_head_type": "gated"}, "markov_head_type is gated"),
        ("dflash", {**BLOCK, "qk_norm": False}, "qk_norm is off"),
    ],
)
def test_what_the_form_does_not_have_is_refused(name, config, words, target, tmp_path):
    with pytest.raises(UserError, match=words):
        write(trained(name, target, config), tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize("name", ["medusa", "mtp", "standalone"])
def test_other_algorithms_have_no_such_form(name, target, tmp_path):
    module = algorithms()[name](str(target))
    with pytest.raises(UserError, match="the speculators form has no"):
        module.export_format.to_speculators(module.draft, module.target, tmp_path / "draft")


def test_the_command_writes_it_and_says_how_it_is_served(target, tmp_path, capsys):
    module = trained("eagle3", target, SMALL)
    module.export_format.to_hf(module.draft, module.target, tmp_path / "draft", "float32")
    words = ["export", "--draft", tmp_path / "draft", "--target", target, "--output", tmp_path / "my out"]
    for _ in range(2):  # an earlier export is replaced
        assert main([*map(str, words), "--to", "speculators"]) == 0
    assert f"vllm serve '{tmp_path / 'my out'}'" in capsys.readouterr().out.replace("\n", " ")
