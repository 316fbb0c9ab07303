"""Which rows a training-time test computes, planned on the host from document lengths and supervised spans.

Row p of step s reads the embedding of token p+1+s and predicts token p+2+s (EAGLE-3, arXiv 2503.01840,
section 3.2). Reading the plan from the label's side: the supervised token j is predicted by T students,
row j-2-s at step s, and all of them share one teacher, the target's distribution at token j-1. A row
that no student needs is not a query at any step; it only contributes its step-0 key and value.

Shape legend: N tokens of the packed batch, R query rows, M labels (supervised tokens), T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from specforge.modeling.layers.attention import Segment

# Matrix libraries prepare a kernel for every new shape, which on a CPU in bf16 takes several times longer than
# the product itself. Rounded row counts repeat.
ROUND = 32


class Plan:
    """Index tensors of one packed batch, made on the host."""

    def to(self, device: torch.device) -> Self:
        """The same plan with its tensors on ``device``."""
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return type(self)(**{**vars(self), **moved})


def borders(lengths: Sequence[int], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of N ``tokens``, the first token of its document and the one after the last.

    Each padding token is a document of its own. So its position is 0, which is in every table of positions, however
    much padding there is.
    """
    sizes = np.asarray([*lengths, *[1] * (tokens - sum(lengths))], dtype=np.int64)
    ends = np.cumsum(sizes)
    return np.repeat(ends - sizes, sizes), np.repeat(ends, sizes)


@dataclass(frozen=True)
class UnrollPlan(Plan):
    """Index tensors of one packed batch.

    Attributes:
        steps: T, how often the layer is applied.
        count: supervised tokens; M and R are padded to a multiple of :data:`ROUND`.
        rows: ``[R]`` flat token of each query row.
        segments: the rows as runs of consecutive tokens; padded rows are in none.
        positions: ``[N]`` position of each token in its document.
        next_tokens: ``[N]`` the token whose embedding a row reads at step 0 (clamped to its document).
        row_tokens: ``[T, R]`` the token whose embedding a query row reads at step s (clamped).
        labels: ``[M]`` flat token that the M-th group of students predicts.
        students: ``[M, T]`` row (0..R-1) that predicts the label at step s; 0 where there is none.
        valid: ``[M, T]`` whether that student exists: its row lies in the label's document, which is not padding.
        longest: tokens of the longest document.
    """

    steps: int
    count: int
    rows: Tensor
    segments: tuple[Segment, ...]
    positions: Tensor
    next_tokens: Tensor
    row_tokens: Tensor
    labels: Tensor
    students: Tensor
    valid: Tensor
    longest: int


def plan_unroll(
    lengths: Sequence[int], spans: Sequence[tuple[int, int]], steps: int, tokens: int | None = None
) -> UnrollPlan:
    """Plan T steps over packed documents.

    Args:
        lengths: tokens of each document, in order; what lies behind them is padding.
        spans: supervised tokens as flat ``(start, stop)`` runs, sorted, none crossing a document's border.
        steps: T.
        tokens: N when the batch is padded; the sum of ``lengths`` when not given.
    """
    tokens = sum(lengths) if tokens is None else tokens
    begin, end = borders(lengths, tokens)
    flat = np.arange(tokens, dtype=np.int64)

    labels = np.concatenate([flat[start:stop] for start, stop in spans] or [flat[:0]])
    labels = labels[labels - 2 >= begin[labels]]
    count = len(labels)
    labels = np.pad(labels, (0, -count % ROUND), mode="edge" if count else "constant")
    predictors = labels[:, None] - 2 - np.arange(steps)
    valid = (predictors >= begin[labels][:, None]) & (np.arange(len(labels)) < count)[:, None]
    needed = np.zeros(tokens, dtype=bool)
    needed[predictors[valid]] = True
    rows = np.flatnonzero(needed)
    rank = np.cumsum(needed) - 1
    segments = _segments(rows, begin)
    rows = np.pad(rows, (0, -len(rows) % ROUND), mode="edge" if count else "constant")

    row_tokens = np.minimum(rows + 1 + np.arange(steps)[:, None], end[rows] - 1)
    as_tensor = torch.from_numpy
    return UnrollPlan(
        steps=steps,
        count=count,
        rows=as_tensor(rows),
        segments=segments,
        positions=as_tensor(flat - begin),
        next_tokens=as_tensor(np.minimum(flat + 1, end - 1)),
        row_tokens=as_tensor(row_tokens),
        labels=as_tensor(labels),
        students=as_tensor(np.where(valid, rank[np.where(valid, predictors, 0)], 0)),
        valid=as_tensor(valid),
        longest=max(lengths, default=0),
    )


def _segments(rows: np.ndarray, begin: np.ndarray) -> tuple[Segment, ...]:
    if not len(rows):
        return ()
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(begin[rows]) != 0)) + 1
    firsts = np.concatenate([[0], breaks])
    counts = np.diff(np.concatenate([firsts, [len(rows)]]))
    return tuple(
        Segment(row=int(i), start=int(rows[i]), stop=int(rows[i] + n), document=int(begin[rows[i]]))
        for i, n in zip(firsts, counts, strict=True)
    )
