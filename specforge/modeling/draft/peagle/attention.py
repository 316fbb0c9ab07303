"""P-EAGLE's attention of deep elements: depth-0 keys up to the anchor, and the shallower elements of the anchor.

No mask over all elements is built. They are taken some at a time, each chunk against the depth-0 keys of its document
that any of its elements sees, and against itself.

Shape legend: N tokens of the packed batch, E deep elements, h query heads, k key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specforge.modeling.layers.attention import Product, additive_mask, merged_attention
from specforge.modeling.layers.flex_attention import Visibility, visible_attention


class Chunk(NamedTuple):
    """Deep elements ``start .. stop - 1``, of whole anchors; they see the tokens ``document .. limit - 1`` at most."""

    start: int
    stop: int
    document: int
    limit: int


def deep_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own: tuple[Tensor, Tensor],
    anchors: Tensor,
    depths: Tensor,
    chunks: Sequence[Chunk],
    *,
    flex: bool = False,
) -> Tensor:
    """Attention of deep elements.

    Args:
        query: ``[E, h, d]``, positions already applied.
        key: depth-0 keys of all tokens, ``[N, k, d]``; ``k`` divides ``h``.
        value: depth-0 values, ``[N, k, d]``.
        own: the deep elements' keys and values, ``[E, k, d]`` each.
        anchors: ``[E]`` flat token of each element's anchor.
        depths: ``[E]`` its depth.
        chunks: the elements to take together; those in none are padding.
        flex: whether to use FlexAttention.

    Returns:
        ``[E, h, d]`` in the dtype of ``query``.
    """
    if flex:
        return visible_attention(query, key, value, [own], _visibility(anchors, depths, chunks))
    tokens = len(key)

    def products(dtype: torch.dtype) -> Iterator[Product]:
        for start, stop, document, limit in chunks:
            anchor, depth = (x[start:stop].unsqueeze(1) for x in (anchors, depths))
            before = torch.arange(document, limit, device=anchors.device) <= anchor
            beside = (anchor == anchor.t()) & (depth >= depth.t())
            mask = additive_mask(torch.cat([before, beside], dim=1), dtype)
            keys = slice(document, limit), slice(tokens + start, tokens + stop)
            yield Product(slice(start, stop), keys, mask=mask)

    return merged_attention(query, torch.cat([key, own[0]]), torch.cat([value, own[1]]), products)


def _visibility(anchors: Tensor, depths: Tensor, chunks: Sequence[Chunk]) -> Visibility:
    low, high = torch.zeros_like(anchors), torch.zeros_like(anchors)
    group = -1 - torch.arange(len(anchors), device=anchors.device)  # a padding row sees only itself
    for start, stop, document, _ in chunks:
        rows = slice(start, stop)
        low[rows], high[rows], group[rows] = document, anchors[rows] + 1, anchors[rows]
    return Visibility(low, high, group, depths)
