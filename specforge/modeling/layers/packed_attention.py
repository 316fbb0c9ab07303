"""Attention of a training-time test on GPUs: one flash kernel for the documents of a whole batch.

The kernel takes documents of any lengths, packed one after the other, and aligns the last query of a document with its
last key. So the queries of a document are those of all tokens from its first needed row to its last
(:class:`Packing`); what is computed for tokens in between that no label needs is dropped. The rows' own keys of later
steps join the softmax afterwards, by the log-sum-exp.

Shape legend: N tokens of the packed batch, R query rows, n of them without padding, P places (queries of the kernel),
Q keys of the kernel, D documents with rows, S steps with own keys, h query heads, k key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specforge.fusion import fused

# Beyond this share of places without a row, separate products for each run of rows are faster.
_MOST_EMPTY = 0.25
# Products with as many keys go to cuDNN's kernels, almost twice as fast. They prepare for every new length, for a tenth
# of a second, and their backward pass adds in no fixed order.
_LONG = 8192


class Segment(NamedTuple):
    """A run of consecutive query rows of one document."""

    row: int  # first row among the R query rows
    start: int  # flat token of that row; the rows are tokens start .. stop - 1
    stop: int  # one past the last token
    document: int  # flat token at which their document begins


class Packing(NamedTuple):
    """The queries and keys that the kernel takes, from :func:`pack`."""

    rows: Tensor | None  # [P] row at each place, 0 where there is none; None if the places are the n rows
    places: Tensor | None  # [n] place of each row; None likewise
    tokens: Tensor  # [Q] token of each key
    query_ends: Tensor  # [D + 1] int32, 0 and the end of each document among the places
    key_ends: Tensor  # [D + 1] int32, likewise among the keys
    num_rows: int  # n
    sizes: tuple[tuple[int, int], ...]  # queries and keys of each document

    @property
    def most_queries(self) -> int:
        """Queries of the longest document."""
        return max(queries for queries, _ in self.sizes)

    @property
    def most_keys(self) -> int:
        """Keys of the longest document."""
        return max(keys for _, keys in self.sizes)

    @property
    def is_long(self) -> bool:
        """Whether a document is so long that a kernel for each is faster than one for all."""
        return self.most_keys >= _LONG and not torch.are_deterministic_algorithms_enabled()


def pack(segments: Sequence[Segment]) -> Packing | None:
    """Lay out rows for the kernel; None if there are none, or too many places would be empty.

    For example, a document of tokens 0 .. 9 with rows 2, 3, 4 and 7 has six places, for the tokens 2 .. 7, of which two
    are empty, and eight keys.
    """
    if not segments:
        return None
    documents = [list(group) for _, group in groupby(segments, key=lambda segment: segment.document)]
    ends = lambda sizes: torch.from_numpy(np.cumsum([0, *sizes], dtype=np.int32))  # noqa: E731
    queries = [runs[-1].stop - runs[0].start for runs in documents]
    keys = [runs[-1].stop - runs[0].document for runs in documents]
    begins = np.cumsum([0, *queries])
    places = np.concatenate(
        [
            begin + np.arange(start, stop) - runs[0].start
            for begin, runs in zip(begins[:-1], documents, strict=True)
            for _, start, stop, _ in runs
        ]
    )
    total, count = int(begins[-1]), len(places)
    if count < (1 - _MOST_EMPTY) * total:
        return None
    rows = np.zeros(total, dtype=np.int64)
    rows[places] = np.arange(count)
    full = total == count
    return Packing(
        rows=None if full else torch.from_numpy(rows),
        places=None if full else torch.from_numpy(places),
        tokens=torch.from_numpy(np.concatenate([np.arange(x[0].document, x[-1].stop) for x in documents])),
        query_ends=ends(queries),
        key_ends=ends(keys),
        num_rows=count,
        sizes=tuple(zip(queries, keys, strict=True)),
    )


def runs_packed(query: Tensor) -> bool:
    """Whether the kernel supports the queries ``[R, h, d]``: on a GPU, in half precision, heads of at most 256."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0


@contextmanager
def _in_fixed_order() -> Iterator[None]:
    """Make the kernel's backward pass add in a fixed order, so that a step can be repeated bit for bit."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)  # with a mere warning, the kernel would keep its own order
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _takes_cudnn(key: Tensor) -> bool:
    return key.shape[1] >= _LONG and not torch.are_deterministic_algorithms_enabled()


def half_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention in half precision on a GPU, by PyTorch's flash or cuDNN kernels.

    Args:
        query: ``[B, L, h, d]``.
        key: ``[B, K, k, d]``.
        value: ``[B, K, k, d]``.
        causal: whether row i sees the first i + 1 keys only; L is K then.

    Returns:
        Output ``[B, L, h, d]``, and log-sum-exp ``[B, L, h]`` in fp32.
    """
    if not _takes_cudnn(key):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, None, None, query.shape[1], key.shape[1], 0.0, causal, False
        )
        return out, lse.transpose(1, 2)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)
    return out.transpose(1, 2), lse.squeeze(-1).transpose(1, 2)


def half_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`half_attention`; ``out`` and ``lse`` may be those of a softmax over further keys."""
    rows, keys = query.shape[1], key.shape[1]
    state = torch.zeros(2, dtype=torch.int64, device=query.device)  # of a random generator that is not used
    lse = lse.transpose(1, 2).contiguous()
    if not _takes_cudnn(key):
        with _in_fixed_order():
            return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
                grad, query, key, value, out, lse, None, None, rows, keys, 0.0, causal, state, state[:0]
            )
    g, q, k, v, o = (x.transpose(1, 2) for x in (grad, query, key, value, out))
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        g, q, k, v, o, lse.unsqueeze(-1), state[0], state[1], None, None, None, rows, keys, 0.0, causal
    )
    return tuple(x.transpose(1, 2) for x in grads)  # type: ignore[return-value]


def _attend(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Output ``[P, h, d]`` and log-sum-exp ``[P, h]`` of the places."""
    if not packing.is_long:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *packing[3:5], packing.most_queries, packing.most_keys, 0.0, True, False
        )
        return out, lse.t()
    outs, lses = [], []
    for q, k, v, before in _by_document(packing, query, key, value):
        out, lse = (x[0] for x in half_attention(q, k[:, before:], v[:, before:], causal=True))
        if before:
            other, other_lse = half_attention(q, k[:, :before], v[:, :before], causal=False)
            out, lse = merge(out, lse, other[0], other_lse[0])
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, packing: Packing
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the places' queries, keys and values, given the final output and log-sum-exp."""
    if not packing.is_long:
        state = torch.zeros(2, dtype=torch.int64, device=query.device)  # of a random generator that is not used
        with _in_fixed_order():
            return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
                *(grad, query, key, value, out, lse.t().contiguous(), *packing[3:5]),
                *(packing.most_queries, packing.most_keys, 0.0, True, state, state[:0]),
            )
    found: list[tuple[Tensor, ...]] = []
    rows = 0
    for q, k, v, before in _by_document(packing, query, key, value):
        part = slice(rows, rows := rows + q.shape[1])
        g, o, s = (x[None, part] for x in (grad, out, lse))
        grads = half_attention_backward(g, q, k[:, before:], v[:, before:], o, s, causal=True)
        if before:
            more = half_attention_backward(g, q, k[:, :before], v[:, :before], o, s, causal=False)
            grads = (grads[0] + more[0], torch.cat([more[1], grads[1]], 1), torch.cat([more[2], grads[2]], 1))
        found.append(tuple(x[0] for x in grads))
    grad_query, grad_key, grad_value = (torch.cat(x) for x in zip(*found, strict=True))
    return grad_query, grad_key, grad_value


def _by_document(
    packing: Packing, query: Tensor, key: Tensor, value: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Queries, keys and values ``[1, ..]`` of each document, and the number of keys before the first query's own."""
    queries, keys = ([size for size, _ in packing.sizes], [size for _, size in packing.sizes])
    parts = query.split(queries), key.split(keys), value.split(keys)
    for q, k, v in zip(*parts, strict=True):
        yield q[None], k[None], v[None], len(k) - len(q)


@fused(out=(0,), lse=(0,), other=(0,), other_lse=(0,))
def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the union of two key sets, from each set's output ``[R, h, d]`` and log-sum-exp ``[R, h]``."""
    total = torch.logaddexp(lse, other_lse)
    merged = out * (lse - total).exp().unsqueeze(-1) + other * (other_lse - total).exp().unsqueeze(-1)
    return merged.to(out.dtype), total


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, *own: Tensor) -> Tensor:
        k, v = key.index_select(0, packing.tokens), value.index_select(0, packing.tokens)
        found = _attend(_to_places(query, packing), k, v, packing)
        out, lse = (_from_places(x, packing, len(query)) for x in found)
        if own:
            out, lse = _join_own(out, lse, query, torch.stack(own[0::2], 1), torch.stack(own[1::2], 1))
        ctx.packing = packing
        ctx.save_for_backward(query, key, value, out, lse, *own)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse, *own = ctx.saved_tensors
        packing: Packing = ctx.packing
        g, q, o = (_to_places(x, packing, empty=0.0) for x in (grad, query, out))
        k, v = key.index_select(0, packing.tokens), value.index_select(0, packing.tokens)
        grads = _attend_backward(g, q, k, v, o, _to_places(lse, packing, empty=torch.inf), packing)
        grad_query = _from_places(grads[0], packing, len(query))
        grad_key, grad_value = (
            torch.zeros_like(x).index_copy_(0, packing.tokens, part)
            for x, part in zip((key, value), grads[1:], strict=True)
        )
        own_grads: list[Tensor] = []
        if own:
            keys, values = torch.stack(own[0::2], 1), torch.stack(own[1::2], 1)
            grad_query, grad_keys, grad_values = _own_backward(grad, query, out, lse, keys, values, grad_query)
            for pair in zip(grad_keys.unbind(1), grad_values.unbind(1), strict=True):
                own_grads.extend(pair)
        return grad_query, grad_key, grad_value, None, *own_grads


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, own: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Attention of one step of the training-time test; arguments and result as in ``ttt_attention``."""
    return _PackedAttention.apply(query, key, value, packing, *(x for pair in own for x in pair))  # type: ignore[no-any-return]


def _to_places(x: Tensor, packing: Packing, empty: float | None = None) -> Tensor:
    """``[P, ...]`` of ``x [R, ...]``; empty places hold ``empty``, or anything."""
    if packing.rows is None or packing.places is None:
        return x[: packing.num_rows]
    if empty is None:
        return x.index_select(0, packing.rows)
    out = x.new_full((len(packing.rows), *x.shape[1:]), empty)
    return out.index_copy_(0, packing.places, x[: packing.num_rows])


def _from_places(x: Tensor, packing: Packing, rows: int) -> Tensor:
    """``[R, ...]`` of ``x [P, ...]``; padding is 0."""
    out = x.new_zeros(rows, *x.shape[1:])
    out[: packing.num_rows] = x if packing.places is None else x.index_select(0, packing.places)
    return out


@fused(out=(0,), lse=(0,), query=(0,), keys=(0, 1), values=(0, 1))
def _join_own(out: Tensor, lse: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Add each row's own keys and values ``[R, S, k, d]`` to its softmax: new ``out [R, h, d]`` and ``lse [R, h]``."""
    scores = _own_scores(query, keys, lse.dtype)
    total = torch.logaddexp(_grouped(lse, keys), scores.logsumexp(1))
    weights = (scores - total.unsqueeze(1)).exp()
    more = (weights.unsqueeze(-1) * values.to(lse.dtype).unsqueeze(3)).sum(1)
    kept = (_grouped(lse, keys) - total).exp().unsqueeze(-1)
    return (_grouped(out, keys) * kept + more).to(out.dtype).flatten(1, 2), total.flatten(1)


@fused(grad=(0,), query=(0,), out=(0,), lse=(0,), keys=(0, 1), values=(0, 1), grad_query=(0,))
def _own_backward(
    grad: Tensor, query: Tensor, out: Tensor, lse: Tensor, keys: Tensor, values: Tensor, grad_query: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries (their other part is given) and of the rows' own keys and values."""
    scale = query.shape[-1] ** -0.5
    wide, q, o = (_grouped(x, keys).to(lse.dtype) for x in (grad, query, out))
    k, v = (x.to(lse.dtype).unsqueeze(3) for x in (keys, values))
    weights = (_own_scores(query, keys, lse.dtype) - _grouped(lse, keys).unsqueeze(1)).exp()
    delta = (wide * o).sum(-1)
    dots = (wide.unsqueeze(1) * v).sum(-1)
    slopes = ((dots - delta.unsqueeze(1)) * weights * scale).unsqueeze(-1)
    more = (slopes * k).sum(1).flatten(1, 2)
    grad_keys = (slopes * q.unsqueeze(1)).sum(3).to(keys.dtype)
    grad_values = (weights.unsqueeze(-1) * wide.unsqueeze(1)).sum(3).to(values.dtype)
    return (grad_query + more).to(grad_query.dtype), grad_keys, grad_values


def _own_scores(query: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores of each row's own keys, ``[R, S, k, h / k]`` in ``dtype``."""
    q = _grouped(query, keys).to(dtype).unsqueeze(1)
    return (q * keys.to(dtype).unsqueeze(3)).sum(-1) * query.shape[-1] ** -0.5


def _grouped(x: Tensor, keys: Tensor) -> Tensor:
    """``x [R, h, ...]`` as ``[R, k, h / k, ...]``: query heads by the key head of ``keys [R, S, k, d]`` they share."""
    return x.unflatten(1, (keys.shape[2], -1))
