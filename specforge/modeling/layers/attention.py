"""Attention of a training-time test: causal keys of step 0 plus each row's own keys of the later steps.

Query row p of step s sees the step-0 keys of its document up to p, and of every step 1..s only its own
key (EAGLE-3, arXiv 2503.01840, fig. 6). The first part is an ordinary causal product and goes to
PyTorch's fused kernel; the second is one dot product a step, so no mask and no score matrix of the
whole row is ever built. Both parts share one softmax: they are merged by their log-sum-exp, and because
a flash backward needs nothing but the *final* output and log-sum-exp, feeding it the merged ones gives
the exact gradient of the joint softmax.

Shape legend: N tokens of the packed batch, R query rows, h query heads, k key/value heads, d / v size of a query and
key head / of a value head, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from specforge.modeling.layers.flex_attention import Sight, attend


class Segment(NamedTuple):
    """A run of consecutive query rows of one document.

    Attributes:
        row: first row among the R query rows.
        start: flat token of that row; the rows are tokens ``start .. stop - 1``.
        stop: one past the last token.
        document: flat token at which their document begins.
    """

    row: int
    start: int
    stop: int
    document: int


def flash(
    query: Tensor, key: Tensor, value: Tensor, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fused attention of ``[L, heads, d]`` tensors: output ``[L, h, d]`` and log-sum-exp ``[L, h]``.

    All tensors but the mask may have one more dimension in front.

    Args:
        query: ``[L, h, d]``.
        key: ``[K, k, d]``.
        value: ``[K, k, d]``.
        causal: row i sees the first i + 1 keys.
        mask: ``[1, 1, L, K]``, added to the scores; from :func:`additive_mask`.
    """
    q, k, v = (_heads_first(x) for x in (query, key, value))
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, attn_mask=mask)
    else:
        k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, _every_head(mask, q), True, is_causal=causal
        )
        lse = lse[..., : q.shape[2]]
    out, lse = out.transpose(1, 2), lse.transpose(1, 2)
    return (out, lse) if query.ndim == 4 else (out[0], lse[0])


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`flash` at ``out [L, h, d]`` and ``lse [L, h]`` of the whole softmax."""
    g, q, k, v, o = (_heads_first(x) for x in (grad, query, key, value, out))
    log_sum = (lse if lse.ndim == 3 else lse.unsqueeze(0)).transpose(1, 2).contiguous()
    if query.device.type == "cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, log_sum, 0.0, causal, attn_mask=mask
        )
    else:
        heads, kv_heads = q.shape[1], k.shape[1]
        # The kernel wants the log-sum-exp padded to a multiple of 32 rows.
        log_sum = F.pad(log_sum, (0, -q.shape[2] % 32), value=float("inf"))
        zero = torch.zeros((), dtype=torch.int64, device=q.device)
        grad_q, grad_k, grad_v, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            g,
            q,
            _repeat_heads(k, heads),
            _repeat_heads(v, heads),
            _every_head(mask, q),
            o,
            log_sum,
            zero,
            zero,
            0.0,
            [True, True, True, False],
            causal,
        )
        grads = grad_q, _sum_heads(grad_k, kv_heads), _sum_heads(grad_v, kv_heads)
    back = tuple(x.transpose(1, 2) for x in grads)
    return back if query.ndim == 4 else tuple(x[0] for x in back)  # type: ignore[return-value]


def _heads_first(x: Tensor) -> Tensor:
    return (x if x.ndim == 4 else x.unsqueeze(0)).transpose(1, 2)


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """``[1, 1, L, K]`` of 0 and -inf, for ``allowed [L, K]``, laid out as the fused kernels want it."""
    rows, keys = allowed.shape
    # The accelerators' kernel wants rows that begin at multiples of 16 bytes.
    mask = torch.zeros(rows, -(-keys // 16) * 16, dtype=dtype, device=allowed.device)[:, :keys]
    return mask.masked_fill_(~allowed, -torch.inf)[None, None]


def _every_head(mask: Tensor | None, query: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(-1, query.shape[1], -1, -1)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _sum_heads(x: Tensor, kv_heads: int) -> Tensor:
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2)


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the union of two key sets, from each set's output ``[.., d]`` and log-sum-exp ``[..]``."""
    total = torch.logaddexp(lse, other_lse)
    merged = out * (lse - total).exp().unsqueeze(-1) + other * (other_lse - total).exp().unsqueeze(-1)
    return merged, total


class _TTTAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], *own: Tensor
    ) -> Tensor:
        # Zero, not empty: padded rows are in no segment.
        out = torch.zeros(query.shape, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
        lse = out.new_zeros(query.shape[:2])
        for row, start, stop, document in segments:
            rows = slice(row, row + stop - start)
            part, part_lse = flash(query[rows], key[start:stop], value[start:stop], causal=True)
            if document < start:
                prompt = flash(query[rows], key[document:start], value[document:start], causal=False)
                part, part_lse = _merge(part, part_lse, *prompt)
            out[rows], lse[rows] = part, part_lse
        scores = _own_scores(query, own[0::2])
        if scores:
            total = torch.logaddexp(lse, torch.stack(scores, -1).logsumexp(-1))
            out.mul_((lse - total).exp_().unsqueeze(-1))
            for score, own_value in zip(scores, own[1::2], strict=True):
                _grouped(out, own_value).addcmul_(
                    _grouped((score - total).exp().unsqueeze(-1), own_value), own_value.unsqueeze(2)
                )
            lse = total
        out = out.to(query.dtype)
        ctx.segments = segments
        ctx.save_for_backward(query, key, value, out, lse, *own)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse, *own = ctx.saved_tensors
        dtype = query.dtype
        wide = lse.dtype
        if grad.device.type == "cpu":  # whose backward kernel is several times slower in bf16 than in fp32
            grad, query, key, value, out = (x.to(wide) for x in (grad, query, key, value, out))
        grad = grad.contiguous()
        grad_query = torch.zeros(query.shape, dtype=wide, device=query.device)
        grad_key = torch.zeros(key.shape, dtype=wide, device=key.device)
        grad_value = torch.zeros(value.shape, dtype=wide, device=value.device)
        for row, start, stop, document in ctx.segments:
            rows = slice(row, row + stop - start)
            at = (grad[rows], query[rows])
            result = out[rows], lse[rows]
            dq, dk, dv = flash_backward(*at, key[start:stop], value[start:stop], *result, causal=True)
            grad_query[rows] = dq
            grad_key[start:stop] += dk
            grad_value[start:stop] += dv
            if document < start:
                prompt = slice(document, start)
                dq, dk, dv = flash_backward(*at, key[prompt], value[prompt], *result, causal=False)
                grad_query[rows] += dq
                grad_key[prompt] += dk
                grad_value[prompt] += dv
        own_grads: list[Tensor] = []
        if own:
            g, q = grad.to(wide), query.to(wide)
            delta = torch.linalg.vecdot(g, out.to(wide))
            scale = query.shape[-1] ** -0.5
            for own_key, own_value, score in zip(own[0::2], own[1::2], _own_scores(query, own[0::2]), strict=True):
                weight = (score - lse).exp_()
                slope = (_own_dot(g, own_value).sub_(delta)).mul_(weight).mul_(scale).unsqueeze(-1)
                _grouped(grad_query, own_key).addcmul_(_grouped(slope, own_key), own_key.unsqueeze(2))
                own_grads += [
                    _grouped(slope * q, own_key).sum(2).to(own_key.dtype),
                    _grouped(weight.unsqueeze(-1) * g, own_key).sum(2).to(own_value.dtype),
                ]
        return (grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype), None, *own_grads)


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


def ttt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    own: Sequence[tuple[Tensor, Tensor]],
    *,
    flex: bool = False,
) -> Tensor:
    """Attention of one step of the training-time test, exact, without a mask.

    Args:
        query: ``[R, h, d]``, positions already applied.
        key: step-0 keys of all tokens, ``[N, k, d]``; ``k`` divides ``h`` (grouped-query attention).
        value: step-0 values, ``[N, k, v]``; ``v`` is at most ``d``.
        segments: which tokens the query rows are; rows in none are padding.
        own: keys ``[R, k, d]`` and values ``[R, k, v]`` of steps 1..s; empty at step 0.
        flex: compute it by FlexAttention.

    Returns:
        ``[R, h, v]`` in the dtype of ``query``.
    """
    if flex:
        return attend(query, key, value, own, _sight(len(query), segments, query.device))
    size = value.shape[-1]
    # The fused kernels want values as wide as keys; zeros add nothing, and their gradient is cut off again.
    pad = (0, key.shape[-1] - size)
    if pad[1]:
        value, own = F.pad(value, pad), [(k, F.pad(v, pad)) for k, v in own]
    flat = [x for pair in own for x in pair]
    out: Tensor = _TTTAttention.apply(query, key, value, segments, *flat)
    return out[..., :size] if pad[1] else out


def _sight(rows: int, segments: Sequence[Segment], device: torch.device) -> Sight:
    low, high = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    for row, start, stop, document in segments:
        low[row : row + stop - start] = document
        high[row : row + stop - start] = np.arange(start, stop) + 1
    each = np.arange(rows)
    return Sight(*(torch.from_numpy(x).to(device) for x in (low, high, each, np.zeros_like(each))))
