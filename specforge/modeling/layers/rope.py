"""Rotary position embedding: tables that depend only on the draft's config, applied to flat rows.

Shape legend: R rows, h heads, d head size, P positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# The types that drafts support. Transformers' ``dynamic`` and ``longrope`` use other angles for longer texts: the
# angles of a document would depend on its batch, and cached keys would become wrong as the text grows.
ROPE_TYPES = ("default", "linear", "yarn", "llama3")


class RotaryTable:
    """Cosines and sines by position, from transformers' own initialisation of ``config.rope_parameters``.

    Not a module: its frequencies stay in fp32 when a draft is cast to a narrower dtype.

    Args:
        config: a transformers config with ``rope_parameters``, ``head_dim`` and ``max_position_embeddings``. Of a head,
            the first ``head_dim * partial_rotary_factor`` dimensions are rotated.

    Raises:
        ValueError: more dimensions are rotated than a head has.
    """

    def __init__(self, config: Any) -> None:
        self._frequencies, self._factor = _frequencies(config)
        if 2 * len(self._frequencies) > config.head_dim:
            raise ValueError(f"head_dim is {config.head_dim}: dimensions are rotated in pairs")

    def __eq__(self, other: object) -> bool:
        """Whether the angles are the same."""
        if not isinstance(other, RotaryTable):
            return NotImplemented
        return self._factor == other._factor and torch.equal(self._frequencies, other._frequencies)

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables for positions ``0 .. length - 1``: cosine and sine, both fp32 ``[P, rotary size / 2]``."""
        positions = torch.arange(length, device=device, dtype=torch.float32)
        angles = positions[:, None] * self._frequencies.to(device)
        return angles.cos() * self._factor, angles.sin() * self._factor


def _frequencies(config: Any) -> tuple[Tensor, float]:
    """Angle by position of each pair of dimensions, and what cosine and sine are multiplied by."""
    rope = config.rope_parameters
    kind = rope["rope_type"]
    with torch.device("cpu"):
        if kind == "default":  # of which transformers has a copy in every model's file
            size = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
            return 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float) / size)), 1.0
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_type is {kind!r}; drafts support {', '.join(ROPE_TYPES)}")
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config)
        return frequencies, float(factor)


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
