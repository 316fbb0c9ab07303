"""Attention of block drafting: every block sees the tokens before its anchor, and itself.

The context's keys and values are those of the packed tokens, shared by all blocks; a block brings its own
(DFlash, arXiv 2602.06036, section 4). Blocks whose anchors lie next to each other see almost the same tokens,
so a few of them share one fused product over the tokens up to the last anchor, with a mask no larger than that
product's scores; the blocks' own parts are one batched product. Both parts share one softmax, merged by their
log-sum-exp (see :mod:`specforge.modeling.layers.attention`).

Shape legend: N tokens of the packed batch, n blocks, b slots of a block, R = n b query rows, h query heads,
k key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specforge.modeling.layers.attention import _merge, flash, flash_backward
from specforge.modeling.layers.flex_attention import Sight, attend


class BlockGroup(NamedTuple):
    """Consecutive blocks of one document.

    Attributes:
        first: the first block.
        stop: one past the last.
        document: flat token at which their document begins.
        low: flat token of the first anchor.
        high: flat token of the last anchor; no block sees it or what follows.
    """

    first: int
    stop: int
    document: int
    low: int
    high: int


class _Product(NamedTuple):
    """One fused product: the query rows, the tokens they look at, and the mask."""

    rows: slice
    tokens: slice
    mask: Tensor


def _products(
    groups: Sequence[BlockGroup], anchors: Tensor, size: int, window: int | None, dtype: torch.dtype
) -> Iterator[_Product]:
    slots = torch.arange(size, device=anchors.device)
    # Not -inf: a row that sees nothing would be NaN; so it has no weight after the merge.
    hidden = torch.finfo(dtype).min / 2
    for first, stop, document, low, high in groups:
        begin = document if window is None else max(document, low - window + 1)
        if begin == high:
            continue
        tokens = torch.arange(begin, high, device=anchors.device)
        at = anchors[first:stop, None, None]
        unseen = tokens >= at
        if window is not None:
            unseen = unseen | (tokens <= at + slots[:, None] - window)
        # The accelerators' kernel wants rows that begin at multiples of 16 bytes.
        width = -(-len(tokens) // 16) * 16
        mask = torch.zeros(stop - first, size, width, dtype=dtype, device=anchors.device)[..., : len(tokens)]
        mask.masked_fill_(unseen, hidden)
        rows = slice(first * size, stop * size)
        yield _Product(rows, slice(begin, high), mask.flatten(0, 1)[None, None])


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        anchors: Tensor,
        groups: Sequence[BlockGroup],
        window: int | None,
    ) -> Tensor:
        size = len(query) // len(anchors)
        q, k, v = (x.unflatten(0, (-1, size)) for x in (query, own_key, own_value))
        part, part_lse = flash(q, k, v, causal=window is not None)
        wide = torch.promote_types(query.dtype, torch.float32)
        out, lse = part.to(wide).flatten(0, 1).contiguous(), part_lse.flatten(0, 1).contiguous()
        for rows, tokens, mask in _products(groups, anchors, size, window, query.dtype):
            seen = flash(query[rows], key[tokens], value[tokens], causal=False, mask=mask)
            out[rows], lse[rows] = _merge(out[rows], lse[rows], *seen)
        out = out.to(query.dtype)
        ctx.plan = groups, window
        ctx.save_for_backward(query, key, value, own_key, own_value, anchors, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, own_key, own_value, anchors, out, lse = ctx.saved_tensors
        groups, window = ctx.plan
        dtype, wide = query.dtype, lse.dtype
        if grad.device.type == "cpu":  # whose backward kernel is several times slower in bf16 than in fp32
            tensors = (grad, query, key, value, own_key, own_value, out)
            grad, query, key, value, own_key, own_value, out = (x.to(wide) for x in tensors)
        grad = grad.contiguous()
        size = len(query) // len(anchors)
        g, q, k, v, o, s = (x.unflatten(0, (-1, size)) for x in (grad, query, own_key, own_value, out, lse))
        grads = flash_backward(g, q, k, v, o, s, causal=window is not None)
        grad_query, grad_own_key, grad_own_value = (x.flatten(0, 1).to(wide) for x in grads)
        grad_key = torch.zeros(key.shape, dtype=wide, device=key.device)
        grad_value = torch.zeros(value.shape, dtype=wide, device=value.device)
        for rows, tokens, mask in _products(groups, anchors, size, window, query.dtype):
            dq, dk, dv = flash_backward(
                grad[rows], query[rows], key[tokens], value[tokens], out[rows], lse[rows], False, mask
            )
            grad_query[rows] += dq
            grad_key[tokens] += dk
            grad_value[tokens] += dv
        found = (grad_query, grad_key, grad_value, grad_own_key, grad_own_value)
        return *(x.to(dtype) for x in found), None, None, None


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
    flex: bool = False,
) -> Tensor:
    """Attention of all blocks, exact; no mask is larger than the scores of a few blocks.

    Args:
        query: ``[R, h, d]``, positions already applied.
        key: keys of all tokens, ``[N, k, d]``; ``k`` divides ``h`` (grouped-query attention).
        value: values of all tokens, ``[N, k, d]``.
        own_key: the blocks' own keys, ``[R, k, d]``.
        own_value: the blocks' own values, ``[R, k, d]``.
        anchors: ``[n]`` flat token of each block's slot 0; tokens before it are seen.
        groups: the blocks by document; what is in none sees its own block only.
        window: keys that lie this far back or further are hidden, and slots after a row's own (a sliding layer);
            None for a full layer, which sees its whole block. At least b.
        flex: compute it by FlexAttention.

    Returns:
        ``[R, h, d]`` in the dtype of ``query``.
    """
    if flex:
        sight = _sight(len(query) // len(anchors), anchors, groups, window)
        return attend(query, key, value, [(own_key, own_value)], sight)
    return _BlockAttention.apply(  # type: ignore[no-any-return]
        query, key, value, own_key, own_value, anchors, groups, window
    )


def _sight(size: int, anchors: Tensor, groups: Sequence[BlockGroup], window: int | None) -> Sight:
    slots = torch.arange(size, device=anchors.device)
    documents = anchors.new_zeros(len(anchors))
    real = torch.zeros_like(documents)
    for first, stop, document, _, _ in groups:
        documents[first:stop], real[first:stop] = document, 1
    low, high = (x.unsqueeze(1).expand(-1, size) for x in (documents, anchors * real))
    order = torch.zeros_like(slots)
    if window is not None:
        low, order = torch.maximum(low, anchors.unsqueeze(1) + slots - window + 1), slots
    block = torch.arange(len(anchors), device=anchors.device)
    group, order = torch.broadcast_tensors(block.unsqueeze(1), order)
    return Sight(*(x.flatten() for x in (low, high, group, order)))
