"""Attention of block drafting: every block sees the tokens before its anchor, and itself.

The context's keys and values are those of the packed tokens, shared by all blocks; a block brings its own (DFlash,
arXiv 2602.06036, section 4). Blocks with neighbouring anchors see almost the same tokens, so a few of them share one
product over the tokens up to the last anchor, with a mask no larger than that product's scores. The blocks' own parts
are one batched product.

Shape legend: N tokens of the packed batch, n blocks, b slots of a block, R = n b query rows, h query heads,
k key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specforge.modeling.layers.attention import Product, additive_mask, merged_attention
from specforge.modeling.layers.flex_attention import Visibility, visible_attention


class BlockGroup(NamedTuple):
    """Consecutive blocks of one document."""

    first: int
    stop: int  # one past the last
    document: int  # flat token at which their document begins
    low: int  # flat token of the first anchor
    high: int  # flat token of the last anchor; no block sees it or the tokens after it


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    anchors: Tensor,
    groups: Sequence[BlockGroup],
    window: int | None = None,
    *,
    causal: bool = False,
    flex: bool = False,
) -> Tensor:
    """Attention of all blocks; no mask is larger than the scores of a few blocks.

    Args:
        query: ``[R, h, d]``, positions already applied.
        key: keys of all tokens, ``[N, k, d]``; ``k`` divides ``h`` (grouped-query attention).
        value: values of all tokens, ``[N, k, d]``.
        own_key: the blocks' own keys, ``[R, k, d]``.
        own_value: the blocks' own values, ``[R, k, d]``.
        anchors: ``[n]`` flat token of each block's slot 0; a block sees the tokens before it.
        groups: the blocks by document; a block in none sees only itself.
        window: in a sliding layer, a row sees no token of the context that is this many tokens back or more; None for a
            full layer. At least b.
        causal: whether a row sees no slot of its block after its own.
        flex: whether to use FlexAttention.

    Returns:
        ``[R, h, d]`` in the dtype of ``query``.
    """
    tokens, blocks, rows = len(key), len(anchors), len(query)
    size = rows // blocks
    if flex:
        visibility = _visibility(size, anchors, groups, window, causal)
        return visible_attention(query, key, value, [(own_key, own_value)], visibility)

    def products(dtype: torch.dtype) -> Iterator[Product]:
        own = slice(tokens, tokens + rows)
        yield Product(slice(0, rows), (own,), causal=causal, runs=blocks)
        for first, stop, document, low, high in groups:
            begin = document if window is None else max(document, low - window + 1)
            if begin < high:
                seen = torch.arange(begin, high, device=anchors.device)
                mask = additive_mask(_allowed(seen, anchors[first:stop], size, window), dtype)
                yield Product(slice(first * size, stop * size), (slice(begin, high),), mask=mask, merge=True)

    return merged_attention(query, torch.cat([key, own_key]), torch.cat([value, own_value]), products)


def _allowed(tokens: Tensor, anchors: Tensor, size: int, window: int | None) -> Tensor:
    """Whether the rows of some blocks, all slots of one after those of the other, see the context's ``tokens``."""
    at = anchors[:, None, None]
    allowed = (tokens < at).expand(-1, size, -1)
    if window is not None:
        allowed = allowed & (tokens > at + torch.arange(size, device=anchors.device)[:, None] - window)
    return allowed.flatten(0, 1)


def _visibility(
    size: int, anchors: Tensor, groups: Sequence[BlockGroup], window: int | None, causal: bool
) -> Visibility:
    slots = torch.arange(size, device=anchors.device)
    documents = anchors.new_zeros(len(anchors))
    real = torch.zeros_like(documents)
    for first, stop, document, _, _ in groups:
        documents[first:stop], real[first:stop] = document, 1
    low, high = (x.unsqueeze(1).expand(-1, size) for x in (documents, anchors * real))
    order = slots if causal else torch.zeros_like(slots)
    if window is not None:
        low = torch.maximum(low, anchors.unsqueeze(1) + slots - window + 1)
    block = torch.arange(len(anchors), device=anchors.device)
    group, order = torch.broadcast_tensors(block.unsqueeze(1), order)
    return Visibility(*(x.flatten() for x in (low, high, group, order)))
