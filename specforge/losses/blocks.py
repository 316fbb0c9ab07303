"""Losses of single block drafters: D-PACE's weights, DSpark's acceptance loss, DFlash-2's selector loss.

Shape legend: M rows, C rows of a tile, r rank, D draft vocabulary, K candidates. All have one student per label.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge.losses.objectives import CrossEntropy, Objective, Student, Teacher, overlap, subtract_at_labels


@dataclass(eq=False)
class DPace:
    """D-PACE's weights: how much a right token adds to the expected length of the accepted prefix (arXiv 2605.18810).

    With the smoothed confidence s = (1 - α) q(label) + α of each supervised draft (1 for all others) and
    C_k = Π_{j≤k} s_j, the weight of draft k is Σ_{j≥k} C_j over supervised j.
    """

    block: Tensor  # [M] block of each row
    depth: Tensor  # [M] place of each row's draft in its block
    drafts: int  # T, drafts per block
    alpha: float
    form: str  # dpace; or one factor of it alone: prefix, C_k, or continuation, Σ_{j≥k} C_j / C_k

    def __call__(self, rows: slice, probs: Tensor) -> Tensor:
        """Weights of the rows of some whole blocks, from the draft's probabilities of the labels, ``[C]`` each."""
        block = self.block[rows] - self.block[rows.start]
        at = block, self.depth[rows]
        smooth = probs.new_ones(len(block), self.drafts)  # more blocks than there are: the host need not know how many
        valid = torch.zeros_like(smooth)
        smooth[at], valid[at] = (1 - self.alpha) * probs + self.alpha, torch.ones_like(probs)
        prefix = smooth.cumprod(1)
        following = (prefix * valid).flip(1).cumsum(1).flip(1)
        weights = {"dpace": following, "prefix": prefix, "continuation": following / prefix}[self.form]
        return weights[at]


class Acceptance(Objective):
    """DSpark's loss: ce · (-log q(label)) + l1 · ‖q - p‖₁ with the full-vocabulary p (arXiv 2607.05147).

    Args:
        ce: weight of the cross-entropy.
        l1: weight of the distance.
        like: ``[M, ...]`` a tensor of the rows' number, dtype and device.

    Attributes:
        accept: ``[M]`` fp32 or wider, the probability Σ min(p, q) = 1 - ‖q - p‖₁ / 2 that a sampled draft is accepted;
            filled tile by tile.
    """

    full_vocabulary = True

    def __init__(self, ce: float, l1: float, like: Tensor) -> None:
        self.ce, self.l1 = ce, l1
        self.accept = like.new_zeros(len(like), dtype=torch.promote_types(like.dtype, torch.float32))

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor, Tensor]:
        """∂‖q - p‖₁/∂z is twice that of the total variation."""
        accept, grad = overlap(student, teacher, 2 * self.l1, self.ce, out=student.probs)
        loss = self.ce * (student.log_sum - student.label_logits) + self.l1 * 2 * (1 - accept)
        return loss, subtract_at_labels(grad, teacher, self.ce), accept

    def keep(self, rows: slice, *found: Tensor) -> None:
        """Note the acceptance."""
        self.accept[rows] = found[0].squeeze(1)


@dataclass(eq=False)
class Candidates(Objective):
    """-log q(label) - weight · log s(label), s = softmax over K candidates of log q(c) + context · matrix_c.

    The candidates are the K most likely tokens of q; a label that is not among them replaces the last. As an objective,
    it gives the first term and the gradient of both by the logits; :meth:`entropy` is the second term with its gradient
    by context and matrix.

    """

    context: Tensor  # [M, r]
    matrix: Tensor  # [D, r]
    top_k: int  # K
    weight: float  # weight of the second term
    elementwise = False

    def __post_init__(self) -> None:
        wide = torch.promote_types(self.context.dtype, torch.float32)
        rows, device, top_k = len(self.context), self.context.device, self.top_k
        # [M] bool, whether the best of the K most likely tokens, without the replacement, is the label
        self.hits = torch.zeros(rows, dtype=torch.bool, device=device)
        self._ids = torch.zeros(rows, top_k, dtype=torch.int64, device=device)
        self._label_ranks = torch.zeros(rows, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(rows, top_k, dtype=wide, device=device)

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """∂/∂z = q - 1[label] + weight (s - 1[label]) at the candidates."""
        probs, labels, rows = student.probs.squeeze(1), teacher.labels, student.rows
        likeliest, ids = probs.topk(self.top_k, -1)
        found = ids == labels
        known = likeliest.clamp_(min=torch.finfo(probs.dtype).tiny).log_()
        best = (known + self._scores(ids, rows)).argmax(1, keepdim=True)
        self.hits[rows] = found.gather(1, best).squeeze(1)
        missing = ~found.any(1)
        ids[:, -1] = torch.where(missing, labels.squeeze(1), ids[:, -1])
        known[:, -1] = torch.where(missing, (student.label_logits - student.log_sum).squeeze(1), known[:, -1])
        ranks = (ids == labels).int().argmax(1)
        self._ids[rows], self._log_probs[rows], self._label_ranks[rows] = ids, known, ranks
        share = (known + self._scores(ids, rows)).softmax(1)
        share[torch.arange(len(share), device=share.device), ranks] -= 1
        losses, grad = CrossEntropy()(student, teacher)
        return losses, grad.scatter_add_(2, ids.unsqueeze(1), share.mul_(self.weight).unsqueeze(1))

    def entropy(self) -> Tensor:
        """-log s(label), ``[M]``; to be called after all tiles."""
        scores = self._log_probs + self._scores(self._ids, slice(None))
        return F.cross_entropy(scores, self._label_ranks, reduction="none")

    def _scores(self, ids: Tensor, rows: slice) -> Tensor:
        rows_of = F.embedding(ids, self.matrix).to(self.context.dtype)
        return (rows_of @ self.context[rows].unsqueeze(2)).squeeze(2)
