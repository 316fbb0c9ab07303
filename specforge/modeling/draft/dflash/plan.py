"""The blocks that a block drafter trains on, planned on the host: anchors by document, and their supervised drafts.

A block starts at its anchor, a known token; its slot k has the anchor's position + k. Its d-th draft (d = 0, 1, ...) is
the token d + 1 after the anchor, whichever slot predicts it. A draft is trained if that token is supervised and in the
anchor's document.

Shape legend: N tokens of the packed batch, n blocks, b slots of a block, M supervised drafts,
U distinct tokens that they predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from specforge.modeling.draft.context_parallel import Share, zigzag
from specforge.modeling.draft.dflash.attention import BlockGroup
from specforge.modeling.draft.plan import ROUND, Plan, borders

# Blocks that share one product over the context. The more share one, the more of its scores are masked.
_GROUP = 8
# The number of blocks is rounded up to a multiple of this, for the same reason as rows (see ROUND).
_BLOCK_ROUND = 4


@dataclass
class BlockPlan(Plan):
    """Index tensors of the blocks of one packed batch, or of those of one rank that shares it with others."""

    count: int  # supervised drafts; M is padded to a multiple of ROUND, n to a multiple of four
    blocks: int  # number of blocks without padding
    anchors: Tensor  # [n] flat token of each block's anchor, ascending
    positions: Tensor  # [N] position of each token in its document
    groups: tuple[BlockGroup, ...]  # runs of blocks that share a product over the context
    block: Tensor  # [M] block of each draft, ascending
    depth: Tensor  # [M] index d of the draft in its block
    labels: Tensor  # [M] flat token that it predicts
    tokens: Tensor  # [U] the distinct labels, ascending
    token: Tensor  # [M] index of each draft's label in them
    repeats: tuple[int, ...]  # number of drafts that predict each of them, padding included
    firsts: tuple[int, ...]  # index of every block's first draft, without padding; last, the number of drafts
    longest: int  # number of tokens of the longest document
    share: Share | None = None  # None: all tokens are this rank's


def starts(spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Every possible anchor: supervised tokens that are followed by a supervised token of the same run."""
    parts = [np.arange(first, stop - 1, dtype=np.int64) for first, stop in spans]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def sample_anchors(
    lengths: Sequence[int], spans: Sequence[tuple[int, int]], most: int, keys: Sequence[str]
) -> np.ndarray:
    """Draw at most ``most`` anchors per document, uniformly and without replacement.

    A document's anchors depend on its key alone, so they do not change with the batch, the rank or a resumed run.

    Args:
        lengths: tokens of each document.
        spans: supervised runs.
        most: maximum number of anchors per document.
        keys: random seed of each document.

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
    group: dist.ProcessGroup | None = None,
) -> BlockPlan:
    """Plan the blocks at the given anchors.

    For example, six tokens whose last three are supervised, two anchors, two drafts per block,
    ``plan_blocks([6], [(3, 6)], np.array([3, 4]), depths=2)``, without the padding of n and M::

        anchor     3     4
        draft 0    4     5
        draft 1    5     -      token 6 is not there

        block  = 0 0 1          of the three drafts
        depth  = 0 1 0
        labels = 4 5 5
        firsts = 0 2 3

    Args:
        lengths: tokens of each document, in order; the tokens after them are padding.
        spans: supervised tokens as flat ``(start, stop)`` runs, sorted, none crossing a document's border.
        anchors: flat tokens, ascending.
        depths: drafts per block.
        tokens: N if the batch is padded; by default the sum of ``lengths``.
        contiguous: whether an unsupervised token ends the block instead of leaving a gap in it.
        group: ranks that share the blocks; each plans its own.
    """
    tokens = sum(lengths) if tokens is None else tokens
    begin, end = borders(lengths, tokens)
    share = None
    if group is not None and len(anchors):
        anchors, share = _share(anchors, tokens, group)
    labels = anchors[:, None] + 1 + np.arange(depths)
    valid = _supervised(labels, anchors, end, spans)
    if contiguous:
        valid = np.logical_and.accumulate(valid, axis=1)
    block, depth, label = _drafts(labels, valid)
    firsts = np.concatenate([[0], np.cumsum(valid.sum(1))])
    distinct, token, repeats = np.unique(label, return_inverse=True, return_counts=True)
    as_tensor = torch.from_numpy
    return BlockPlan(
        count=int(firsts[-1]),
        blocks=len(anchors),
        anchors=as_tensor(_padded(anchors, share)),
        positions=as_tensor(np.arange(tokens, dtype=np.int64) - begin),
        groups=_groups(anchors, begin),
        block=as_tensor(block),
        depth=as_tensor(depth),
        labels=as_tensor(label),
        tokens=as_tensor(distinct),
        token=as_tensor(token),
        repeats=tuple(repeats.tolist()),
        firsts=tuple(firsts.tolist()),
        longest=max(lengths, default=0),
        share=share,
    )


def _share(anchors: np.ndarray, tokens: int, group: dist.ProcessGroup) -> tuple[np.ndarray, Share]:
    """This rank's anchors, and its part of the tokens."""
    own = zigzag(anchors, group.size())[group.rank()]
    return own, Share.of(np.array_split(np.arange(tokens), group.size()), group)


def _drafts(labels: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Block, depth and label of each valid draft, ``[3, M]``; the last one is repeated."""
    block, depth = np.nonzero(valid)
    found = np.stack([block, depth, labels[block, depth]])
    edge = "edge" if len(block) else "constant"
    return np.pad(found, ((0, 0), (0, -len(block) % ROUND)), mode=edge)  # type: ignore[call-overload, no-any-return]


def _padded(anchors: np.ndarray, share: Share | None) -> np.ndarray:
    """The anchors, the last one repeated; a rank without blocks gets some, to take part in the collectives."""
    if not len(anchors):
        return anchors if share is None else np.zeros(_BLOCK_ROUND, dtype=np.int64)
    return np.pad(anchors, (0, -len(anchors) % _BLOCK_ROUND), mode="edge")


def _supervised(
    labels: np.ndarray, anchors: np.ndarray, end: np.ndarray, spans: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Which labels are supervised tokens of their anchor's document."""
    supervised = np.zeros(len(end) + 1, dtype=bool)  # the last entry stands for tokens beyond the document
    for start, stop in spans:
        supervised[start:stop] = True
    inside = labels < end[anchors][:, None] if len(anchors) else np.zeros(labels.shape, dtype=bool)
    found: np.ndarray = supervised[np.where(inside, labels, len(end))]
    return found


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
