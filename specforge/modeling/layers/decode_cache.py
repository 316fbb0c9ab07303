"""Decoding with a draft's layers: the keys and values of a growing sequence, and attention of some rows to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge.modeling.layers.rope import RotaryTable


class DecodeCache:
    """Keys and values by layer, and the angles of their positions, in buffers that grow by doubling.

    Which rows count is the caller's; a row that is written again is forgotten.

    Args:
        rotary: the angles.
        attentions: of each layer: sizes ``kv_heads`` (k), ``head_dim`` (d) and ``value_dim`` (v).
        dtype: of keys and values.
        device: of everything.
    """

    def __init__(
        self, rotary: RotaryTable, attentions: Sequence[Any], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._rotary, self._device, self._room = rotary, device, 0
        self._cos, self._sin = rotary(0, device)
        sizes = [((a.kv_heads, a.head_dim), (a.kv_heads, a.value_dim)) for a in attentions]
        self._layers = [[torch.empty(0, *x, dtype=dtype, device=device) for x in pair] for pair in sizes]

    def reserve(self, rows: int) -> None:
        """Make room for so many rows in all."""
        if rows <= self._room:
            return
        more = max(128, 2 * rows) - self._room
        self._room += more
        self._layers = [[torch.cat([x, x.new_empty(more, *x.shape[1:])]) for x in layer] for layer in self._layers]
        self._cos, self._sin = self._rotary(self._room, self._device)

    def angles(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of some positions, within the room."""
        return self._cos[start:stop], self._sin[start:stop]

    def write(self, layer: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put ``key [n, k, d]`` and ``value [n, k, v]`` behind the first ``start`` rows, within the room.

        Returns:
            Keys and values of all rows up to theirs, ``[start + n, ...]``.
        """
        keys, values = self._layers[layer]
        stop = start + len(key)
        keys[start:stop], values[start:stop] = key, value
        return keys[:stop], values[:stop]


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention ``[n, h, v]`` of ``query [n, h, d]`` to the rows of a cache, all or those of ``mask [n, m]``."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
