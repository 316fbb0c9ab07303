"""Storage formats of tensors: unchanged, or 8-bit floating point with one scale per token.

``float8_e4m3fn`` halves the bytes of bf16 features. The norms of hidden states differ by a factor of a thousand between
tokens, hence one scale per token rather than per tensor. docs/user-guide.md reports the cost in τ.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specforge.contracts import ENCODINGS as ENCODINGS

_SCALE = ".scale"


def encode(tensors: Mapping[str, Tensor], encoding: str) -> dict[str, Tensor]:
    """Stored form of a sample's tensors: ``name`` and, for a scaled tensor, ``name.scale [L, 1]`` fp32."""
    if encoding == "raw":
        return {name: x.contiguous() for name, x in tensors.items()}
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding {encoding!r}: use one of {', '.join(ENCODINGS)}")
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            stored[name] = tensor.contiguous()
            continue
        wide = tensor.float()
        scale = wide.abs().amax(-1, keepdim=True).div_(torch.finfo(torch.float8_e4m3fn).max)
        scale.clamp_(min=torch.finfo(torch.float32).tiny)
        stored[name] = (wide / scale).to(torch.float8_e4m3fn)
        stored[name + _SCALE] = scale
    return stored


def stored_width(width: int, itemsize: int, encoding: str) -> int:
    """Stored bytes per token of a floating-point feature of this width and item size."""
    return width * itemsize if encoding == "raw" else width + torch.float32.itemsize


def decode(stored: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors in their original dtypes.

    Raises:
        ValueError: a scale does not fit its tensor.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(_SCALE):
            continue
        scale = stored.get(name + _SCALE)
        if scale is not None:
            if name not in dtypes or scale.shape != (*tensor.shape[:-1], 1):
                raise ValueError(
                    f"{name} has a scale of shape {tuple(scale.shape)}, but is {tuple(tensor.shape)} itself"
                )
            tensor = (tensor.float() * scale).to(getattr(torch, dtypes[name]))
        tensors[name] = tensor
    return tensors
