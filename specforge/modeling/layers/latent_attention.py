"""Multi-head latent attention of DeepSeek and Kimi layers.

Queries, and keys with values, are products of low rank (``q_a`` then ``q_b``, ``kv_a`` then ``kv_b``). Positions have
dimensions of their own, which all heads of a key share (DeepSeek-V2, arXiv 2405.04434, section 2.1). Keys and values
are expanded, not absorbed: a training-time test needs them per step anyway.

Shape legend: R rows, H hidden size, h heads, r / n rotary and other dimensions of a query and key head, v size of a
value head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config

from specforge.modeling.layers.decoder_layer import Angles, Attention, RMSNorm, rotated
from specforge.modeling.layers.fp8 import Matrix


class LatentAttention(Attention):
    """Multi-head latent attention.

    A head is ``[rotary, other]`` here and ``[other, rotary]`` in checkpoints, and the rotary pairs ``(2i, 2i + 1)`` of
    checkpoints become ``(i, i + r/2)``. Scores stay the same, because keys and queries are reordered alike.

    Args:
        config: a ``DeepseekV3Config``.
        width: width of the layer's input to the projections; H by default.

    Raises:
        ValueError: ``v_head_dim`` is larger than a key's head, or a part of the rotary dimensions is not rotated.
    """

    def __init__(self, config: DeepseekV3Config, width: int | None = None) -> None:
        super().__init__()
        rotary, other, eps = config.qk_rope_head_dim, config.qk_nope_head_dim, config.rms_norm_eps
        self.heads = self.kv_heads = config.num_attention_heads
        self.rotary_dim, self.head_dim, self.value_dim = rotary, rotary + other, config.v_head_dim
        if self.value_dim > self.head_dim:
            raise ValueError(f"v_head_dim is {self.value_dim}, larger than the size of a key head, {self.head_dim}")
        if "partial_rotary_factor" in config.rope_parameters:
            raise ValueError("partial_rotary_factor is set, but qk_rope_head_dim sets the rotated size")
        self.query_width, self.rank = config.q_lora_rank, config.kv_lora_rank
        width = width or config.hidden_size
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
        """``q_b``, with each head's rows in the order used here and multiplied by YaRN's temperature; and ``kv_b``."""
        heads = self.q_b_proj.weight.unflatten(0, (self.heads, -1))
        other, rotary = heads.split([self.head_dim - self.rotary_dim, self.rotary_dim], dim=1)
        q_b = torch.cat([_deinterleaved(rotary), other], dim=1).flatten(0, 1)
        return (q_b * self._scale).to(dtype), self.kv_b_proj.weight.to(dtype)

    def queries(self, product: Tensor, angles: Angles | None, more: tuple[Matrix, ...]) -> Tensor:
        """``[R, h, r + n]``."""
        query = self.q_a_layernorm.linear(product.contiguous(), more[0])
        return rotated(query.unflatten(1, (self.heads, self.head_dim)), angles)

    def keys_values(self, product: Tensor, angles: Angles | None, more: tuple[Matrix, ...]) -> tuple[Tensor, Tensor]:
        """``[R, h, r + n]`` and ``[R, h, v]``."""
        rotary = rotated(_deinterleaved(product[:, self.rank :]).unsqueeze(1), angles)
        expanded = self.kv_a_layernorm.linear(product[:, : self.rank].contiguous(), more[1])
        other, value = expanded.unflatten(1, (self.heads, -1)).split(
            [self.head_dim - self.rotary_dim, self.value_dim], dim=-1
        )
        return torch.cat([rotary.expand(-1, self.heads, -1), other], dim=-1), value


def _deinterleaved(x: Tensor) -> Tensor:
    """Pairs ``(2i, 2i + 1)`` along dimension 1 moved to ``(i, i + r/2)``."""
    return x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def _yarn_scale(config: DeepseekV3Config) -> float:
    """DeepSeek's factor for scores under YaRN: ``(0.1 mscale_all_dim ln(factor) + 1)²``."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") == "default" or not rope.get("mscale_all_dim"):
        return 1.0
    factor = float(rope["factor"])
    return (0.1 * float(rope["mscale_all_dim"]) * math.log(factor) + 1.0) ** 2 if factor > 1 else 1.0
