"""Distillation objectives on logit tiles, each with its closed-form gradient.

A tile is small enough to stay in cache, so an objective may overwrite the probabilities it is given;
:func:`specforge.losses.tiled.tiled_loss` holds one tile at a time. The caller sums over rows: no objective divides.

Notation: z the draft's logits over the draft vocabulary, q = softmax(z); p the target's probabilities over
the *whole* vocabulary, of which a tile holds the draft vocabulary's part; p̃ = p renormalised over it.

Shape legend: C labels of a tile, T students of each, D draft vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge.errors import UserError


class Teacher(NamedTuple):
    """The target's side of a tile. Fields that the objective does not read hold anything."""

    labels: Tensor  # [C, 1] int64 draft id of the label; arbitrary if the row has no weight
    probs: Tensor  # [C, 1, D] fp32, p̃
    entropy: Tensor  # [C, 1] fp32, -Σ p̃ log p̃
    full: Tensor  # [C, 1, D] fp32, p on the draft vocabulary


class Student(NamedTuple):
    """The draft's side of a tile."""

    probs: Tensor  # [C, T, D] fp32, q; may be overwritten
    logits: Tensor  # [C, T, D] fp32, z
    log_sum: Tensor  # [C, T] fp32, log Σ exp z
    label_logits: Tensor  # [C, T] fp32, z at the label
    rows: slice  # the tile's labels, as a slice of all M

    def cross_entropy(self, teacher: Teacher) -> Tensor:
        """``[C, T]`` -Σ p̃ log q."""
        if torch.compiler.is_compiling():  # as a reduction, so that it joins the others in one kernel
            return self.log_sum - (self.logits * teacher.probs).sum(-1)
        return self.log_sum - torch.bmm(self.logits, teacher.probs.transpose(1, 2)).squeeze(-1)


class Objective(ABC):
    """A loss of single rows with its gradient."""

    draft_vocabulary: bool = False  # whether it reads Teacher.probs and Teacher.entropy: p̃
    full_vocabulary: bool = False  # whether it reads Teacher.full: p, from logits over the whole vocabulary
    elementwise: bool = True  # whether it consists of element-wise operations and reductions, which fuse to one kernel

    @abstractmethod
    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, ...]:
        """Loss of each row, ``[C, T]``, its gradient by the logits, ``[C, T, D]``, and what :meth:`keep` receives."""

    def keep(self, rows: slice, *found: Tensor) -> None:  # noqa: B027 - most have nothing to note
        """Note further results of a tile's rows, a slice of all M."""


class ForwardKL(Objective):
    """KL(p̃ ‖ q) over the draft vocabulary: EAGLE-3's loss (arXiv 2503.01840) less the teacher's entropy."""

    draft_vocabulary = True

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """∂/∂z = q - p̃."""
        return student.cross_entropy(teacher) - teacher.entropy, student.probs.sub_(teacher.probs)


class CrossEntropy(Objective):
    """-log q(label), the label being the data token or the target's most likely one."""

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """∂/∂z = q - 1[label]."""
        return student.log_sum - student.label_logits, subtract_at_labels(student.probs, teacher, 1.0)


def subtract_at_labels(grad: Tensor, teacher: Teacher, weight: float) -> Tensor:
    """Subtract a weight at the labels, in place."""
    if torch.compiler.is_compiling():  # compared, not scattered, so that it joins the kernel that computes `grad`
        at = torch.arange(grad.shape[-1], device=grad.device) == teacher.labels.unsqueeze(-1)
        return torch.where(at, grad - weight, grad)
    index = teacher.labels.expand(grad.shape[:2]).unsqueeze(-1)
    return grad.scatter_add_(-1, index, grad.new_full(index.shape, -weight))


def overlap(
    student: Student, teacher: Teacher, scale: float = 1.0, linear: float = 0.0, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Acceptance α = Σ min(p, q) ``[C, T]``, and the gradient of scale (1 - α) by the logits, plus ``linear`` q.

    ∂(1 - α)/∂z = q ⊙ (Σ_{q≤p} q - 1[q ≤ p]).
    """
    inside = torch.minimum(student.probs, teacher.full)
    accept = inside.sum(-1)
    inside.mul_(student.probs <= teacher.full)  # twice as fast on a CPU as torch.where
    share = inside.sum(-1, keepdim=True).mul_(scale).add_(linear)
    return accept, torch.mul(student.probs, share, out=out).sub_(inside, alpha=scale)


def _softmax_grad(probs: Tensor, slope: Tensor) -> Tensor:
    """Gradient by the logits, given that by the probabilities: q ⊙ (g - Σ q g)."""
    weighted = probs * slope
    return weighted.sub_(probs * weighted.sum(-1, keepdim=True))


def _log(probs: Tensor) -> Tensor:
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log_()


class ReverseKL(Objective):
    """KL(q ‖ p̃) over the draft vocabulary."""

    draft_vocabulary = True

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """∂/∂q = log q - log p̃ (+ 1, which the softmax cancels)."""
        slope = _log(student.probs).sub_(_log(teacher.probs))
        return torch.linalg.vecdot(student.probs, slope), _softmax_grad(student.probs, slope)


class JensenShannon(Objective):
    """½ KL(p̃ ‖ m) + ½ KL(q ‖ m), m = ½ (p̃ + q), over the draft vocabulary (Lin 1991)."""

    draft_vocabulary = True

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """∂/∂q = ½ log(q / m)."""
        middle = _log((student.probs + teacher.probs).div_(2))
        slope = _log(student.probs).sub_(middle).div_(2)
        apart = torch.linalg.vecdot(teacher.probs.expand_as(middle), middle).add_(teacher.entropy)
        return torch.linalg.vecdot(student.probs, slope) - apart / 2, _softmax_grad(student.probs, slope)


class TotalVariation(Objective):
    """1 - α = ½ ‖p - q‖₁ with the full-vocabulary p: the probability that a sampled draft is rejected."""

    full_vocabulary = True

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """∂/∂z, see :func:`overlap`."""
        accept, grad = overlap(student, teacher, out=student.probs)
        return 1 - accept, grad


class LKAlpha(Objective):
    """-log α, α = Σ min(p, q) with the full-vocabulary p (LK losses, arXiv 2602.23881)."""

    full_vocabulary = True

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """The total-variation gradient divided by α."""
        accept, grad = overlap(student, teacher, out=student.probs)
        accept = accept.clamp_min(torch.finfo(accept.dtype).tiny)
        return -accept.log(), grad.div_(accept.unsqueeze(-1))


@dataclass(frozen=True)
class LKLambda(Objective):
    """λ KL(p̃ ‖ q) + (1 - λ)(1 - α) with λ = exp(-η α), α detached, per token (arXiv 2602.23881)."""

    eta: float = 3.0  # how fast the weight moves from KL to total variation as acceptance grows
    draft_vocabulary = True
    full_vocabulary = True

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """The two gradients with the same weights."""
        accept, overlap_grad = overlap(student, teacher)
        weight = torch.exp(-self.eta * accept)
        loss = weight * (student.cross_entropy(teacher) - teacher.entropy) + (1 - weight) * (1 - accept)
        grad = student.probs.sub_(teacher.probs).mul_(weight.unsqueeze(-1))
        return loss, grad.addcmul_(overlap_grad, 1 - weight.unsqueeze(-1))


@dataclass(frozen=True)
class TopK(Objective):
    """-Σ_{x ∈ TopK(p̃)} p̃(x) log q(x) over the teacher's K most likely draft tokens (HASS, arXiv 2408.15766)."""

    k: int = 10  # K; capped at the size of the draft vocabulary
    draft_vocabulary = True
    elementwise = False

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """∂/∂z = q Σ_{TopK} p̃ - p̃ 1[TopK]."""
        p, index = teacher.probs.topk(min(self.k, teacher.probs.shape[-1]), dim=-1)
        index = index.expand(-1, student.probs.shape[1], -1)
        p = p.expand(index.shape)
        loss = -torch.linalg.vecdot(p, _log(student.probs.gather(-1, index)))
        grad = student.probs.mul_(p.sum(-1, keepdim=True)).scatter_add_(-1, index, -p)
        return loss, grad


class Mix(Objective):
    """A weighted sum of objectives; each of the ``parts`` is a weight and an objective."""

    def __init__(self, parts: Sequence[tuple[float, Objective]]) -> None:
        self.parts = parts
        self.draft_vocabulary = any(objective.draft_vocabulary for _, objective in parts)
        self.full_vocabulary = any(objective.full_vocabulary for _, objective in parts)
        self.elementwise = all(objective.elementwise for _, objective in parts)

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """The sum of the losses and of their gradients."""
        loss: Tensor | None = None
        grad: Tensor | None = None
        for weight, objective in self.parts:
            part, slope, *_ = objective(student._replace(probs=student.probs.clone()), teacher)
            loss = part * weight if loss is None else loss.add_(part, alpha=weight)
            grad = slope * weight if grad is None else grad.add_(slope, alpha=weight)
        assert loss is not None
        assert grad is not None
        return loss, grad


def make_objective(loss: str | Mapping[str, float], lk_eta: float = 3.0, topk: int = 10) -> Objective:
    """An objective by name, or a weighted mix of several.

    Args:
        loss: one of ``kl``, ``reverse_kl``, ``js``, ``tv``, ``ce``, ``topk``, ``lk_alpha``, ``lk_lambda``, or a weight
            for each of several by name.
        lk_eta: η of ``lk_lambda``.
        topk: K of ``topk``.

    Raises:
        UserError: there is no such objective, the mix is empty, or K is not positive.
    """
    known: dict[str, Objective] = {
        "kl": ForwardKL(),
        "reverse_kl": ReverseKL(),
        "js": JensenShannon(),
        "tv": TotalVariation(),
        "ce": CrossEntropy(),
        "topk": TopK(topk),
        "lk_alpha": LKAlpha(),
        "lk_lambda": LKLambda(lk_eta),
    }
    parts = {loss: 1.0} if isinstance(loss, str) else dict(loss)
    for name in parts:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"loss {name!r}: use one of {', '.join(known)}{hint}")
    if not parts:
        raise UserError("loss: the mix is empty")
    if topk < 1:
        raise UserError(f"topk must be at least 1, not {topk}")
    if len(parts) == 1 and 1.0 in parts.values():
        return known[next(iter(parts))]
    return Mix([(weight, known[name]) for name, weight in parts.items()])


def feature_distance(states: Tensor, students: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
    """Distance between the states that the draft's and the target's head read: the feature loss of EAGLE and HASS.

    Σ weight · mean over H of the smooth L1 distance (EAGLE, arXiv 2401.15077, section 4.2).

    Shape legend: S states, M labels, T students of each, H hidden size.

    Args:
        states: ``[S, H]`` the draft's normed states.
        students: ``[M, T]`` the state that predicts label m at step t; any if the weight is 0.
        weights: ``[M, T]`` weight of each row; 0 drops it.
        hidden: ``[M, H]`` the target's last hidden state that predicts the label.

    Returns:
        A scalar in fp32 or wider.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=states.device)
    with torch.autocast(states.device.type, enabled=False):
        for student, weight in zip(students.t(), weights.t(), strict=True):
            apart = F.smooth_l1_loss(states[student].to(wide), hidden.to(wide), reduction="none")
            total = total + apart.mean(-1) @ weight.to(wide)
    return total
