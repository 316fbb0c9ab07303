"""How tensors are stored: as they are, or in 8-bit floating point with one scale a token.

``float8_e4m3fn`` halves the bytes of bf16 features. Hidden states have tokens whose norm is a thousand
times the others', hence a scale for each token, not for each tensor. What it costs in τ is measured in
docs/quickstart.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specforge.contracts import ENCODINGS as ENCODINGS

_SCALE = ".scale"


def encode(tensors: Mapping[str, Tensor], encoding: str) -> dict[str, Tensor]:
    """Stored form of a sample's tensors: ``name`` and, where it is scaled, ``name.scale [L, 1]`` fp32."""
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
    """Bytes a token of a floating-point tensor of so many values of so many bytes."""
    return width * itemsize if encoding == "raw" else width + torch.float32.itemsize


def decode(stored: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors in their own dtype again.

    Args:
        stored: the stored form; scales tell what is encoded.
        dtypes: dtype name of every tensor before it was encoded.

    Raises:
        ValueError: a scale does not belong to its tensor.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(_SCALE):
            continue
        scale = stored.get(name + _SCALE)
        if scale is not None:
            if name not in dtypes or scale.shape != (*tensor.shape[:-1], 1):
                raise ValueError(f"{name} has a scale of shape {tuple(scale.shape)}, itself {tuple(tensor.shape)}")
            tensor = (tensor.float() * scale).to(getattr(torch, dtypes[name]))
        tensors[name] = tensor
    return tensors
