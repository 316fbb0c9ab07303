"""The EAGLE-3 draft with multi-head latent attention, as SGLang loads it for DeepSeek and Kimi targets.

Queries, and keys with values, are products of low rank (``q_a`` then ``q_b``, ``kv_a`` then ``kv_b``); positions
live in dimensions of their own, which all heads of a key share (DeepSeek-V2, arXiv 2405.04434, section 2.1). The
doubled input of EAGLE-3 enters the two ``a`` projections. Keys and values are expanded, not absorbed: the unroll
needs them per step anyway.

Shape legend: R rows, H hidden size, h heads, r / n rotary and other dimensions of a query and key head, v size of a
value head.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config

from specforge.modeling.draft.eagle3.family import Angles, Eagle3Attention
from specforge.modeling.draft.eagle3.network import Eagle3Draft
from specforge.modeling.draft.fields import ANYTHING, FLAG, POSITIVE, SIZE, Fields, only, required
from specforge.modeling.draft.registry import register_draft
from specforge.modeling.layers.functional import RMSNorm
from specforge.modeling.layers.rope import apply_rope

# There are as many key heads as query heads, and their size is the sum of the two parts.
LATENT: Fields = {
    **{name: required(SIZE) for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    "q_lora_rank": required(SIZE),
    "rope_interleave": only(True),
    "attention_bias": only(False),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "qk_head_dim", "num_nextn_predict_layers"), ANYTHING),
}
EXPERTS: Fields = {
    **dict.fromkeys(("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"), SIZE),
    **dict.fromkeys(("n_group", "topk_group"), SIZE),
    "norm_topk_prob": FLAG,
    "routed_scaling_factor": POSITIVE,
    "first_k_dense_replace": ANYTHING,
    "num_local_experts": ANYTHING,
    "output_router_logits": only(False),
}


class LatentAttention(Eagle3Attention):
    """Multi-head latent attention over ``input_parts`` times H columns: EAGLE-3's doubled input.

    A head is ``[rotary, other]`` inside, where checkpoints have ``[other, rotary]``, and the rotary pairs
    ``(2i, 2i + 1)`` of checkpoints become ``(i, i + r/2)``; scores do not notice, if keys and queries agree.

    Args:
        config: a ``DeepseekV3Config``.

    Raises:
        ValueError: ``v_head_dim`` is larger than a key's head, or a part of the rotary dimensions is not rotated.
    """

    input_parts: ClassVar[int] = 2

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        rotary, other, eps = config.qk_rope_head_dim, config.qk_nope_head_dim, config.rms_norm_eps
        self.heads = self.kv_heads = config.num_attention_heads
        self.rotary_dim, self.head_dim, self.value_dim = rotary, rotary + other, config.v_head_dim
        if self.value_dim > self.head_dim:
            raise ValueError(f"v_head_dim is {self.value_dim}, more than a key's {self.head_dim}")
        if "partial_rotary_factor" in config.rope_parameters:
            raise ValueError("partial_rotary_factor is set, but qk_rope_head_dim says how much is rotated")
        self.query_width, self.rank = config.q_lora_rank, config.kv_lora_rank
        width = self.input_parts * config.hidden_size
        self.q_a_proj = nn.Linear(width, self.query_width, bias=False)
        self.q_a_layernorm = RMSNorm(self.query_width, eps)
        self.q_b_proj = nn.Linear(self.query_width, self.heads * self.head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.rank + rotary, bias=False)
        self.kv_a_layernorm = RMSNorm(self.rank, eps)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (other + self.value_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value_dim, config.hidden_size, bias=False)
        self._scale = _yarn_scale(config)

    def inputs(self) -> list[nn.Linear]:
        """The two projections of the layer's input."""
        return [self.q_a_proj, self.kv_a_proj_with_mqa]

    def more(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """``q_b``, with each head's rows in the order used here and YaRN's temperature; and ``kv_b``."""
        heads = self.q_b_proj.weight.unflatten(0, (self.heads, -1))
        other, rotary = heads.split([self.head_dim - self.rotary_dim, self.rotary_dim], dim=1)
        q_b = torch.cat([_halves(rotary, 1), other], dim=1).flatten(0, 1)
        return (q_b * self._scale).to(dtype), self.kv_b_proj.weight.to(dtype)

    def queries(self, product: Tensor, angles: Angles, more: tuple[Tensor, ...]) -> Tensor:
        """``[R, h, r + n]``."""
        query = self.q_a_layernorm.linear(product.contiguous(), more[0])
        return apply_rope(query.unflatten(1, (self.heads, self.head_dim)), *angles)

    def keys_values(self, product: Tensor, angles: Angles, more: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """``[R, h, r + n]`` and ``[R, h, v]``."""
        rotary = apply_rope(_halves(product[:, self.rank :], 1).unsqueeze(1), *angles)
        expanded = self.kv_a_layernorm.linear(product[:, : self.rank].contiguous(), more[1])
        other, value = expanded.unflatten(1, (self.heads, -1)).split(
            [self.head_dim - self.rotary_dim, self.value_dim], dim=-1
        )
        return torch.cat([rotary.expand(-1, self.heads, -1), other], dim=-1), value


def _halves(x: Tensor, dim: int) -> Tensor:
    """Interleaved pairs, ``2i`` with ``2i + 1``, as halves, ``i`` with ``i + r/2``, along a dimension."""
    return x.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def _yarn_scale(config: DeepseekV3Config) -> float:
    """What DeepSeek multiplies the scores by under YaRN: ``(0.1 mscale_all_dim ln(factor) + 1)²``."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") == "default" or not rope.get("mscale_all_dim"):
        return 1.0
    factor = float(rope["factor"])
    return (0.1 * float(rope["mscale_all_dim"]) * math.log(factor) + 1.0) ** 2 if factor > 1 else 1.0


@register_draft("Eagle3DeepseekV2ForCausalLM", config_class=DeepseekV3Config)
class DeepseekEagle3(Eagle3Draft):
    """EAGLE-3 draft with latent attention and a dense MLP.

    Args:
        config: a ``DeepseekV3Config`` with the fields of
            :class:`~specforge.modeling.draft.eagle3.network.Eagle3Draft`; of the target's experts it reads nothing.
    """

    # Configs copied from a target have fields of experts; servers do not read them in a draft either.
    fields: ClassVar[Fields] = {**Eagle3Draft.fields, **LATENT, **dict.fromkeys(EXPERTS, ANYTHING)}
    attention: ClassVar[type[Eagle3Attention]] = LatentAttention

    def __init__(self, config: DeepseekV3Config) -> None:
        # The rotary table goes by this field, which a config of other attention may have set otherwise.
        config.head_dim = config.qk_rope_head_dim
        super().__init__(config)
