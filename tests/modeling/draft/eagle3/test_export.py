"""Exported drafts of the EAGLE family beside EAGLE-3's own: names, what comes back, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lightning_modules.eagle3 import Eagle3Module
from lightning_modules.eagle_family import EagleFamilyModule
from lightning_modules.loading import load_module
from lightning_modules.peagle import PEagleModule
from specforge.errors import UserError

LATENT = {
    "architectures": ["Eagle3DeepseekV2ForCausalLM"],
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
SMALL = {"draft_vocab_size": 64}


def trained(module: EagleFamilyModule) -> EagleFamilyModule:
    """As if trained: no weight as it was initialised."""
    module.draft.set_vocabulary(torch.arange(64) * 4)
    with torch.no_grad():
        for parameter in module.draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


@pytest.mark.parametrize(
    ("cls", "config", "forms"),
    [
        (Eagle3Module, {"fc_norm": True, "norm_output": True}, ("to_hf", "to_sglang", "to_vllm")),
        (Eagle3Module, LATENT, ("to_hf", "to_sglang", "to_vllm")),
        (PEagleModule, {}, ("to_hf", "to_vllm")),
        (PEagleModule, {"embed_requires_grad": True, "num_hidden_layers": 2}, ("to_hf", "to_vllm")),
    ],
    ids=["eagle3.1", "latent", "peagle", "peagle, own embedding"],
)
def test_an_exported_draft_comes_back_as_it_was(cls, config, forms, target, tmp_path):
    module = trained(cls(str(target), {**SMALL, **config}))
    for form in forms:
        getattr(module.export_format, form)(module.draft, module.target, tmp_path / form, "float32")
        written = json.loads((tmp_path / form / "config.json").read_text())
        again = cls(str(target), draft_config=written, init_from=str(tmp_path / form))
        for name, tensor in module.draft.state_dict().items():
            assert torch.equal(again.draft.state_dict()[name], tensor), name


def test_latent_names_are_those_that_sglang_loads(target, tmp_path):
    module = trained(Eagle3Module(str(target), {**SMALL, **LATENT}))
    module.export_format.to_sglang(module.draft, module.target, tmp_path / "draft")
    tensors, config = (
        load_file(tmp_path / "draft" / "model.safetensors"),
        json.loads((tmp_path / "draft" / "config.json").read_text()),
    )
    attention = {n.removeprefix("midlayer.self_attn."): x for n, x in tensors.items() if "self_attn" in n}
    assert {name: tuple(x.shape) for name, x in attention.items()} == {
        "q_a_proj.weight": (12, 64),
        "q_a_layernorm.weight": (12,),
        "q_b_proj.weight": (40, 12),
        "kv_a_proj_with_mqa.weight": (12, 64),
        "kv_a_layernorm.weight": (8,),
        "kv_b_proj.weight": (44, 8),
        "o_proj.weight": (32, 20),
    }
    assert config["architectures"] == ["Eagle3DeepseekV2ForCausalLM"]
    assert config["model_type"] == "deepseek_v2"  # vLLM takes deepseek_v3 for an MTP module
    assert (config["q_lora_rank"], config["v_head_dim"], config["num_hidden_layers"]) == (12, 5, 1)
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]


def test_peagle_names_are_those_that_vllm_loads(target, tmp_path):
    module = trained(PEagleModule(str(target), {**SMALL, "mask_token_id": 3}))
    module.export_format.to_hf(module.draft, module.target, tmp_path / "draft", "float32")
    tensors, config = (
        load_file(tmp_path / "draft" / "model.safetensors"),
        json.loads((tmp_path / "draft" / "config.json").read_text()),
    )
    assert tensors["mask_hidden"].shape == (1, 1, 96)
    assert tensors["layers.0.self_attn.q_proj.weight"].shape == (32, 64)
    assert tensors["layers.3.self_attn.q_proj.weight"].shape == (32, 32)
    assert "layers.0.hidden_norm.weight" in tensors
    assert "layers.1.hidden_norm.weight" not in tensors
    assert torch.equal(tensors["embed_tokens.weight"], module.target.embedding())
    assert config["ptd_token_id"] == config["mask_token_id"] == 3
    # To vLLM it is an EAGLE-3 draft, whose layers are counted by their inputs.
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["norm_before_residual"] is False
    assert type(load_module(tmp_path / "draft", str(module.target.folder))) is PEagleModule


def test_a_trained_embedding_is_the_one_that_is_written(target, tmp_path):
    module = trained(PEagleModule(str(target), {**SMALL, "embed_requires_grad": True}))
    module.export_format.to_hf(module.draft, module.target, tmp_path / "draft", "float32")
    written = load_file(tmp_path / "draft" / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(written, module.draft.embed_tokens.weight)
    assert not torch.equal(written, module.target.embedding())


def test_peagle_is_refused_for_sglang(target, tmp_path):
    module = trained(PEagleModule(str(target), SMALL))
    with pytest.raises(UserError, match="SGLang has no P-EAGLE; use --to vllm"):
        module.export_format.to_sglang(module.draft, module.target, tmp_path / "draft")


def test_a_norm_that_latent_drafts_do_not_have_in_sglang_is_refused(target, tmp_path):
    module = trained(Eagle3Module(str(target), {**SMALL, **LATENT, "norm_before_fc": True}))
    with pytest.raises(UserError, match="norm_before_fc is set"):
        module.export_format.to_sglang(module.draft, module.target, tmp_path / "draft")
    assert not (tmp_path / "draft").exists()
