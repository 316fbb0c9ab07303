"""Exact attention as a few fused products that share one softmax, merged by their log-sum-exp.

Every draft's attention is a union of key sets: the tokens of a document up to some point, and keys that only a few rows
share. Each set goes to PyTorch's fused kernel in a product of its own, so neither a mask nor a score matrix of the
whole batch is ever built. A flash backward needs nothing but the *final* output and log-sum-exp, so feeding it the
merged ones gives the exact gradient of the joint softmax.

A training-time test (:func:`ttt_attention`) adds one key per row and step. Query row p of step s sees the step-0 keys
of its document up to p, and only its own key of each step 1..s (EAGLE-3, arXiv 2503.01840, fig. 6): one dot product
per step, without a kernel.

Shape legend: N tokens of the packed batch, R query rows, K keys, B runs, L rows of a run, h query heads, k key/value
heads, d / v size of a query and key head / of a value head, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from specforge.modeling.layers.flex_attention import Visibility, visible_attention
from specforge.modeling.layers.packed_attention import (
    Packing,
    Segment,
    half_attention,
    half_attention_backward,
    merge,
    packed_attention,
    runs_packed,
)


class Product(NamedTuple):
    """One fused product: query rows and the keys that they see."""

    rows: slice
    keys: tuple[slice, ...]  # the keys, as slices that are concatenated
    causal: bool = False  # whether row i sees the first i + 1 keys only
    mask: Tensor | None = None  # [1, 1, L, K], added to the scores; from additive_mask
    runs: int = 1  # B; rows and keys are that many independent runs of equal length
    merge: bool = False  # whether an earlier product has the same rows

    def of_rows(self, x: Tensor) -> Tensor:
        """``[B, L, ...]`` of the rows of ``x [R, ...]``."""
        return x[self.rows].unflatten(0, (self.runs, -1))

    def of_keys(self, x: Tensor) -> Tensor:
        """``[B, K / B, ...]`` of the keys of ``x [K, ...]``."""
        parts = [x[keys] for keys in self.keys]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unflatten(0, (self.runs, -1))

    def by_slice(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The slices of keys, each with its part of ``x [B, K / B, ...]``."""
        return zip(self.keys, x.flatten(0, 1).split([s.stop - s.start for s in self.keys]), strict=True)


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """``[1, 1, L, K]`` for ``allowed [L, K]``: 0 or a large negative number, laid out as the fused kernels need it.

    Not -inf: a row that sees no key would be NaN. As it is, such a row has no weight after the merge.
    """
    rows, keys = allowed.shape
    # The kernel for accelerators needs rows that begin at multiples of 16 bytes.
    mask = torch.zeros(rows, -(-keys // 16) * 16, dtype=dtype, device=allowed.device)[:, :keys]
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min / 2)[None, None]


def _flash(query: Tensor, key: Tensor, value: Tensor, product: Product) -> tuple[Tensor, Tensor]:
    """Output ``[B, L, h, d]`` and log-sum-exp ``[B, L, h]`` of one product, from PyTorch's fused kernels."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal, mask = product.causal, product.mask
    if mask is None and runs_packed(query):
        return half_attention(query, key, value, causal)
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, attn_mask=mask)
    else:
        k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, _every_head(mask, q), True, is_causal=causal
        )
        lse = lse[..., : q.shape[2]]
    return out.transpose(1, 2), lse.transpose(1, 2)


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, product: Product
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value in one product; ``out`` and ``lse`` are those of the whole softmax."""
    if product.mask is None and runs_packed(query):
        return half_attention_backward(grad, query, key, value, out, lse, product.causal)
    g, q, k, v, o = (x.transpose(1, 2) for x in (grad, query, key, value, out))
    lse = lse.transpose(1, 2).contiguous()
    causal, mask = product.causal, product.mask
    if query.device.type == "cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, lse, 0.0, causal, attn_mask=mask
        )
    else:
        heads, kv_heads = q.shape[1], k.shape[1]
        # The kernel needs the log-sum-exp padded to a multiple of 32 rows.
        lse = F.pad(lse, (0, -q.shape[2] % 32), value=float("inf"))
        zero = torch.zeros((), dtype=torch.int64, device=q.device)
        k, v, mask = _repeat_heads(k, heads), _repeat_heads(v, heads), _every_head(mask, q)
        grad_q, grad_k, grad_v, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            g, q, k, v, mask, o, lse, zero, zero, 0.0, [True, True, True, False], causal
        )
        grads = grad_q, _sum_heads(grad_k, kv_heads), _sum_heads(grad_v, kv_heads)
    return tuple(x.transpose(1, 2) for x in grads)


def _every_head(mask: Tensor | None, query: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(-1, query.shape[1], -1, -1)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _sum_heads(x: Tensor, kv_heads: int) -> Tensor:
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2)


# The products of an attention, given the dtype of their masks. It is called again in the backward pass, so that masks
# are not kept.
Products = Callable[[torch.dtype], Iterable[Product]]


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, products: Products, *own: Tensor) -> Tensor:
        # Zero, not empty: padded rows are in no product.
        out = torch.zeros(query.shape, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
        lse = out.new_zeros(query.shape[:2])
        for product in products(query.dtype):
            rows = product.rows
            parts = _flash(product.of_rows(query), product.of_keys(key), product.of_keys(value), product)
            part, part_lse = (x.flatten(0, 1) for x in parts)
            if product.merge:
                part, part_lse = merge(out[rows], lse[rows], part, part_lse)
            out[rows], lse[rows] = part, part_lse
        if own:
            lse = _add_own(out, lse, query, own)
        out = out.to(query.dtype)
        ctx.products = products
        ctx.save_for_backward(query, key, value, out, lse, *own)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse, *own = ctx.saved_tensors
        dtype, wide = query.dtype, lse.dtype
        if grad.device.type == "cpu":  # the CPU's backward kernel is several times slower in bf16 than in fp32
            grad, query, key, value, out = (x.to(wide) for x in (grad, query, key, value, out))
        grad = grad.contiguous()
        grad_query, grad_key, grad_value = (
            torch.zeros(x.shape, dtype=wide, device=x.device) for x in (query, key, value)
        )
        for product in ctx.products(query.dtype):
            g, q, o, s = (product.of_rows(x) for x in (grad, query, out, lse))
            k, v = product.of_keys(key), product.of_keys(value)
            dq, dk, dv = _flash_backward(g, q, k, v, o, s, product)
            if product.merge:
                grad_query[product.rows] += dq.flatten(0, 1)
            else:
                grad_query[product.rows] = dq.flatten(0, 1)
            for total, part in ((grad_key, dk), (grad_value, dv)):
                for keys, x in product.by_slice(part):
                    total[keys] += x
        own_grads = _own_backward(grad.to(wide), query.to(wide), out.to(wide), lse, own, grad_query) if own else []
        return (grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype), None, *own_grads)


def _add_own(out: Tensor, lse: Tensor, query: Tensor, own: Sequence[Tensor]) -> Tensor:
    """Add each row's own keys and values to its softmax: ``out`` in place, and the new log-sum-exp."""
    scores = _own_scores(query, own[0::2])
    total = torch.logaddexp(lse, torch.stack(scores, -1).logsumexp(-1))
    out.mul_((lse - total).exp_().unsqueeze(-1))
    for score, own_value in zip(scores, own[1::2], strict=True):
        _grouped(out, own_value).addcmul_(
            _grouped((score - total).exp().unsqueeze(-1), own_value), own_value.unsqueeze(2)
        )
    return total


def _own_backward(
    grad: Tensor, query: Tensor, out: Tensor, lse: Tensor, own: Sequence[Tensor], grad_query: Tensor
) -> list[Tensor]:
    """Gradients of the rows' own keys and values; their part of the queries' gradient is added to ``grad_query``."""
    found: list[Tensor] = []
    delta = torch.linalg.vecdot(grad, out)
    scale = query.shape[-1] ** -0.5
    for own_key, own_value, score in zip(own[0::2], own[1::2], _own_scores(query, own[0::2]), strict=True):
        weight = (score - lse).exp_()
        slope = (_own_dot(grad, own_value).sub_(delta)).mul_(weight).mul_(scale).unsqueeze(-1)
        _grouped(grad_query, own_key).addcmul_(_grouped(slope, own_key), own_key.unsqueeze(2))
        found += [
            _grouped(slope * query, own_key).sum(2).to(own_key.dtype),
            _grouped(weight.unsqueeze(-1) * grad, own_key).sum(2).to(own_value.dtype),
        ]
    return found


def _grouped(x: Tensor, like: Tensor) -> Tensor:
    """View ``[R, h, ...]`` as ``[R, k, h / k, ...]``: query heads by the key head of ``like`` they share."""
    return x.unflatten(1, (like.shape[1], -1))


def _own_dot(query: Tensor, own: Tensor) -> Tensor:
    """Dot product of each query head with its row's own key or value: ``[R, h]`` in fp32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.linalg.vecdot(_grouped(query.to(wide), own), own.to(wide).unsqueeze(2)).flatten(1)


def _own_scores(query: Tensor, own_keys: Sequence[Tensor]) -> list[Tensor]:
    scale = query.shape[-1] ** -0.5
    return [_own_dot(query, own_key).mul_(scale) for own_key in own_keys]


def merged_attention(
    query: Tensor, key: Tensor, value: Tensor, products: Products, own: Sequence[tuple[Tensor, Tensor]] = ()
) -> Tensor:
    """Attention of every row to the union of the keys of its products and of its own keys.

    Args:
        query: ``[R, h, d]``, positions already applied.
        key: ``[K, k, d]``; ``k`` divides ``h`` (grouped-query attention).
        value: ``[K, k, d]``.
        products: the products; rows in none are padding.
        own: keys and values ``[R, k, d]`` that only their own row sees.

    Returns:
        ``[R, h, d]`` in the dtype of ``query``.
    """
    flat = [x for pair in own for x in pair]
    return _MergedAttention.apply(query, key, value, products, *flat)  # type: ignore[no-any-return]


def ttt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    own: Sequence[tuple[Tensor, Tensor]],
    *,
    packing: Packing | None = None,
    flex: bool = False,
) -> Tensor:
    """Attention of one step of the training-time test.

    Args:
        query: ``[R, h, d]``, positions already applied.
        key: step-0 keys of all tokens, ``[N, k, d]``; ``k`` divides ``h`` (grouped-query attention).
        value: step-0 values, ``[N, k, v]``; ``v`` is at most ``d``.
        segments: the tokens that the query rows are; rows in none are padding.
        own: keys ``[R, k, d]`` and values ``[R, k, v]`` of steps 1..s; empty at step 0.
        packing: the segments laid out for GPUs, on the device of the rows.
        flex: whether to use FlexAttention.

    Returns:
        ``[R, h, v]`` in the dtype of ``query``.
    """
    if flex:
        return visible_attention(query, key, value, own, _visibility(len(query), segments, query.device))

    def products(dtype: torch.dtype) -> Iterator[Product]:
        for row, start, stop, document in segments:
            rows = slice(row, row + stop - start)
            yield Product(rows, (slice(start, stop),), causal=True)
            if document < start:
                yield Product(rows, (slice(document, start),), merge=True)

    size = value.shape[-1]
    # The fused kernel needs values as wide as keys. Zeros add nothing, and their gradient is cut off again.
    pad = (0, key.shape[-1] - size)
    if pad[1]:
        value, own = F.pad(value, pad), [(k, F.pad(v, pad)) for k, v in own]
    if packing is not None and runs_packed(query):
        return packed_attention(query, key, value, packing, own)[..., :size]
    return merged_attention(query, key, value, products, own)[..., :size]


def _visibility(rows: int, segments: Sequence[Segment], device: torch.device) -> Visibility:
    low, high = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    for row, start, stop, document in segments:
        low[row : row + stop - start] = document
        high[row : row + stop - start] = np.arange(start, stop) + 1
    each = np.arange(rows)
    return Visibility(*(torch.from_numpy(x).to(device) for x in (low, high, each, np.zeros_like(each))))
