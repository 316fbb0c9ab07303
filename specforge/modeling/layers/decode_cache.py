"""Decoding with a draft's layers: the key/value cache of a growing text, and attention of new rows to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge.modeling.layers.decoder_layer import Angles, DecoderLayer, RotaryTable


class CachedDecoder:
    """Base of decoders that run a draft's layers on new rows with a key/value cache, on a snapshot of the weights.

    Keys and values by layer, and the angles of their positions, are in buffers that grow by doubling. Subclasses keep
    count of the valid rows; writing a row again replaces it.

    Attributes:
        rows: valid rows of the cache.
        device: device of the layers and of all buffers.
    """

    def __init__(self, layers: Sequence[DecoderLayer], rotary: RotaryTable, dtype: torch.dtype) -> None:
        self.layers, self.dtype, self.device = layers, dtype, layers[0].input_layernorm.weight.device
        self._rotary = rotary
        with torch.no_grad():  # in the compute dtype, also of a draft that trains in fp8
            self._weights = [layer.weights(dtype) for layer in layers]
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self.rows = self._capacity = 0
        self._cos, self._sin = self._rotary(0, self.device)
        attentions = [layer.self_attn for layer in self.layers]
        sizes = [((a.kv_heads, a.head_dim), (a.kv_heads, a.value_dim)) for a in attentions]
        self._buffers = [[torch.empty(0, *x, dtype=self.dtype, device=self.device) for x in pair] for pair in sizes]

    def crop(self, rows: int) -> None:
        """Keep the first ``rows`` rows."""
        self.rows = rows

    def reserve(self, rows: int) -> None:
        """Grow the buffers to hold at least ``rows`` rows."""
        if rows <= self._capacity:
            return
        more = max(128, 2 * rows) - self._capacity
        self._capacity += more
        self._buffers = [[torch.cat([x, x.new_empty(more, *x.shape[1:])]) for x in pair] for pair in self._buffers]
        self._cos, self._sin = self._rotary(self._capacity, self.device)

    def angles(self, start: int, stop: int) -> Angles:
        """Cosines and sines of the positions ``start .. stop - 1``, which must be reserved."""
        return self._cos[start:stop], self._sin[start:stop]

    def write(self, layer: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``key [n, k, d]`` and ``value [n, k, v]`` from row ``start`` on; the rows must be reserved.

        Returns:
            Keys and values of all rows up to the last one written, ``[start + n, ...]``.
        """
        keys, values = self._buffers[layer]
        stop = start + len(key)
        keys[start:stop], values[start:stop] = key, value
        return keys[:stop], values[:stop]


def cached_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention ``[n, h, v]`` of ``query [n, h, d]`` to m cached rows, or to those that ``mask [n, m]`` allows."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
