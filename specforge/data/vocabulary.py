"""The draft vocabulary: the most frequent part of the target's, so that the draft's head is small."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.contracts import TokenCounts
from specforge.errors import UserError

# A prompt's names and nouns come back in the answer; on held-out text, counting them at a tenth raised
# coverage by two points over counting answers alone.
CONTEXT_WEIGHT = 0.1


def draft_vocabulary(counts: TokenCounts, size: int, context_weight: float = CONTEXT_WEIGHT) -> Tensor:
    """Choose the ``size`` most frequent token ids.

    Args:
        counts: occurrences of each id.
        size: D.
        context_weight: what an occurrence outside the loss mask counts.

    Returns:
        ``[D]`` int64, ascending; ties and ids that never occur go to the lower id.

    Raises:
        UserError: the target has fewer tokens.
    """
    score = counts.supervised.double() + context_weight * counts.context.double()
    if not 0 < size <= len(score):
        raise UserError(f"draft_vocab_size {size}: the target has {len(score)} tokens")
    order = torch.argsort(score, descending=True, stable=True)
    return order[:size].sort().values


def coverage(counts: TokenCounts, target_ids: Tensor) -> float:
    """Share of supervised tokens that the draft vocabulary can express."""
    total = int(counts.supervised.sum())
    return int(counts.supervised[target_ids].sum()) / total if total else 0.0
