"""Drafts as other projects write them: config fields and tensor names of each, for the tiny target.

Read in the projects' public code; docs/user-guide.md lists the versions. A draft's ``own`` are its tensors under
SpecForge's names, written out here by name and not by the code under test, and ``network`` is what its config means.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specforge.inference.target_files import TargetFiles

V, H, D, HEAD, HEADS, KV, FFN = 264, 32, 64, 8, 4, 2, 48
THETA = 500.0


@dataclass
class Published:
    """A draft in a project's form."""

    algorithm: str
    config: dict[str, Any]
    own: dict[str, Tensor]  # the draft's tensors under SpecForge's names, without the vocabulary maps
    network: SimpleNamespace  # what the config means, for the references
    name: Callable[[str], str] = lambda name: name  # the project's name of a tensor
    borrowed: tuple[str, ...] = ()  # tensors of the target in the file
    maps: tuple[str, ...] = ()  # vocabulary maps in the file
    layers: tuple[int, ...] = (1, 3, 4)  # captured layers, by their outputs
    dtype: torch.dtype = torch.float32
    more: dict[str, Tensor] = field(default_factory=dict)  # tensors that neither has

    def target_ids(self) -> Tensor:
        return torch.arange(D) * 4 if self.maps else torch.arange(V)

    def write(self, folder: Path, target: Path) -> Path:
        files = TargetFiles.find(str(target))
        ids = self.target_ids()
        given = {
            "embed_tokens.weight": files.embedding(),
            "lm_head.weight": files.lm_head()[ids],
            "d2t": ids - torch.arange(len(ids)),
            "t2d": torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True),
        }
        tensors = {self.name(n): x.to(self.dtype) for n, x in self.own.items()}
        tensors |= {n: given[n].to(self.dtype) for n in self.borrowed} | {n: given[n] for n in self.maps} | self.more
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file({n: x.contiguous() for n, x in tensors.items()}, folder / "model.safetensors")
        return folder


def draw(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors that any order or confusion of which would change the logits."""
    g = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.rand(shape, generator=g) + 0.5
        if len(shape) == 1 and "norm" in name
        else torch.randn(shape, generator=g) * 0.2
        for name, shape in shapes.items()
    }
    return {name: x.to(dtype).float() for name, x in drawn.items()}


def attention(prefix: str, width: int, qk_norm: bool) -> dict[str, tuple[int, ...]]:
    norms = {f"{prefix}{n}_norm.weight": (HEAD,) for n in "qk"} if qk_norm else {}
    return {
        f"{prefix}q_proj.weight": (HEADS * HEAD, width),
        f"{prefix}k_proj.weight": (KV * HEAD, width),
        f"{prefix}v_proj.weight": (KV * HEAD, width),
        f"{prefix}o_proj.weight": (H, HEADS * HEAD),
        **norms,
    }


LATENT = {"q_lora_rank": 12, "kv_lora_rank": 6, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}


def latent_attention(prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}q_a_proj.weight": (12, 2 * H),
        f"{prefix}q_a_layernorm.weight": (12,),
        f"{prefix}q_b_proj.weight": (HEADS * 10, 12),
        f"{prefix}kv_a_proj_with_mqa.weight": (10, 2 * H),
        f"{prefix}kv_a_layernorm.weight": (6,),
        f"{prefix}kv_b_proj.weight": (HEADS * 11, 6),
        f"{prefix}o_proj.weight": (H, HEADS * 5),
    }


def layer(prefix: str, first: bool = False, qk_norm: bool = False, latent: bool = False) -> dict[str, tuple[int, ...]]:
    attn, width = f"{prefix}self_attn.", 2 * H if first else H
    return {
        **(latent_attention(attn) if latent else attention(attn, width, qk_norm)),
        **{f"{prefix}mlp.{n}_proj.weight": (FFN, H) for n in ("gate", "up")},
        f"{prefix}mlp.down_proj.weight": (H, FFN),
        **{f"{prefix}{n}.weight": (H,) for n in ("input_layernorm", "post_attention_layernorm")},
        **({f"{prefix}hidden_norm.weight": (H,)} if first else {}),
    }


def eagle(names: dict[str, tuple[int, ...]] | None = None, vocab: int = D, **first: bool) -> dict[str, Tensor]:
    """An EAGLE-3 draft with further tensors."""
    shapes = {"fc.weight": (H, 3 * H), "norm.weight": (H,), "lm_head.weight": (vocab, H)}
    return draw({**shapes, **layer("midlayer.", first=True, **first), **(names or {})})


def peagle(vocab: int = D, qk_norm: bool = False, own_embedding: bool = True) -> dict[str, Tensor]:
    shapes = {"fc.weight": (H, 3 * H), "norm.weight": (H,), "lm_head.weight": (vocab, H), "mask_hidden": (1, 1, 3 * H)}
    shapes |= layer("layers.0.", first=True, qk_norm=qk_norm) | layer("layers.1.", qk_norm=qk_norm)
    return draw(shapes | ({"embed_tokens.weight": (V, H)} if own_embedding else {}))


def blocks(names: dict[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """A DFlash backbone of two layers, with further tensors."""
    shapes = {"fc.weight": (H, 3 * H), "norm.weight": (H,), "hidden_norm.weight": (H,)}
    return draw({**shapes, **layer("layers.0.", qk_norm=True), **layer("layers.1.", qk_norm=True), **(names or {})})


def convolutions() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(2):
        for part in ("attention_conv", "mlp_conv"):
            shapes[f"layers.{n}.{part}.base_kernel"] = (2, 2, H)
            shapes[f"layers.{n}.{part}.kernel_projection.weight"] = (2 * 2 * (H // 16), H)
    return shapes | {
        "candidate_selector.predecessor_codebook": (V, 8),
        "candidate_selector.successor_codebook": (V, 8),
        "candidate_selector.hidden_projection.weight": (8, H),
    }


def markov(kind: str = "vanilla", vocab: int = V) -> dict[str, tuple[int, ...]]:
    gate = {"markov_head.gate_proj.weight": (8, H + 8), "markov_head.gate_proj.bias": (8,)} if kind == "gated" else {}
    return {
        "markov_head.markov_w1.weight": (V, 8),
        "markov_head.markov_w2.weight": (vocab, 8),
        "confidence_head.proj.weight": (1, H + 8),
        "confidence_head.proj.bias": (1,),
        **gate,
    }


GRU = {
    "prefix_gru.weight_ih_l0": (36, H),
    "prefix_gru.weight_hh_l0": (36, 12),
    "embed_proj.0.weight": (8, H + 12),
    "embed_proj.2.weight": (V, 8),
}


def sizes(layers: int = 1, **more: Any) -> dict[str, Any]:
    """Fields that all configs have, as transformers writes them."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 256,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "hidden_size": H,
        "initializer_range": 0.02,
        "intermediate_size": FFN,
        "max_position_embeddings": 512,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV,
        "rms_norm_eps": 1e-5,
        "use_cache": True,
        "vocab_size": V,
        **more,
    }


def network(**more: Any) -> SimpleNamespace:
    """What the references read."""
    base = sizes(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 0, 0]})
    return SimpleNamespace(**{**base, "rope_parameters": {"rope_theta": THETA}, **more})


def block_network(size: int, layers: int = 2, **more: Any) -> SimpleNamespace:
    fields = {"mask_token_id": 5, "conv_kernel_size": 2, "conv_group_size": 16, "selector_top_k": 4}
    fields |= {"gru_hidden_dim": 12, "emb_dim": 8, "pure_draft_prefix_len": 1}
    kinds = ["full_attention"] * layers
    return network(block_size=size, layer_types=kinds, num_hidden_layers=layers, dflash_config=fields, **more)


TRANSFORMERS_4 = {"rope_scaling": None, "rope_theta": THETA, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
TRANSFORMERS_5 = {"rope_parameters": {"rope_theta": THETA, "rope_type": "default"}, "dtype": "bfloat16"}
QWEN3 = {"max_window_layers": 36, "sliding_window": None, "use_sliding_window": False, "model_type": "qwen3"}


def midlayer_as_layers_0(name: str) -> str:
    return name.replace("midlayer.", "layers.0.")


# speculators 0.9.0


def speculators(kind: str, layers: dict[str, Any], **fields: Any) -> dict[str, Any]:
    method = {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
        },
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformers_version": "5.8.1",
        "dtype": "bfloat16",
        "transformer_layer_config": {**layers, "tie_word_embeddings": True},
        **fields,
    }


IDS = "eagle_aux_hidden_state_layer_ids"
MAPS = ("d2t", "t2d")


def speculators_eagle3() -> Published:
    flags = {"norm_before_residual": True, "norm_before_fc": False, "fc_norm": False, "norm_output": False}
    layers = {**sizes(), **TRANSFORMERS_5, "model_type": "llama", "mlp_bias": False, "pretraining_tp": 1}
    more = {"draft_vocab_size": D, "embed_requires_grad": False, IDS: [2, 4, 5]}
    config = speculators("eagle3", layers, **flags, **more)
    own, meant = eagle(), network(norm_before_residual=True)
    return Published("eagle3", config, own, meant, midlayer_as_layers_0, ("embed_tokens.weight",), MAPS)


def speculators_eagle3_1() -> Published:
    flags = {"norm_before_residual": False, "norm_before_fc": False, "fc_norm": True, "norm_output": True}
    layers = {**sizes(layer_types=["full_attention"]), **TRANSFORMERS_5, **QWEN3}
    config = speculators("eagle3", layers, **flags, draft_vocab_size=D, embed_requires_grad=False, **{IDS: [2, 4, 5]})
    own = eagle({f"fc_norm.{i}.weight": (H,) for i in range(3)}, qk_norm=True)
    meant = network(norm_output=True)
    return Published("eagle3", config, own, meant, midlayer_as_layers_0, ("embed_tokens.weight",), MAPS)


def speculators_peagle() -> Published:
    flags = {"norm_before_residual": True, "norm_before_fc": False, "fc_norm": False, "norm_output": False}
    layers = {**sizes(2), **TRANSFORMERS_5, **QWEN3}
    more = {"draft_vocab_size": V, "embed_requires_grad": True, "mask_token_id": 3, IDS: [2, 4, 5]}
    config = speculators("peagle", layers, **flags, **more)
    own = peagle(V, qk_norm=True)
    return Published("peagle", config, own, network(num_hidden_layers=2, norm_before_residual=True, mask_token_id=3))


def speculators_blocks(kind: str, size: int, **fields: Any) -> dict[str, Any]:
    layers = {**sizes(2, layer_types=["full_attention"] * 2), **TRANSFORMERS_5, **QWEN3}
    more = {"aux_hidden_state_layer_ids": [2, 4, 5], "mask_token_id": 5, "block_size": size}
    flags = {"sample_from_anchor": False, "sliding_window_non_causal": kind == "dflash2"}
    return speculators(kind, layers, **{**flags, **more, "draft_vocab_size": V, **fields})


def speculators_dflash() -> Published:
    config = speculators_blocks("dflash", 5, draft_vocab_size=D)
    return Published("dflash", config, blocks(), block_network(5), borrowed=("lm_head.weight",), maps=MAPS)


SLIDING = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 6, "use_sliding_window": True}


def both_directions(size: int) -> SimpleNamespace:
    meant = block_network(size, sliding_window=6, is_causal=False)
    meant.layer_types = ["sliding_attention"] * 2
    return meant


def speculators_dflash2() -> Published:
    fields = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 8, "selector_top_k": 4}
    config = speculators_blocks("dflash2", 5, **fields)
    config["transformer_layer_config"] |= SLIDING
    return Published("dflash2", config, blocks(convolutions()), both_directions(5))


def speculators_dspark() -> Published:
    heads = {"markov_rank": 8, "markov_head_type": "vanilla", "enable_confidence_head": True}
    heads |= {"confidence_head_with_markov": True, "sample_from_anchor": True, "draft_vocab_size": D}
    config, own = speculators_blocks("dspark", 4, **heads), blocks(markov(vocab=D))
    meant = block_network(4, markov_head_type="vanilla")
    return Published("dspark", config, own, meant, borrowed=("lm_head.weight",), maps=MAPS)


# EAGLE's own code


def eagles_own() -> Published:
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "pad_token_id": 0, "draft_vocab_size": D}
    config = {**sizes(), **fields, "rope_theta": THETA, "tie_word_embeddings": False, "torch_dtype": "float16"}
    del config["head_dim"], config["attention_dropout"]
    own = {name: x.half().float() for name, x in eagle().items()}
    borrowed = ("embed_tokens.weight",)
    return Published("eagle3", config, own, network(), borrowed=borrowed, maps=MAPS, dtype=torch.float16)


# z-lab


def zlab_dflash() -> Published:
    fields = {"architectures": ["DFlashDraftModel"], "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}}
    fields |= {"block_size": 5, "num_target_layers": 8, "layer_types": ["full_attention"] * 2}
    nested = {"mask_token_id": 5, "target_layer_ids": [1, 3, 4]}
    config = {**sizes(2), **TRANSFORMERS_4, **QWEN3, **fields, "dflash_config": nested}
    return Published("dflash", config, blocks(), block_network(5))


def zlab_dflash2() -> Published:
    fields = {"architectures": ["DFlash2DraftModel"], "is_causal": False, "num_target_layers": 8}
    nested = {"block_size": 5, "mask_token_id": 5, "target_layer_ids": [1, 3, 4]}
    nested |= {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 8, "selector_top_k": 4}
    config = {**sizes(2), **TRANSFORMERS_5, **QWEN3, **fields, **SLIDING, "dflash_config": nested}
    return Published("dflash2", config, blocks(convolutions()), both_directions(5))


# AngelSlim


def angelslim_eagle3() -> Published:
    fields = {"architectures": ["Eagle3LlamaForCausalLM"], "draft_vocab_size": D}
    fields |= {"aux_hidden_states_layer_ids": [0, 2, 5]}
    config = {**sizes(), **QWEN3, "model_type": "llama", **TRANSFORMERS_4, **fields}
    borrowed = ("embed_tokens.weight",)
    return Published("eagle3", config, eagle(), network(), borrowed=borrowed, maps=MAPS, layers=(0, 2, 5))


def angelslim_dflash() -> Published:
    draft = zlab_dflash()
    draft.config["architectures"] = ["QwenDFlashDraftModel"]
    return draft


# NVIDIA ModelOpt


def modelopt_eagle_config(ids: list[int]) -> dict[str, Any]:
    return {
        IDS: ids,
        "use_aux_hidden_state": True,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "use_mtp_layernorm": False,
        "next_layer_regular": True,
        "parallel_draft_step": 1,
        "parallel_draft_heads_num_layers": 1,
    }


def modelopt_eagle3() -> Published:
    fields = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "mlp_bias": False}
    config = {**sizes(), **TRANSFORMERS_4, **fields, "pretraining_tp": None, "draft_vocab_size": D}
    config["eagle_config"] = modelopt_eagle_config([1, 3, 4])
    return Published("eagle3", config, eagle(), network(), midlayer_as_layers_0, maps=("d2t",))


def modelopt_kimi() -> Published:
    experts = {"aux_loss_alpha": 0.001, "first_k_dense_replace": 1, "moe_intermediate_size": 16, "moe_layer_freq": 1}
    experts |= {"n_group": 1, "n_routed_experts": 8, "n_shared_experts": 1, "norm_topk_prob": True, "seq_aux": True}
    experts |= {"num_experts_per_tok": 2, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "topk_group": 1}
    experts |= {"topk_method": "noaux_tc", "num_nextn_predict_layers": 0, "ep_size": None, "num_return_sequences": 1}
    fields = {"architectures": ["Eagle3DeepseekV2ForCausalLM"], "model_type": "kimi_k2", **LATENT, **experts}
    config = {**sizes(), **TRANSFORMERS_4, **fields, "num_key_value_heads": HEADS}
    del config["head_dim"]
    config["eagle_config"] = modelopt_eagle_config([1, 3, 4])
    own, meant = eagle(vocab=V, latent=True), network(**LATENT)
    return Published("eagle3", config, own, meant, midlayer_as_layers_0)


def modelopt_blocks(**nested: Any) -> dict[str, Any]:
    config = zlab_dflash().config
    config["model_type"] = "qwen3"
    config["dflash_config"] |= {"causal": False, **nested}
    return {name: x for name, x in config.items() if name != "auto_map"}


def modelopt_dflash() -> Published:
    return Published("dflash", modelopt_blocks(), blocks(), block_network(5))


def modelopt_domino() -> Published:
    nested = {"projector_type": "domino", "shift_label": True, "pure_draft_prefix_len": 1}
    nested |= {"gru_hidden_dim": 12, "emb_dim": 8}
    return Published("domino", {**modelopt_blocks(**nested), "emb_dim": 8}, blocks(GRU), block_network(5))


def without_heads(name: str) -> str:
    return name.removeprefix("markov_head.").replace("confidence_head.proj.", "confidence_proj.")


def modelopt_dspark() -> Published:
    nested = {"projector_type": "dspark", "shift_label": True, "markov_rank": 8, "markov_head_type": "gated"}
    config = modelopt_blocks(**nested, use_confidence_head=True)
    own, meant = blocks(markov("gated")), block_network(5, markov_head_type="gated")
    return Published("dspark", config, own, meant, without_heads)


def modelopt_dflash2() -> Published:
    nested = {"projector_type": "dflash2", "conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 8}
    config = {**modelopt_blocks(**nested, selector_top_k=4, block_size=5), "is_causal": False}
    config["architectures"] = ["DFlash2DraftModel"]
    return Published("dflash2", config, blocks(convolutions()), block_network(5))


# SpecForge of sgl-project


def upstream_eagle3_1() -> Published:
    fields = {"architectures": ["LlamaForCausalLMEagle3"], "fc_norm": True, "norm_output": True, "draft_vocab_size": D}
    config = {**sizes(), **QWEN3, "model_type": "llama", **TRANSFORMERS_4, **fields}
    config["eagle_config"] = {IDS: [2, 3, 5], "use_aux_hidden_state": True}
    own = eagle({f"fc_norm.{i}.weight": (H,) for i in range(3)})
    return Published("eagle3", config, own, network(norm_output=True), maps=MAPS, layers=(2, 3, 5))


def upstream_latent() -> Published:
    draft = modelopt_kimi()
    draft.config["architectures"] = ["DeepseekV3ForCausalLMEagle3"]
    del draft.config["eagle_config"]
    draft.name, draft.layers = lambda name: name, (1, 3, 4)
    return draft


def upstream_peagle() -> Published:
    fields = {"architectures": ["PEagleDraftModel"], "draft_vocab_size": V, "mask_token_id": 3}
    config = {**sizes(2), **QWEN3, "model_type": "llama", **TRANSFORMERS_4, **fields, "embed_requires_grad": True}
    return Published("peagle", config, peagle(V), network(num_hidden_layers=2, mask_token_id=3))


def upstream_domino() -> Published:
    draft = modelopt_domino()
    del draft.config["dflash_config"]["causal"]
    return draft


def upstream_dspark() -> Published:
    nested = {"projector_type": "dspark", "markov_rank": 8, "markov_head_type": "vanilla"}
    nested |= {"confidence_head_alpha": 1.0, "enable_confidence_head": True, "confidence_head_with_markov": True}
    config = zlab_dflash().config
    config["architectures"], config["dflash_config"] = ["DSparkDraftModel"], {**config["dflash_config"], **nested}
    meant = block_network(5, markov_head_type="vanilla")
    return Published("dspark", config, blocks(markov()), meant)


def zlab_sliding() -> Published:
    """A sliding layer without `is_causal`."""
    draft = zlab_dflash()
    kinds = ["sliding_attention", "full_attention"]
    draft.config |= {"layer_types": kinds, "sliding_window": 6, "use_sliding_window": True}
    draft.network.layer_types, draft.network.sliding_window = kinds, 6
    return draft


FORMS: dict[str, Callable[[], Published]] = {
    "speculators, EAGLE-3": speculators_eagle3,
    "speculators, EAGLE-3.1 with Qwen3's attention": speculators_eagle3_1,
    "speculators, P-EAGLE": speculators_peagle,
    "speculators, DFlash": speculators_dflash,
    "speculators, DFlash-2": speculators_dflash2,
    "speculators, DSpark": speculators_dspark,
    "EAGLE, EAGLE-3": eagles_own,
    "z-lab, DFlash": zlab_dflash,
    "z-lab, DFlash with a sliding layer": zlab_sliding,
    "z-lab, DFlash-2": zlab_dflash2,
    "AngelSlim, EAGLE-3": angelslim_eagle3,
    "AngelSlim, DFlash": angelslim_dflash,
    "ModelOpt, EAGLE-3": modelopt_eagle3,
    "ModelOpt, EAGLE-3 with latent attention": modelopt_kimi,
    "ModelOpt, DFlash": modelopt_dflash,
    "ModelOpt, Domino": modelopt_domino,
    "ModelOpt, DSpark": modelopt_dspark,
    "ModelOpt, DFlash-2": modelopt_dflash2,
    "SpecForge upstream, EAGLE-3.1": upstream_eagle3_1,
    "SpecForge upstream, EAGLE-3 with latent attention": upstream_latent,
    "SpecForge upstream, P-EAGLE": upstream_peagle,
    "SpecForge upstream, Domino": upstream_domino,
    "SpecForge upstream, DSpark": upstream_dspark,
}
