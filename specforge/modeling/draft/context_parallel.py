"""Context parallelism: the ranks of a group share the rows of one batch, whose documents are too long for one of them.

Every rank of the group has the whole batch. It computes the queries, states and losses of some rows, and the context's
keys and values of some tokens. The keys and values of all ranks are gathered, because a row sees tokens of all of them;
in the backward pass, their gradients are summed over the ranks and scattered. Nothing else is exchanged: the losses and
gradients of the ranks add up to those of the batch.

Shape legend: N tokens of the packed batch, W ranks of the group, K tokens of each rank, k key/value heads, d / v size
of a key head / of a value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from specforge.modeling.draft.plan import ROUND, Plan

# Their names since torch 2.13, which warns of the earlier ones.
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def zigzag(items: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Each rank's part of some items: of 2 W runs of about equal length, the i-th and the i-th from the end.

    A row attends to the tokens before it, so the first runs are cheap and the last ones expensive.
    """
    runs = np.array_split(items, 2 * ranks)
    return [np.concatenate([runs[i], runs[-1 - i]]) for i in range(ranks)]


@dataclass
class Share(Plan):
    """The tokens of which a rank computes the context's keys and values."""

    tokens: Tensor  # [K] flat token, ascending; padded at the end, so that K is the same on all ranks
    order: Tensor  # [N] where each token is among those of all ranks, [W K]
    group: dist.ProcessGroup  # used for nothing else, so that its collectives have the same order on all ranks

    @classmethod
    def of(cls, parts: Sequence[np.ndarray], group: dist.ProcessGroup) -> Share:
        """The share of this rank, given the tokens of each rank, ascending; each token is in one part."""
        size = -(-max(map(len, parts)) // ROUND) * ROUND
        order = np.zeros(sum(map(len, parts)), dtype=np.int64)
        for rank, part in enumerate(parts):
            order[part] = rank * size + np.arange(len(part))
        own = parts[group.rank()]
        own = np.pad(own, (0, size - len(own)), mode="edge" if len(own) else "constant")
        return cls(torch.from_numpy(own), torch.from_numpy(order), group)

    def gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``[N, k, d]`` and values ``[N, k, v]`` of all tokens, from those of this rank's, ``[K, ...]``.

        To be called on all ranks of the group alike.
        """
        shapes = key.shape[1:], value.shape[1:]
        own = torch.cat([key.flatten(1), value.flatten(1)], dim=1)
        every = _Gather.apply(own, self.order, self.group)  # type: ignore[no-untyped-call]
        parts = every.split([shape.numel() for shape in shapes], dim=1)
        key, value = (part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True))
        return key, value


def own(x: Tensor, share: Share | None) -> Tensor:
    """Of ``x [N, ...]``, the tokens of this rank; all of them without a share."""
    return x if share is None else x.index_select(0, share.tokens)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, len(x)
        ctx.save_for_backward(order)
        every = x.new_empty(group.size() * len(x), *x.shape[1:])
        _all_gather(every, x.contiguous(), group=group)
        return every[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (order,) = ctx.saved_tensors
        every = grad.new_zeros(ctx.group.size() * ctx.rows, *grad.shape[1:])
        every[order] = grad
        part = grad.new_empty(ctx.rows, *grad.shape[1:])
        _reduce_scatter(part, every, group=ctx.group)
        return part, None, None
