"""The rows that a training-time test computes, planned on the host from document lengths and supervised spans.

At step s, row p reads the embedding of token p+1+s and predicts token p+2+s (EAGLE-3, arXiv 2503.01840, section 3.2).
Seen from the label, the supervised token j is predicted by T students: row j-2-s at step s. All of them share one
teacher, the target's distribution at token j-1. Rows that no label needs have no query at any step; they only
contribute their key and value of step 0.

Drafts with heads (Medusa, Hydra) and MTP modules are planned the same way.

Shape legend: N tokens of the packed batch, R query rows, M labels (supervised tokens), T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specforge.modeling.draft.plan import ROUND, Plan, borders
from specforge.modeling.layers.packed_attention import Packing, Segment, pack


@dataclass
class UnrollPlan(Plan):
    """Index tensors of one packed batch."""

    steps: int  # T, the number of times that the layer is applied
    count: int  # supervised tokens; M and R are padded to a multiple of ROUND
    rows: Tensor  # [R] flat token of each query row
    segments: tuple[Segment, ...]  # the rows as runs of consecutive tokens, without padding
    packing: Packing | None  # the same for GPUs
    positions: Tensor  # [N] position of each token in its document
    next_tokens: Tensor  # [N] the token whose embedding a row reads at step 0 (clamped to its document)
    row_tokens: Tensor  # [T, R] the token whose embedding a query row reads at step s (clamped)
    labels: Tensor  # [M] flat token that the M-th group of students predicts
    students: Tensor  # [M, T] row (0..R-1) that predicts the label at step s; 0 if there is none
    # [M, T] whether that student exists: its row is in the label's document, and the label is not padding
    valid: Tensor
    longest: int  # number of tokens of the longest document


def plan_unroll(
    lengths: Sequence[int], spans: Sequence[tuple[int, int]], steps: int, tokens: int | None = None
) -> UnrollPlan:
    """Plan T steps over packed documents.

    For example, six tokens whose last three are supervised, ``plan_unroll([6], [(3, 6)], steps=2)``, without the
    padding of R and M::

        label j      3  4  5
        students     1  2  3    at step 0, row j-2
                     0  1  2    at step 1, row j-3
        rows         0  1  2  3           of 6: rows 4 and 5 predict nothing that is supervised
        row_tokens   1  2  3  4           at step 0
                     2  3  4  5           at step 1

    Args:
        lengths: tokens of each document, in order; the tokens after them are padding.
        spans: supervised tokens as flat ``(start, stop)`` runs, sorted, none crossing a document's border.
        steps: T.
        tokens: N if the batch is padded; by default the sum of ``lengths``.
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
        packing=pack(segments),
        positions=as_tensor(flat - begin),
        next_tokens=as_tensor(np.minimum(flat + 1, end - 1)),
        row_tokens=as_tensor(row_tokens),
        labels=as_tensor(labels),
        students=as_tensor(np.where(valid, rank[np.where(valid, predictors, 0)], 0)),
        valid=as_tensor(valid),
        longest=max(lengths, default=0),
    )


def _segments(rows: np.ndarray, begin: np.ndarray) -> tuple[Segment, ...]:
    """Runs of consecutive rows of one document."""
    if not len(rows):
        return ()
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(begin[rows]) != 0)) + 1
    firsts = np.concatenate([[0], breaks])
    counts = np.diff(np.concatenate([firsts, [len(rows)]]))
    return tuple(
        Segment(row=int(i), start=int(rows[i]), stop=int(rows[i] + n), document=int(begin[rows[i]]))
        for i, n in zip(firsts, counts, strict=True)
    )
