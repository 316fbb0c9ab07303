"""Rotary position embedding: every variant that transformers knows, applied to flat rows.

Shape legend: R rows, h heads, d head size, P positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class RotaryTable:
    """Cosines and sines by position, from transformers' own initialisation of ``config.rope_parameters``.

    Not a module: its frequencies stay in fp32 when a draft is cast to a narrower dtype.

    Args:
        config: a transformers config with ``rope_parameters``, ``head_dim`` and ``max_position_embeddings``.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables for positions ``0 .. length - 1``: cosine and sine, both fp32 ``[P, rotary size / 2]``."""
        rotary = LlamaRotaryEmbedding(self.config).to(device)
        positions = torch.arange(length, device=device)
        cos, sin = rotary(torch.empty(0, device=device, dtype=torch.float32), positions[None])
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = x[..., :half], x[..., half : 2 * half]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    out[..., half : 2 * half] = (second * cos).addcmul_(first, sin)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [R, h, d]`` by the angles of ``cos, sin [R, rotary size / 2]`` (RoFormer, arXiv 2104.09864, eq. 34).

    The rotated dimensions pair ``i`` with ``i + rotary size / 2`` (the layout of Llama and NeoX); what lies
    beyond the rotary size passes through. The result has the dtype of ``x``.
    """
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return]
