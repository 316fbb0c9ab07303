"""DFlash-2's loss: cross-entropy of the logits, and among the likeliest tokens once they are scored again.

Shape legend: M rows, C rows of a tile, r rank, D draft vocabulary, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge.losses.blocks import HardLabel


class Candidates:
    """-log q(label) - weight · log s(label), s = softmax over K candidates of log q(c) + context · matrix_c.

    The candidates are the K likeliest tokens of q, the last of them replaced by the label where it is not there. As a
    :class:`~specforge.losses.blocks.RowLoss` it gives the first term and the gradient of both by the logits;
    :meth:`entropy` is the second term with its gradient by context and matrix.

    Args:
        context: ``[M, r]``.
        matrix: ``[D, r]``.
        top_k: K.
        weight: of the second term.

    Attributes:
        hits: ``[M]`` bool, whether the best of the K likeliest tokens, the label not put in, is the label.
    """

    def __init__(self, context: Tensor, matrix: Tensor, top_k: int, weight: float) -> None:
        self.context, self.matrix, self.top_k, self.weight = context, matrix, top_k, weight
        wide = torch.promote_types(context.dtype, torch.float32)
        rows, device = len(context), context.device
        self.hits = torch.zeros(rows, dtype=torch.bool, device=device)
        self._ids = torch.zeros(rows, top_k, dtype=torch.int64, device=device)
        self._places = torch.zeros(rows, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(rows, top_k, dtype=wide, device=device)

    def __call__(self, probs: Tensor, log_probs: Tensor, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """∂/∂z = q - 1[label] + weight (s - 1[label]) at the candidates."""
        likeliest, ids = probs.topk(self.top_k, -1)
        found = ids == labels.unsqueeze(1)
        known = likeliest.clamp_(min=torch.finfo(probs.dtype).tiny).log_()
        best = (known + self._scores(ids, rows)).argmax(1, keepdim=True)
        self.hits[rows] = found.gather(1, best).squeeze(1)
        missing = ~found.any(1)
        ids[:, -1] = torch.where(missing, labels, ids[:, -1])
        known[:, -1] = torch.where(missing, log_probs, known[:, -1])
        places = (ids == labels.unsqueeze(1)).int().argmax(1)
        self._ids[rows], self._log_probs[rows], self._places[rows] = ids, known, places
        share = (known + self._scores(ids, rows)).softmax(1)
        share[torch.arange(len(share), device=share.device), places] -= 1
        losses, grad = HardLabel()(probs, log_probs, labels, rows)
        return losses, grad.scatter_add_(1, ids, share.mul_(self.weight))

    def entropy(self) -> Tensor:
        """-log s(label), ``[M]``; for after all tiles."""
        scores = self._log_probs + self._scores(self._ids, slice(None))
        return F.cross_entropy(scores, self._places, reduction="none")

    def _scores(self, ids: Tensor, rows: slice) -> Tensor:
        rows_of = F.embedding(ids, self.matrix).to(self.context.dtype)
        return (rows_of @ self.context[rows].unsqueeze(2)).squeeze(2)
