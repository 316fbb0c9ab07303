"""Linear head and distillation loss in one pass over cache-sized chunks; logits are never stored.

The students of one label (its T steps) share one teacher row, so a chunk is C labels: the teacher's
softmax is computed once and used T times. The gradient is computed in the forward pass while the
probabilities are in cache (as in Liger, arXiv 2410.10989), which needs no second product with the head;
the loss is a weighted sum of rows, so the backward pass only scales it.

Shape legend: S states, M labels, C labels of a chunk, T students of each, H hidden size,
D draft vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from specforge.inference.target_head import OutputHead
from specforge.losses.objectives import Objective, Student, Teacher

_TILE_BYTES = {"cpu": 4 << 20}
_TILE_BYTES_ACCELERATOR = 512 << 20
# Teacher rows are computed for this many chunks at once: T times fewer than students, they make thin products.
_TEACHER_CHUNKS = 4


class TeacherRows(NamedTuple):
    """The target's side of M labels.

    Attributes:
        hidden: ``[M, H]`` last hidden state whose logits predict the label.
        head: the target's, for the draft vocabulary.
        log_sum: ``[M]`` fp32 log-sum-exp of the full-vocabulary logits; None takes the draft vocabulary
            for the whole one.
        labels: ``[M]`` int64 draft id of the label, -1 where it is outside the draft vocabulary.
    """

    hidden: Tensor
    head: OutputHead
    log_sum: Tensor | None
    labels: Tensor


class DistillationResult(NamedTuple):
    """Result of :func:`chunked_distillation`.

    Attributes:
        loss: scalar, Σ weight · loss over all rows; the only one that carries a gradient.
        losses: ``[T]`` fp32, Σ loss over the rows of each step that have a weight, unweighted.
        hits: ``[M, T]`` bool, whether the draft's likeliest token is the label.
    """

    loss: Tensor
    losses: Tensor
    hits: Tensor


def default_chunk(vocabulary: int, students: int, device: torch.device) -> int:
    """Labels of a chunk whose fp32 tile fits the cache of a CPU core, or is large enough to fill a GPU."""
    tile = _TILE_BYTES.get(device.type, _TILE_BYTES_ACCELERATOR)
    labels = max(1, tile // (4 * vocabulary * students))
    # A power of two, so that few shapes occur (see specforge.modeling.draft.plan.ROUND).
    return 1 << (labels.bit_length() - 1)


class _Tile:
    """Scratch for one chunk, reused by all of them so that it stays in cache."""

    def __init__(self, labels: int, steps: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        rows = labels * steps
        self.logits = torch.empty(rows, vocabulary, dtype=wide, device=device)
        self.probs = torch.empty(rows, vocabulary, dtype=wide, device=device)
        narrow = dtype != wide
        self.product = torch.empty(rows, vocabulary, dtype=dtype, device=device) if narrow else self.logits

    def student(
        self, states: Tensor, head: Tensor, bias: Tensor | None, teacher: Teacher, steps: int
    ) -> tuple[Student, Tensor]:
        """The draft's side for ``states [C T, H]``, and its likeliest draft ids ``[C, T]``."""
        rows = len(states)
        product = torch.mm(states, head.t(), out=self.product[:rows])
        logits = self.logits[:rows].copy_(product) if product.dtype != self.logits.dtype else product
        if bias is not None:
            logits += bias
        probs = torch.softmax(logits, -1, out=self.probs[:rows])
        logits, probs = (x.unflatten(0, (-1, steps)) for x in (logits, probs))
        top, best = logits.max(-1)
        log_sum = top - probs.gather(-1, best.unsqueeze(-1)).squeeze(-1).log()
        cross_entropy = log_sum - torch.bmm(logits, teacher.probs.transpose(1, 2)).squeeze(-1)
        labels = teacher.labels.expand_as(best).unsqueeze(-1)
        return Student(probs, cross_entropy, log_sum, logits.gather(-1, labels).squeeze(-1)), best

    def slope(self, grad: Tensor) -> Tensor:
        """The gradient tile ``[C T, D]`` in the compute dtype."""
        flat = grad.flatten(0, 1)
        return flat if flat.dtype == self.product.dtype else self.product[: len(flat)].copy_(flat)


def _teacher_tile(rows: TeacherRows, part: slice) -> Teacher:
    logits = rows.head.logits(rows.hidden[part])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, best = logits.max(-1)
    probs = logits.softmax(-1)
    log_sum = top - probs.gather(-1, best.unsqueeze(-1)).squeeze(-1).log()
    entropy = log_sum - torch.linalg.vecdot(probs, logits)
    mass = torch.ones_like(log_sum) if rows.log_sum is None else (log_sum - rows.log_sum[part]).exp_().clamp_(max=1)
    # A dropped row has no weight, so any label does for it.
    labels = rows.labels[part].clamp(min=0)
    return Teacher(probs.unsqueeze(1), mass.unsqueeze(1), entropy.unsqueeze(1), labels.unsqueeze(1))


class _ChunkedDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Tensor,
        bias: Tensor | None,
        students: Tensor,
        weights: Tensor,
        rows: TeacherRows,
        objective: Objective,
        chunk: int,
        train: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        labels, steps = students.shape
        dtype, wide = states.dtype, torch.promote_types(states.dtype, torch.float32)
        matrix = head.to(dtype)
        need_states, need_head = (train and need for need in ctx.needs_input_grad[:2])
        grad_states = torch.zeros_like(states) if need_states else None
        grad_head = torch.zeros(head.shape, dtype=wide, device=head.device) if need_head else None
        losses = torch.zeros(labels, steps, dtype=wide, device=states.device)
        hits = torch.zeros(labels, steps, dtype=torch.bool, device=states.device)
        tile = _Tile(min(chunk, labels), steps, len(head), dtype, states.device)
        for start in range(0, labels, chunk):
            part = slice(start, start + chunk)
            index = students[part].flatten()
            picked = states[index]
            ahead = start // chunk % _TEACHER_CHUNKS
            if ahead == 0:
                teachers = _teacher_tile(rows, slice(start, start + chunk * _TEACHER_CHUNKS))
            teacher = Teacher(*(x[ahead * chunk : (ahead + 1) * chunk] for x in teachers))
            student, best = tile.student(picked, matrix, bias, teacher, steps)
            hits[part] = best == rows.labels[part].unsqueeze(1)
            losses[part], grad = objective(student, teacher)
            if not (need_states or need_head):
                continue
            scale = weights[part].reshape(-1, 1).to(dtype)
            slope = tile.slope(grad)
            if grad_states is not None:
                grad_states.index_add_(0, index, (slope @ matrix).mul_(scale))
            if grad_head is not None:
                add_product(grad_head, slope, picked.mul_(scale))
        ctx.save_for_backward(grad_states, grad_head)
        trained = torch.where(weights != 0, losses, 0.0)
        ctx.mark_non_differentiable(hits)
        ctx.set_materialize_grads(False)
        return (trained * weights).sum(), trained.sum(0), hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = (None if x is None else x.mul_(grad.to(x.dtype)) for x in ctx.saved_tensors)
        return *grads, None, None, None, None, None, None, None


def add_product(total: Tensor, slope: Tensor, states: Tensor) -> None:
    """``total += slopeᵀ @ states``, accumulated in the dtype of ``total``."""
    if slope.dtype == total.dtype:
        total.addmm_(slope.t(), states)
    else:
        total += slope.t() @ states


def chunked_distillation(
    states: Tensor,
    head: Tensor,
    students: Tensor,
    weights: Tensor,
    teacher: TeacherRows,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
) -> DistillationResult:
    """Distil the target's next-token distribution into a draft's linear head.

    Args:
        states: ``[S, H]`` the draft's normed states of all rows and steps; their dtype is the compute dtype.
        head: ``[D, H]`` the draft's ``lm_head`` weight.
        students: ``[M, T]`` the state that predicts label m at step t; any where the weight is 0.
        weights: ``[M, T]`` fp32 weight of each row in the sum; 0 drops it.
        teacher: the target's side.
        objective: the per-row loss.
        bias: ``[D]`` added to the draft's logits; frozen.
        chunk: labels at a time; chosen by :func:`default_chunk` when None. It does not change the result.
    """
    chunk = chunk or default_chunk(len(head), students.shape[1], states.device)
    dtype = states.dtype
    teacher = teacher._replace(hidden=teacher.hidden.to(dtype), head=teacher.head.to(dtype))
    with torch.autocast(states.device.type, enabled=False):
        loss, losses, hits = _ChunkedDistillation.apply(  # type: ignore[no-untyped-call]
            states, head, bias, students, weights, teacher, objective, chunk, torch.is_grad_enabled()
        )
    return DistillationResult(loss, losses.detach(), hits)
