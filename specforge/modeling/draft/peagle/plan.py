"""The elements that P-EAGLE computes, anchors at several depths, planned on the host (arXiv 2602.01469).

Element (a, d) is d tokens ahead of anchor a: it has position a+d and predicts token a+d+2. At depth 0 it reads the
anchor's features and the embedding of token a+1; deeper elements read a mask token. It sees the depth-0 elements of its
document up to a, and the elements of its own anchor up to depth d. Training may drop deep elements at random, but never
leaves a gap in an anchor's depths.

Shape legend: N tokens of the packed batch, R tokens whose depth-0 state the head reads, E deep elements,
M labels (supervised tokens), T depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specforge.modeling.draft.eagle3.plan import plan_unroll
from specforge.modeling.draft.peagle.attention import Chunk
from specforge.modeling.draft.plan import ROUND, Plan
from specforge.modeling.layers.packed_attention import Packing, Segment, pack

# Deep elements per attention product: enough to fill a fused kernel. A mask is as wide as its document.
_CHUNK = 512


@dataclass(frozen=True)
class DepthSampling:
    """Share of a document's elements at depth d that training keeps, ``max(ratio ** d, least)``."""

    ratio: float = 0.8  # r; 1 keeps all elements
    least: float = 0.2  # the smallest share at any depth

    def size(self, labels: int, depth: int) -> int:
        """Number of elements to keep at a depth of a document with this many labels, if it has that many."""
        return int(max(0, labels - depth) * max(self.ratio**depth, self.least))


@dataclass
class PEaglePlan(Plan):
    """Index tensors of one packed batch."""

    count: int  # supervised tokens; M, R and E are padded to a multiple of ROUND
    rows: Tensor  # [R] flat token of each depth-0 element that predicts a label
    segments: tuple[Segment, ...]  # those rows as runs of consecutive tokens
    documents: tuple[Segment, ...]  # the documents, as runs of tokens as well
    row_packing: Packing | None  # segments and documents for GPUs
    document_packing: Packing | None
    positions: Tensor  # [N] position of each token in its document
    next_tokens: Tensor  # [N] the token whose embedding a depth-0 element reads (clamped to its document)
    anchors: Tensor  # [E] flat token of each deep element's anchor, ascending except for padding
    depths: Tensor  # [E] its depth, 1 and up; 0 for padding
    chunks: tuple[Chunk, ...]  # runs of deep elements of one document
    labels: Tensor  # [M] flat token that the M-th group of students predicts
    students: Tensor  # [M, T] its student at each depth, among R + E states; 0 if there is none
    valid: Tensor  # [M, T] whether that student exists
    longest: int  # number of tokens of the longest document

    @property
    def num_elements(self) -> int:
        """Elements of all depths that predict a supervised token."""
        return self.count + (self.chunks[-1].stop if self.chunks else 0)


def plan_peagle(
    lengths: Sequence[int],
    spans: Sequence[tuple[int, int]],
    depths: int,
    tokens: int | None = None,
    sampling: DepthSampling | None = None,
    seeds: Sequence[int] = (),
) -> PEaglePlan:
    """Plan T depths over packed documents.

    For example, six tokens whose last three are supervised, ``plan_peagle([6], [(3, 6)], depths=3)``, without the
    padding of R, E and M::

        label      3  4  5
        depth 0    1  2  3      rows; row a predicts token a+2
        depth 1    0  1  2      anchors of the deep elements (0, 1), (1, 1), (2, 1)
        depth 2       0  1      and (0, 2), (1, 2)

    The deep elements are ordered by anchor: ``anchors = 0 0 1 1 2``, ``depths = 1 2 1 2 1``. Their states follow those
    of the three rows, so ``students`` of label 5 is ``2 7 6``.

    Args:
        lengths: tokens of each document, in order; the tokens after them are padding.
        spans: supervised tokens as flat ``(start, stop)`` runs, sorted, none crossing a document's border.
        depths: T.
        tokens: N if the batch is padded; by default the sum of ``lengths``.
        sampling: share of the deep elements to keep; by default all are kept.
        seeds: random seed of each document's sampling.
    """
    first = plan_unroll(lengths, spans, 1, tokens)
    labels = first.labels[: first.count].numpy()
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = (ends - np.asarray(lengths, dtype=np.int64)).tolist()
    documents = [Segment(begin, begin, end, begin) for begin, end in zip(begins, ends.tolist(), strict=True)]
    flat_anchors, flat_depths, chunks = _deep_elements(documents, labels, depths, sampling, seeds)
    students = np.zeros((len(first.labels), depths), dtype=np.int64)
    valid = np.zeros((len(first.labels), depths), dtype=bool)
    students[:, 0], valid[:, 0] = first.students[:, 0], first.valid[:, 0]
    of = np.searchsorted(labels, flat_anchors + flat_depths + 2)
    students[of, flat_depths] = len(first.rows) + np.arange(len(flat_anchors))
    valid[of, flat_depths] = True
    pad = (0, -len(flat_anchors) % ROUND)
    return PEaglePlan(
        count=first.count,
        rows=first.rows,
        segments=first.segments,
        documents=tuple(documents),
        row_packing=first.packing,
        document_packing=pack(documents),
        positions=first.positions,
        next_tokens=first.next_tokens,
        anchors=torch.from_numpy(np.pad(flat_anchors, pad)),
        depths=torch.from_numpy(np.pad(flat_depths, pad)),
        chunks=tuple(chunks),
        labels=first.labels,
        students=torch.from_numpy(students),
        valid=torch.from_numpy(valid),
        longest=first.longest,
    )


def _deep_elements(
    documents: Sequence[Segment], labels: np.ndarray, depths: int, sampling: DepthSampling | None, seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, list[Chunk]]:
    """Anchors, depths and chunks of the deep elements of all documents."""
    anchors, deep, chunks = [labels[:0]], [labels[:0]], list[Chunk]()
    for number, (_, begin, end, _) in enumerate(documents):
        own = labels[(labels >= begin) & (labels < end)]
        rng = np.random.default_rng(seeds[number]) if sampling else None
        a, d = _elements(own, begin, depths, sampling, rng)
        chunks += _chunks(a, begin, sum(map(len, anchors)))
        anchors.append(a)
        deep.append(d)
    return np.concatenate(anchors), np.concatenate(deep), chunks


def _elements(
    labels: np.ndarray, begin: int, depths: int, sampling: DepthSampling | None, rng: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray]:
    """Anchors and depths of one document's deep elements, by anchor and then by depth."""
    anchors, found = [labels[:0]], [labels[:0]]
    candidates = labels
    for depth in range(1, depths):
        kept = candidates[candidates - 2 - depth >= begin]
        if sampling is not None and rng is not None:
            size = min(sampling.size(len(labels), depth), len(kept))
            kept = np.sort(rng.choice(kept, size, replace=False))
        if not len(kept):
            break
        anchors.append(kept - 2 - depth)
        found.append(np.full(len(kept), depth, dtype=np.int64))
        candidates = np.intersect1d(kept + 1, labels, assume_unique=True)
    flat, deep = np.concatenate(anchors), np.concatenate(found)
    order = np.lexsort((deep, flat))
    return flat[order], deep[order]


def _chunks(anchors: np.ndarray, begin: int, offset: int) -> list[Chunk]:
    """Runs of a document's deep elements that keep those of an anchor together."""
    chunks = []
    start = 0
    borders = np.flatnonzero(np.diff(anchors, append=np.iinfo(np.int64).max)) + 1
    while start < len(anchors):
        fitting = borders[(borders > start) & (borders <= start + _CHUNK)]
        stop = int(fitting[-1]) if len(fitting) else int(borders[borders > start][0])
        chunks.append(Chunk(offset + start, offset + stop, begin, int(anchors[stop - 1]) + 1))
        start = stop
    return chunks
