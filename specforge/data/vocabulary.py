"""The draft vocabulary: the most frequent tokens of the target's vocabulary, which keeps the draft's head small."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.contracts import TokenCounts
from specforge.errors import UserError

# Names and nouns of a prompt recur in the answer. On held-out text, counting prompt tokens at a tenth of the weight
# raised coverage by two points over counting answers alone.
CONTEXT_WEIGHT = 0.1


def draft_vocabulary(counts: TokenCounts, size: int, context_weight: float = CONTEXT_WEIGHT) -> Tensor:
    """Choose the ``size`` most frequent token ids.

    Args:
        counts: occurrences of each token id.
        size: D.
        context_weight: weight of an occurrence outside the loss mask.

    Returns:
        ``[D]`` int64, ascending; among equally frequent ids, lower ids are preferred.

    Raises:
        UserError: the target's vocabulary is smaller than ``size``.
    """
    score = counts.supervised.double() + context_weight * counts.context.double()
    if not 0 < size <= len(score):
        raise UserError(f"draft_vocab_size is {size}, but the target has only {len(score)} tokens")
    order = torch.argsort(score, descending=True, stable=True)
    return order[:size].sort().values


def coverage(counts: TokenCounts, target_ids: Tensor) -> float:
    """Share of supervised tokens that are in the draft vocabulary."""
    total = int(counts.supervised.sum())
    return int(counts.supervised[target_ids].sum()) / total if total else 0.0
