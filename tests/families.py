"""Tiny random targets of many architectures, saved as users' targets are; what `tests/test_targets.py` tries."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import write_tokenizer

BASE: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 400,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


@dataclass(frozen=True)
class Family:
    """How a tiny target is made.

    Attributes:
        kind: ``model_type``.
        fields: of its config, beside :data:`BASE`.
        dropped: fields that its config.json leaves at the class's default, as published ones do.
        written: fields that are written into config.json as they are, in place of transformers' own form.
        shards: files that its weights are spread over.
        refusal: words of the one line in which a command refuses it; None where it works.
        why: the reason, for the page.
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    written: dict[str, Any] = field(default_factory=dict)
    shards: int = 1
    refusal: str | None = None
    why: str = ""


FAMILIES: dict[str, Family] = {
    "apertus": Family("apertus"),
    "arcee": Family("arcee"),
    "baichuan, from its own code": Family(
        "llama",
        written={"model_type": "baichuan", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}},
        refusal="baichuan",
        why="transformers has no such class, and code that comes with a target is never run",
    ),
    "bert": Family(
        "bert",
        {"is_decoder": True},
        refusal="its head has a bias, but the tensor is missing",
        why="more than one matrix product between hidden state and logits",
    ),
    "bloom": Family("bloom", {"n_layer": 8, "n_head": 4}),
    "cohere": Family("cohere", dropped=("logit_scale",)),
    "cohere2": Family("cohere2", {"sliding_window": 16}),
    "deepseek_v3": Family(
        "deepseek_v3",
        {
            **LATENT,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 2,
        },
    ),
    "ernie4_5": Family("ernie4_5"),
    "ernie4_5_moe": Family(
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "use_bias": True,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "exaone4": Family("exaone4", {"sliding_window": 16}),
    "falcon": Family("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}),
    "gemma": Family("gemma", {"head_dim": 8}, dropped=("tie_word_embeddings",)),
    "gemma2": Family("gemma2", {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3": Family("gemma3_text", {"head_dim": 8, "sliding_window": 16}, dropped=("tie_word_embeddings",)),
    "glm": Family("glm", {"head_dim": 8, "attention_bias": True}),
    "glm4": Family("glm4", {"head_dim": 8, "attention_bias": True}),
    "glm4_moe": Family(
        "glm4_moe",
        {
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "gpt2": Family("gpt2", {"n_embd": 32, "n_layer": 8, "n_head": 4, "n_positions": 512}),
    "gpt_neox": Family("gpt_neox"),
    "gpt_oss": Family("gpt_oss", {**EXPERTS, "sliding_window": 16, "head_dim": 8}),
    "granite": Family(
        "granite",
        {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1},
    ),
    "helium": Family("helium", {"head_dim": 8}),
    "hyperclovax": Family("hyperclovax", {"logits_scaling": 0.125}),
    "internlm3": Family("internlm3", {"head_dim": 8}),
    "granitemoe": Family("granitemoe", {**EXPERTS, "logits_scaling": 4.0}),
    "gpt_bigcode": Family("gpt_bigcode", {"n_embd": 32, "n_layer": 8, "n_head": 4, "n_positions": 512}),
    "gptj": Family("gptj", {"n_embd": 32, "n_layer": 8, "n_head": 4, "n_positions": 512, "rotary_dim": 4}),
    "lfm2": Family("lfm2", {"full_attn_idxs": [2, 5, 7]}),
    "llama": Family("llama", {"tie_word_embeddings": True}, shards=3),
    "llama3.1": Family("llama", {"rope_parameters": LLAMA3}),
    "llama3.1, as published": Family(
        "llama",
        {"rope_parameters": LLAMA3},
        dropped=("rope_parameters",),
        written={
            "rope_theta": 500000.0,
            "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
            "torch_dtype": "float32",
        },
    ),
    "llama, yarn": Family("llama", {"rope_parameters": YARN}),
    "llama, dynamic": Family("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "llama4_text": Family(
        "llama4_text",
        {
            **EXPERTS,
            "head_dim": 8,
            "attention_chunk_size": 16,
            "intermediate_size_mlp": 64,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "for_llm_compressor": False,
        },
    ),
    "llama, quantised by GPTQ": Family(
        "llama",
        written={"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
        refusal="transformers cannot load it",
        why="its package is not installed",
    ),
    "minicpm3": Family("minicpm3", {**LATENT, "dim_model_base": 16, "scale_emb": 12, "scale_depth": 1.4}),
    "mistral": Family("mistral", {"sliding_window": 16}, shards=2),
    "mixtral": Family("mixtral", {**EXPERTS, "sliding_window": None}),
    "nanochat": Family("nanochat"),
    "nemotron": Family("nemotron", {"head_dim": 8}),
    "olmo2": Family("olmo2"),
    "olmoe": Family("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": Family("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "opt, narrow embedding": Family(
        "opt",
        {"ffn_dim": 64, "word_embed_proj_dim": 16},
        refusal="last_hidden_states",
        why="hidden states and embeddings have different widths",
    ),
    "phi": Family("phi", {"partial_rotary_factor": 0.5}),
    "phi3": Family("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 400}),
    "phimoe": Family("phimoe", {**EXPERTS, "lm_head_bias": True, "attention_bias": True, "tie_word_embeddings": False}),
    "qwen2": Family("qwen2", {"tie_word_embeddings": True}),
    "qwen2_moe": Family(
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3": Family("qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen3_moe": Family(
        "qwen3_moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ),
    "qwen3_next": Family("qwen3_next", {**LINEAR, "head_dim": 16}),
    "recurrent_gemma": Family("recurrent_gemma", {"attention_window_size": 16, "lru_width": 32}),
    "seed_oss": Family("seed_oss", {"head_dim": 8}),
    "smollm3": Family("smollm3"),
    "stablelm": Family("stablelm", {"partial_rotary_factor": 0.25}),
    "starcoder2": Family("starcoder2", {"sliding_window": 16}),
}


def write_family(name: str, folder: Path, seed: int = 0, layers: int = 8) -> Path:
    """A random target of a family, with weights large enough for its answers to differ from each other's."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = FAMILIES[name]
    if family.kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family.kind}")
    write_tokenizer(folder)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.kind, **{**BASE, "num_hidden_layers": layers, **family.fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * (1.0 if parameter_name.endswith("head.bias") else 0.1)
            else:
                parameter *= 8.0
    size = sum(x.nbytes for x in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=size if family.shards == 1 else size // family.shards)
    path = folder / "config.json"
    fields = {k: v for k, v in json.loads(path.read_text()).items() if k not in family.dropped}
    path.write_text(json.dumps({**fields, **family.written}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))
    return folder
