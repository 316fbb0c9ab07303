"""Which blocks a block drafter trains on, planned on the host: anchors by document, and their supervised slots.

A block starts at its anchor, a token that is known; slot k of it stands at the anchor's position + k. Its d-th
draft (d = 0, 1, ...) is the token d + 1 after the anchor, wherever in the block it is predicted. A draft is
trained where that token is of the anchor's own document and supervised.

Shape legend: N tokens of the packed batch, n blocks, b slots of a block, M supervised drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from specforge.modeling.draft.dflash.attention import BlockGroup
from specforge.modeling.draft.plan import ROUND, Plan, borders

# Blocks that share one product over the context; more of them hide more of it from each other.
_GROUP = 8
# Blocks are padded to a multiple of this, for the same reason as rows (see ROUND).
_BLOCK_ROUND = 4


@dataclass(frozen=True)
class BlockPlan(Plan):
    """Index tensors of the blocks of one packed batch.

    Attributes:
        count: supervised drafts; M is padded to a multiple of :data:`ROUND`, n to a multiple of four.
        blocks: real blocks among the n.
        anchors: ``[n]`` flat token of each block's anchor, ascending.
        positions: ``[N]`` position of each token in its document.
        groups: the blocks, some at a time.
        block: ``[M]`` block of each draft, ascending.
        depth: ``[M]`` d, which draft of its block it is.
        labels: ``[M]`` flat token that it predicts.
        firsts: for every real block, how many drafts lie before its own; last, their number.
        longest: tokens of the longest document.
    """

    count: int
    blocks: int
    anchors: Tensor
    positions: Tensor
    groups: tuple[BlockGroup, ...]
    block: Tensor
    depth: Tensor
    labels: Tensor
    firsts: tuple[int, ...]
    longest: int


def starts(spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Every anchor there can be: supervised tokens that a supervised token of their run follows."""
    parts = [np.arange(first, stop - 1, dtype=np.int64) for first, stop in spans]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def sample_anchors(
    lengths: Sequence[int], spans: Sequence[tuple[int, int]], most: int, keys: Sequence[str]
) -> np.ndarray:
    """Draw at most ``most`` anchors of each document, uniformly and without replacement.

    What is drawn for a document depends on its key alone, so neither batches, ranks nor a resumption change it.

    Args:
        lengths: tokens of each document.
        spans: supervised runs.
        most: anchors of a document.
        keys: seed of each document's draw.

    Returns:
        Flat tokens, ascending.
    """
    every = starts(spans)
    ends = np.cumsum([0, *lengths])
    drawn = []
    for key, begin, end in zip(keys, ends[:-1], ends[1:], strict=True):
        own = every[np.searchsorted(every, begin) : np.searchsorted(every, end)]
        if len(own) > most:
            generator = np.random.default_rng(xxhash.xxh3_64_intdigest(key.encode()))
            own = np.sort(generator.choice(own, most, replace=False))
        drawn.append(own)
    return np.concatenate(drawn) if drawn else every


def plan_blocks(
    lengths: Sequence[int],
    spans: Sequence[tuple[int, int]],
    anchors: np.ndarray,
    depths: int,
    tokens: int | None = None,
    *,
    contiguous: bool = False,
) -> BlockPlan:
    """Plan the blocks of some anchors.

    Args:
        lengths: tokens of each document, in order; what lies behind them is padding.
        spans: supervised tokens as flat ``(start, stop)`` runs, sorted, none crossing a document's border.
        anchors: flat tokens, ascending.
        depths: drafts of a block.
        tokens: N when the batch is padded; the sum of ``lengths`` when not given.
        contiguous: a token that is not supervised ends the block, rather than leaving a gap in it.
    """
    tokens = sum(lengths) if tokens is None else tokens
    begin, end = borders(lengths, tokens)
    supervised = np.zeros(tokens + 1, dtype=bool)
    for start, stop in spans:
        supervised[start:stop] = True

    labels = anchors[:, None] + 1 + np.arange(depths)
    inside = labels < end[anchors][:, None] if len(anchors) else np.zeros(labels.shape, dtype=bool)
    valid = supervised[np.where(inside, labels, tokens)]
    if contiguous:
        valid = np.logical_and.accumulate(valid, axis=1)
    block, depth = np.nonzero(valid)
    count = len(block)
    firsts = np.concatenate([[0], np.cumsum(valid.sum(1))])
    edge = "edge" if count else "constant"
    flat = np.stack([block, depth, labels[block, depth]])
    flat = np.pad(flat, ((0, 0), (0, -count % ROUND)), mode=edge)  # type: ignore[call-overload]
    padded = np.pad(anchors, (0, -len(anchors) % _BLOCK_ROUND), mode="edge") if len(anchors) else anchors
    as_tensor = torch.from_numpy
    return BlockPlan(
        count=count,
        blocks=len(anchors),
        anchors=as_tensor(padded),
        positions=as_tensor(np.arange(tokens, dtype=np.int64) - begin),
        groups=_groups(anchors, begin),
        block=as_tensor(flat[0]),
        depth=as_tensor(flat[1]),
        labels=as_tensor(flat[2]),
        firsts=tuple(firsts.tolist()),
        longest=max(lengths, default=0),
    )


def _groups(anchors: np.ndarray, begin: np.ndarray) -> tuple[BlockGroup, ...]:
    found = []
    first = 0
    while first < len(anchors):
        document = begin[anchors[first]]
        stop = first + 1
        while stop < len(anchors) and stop - first < _GROUP and begin[anchors[stop]] == document:
            stop += 1
        found.append(BlockGroup(first, stop, int(document), int(anchors[first]), int(anchors[stop - 1])))
        first = stop
    return tuple(found)
