"""Distillation objectives on logit tiles, each with its closed-form gradient.

A tile is small enough to stay in cache, so an objective may overwrite the logits it is given; the chunked
loss never holds more than one. Every objective is summed over rows by its caller: none divides.

Notation: z the draft's logits over the draft vocabulary, q = softmax(z); p the target's probabilities over
the *whole* vocabulary, of which a tile holds the draft vocabulary's part; p̃ = p renormalised over it.

Shape legend: C rows of a chunk, T students of each, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from specforge.errors import UserError


class Teacher(NamedTuple):
    """The target's side of a tile.

    Attributes:
        probs: ``[C, 1, D]`` fp32, p̃.
        mass: ``[C, 1]`` fp32, the share of p on the draft vocabulary; p = mass · p̃.
        entropy: ``[C, 1]`` fp32, -Σ p̃ log p̃.
        labels: ``[C, 1]`` int64 draft id of the label; arbitrary where the row is not trained.
    """

    probs: Tensor
    mass: Tensor
    entropy: Tensor
    labels: Tensor


class Student(NamedTuple):
    """The draft's side of a tile: ``probs [C, T, D]`` fp32 (may be overwritten), and two helpers.

    Attributes:
        probs: q.
        cross_entropy: ``[C, T]`` fp32, -Σ p̃ log q.
        log_sum: ``[C, T]`` fp32, log Σ exp z.
        label_logits: ``[C, T]`` fp32, z at the label.
    """

    probs: Tensor
    cross_entropy: Tensor
    log_sum: Tensor
    label_logits: Tensor


class Objective(Protocol):
    """A per-row loss with its gradient."""

    @property
    def full_vocabulary(self) -> bool:
        """Whether it reads ``Teacher.mass``, the share of p that the draft vocabulary holds."""

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """Loss of each row, ``[C, T]``, and its gradient by the logits, ``[C, T, D]``."""


@dataclass(frozen=True)
class ForwardKL:
    """KL(p̃ ‖ q) over the draft vocabulary: EAGLE-3's loss (arXiv 2503.01840) less the teacher's entropy."""

    full_vocabulary: ClassVar[bool] = False

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """∂/∂z = q - p̃."""
        return student.cross_entropy - teacher.entropy, student.probs.sub_(teacher.probs)


@dataclass(frozen=True)
class CrossEntropy:
    """-log q(label), the label being the data token or the target's argmax."""

    full_vocabulary: ClassVar[bool] = False

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """∂/∂z = q - 1[label]."""
        index = teacher.labels.expand(student.probs.shape[:2]).unsqueeze(-1)
        grad = student.probs.scatter_add_(-1, index, student.probs.new_full(index.shape, -1.0))
        return student.log_sum - student.label_logits, grad


def _overlap(student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Acceptance α = Σ min(p, q) ``[C, T]`` and ∂(1 - α)/∂z = q ⊙ (Σ_{q≤p} q - 1[q ≤ p])."""
    p = teacher.probs * teacher.mass.unsqueeze(-1)
    accept = torch.minimum(student.probs, p).sum(-1)
    inside = student.probs * (student.probs <= p)
    grad = (student.probs * inside.sum(-1, keepdim=True)).sub_(inside)
    return accept, grad


def _softmax_grad(probs: Tensor, slope: Tensor) -> Tensor:
    """Gradient by the logits from that by the probabilities: q ⊙ (g - Σ q g)."""
    weighted = probs * slope
    return weighted.sub_(probs * weighted.sum(-1, keepdim=True))


def _log(probs: Tensor) -> Tensor:
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log_()


@dataclass(frozen=True)
class ReverseKL:
    """KL(q ‖ p̃) over the draft vocabulary."""

    full_vocabulary: ClassVar[bool] = False

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """∂/∂q = log q - log p̃ (+ 1, which the softmax cancels)."""
        slope = _log(student.probs).sub_(_log(teacher.probs))
        return torch.linalg.vecdot(student.probs, slope), _softmax_grad(student.probs, slope)


@dataclass(frozen=True)
class JensenShannon:
    """½ KL(p̃ ‖ m) + ½ KL(q ‖ m), m = ½ (p̃ + q), over the draft vocabulary (Lin 1991)."""

    full_vocabulary: ClassVar[bool] = False

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """∂/∂q = ½ log(q / m)."""
        middle = _log((student.probs + teacher.probs).div_(2))
        slope = _log(student.probs).sub_(middle).div_(2)
        apart = torch.linalg.vecdot(teacher.probs.expand_as(middle), middle).add_(teacher.entropy)
        return torch.linalg.vecdot(student.probs, slope) - apart / 2, _softmax_grad(student.probs, slope)


@dataclass(frozen=True)
class TotalVariation:
    """1 - α = ½ ‖p - q‖₁ with the full-vocabulary p: the probability that a sampled draft is rejected."""

    full_vocabulary: ClassVar[bool] = True

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """See :func:`_overlap`."""
        accept, grad = _overlap(student, teacher)
        return 1 - accept, grad


@dataclass(frozen=True)
class LKAlpha:
    """-log α, α = Σ min(p, q) with the full-vocabulary p (LK losses, arXiv 2602.23881)."""

    full_vocabulary: ClassVar[bool] = True

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """The total-variation gradient over α."""
        accept, grad = _overlap(student, teacher)
        accept = accept.clamp_min(torch.finfo(accept.dtype).tiny)
        return -accept.log(), grad.div_(accept.unsqueeze(-1))


@dataclass(frozen=True)
class LKLambda:
    """λ KL(p̃ ‖ q) + (1 - λ)(1 - α) with λ = exp(-η α), α detached, per token (arXiv 2602.23881).

    Args:
        eta: how fast the weight moves from KL to total variation as acceptance grows.
    """

    eta: float = 3.0
    full_vocabulary: ClassVar[bool] = True

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """The two gradients under the same weights."""
        accept, overlap_grad = _overlap(student, teacher)
        weight = torch.exp(-self.eta * accept)
        loss = weight * (student.cross_entropy - teacher.entropy) + (1 - weight) * (1 - accept)
        grad = student.probs.sub_(teacher.probs).mul_(weight.unsqueeze(-1))
        return loss, grad.addcmul_(overlap_grad, 1 - weight.unsqueeze(-1))


@dataclass(frozen=True)
class TopK:
    """-Σ_{x ∈ TopK(p̃)} p̃(x) log q(x) over the teacher's K likeliest draft tokens (HASS, arXiv 2408.15766).

    Args:
        k: K; the whole draft vocabulary where that is smaller.
    """

    k: int = 10
    full_vocabulary: ClassVar[bool] = False

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """∂/∂z = q Σ_{TopK} p̃ - p̃ 1[TopK]."""
        p, index = teacher.probs.topk(min(self.k, teacher.probs.shape[-1]), dim=-1)
        index = index.expand(-1, student.probs.shape[1], -1)
        p = p.expand(index.shape)
        loss = -torch.linalg.vecdot(p, _log(student.probs.gather(-1, index)))
        grad = student.probs.mul_(p.sum(-1, keepdim=True)).scatter_add_(-1, index, -p)
        return loss, grad


class Mix:
    """A weighted sum of objectives.

    Args:
        parts: weight and objective of each term.
    """

    def __init__(self, parts: Sequence[tuple[float, Objective]]) -> None:
        self.parts = parts
        self.full_vocabulary = any(objective.full_vocabulary for _, objective in parts)

    def __call__(self, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """The sum of the losses and of their gradients."""
        loss: Tensor | None = None
        grad: Tensor | None = None
        for weight, objective in self.parts:
            part, slope = objective(student._replace(probs=student.probs.clone()), teacher)
            loss = part * weight if loss is None else loss.add_(part, alpha=weight)
            grad = slope * weight if grad is None else grad.add_(slope, alpha=weight)
        assert loss is not None
        assert grad is not None
        return loss, grad


def make_objective(loss: str | Mapping[str, float], lk_eta: float = 3.0, topk: int = 10) -> Objective:
    """An objective by name, or a weighted mix of several.

    Args:
        loss: one of ``kl``, ``reverse_kl``, ``js``, ``tv``, ``ce``, ``topk``, ``lk_alpha``, ``lk_lambda``, or weights
            by those names.
        lk_eta: η of ``lk_lambda``.
        topk: K of ``topk``.

    Raises:
        UserError: there is no objective of that name, the mix is empty, or K is not positive.
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
        raise UserError(f"topk is {topk}: at least 1")
    if len(parts) == 1 and 1.0 in parts.values():
        return known[next(iter(parts))]
    return Mix([(weight, known[name]) for name, weight in parts.items()])
