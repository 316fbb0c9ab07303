"""Attention of a parallel draft's deep elements: depth-0 keys up to the anchor, and the anchor's own depths.

No mask over all elements is built: they are taken a piece at a time, each piece against the depth-0 keys
of its document that any of it sees and against itself.

Shape legend: N tokens of the packed batch, E deep elements, h query heads, k key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specforge.modeling.layers.attention import additive_mask, flash, flash_backward
from specforge.modeling.layers.flex_attention import Sight, attend


class Chunk(NamedTuple):
    """Deep elements ``start .. stop - 1``, of whole anchors; they see the tokens ``document .. limit - 1`` at most."""

    start: int
    stop: int
    document: int
    limit: int


def _mask(chunk: Chunk, anchors: Tensor, depths: Tensor, dtype: torch.dtype) -> Tensor:
    anchor, depth = (x[chunk.start : chunk.stop].unsqueeze(1) for x in (anchors, depths))
    tokens = torch.arange(chunk.document, chunk.limit, device=anchors.device)
    own = (anchor == anchor.t()) & (depth >= depth.t())
    return additive_mask(torch.cat([tokens <= anchor, own], dim=1), dtype)


class _DeepAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        anchors: Tensor,
        depths: Tensor,
        chunks: Sequence[Chunk],
    ) -> Tensor:
        # Zero, not empty: padded elements are in no chunk.
        out = torch.zeros_like(query)
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = torch.zeros(query.shape[:2], dtype=wide, device=query.device)
        for chunk in chunks:
            rows, seen = slice(chunk.start, chunk.stop), slice(chunk.document, chunk.limit)
            keys, values = torch.cat([key[seen], own_key[rows]]), torch.cat([value[seen], own_value[rows]])
            mask = _mask(chunk, anchors, depths, query.dtype)
            out[rows], lse[rows] = flash(query[rows], keys, values, mask=mask)
        ctx.chunks = chunks
        ctx.save_for_backward(query, key, value, own_key, own_value, anchors, depths, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *saved, anchors, depths, out, lse = ctx.saved_tensors
        dtype, wide = grad.dtype, lse.dtype
        tensors = [grad.contiguous(), out, *saved]
        if grad.device.type == "cpu":  # whose backward kernel is several times slower in bf16 than in fp32
            tensors = [x.to(wide) for x in tensors]
        grad, out, query, key, value, own_key, own_value = tensors
        grads = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in tensors[2:]]
        for chunk in ctx.chunks:
            rows, seen = slice(chunk.start, chunk.stop), slice(chunk.document, chunk.limit)
            keys, values = torch.cat([key[seen], own_key[rows]]), torch.cat([value[seen], own_value[rows]])
            mask = _mask(chunk, anchors, depths, query.dtype)
            dq, dk, dv = flash_backward(grad[rows], query[rows], keys, values, out[rows], lse[rows], mask=mask)
            before = chunk.limit - chunk.document
            for total, place, part in zip(
                grads,
                (rows, seen, seen, rows, rows),
                (dq, dk[:before], dv[:before], dk[before:], dv[before:]),
                strict=True,
            ):
                total[place] += part
        return (*(x.to(dtype) for x in grads), None, None, None)


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
    """Attention of deep elements, exact.

    Args:
        query: ``[E, h, d]``, positions already applied.
        key: depth-0 keys of all tokens, ``[N, k, d]``; ``k`` divides ``h``.
        value: depth-0 values, ``[N, k, d]``.
        own: the deep elements' keys and values, ``[E, k, d]`` each.
        anchors: ``[E]`` flat token of each element's anchor.
        depths: ``[E]`` its depth.
        chunks: which elements to take together; those in none are padding.
        flex: compute it by FlexAttention.

    Returns:
        ``[E, h, d]`` in the dtype of ``query``.
    """
    if flex:
        return attend(query, key, value, [own], _sight(anchors, depths, chunks))
    return _DeepAttention.apply(query, key, value, *own, anchors, depths, chunks)  # type: ignore[no-any-return]


def _sight(anchors: Tensor, depths: Tensor, chunks: Sequence[Chunk]) -> Sight:
    low, high = torch.zeros_like(anchors), torch.zeros_like(anchors)
    group = -1 - torch.arange(len(anchors), device=anchors.device)  # padding sees itself only
    for start, stop, document, _ in chunks:
        rows = slice(start, stop)
        low[rows], high[rows], group[rows] = document, anchors[rows] + 1, anchors[rows]
    return Sight(low, high, group, depths)
