"""Exported block drafters: the field's names, and the same draft when read back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lightning_modules import algorithms
from lightning_modules.loading import load_module
from specforge.errors import UserError
from tests.families import write_family


def trained(name: str, target, layer_ids=(1, 3, 4), **config):
    """A draft that looks trained: no weight as it was initialised."""
    torch.manual_seed(0)
    module = algorithms()[name](str(target), layer_ids=list(layer_ids), draft_config={"num_hidden_layers": 2, **config})
    with torch.no_grad():
        for parameter in module.draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


@pytest.mark.parametrize(("name", "size"), [("dflash", 16), ("dspark", 7), ("domino", 16), ("dflash2", 8)])
def test_a_served_draft_has_the_fields_names_and_can_be_started_from(name, size, target, tmp_path):
    module = trained(name, target)
    module.export_format.to_sglang(module.draft, module.target, tmp_path / "draft", "float32")
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    names = {"dspark": "Qwen3DSparkModel", "dflash2": "DFlash2DraftModel"}
    assert config["architectures"] == [names.get(name, "DFlashDraftModel")]
    assert config["block_size"] == size
    fields = {"mask_token_id": 263, "target_layer_ids": [1, 3, 4]}
    if name == "domino":
        fields |= {"projector_type": "domino", "shift_label": True, "pure_draft_prefix_len": 1}
        fields |= {"gru_hidden_dim": 1024, "emb_dim": 256}
        assert tensors["prefix_gru.weight_ih_l0"].shape == (3 * 1024, 32)
        assert tensors["prefix_gru.weight_hh_l0"].shape == (3 * 1024, 1024)
        assert tensors["embed_proj.0.weight"].shape == (256, 32 + 1024)
        assert tensors["embed_proj.2.weight"].shape == (264, 256)
    if name == "dflash2":
        fields |= {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16}
        for part in ("attention", "mlp"):
            assert tensors[f"layers.1.{part}_conv.base_kernel"].shape == (2, 2, 32)
            assert tensors[f"layers.1.{part}_conv.kernel_projection.weight"].shape == (2 * 2 * 2, 32)
        assert tensors["candidate_selector.predecessor_codebook"].shape == (264, 256)
        assert tensors["candidate_selector.successor_codebook"].shape == (264, 256)
        assert tensors["candidate_selector.hidden_projection.weight"].shape == (256, 32)
    assert config["dflash_config"] == fields
    assert {"fc.weight", "hidden_norm.weight", "norm.weight"} <= set(tensors)
    assert {"layers.1.self_attn.q_norm.weight", "layers.0.mlp.up_proj.weight"} <= set(tensors)
    assert not {"d2t", "t2d", "lm_head.weight", "embed_tokens.weight"} & set(tensors)
    if name == "dspark":
        assert config["markov_rank"] == 256
        assert {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight"} <= set(tensors)
        assert tensors["confidence_head.proj.weight"].shape == (1, 32 + 256)
    again = load_module(tmp_path / "draft", str(target))
    assert type(again) is type(module)
    for key, tensor in module.draft.state_dict().items():
        assert torch.equal(again.draft.state_dict()[key], tensor), key


def test_a_domino_draft_is_not_read_as_another_of_its_architecture(target, tmp_path):
    module = trained("domino", target)
    module.export_format.to_hf(module.draft, module.target, tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    with pytest.raises(UserError, match="DominoDraftModel is not a draft of dflash"):
        algorithms()["dflash"](str(target), draft_config=config)


def test_what_the_server_would_misread_is_refused(target, tmp_path):
    module = trained("domino", target, dflash_config={"pure_draft_prefix_len": 2})
    with pytest.raises(UserError, match="pure_draft_prefix_len is 2"):
        module.export_format.to_sglang(module.draft, module.target, tmp_path / "draft")
    for config, words in (
        ({"draft_vocab_size": 64}, "draft_vocab_size is 64"),
        ({"qk_norm": False}, "qk_norm"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is set; SGLang's DFlash rotates whole heads"),
    ):
        module = trained("dflash", target, **config)
        with pytest.raises(UserError, match=words):
            module.export_format.to_sglang(module.draft, module.target, tmp_path / "draft")


@pytest.mark.parametrize("name", ["dflash", "dspark", "domino"])
def test_a_bias_of_the_targets_head_which_the_server_leaves_out_is_refused(name, tmp_path):
    module = trained(name, write_family("phi", tmp_path / "target"), layer_ids=[0, 1])
    with pytest.raises(UserError, match="target has a bias, which SGLang omits"):
        module.export_format.to_sglang(module.draft, module.target, tmp_path / "draft")


@pytest.mark.parametrize("name", ["dflash", "dspark"])
def test_a_reduced_vocabulary_is_exported_with_the_head_of_the_target(name, target, tmp_path):
    """VLLM would leave a head of the draft vocabulary at random values."""
    module = trained(name, target, draft_vocab_size=64)
    module.draft.set_vocabulary(torch.arange(64) * 4)
    module.export_format.to_hf(module.draft, module.target, tmp_path / "draft", "float32")
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    assert {"d2t", "t2d"} <= set(tensors)
    assert torch.equal(tensors["lm_head.weight"], module.target.lm_head()[torch.arange(64) * 4].float())
    again = load_module(tmp_path / "draft", str(target))
    assert all(torch.equal(again.draft.state_dict()[n], x) for n, x in module.draft.state_dict().items())


@pytest.mark.parametrize("causal", [True, False])
def test_sliding_layers_are_exported_as_servers_run_them(causal, target, tmp_path):
    """They are causal within the block unless `is_causal` is false; full-attention layers see the whole block."""
    kinds, field = ["full_attention", "sliding_attention"], {} if causal else {"is_causal": False}
    module = trained("dflash", target, layer_types=kinds, use_sliding_window=True, sliding_window=20, **field)
    module.export_format.to_sglang(module.draft, module.target, tmp_path / "draft", "float32")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert (config["layer_types"], config["sliding_window"]) == (kinds, 20)
    assert "causal" not in config["dflash_config"]
    assert config.get("is_causal") is (None if causal else False)
    layers = load_module(tmp_path / "draft", str(target)).draft.layers
    assert [(layer.window, layer.causal) for layer in layers] == [(None, False), (20, causal)]


@pytest.mark.parametrize("name", ["dflash", "dspark", "domino", "dflash2"])
def test_a_draft_of_short_blocks_can_be_read(name, target, tmp_path):
    """The default number of tokens of a round in validation is at most what a block drafts."""
    module = trained(name, target, block_size=3)
    assert module.gamma == min(4, module.draft.drafts) < 4
    module.export_format.to_hf(module.draft, module.target, tmp_path / "draft", "float32")
    assert load_module(tmp_path / "draft", str(target)).draft.block_size == 3
