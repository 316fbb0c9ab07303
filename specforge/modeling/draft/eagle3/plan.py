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
import torch.distributed as dist
from torch import Tensor

from specforge.modeling.draft.context_parallel import Share, zigzag
from specforge.modeling.draft.plan import ROUND, Plan, borders
from specforge.modeling.layers.packed_attention import Packing, Segment, pack


@dataclass
class UnrollPlan(Plan):
    """Index tensors of one packed batch, or of the rows of one rank that shares it with others.

    With a share, K of the N tokens are the rank's own, ``own``, and E are those whose embeddings it reads, ``read``.
    Without, both are all N tokens.
    """

    steps: int  # T, the number of times that the layer is applied
    count: int  # labels that have a student; M and R are padded to a multiple of ROUND
    supervised: int  # labels whose student at step 0 is here; of all ranks together, the supervised tokens
    rows: Tensor  # [R] token of each query row, in own
    segments: tuple[Segment, ...]  # the rows as runs of consecutive flat tokens, without padding
    packing: Packing | None  # the same for GPUs
    positions: Tensor  # [K] position of each own token in its document
    next_tokens: Tensor  # [K] the token, in read, whose embedding an own token reads at step 0 (clamped)
    row_tokens: Tensor  # [T, R] the token, in read, whose embedding a query row reads at step s (clamped)
    labels: Tensor  # [M] flat token that the M-th group of students predicts
    students: Tensor  # [M, T] row (0..R-1) that predicts the label at step s; 0 if there is none
    # [M, T] whether that student exists: its row is in the label's document and here, and the label is not padding
    valid: Tensor
    longest: int  # number of tokens of the longest document
    read: Tensor | None = None  # [E] flat token
    share: Share | None = None


def plan_unroll(
    lengths: Sequence[int],
    spans: Sequence[tuple[int, int]],
    steps: int,
    tokens: int | None = None,
    group: dist.ProcessGroup | None = None,
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
        group: ranks that share the rows; each plans its own. A label may have students on several of them.
    """
    tokens = sum(lengths) if tokens is None else tokens
    begin, end = borders(lengths, tokens)
    flat = np.arange(tokens, dtype=np.int64)

    labels, predictors, valid = _students(spans, begin, steps)
    rows, share = _marked(predictors[valid], tokens), None
    if group is not None and tokens:
        rows, share = _share(rows, flat, group)
        valid &= np.isin(predictors, rows)
        kept = valid.any(axis=1)
        labels, predictors, valid = labels[kept], predictors[kept], valid[kept]
    rank = np.zeros(tokens, dtype=np.int64)
    rank[rows] = np.arange(len(rows))
    count, padding = len(labels), (0, -len(labels) % ROUND)
    segments = _segments(rows, begin)
    rows = np.pad(rows, (0, -len(rows) % ROUND), mode="edge" if count else "constant")

    own, read = flat if share is None else share.tokens.numpy(), None
    next_tokens = np.minimum(own + 1, end[own] - 1)
    row_tokens = np.minimum(rows + 1 + np.arange(steps)[:, None], end[rows] - 1)
    if share is not None:
        read = _marked(np.concatenate([next_tokens, row_tokens.flatten()]), tokens)
        read = np.pad(read, (0, -len(read) % ROUND), mode="edge")
        next_tokens, row_tokens = (np.searchsorted(read, x) for x in (next_tokens, row_tokens))
        rows = np.searchsorted(own, rows)
    as_tensor = torch.from_numpy
    return UnrollPlan(
        steps=steps,
        count=count,
        supervised=int(valid[:, 0].sum()),
        rows=as_tensor(rows),
        segments=segments,
        packing=pack(segments),
        positions=as_tensor((flat - begin)[own]),
        next_tokens=as_tensor(next_tokens),
        row_tokens=as_tensor(row_tokens),
        labels=as_tensor(np.pad(labels, padding, mode="edge" if count else "constant")),
        students=as_tensor(np.pad(np.where(valid, rank[predictors], 0), (padding, (0, 0)))),
        valid=as_tensor(np.pad(valid, (padding, (0, 0)))),
        longest=max(lengths, default=0),
        read=None if read is None else as_tensor(read),
        share=share,
    )


def _students(
    spans: Sequence[tuple[int, int]], begin: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels ``[M]``, the token that predicts each at each step ``[M, T]``, and whether it exists; 0 if it does not."""
    flat = np.arange(len(begin), dtype=np.int64)
    labels = np.concatenate([flat[start:stop] for start, stop in spans] or [flat[:0]])
    labels = labels[labels - 2 >= begin[labels]]
    predictors = labels[:, None] - 2 - np.arange(steps)
    valid = predictors >= begin[labels][:, None]
    return labels, np.where(valid, predictors, 0), valid


def _marked(indices: np.ndarray, tokens: int) -> np.ndarray:
    """The tokens that occur among some indices, ascending."""
    found = np.zeros(tokens, dtype=bool)
    found[indices] = True
    return np.flatnonzero(found)


def _share(rows: np.ndarray, flat: np.ndarray, group: dist.ProcessGroup) -> tuple[np.ndarray, Share]:
    """This rank's rows, and its tokens: those of its rows, and an equal part of those that are no row's."""
    by_rank = zigzag(rows, group.size())
    others = np.array_split(np.setdiff1d(flat, rows, assume_unique=True), group.size())
    tokens = [np.sort(np.concatenate(parts)) for parts in zip(by_rank, others, strict=True)]
    return by_rank[group.rank()], Share.of(tokens, group)


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
