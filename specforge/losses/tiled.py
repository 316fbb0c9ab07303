"""Linear head and loss in one pass over cache-sized tiles; logits are never stored.

The students of one label (its T drafted positions) share one teacher row, so a tile is C labels: the teacher's softmax
is computed once and used T times. The gradient is computed in the forward pass while the probabilities are in cache (as
in Liger, arXiv 2410.10989), which avoids a second product with the head; the loss is a weighted sum of rows, so the
backward pass only scales it. Some drafts add a low-rank correction to the logits; its product joins the head's in the
tile.

Shape legend: S states, M labels, C labels of a tile, T students of each, H hidden size, r rank of a correction,
D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specforge.inference.target_head import OutputHead
from specforge.losses.objectives import CrossEntropy, Objective, Student, Teacher

_TILE_BYTES = {"cpu": 4 << 20}
_TILE_BYTES_ACCELERATOR = 512 << 20
# Teacher rows are computed for this many tiles at once: T times fewer than students, they make thin products.
_TEACHER_TILES = 4
# Tiles that end with a block are padded to a multiple of this (see specforge.modeling.draft.plan.ROUND).
_ROUND = 32

Weigh = Callable[[slice, Tensor], Tensor]
"""Weights ``[C]`` of a tile's rows, from the rows' slice of M and the draft's probability of each label ``[C]``."""


class TeacherRows(NamedTuple):
    """The target's side of M labels.

    Attributes:
        labels: ``[M]`` int64 draft id of the label, -1 if it is outside the draft vocabulary.
        hidden: ``[M, H]`` last hidden state whose logits predict the label, or ``[N, H]`` with ``hidden_index``; None
            if the objective reads the label alone.
        head: the target's, for the draft vocabulary.
        log_sum: ``[M]`` or ``[N]`` fp32 log-sum-exp of the full-vocabulary logits; None if the draft vocabulary is the
            whole one, or is taken for it.
        hidden_index: ``[M]`` row of ``hidden`` of each label, equal ones in a run; None if it is the label's own.
    """

    labels: Tensor
    hidden: Tensor | None = None
    head: OutputHead | None = None
    log_sum: Tensor | None = None
    hidden_index: Tensor | None = None


class Correction(NamedTuple):
    """A trained addition to the logits: ``states [S, r] @ matrix [D, r]ᵀ``."""

    states: Tensor
    matrix: Tensor


class TiledLoss(NamedTuple):
    """Result of :func:`tiled_loss`.

    Attributes:
        loss: scalar, Σ weight · loss over all rows; the only one that carries a gradient.
        losses: unweighted loss of each row, fp32 or wider, of the weights' shape; arbitrary if the weight is 0.
        hits: bool, whether the draft's most likely token is the label, of the weights' shape.
    """

    loss: Tensor
    losses: Tensor
    hits: Tensor


def default_chunk(vocabulary: int, students: int, device: torch.device) -> int:
    """Labels of a tile whose fp32 logits fit the cache of a CPU core, or are enough to fill a GPU."""
    tile = _TILE_BYTES.get(device.type, _TILE_BYTES_ACCELERATOR)
    labels = max(1, tile // (4 * vocabulary * students))
    # A power of two, so that few shapes occur (see specforge.modeling.draft.plan.ROUND).
    return 1 << (labels.bit_length() - 1)


def tiled_loss(
    states: Tensor,
    head: OutputHead,
    teacher: TeacherRows,
    weights: Tensor,
    objective: Objective | None = None,
    *,
    students: Tensor | None = None,
    correction: Correction | None = None,
    base_share: float = 0.0,
    weigh: Weigh | None = None,
    firsts: Sequence[int] | None = None,
    chunk: int | None = None,
) -> TiledLoss:
    """Weighted sum of the losses of a draft's rows, with its gradient.

    Args:
        states: ``[S, H]`` the draft's normed states; their dtype is the compute dtype.
        head: the head that reads them, trained or frozen. Its cap, which changes no order, is left out.
        teacher: labels, and the target's distributions if the objective reads them.
        weights: ``[M, T]``, or ``[M]`` for T = 1: weight of each row in the sum; 0 drops it.
        objective: the loss of a row; cross-entropy with the label by default.
        students: ``[M, T]`` the state that predicts label m at position t; any if the weight is 0. By default state m
            predicts label m.
        correction: added to the head's logits.
        base_share: share of the loss that is the cross-entropy of the logits without the correction.
        weigh: another factor of the weights, from the draft's probabilities, without a gradient; for T = 1.
        firsts: rows at which a tile may begin, and the number of rows; for a ``weigh`` that reads whole blocks.
        chunk: labels per tile; chosen by :func:`default_chunk` if None. It does not change the result.
    """
    steps = 1 if students is None else students.shape[1]
    count = len(teacher.labels)
    chunk = chunk or default_chunk(len(head), steps, states.device)
    if teacher.hidden is not None and teacher.head is not None:
        teacher = teacher._replace(hidden=teacher.hidden.to(states.dtype), head=teacher.head.to(states.dtype))
    tiles = _block_tiles(firsts, chunk) if firsts else [(x, min(x + chunk, count)) for x in range(0, count, chunk)]
    round_to = 1 if firsts is None else _ROUND
    job = _Job(
        head.bias,
        teacher,
        weights.reshape(-1, steps),
        objective or CrossEntropy(),
        students,
        base_share,
        weigh,
        [(start, stop, min(start + -(-(stop - start) // round_to) * round_to, count)) for start, stop in tiles],
        torch.is_grad_enabled(),
    )
    extra, matrix = (None, None) if correction is None else correction
    with torch.autocast(states.device.type, enabled=False):
        loss, losses, hits = _TiledLoss.apply(states, head.weight, extra, matrix, job)  # type: ignore[no-untyped-call]
    return TiledLoss(loss, losses.view(weights.shape), hits.view(weights.shape))


def _block_tiles(firsts: Sequence[int], chunk: int) -> list[tuple[int, int]]:
    """Runs of about ``chunk`` rows that begin at one of ``firsts``."""
    tiles = []
    start = 0
    for previous, stop in zip(firsts, [*firsts[1:], firsts[-1]], strict=True):
        if stop - start > chunk and previous > start:
            tiles.append((start, previous))
            start = previous
    return [*tiles, (start, firsts[-1])] if firsts[-1] > start else tiles


@dataclass(frozen=True)
class _Job:
    """What :func:`tiled_loss` was given, but for the tensors that take a gradient.

    ``tiles`` are ``(start, stop, end)``: the labels up to ``end`` are computed, and those up to ``stop`` count.
    """

    bias: Tensor | None
    teacher: TeacherRows
    weights: Tensor
    objective: Objective
    students: Tensor | None
    base_share: float
    weigh: Weigh | None
    tiles: Sequence[tuple[int, int, int]]
    train: bool


class _Tile:
    """Scratch memory for one tile, reused by all tiles so that it stays in cache."""

    def __init__(self, labels: int, steps: int, vocabulary: int, like: Tensor, mixed: bool) -> None:
        self.steps, self.wide = steps, torch.promote_types(like.dtype, torch.float32)
        new = lambda dtype: torch.empty(labels * steps, vocabulary, dtype=dtype, device=like.device)  # noqa: E731
        self.logits, self.probs = new(self.wide), new(self.wide)
        self.base = new(self.wide) if mixed else None
        self.product = self.logits if like.dtype == self.wide else new(like.dtype)

    def scores(self, states: Tensor, matrix: Tensor, add: bool = False) -> Tensor:
        """``states @ matrixᵀ`` in fp32 or wider; with ``add``, added to the logits in the tile."""
        rows = len(states)
        if self.product is self.logits:
            return self.logits[:rows].addmm_(states, matrix.t(), beta=float(add))
        product = torch.mm(states, matrix.t(), out=self.product[:rows])
        return self.logits[:rows].add_(product) if add else self.logits[:rows].copy_(product)

    def student(self, logits: Tensor, teacher: Teacher, part: slice, out: Tensor) -> tuple[Student, Tensor]:
        """The draft's side for logits ``[C T, D]``, and its most likely draft ids ``[C, T]``."""
        probs = torch.softmax(logits, -1, out=out[: len(logits)])
        logits, probs = (x.unflatten(0, (-1, self.steps)) for x in (logits, probs))
        top, best = logits.max(-1)
        log_sum = top - probs.gather(-1, best.unsqueeze(-1)).squeeze(-1).log()
        labels = teacher.labels.expand_as(best).unsqueeze(-1)
        return Student(probs, logits, log_sum, logits.gather(-1, labels).squeeze(-1), part), best

    def slope(self, grad: Tensor) -> Tensor:
        """The gradient tile ``[C T, D]`` in the compute dtype."""
        flat = grad.flatten(0, 1)
        return flat if flat.dtype == self.product.dtype else self.product[: len(flat)].copy_(flat)


class _Teachers:
    """The teacher's side of the tiles, computed for several of them at once."""

    def __init__(self, rows: TeacherRows, objective: Objective, labels: int) -> None:
        self.rows, self.objective = rows, objective
        self.ahead = labels * _TEACHER_TILES if rows.hidden_index is None else labels
        self.part, self.teacher = slice(0, 0), Teacher(*[rows.labels[:0]] * 4)

    def tile(self, part: slice) -> Teacher:
        """The teacher of the labels in ``part``."""
        if not self.part.start <= part.start < part.stop <= self.part.stop:
            self.part = slice(part.start, max(part.stop, part.start + self.ahead))
            self.teacher = self._compute(self.part)
        first = part.start - self.part.start
        return Teacher(*(x[first : first + part.stop - part.start] for x in self.teacher))

    def _compute(self, part: slice) -> Teacher:
        rows, reads = self.rows, self.objective
        # A dropped row has no weight, so any label does for it.
        labels = rows.labels[part].clamp(min=0).unsqueeze(1)
        if rows.hidden is None or rows.head is None or not (reads.draft_vocabulary or reads.full_vocabulary):
            return Teacher(labels, labels, labels, labels)
        picked, inverse = part, None
        if rows.hidden_index is not None:
            picked, inverse = torch.unique_consecutive(rows.hidden_index[part], return_inverse=True)
        logits = rows.head.logits(rows.hidden[picked])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probs = logits.softmax(-1)
        entropy, full = labels, probs
        if reads.draft_vocabulary or rows.log_sum is not None:
            top, best = logits.max(-1)
            log_sum = top - probs.gather(-1, best.unsqueeze(-1)).squeeze(-1).log()
        if reads.draft_vocabulary:
            entropy = (log_sum - torch.linalg.vecdot(probs, logits)).unsqueeze(1)
        if reads.full_vocabulary and rows.log_sum is not None:
            full = probs * (log_sum - rows.log_sum[picked]).exp_().clamp_(max=1).unsqueeze(1)
        if inverse is not None:
            full = full[inverse]
            probs = probs[inverse] if reads.draft_vocabulary else full
        return Teacher(labels, probs.unsqueeze(1), entropy, full.unsqueeze(1))


class _Gradients:
    """Gradients of the states, the head, the correction's states and its matrix, accumulated tile by tile."""

    def __init__(self, tile: _Tile, given: Sequence[Tensor | None], needs: Sequence[bool], share: float) -> None:
        self.tile, self.given, self.share = tile, given, share
        # Those of matrices are sums over all tiles, in fp32 or wider; those of states are sums of few rows.
        self.sums = [
            torch.zeros_like(x, dtype=tile.wide if number % 2 else None) if x is not None and needed else None
            for number, (x, needed) in enumerate(zip(given, needs, strict=True))
        ]

    def add(self, index: slice | Tensor, weights: Tensor, grad: Tensor, base: Tensor | None) -> None:
        """Add a tile's, given the gradients of its corrected and (if they count) its base logits."""
        scale = weights.reshape(-1, 1).to(self.tile.product.dtype)
        if self.given[2] is not None:
            own = scale * (1 - self.share) if base is not None else scale
            self._add(2, index, grad, own)
            if base is not None:
                grad = base.lerp_(grad, 1 - self.share)
        self._add(0, index, grad, scale)

    def _add(self, which: int, index: slice | Tensor, grad: Tensor, scale: Tensor) -> None:
        """Add to the gradients of states and of the matrix that they are multiplied with."""
        (states, matrix), (of_states, of_matrix) = self.given[which : which + 2], self.sums[which : which + 2]
        if states is None or matrix is None or (of_states is None and of_matrix is None):
            return
        slope = self.tile.slope(grad)
        if of_states is not None:
            part = (slope @ matrix).mul_(scale)
            if isinstance(index, slice):
                of_states[index] += part
            else:
                of_states.index_add_(0, index, part)
        if of_matrix is not None:
            scaled = states[index] * scale
            if slope.dtype == of_matrix.dtype:
                of_matrix.addmm_(slope.t(), scaled)
            else:
                of_matrix += slope.t() @ scaled


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, extra: Tensor | None, matrix: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = job.weights.shape
        most = max((end - start for start, _, end in job.tiles), default=0)
        tile = _Tile(most, shape[1], len(head), states, mixed=job.base_share > 0)
        needs = [job.train and need for need in ctx.needs_input_grad[:4]]
        narrow_head, narrow_matrix = head.to(states.dtype), None if matrix is None else matrix.to(states.dtype)
        grads = _Gradients(tile, (states, narrow_head, extra, narrow_matrix), needs, job.base_share)
        teachers = _Teachers(job.teacher, job.objective, most)
        losses = torch.zeros(shape, dtype=tile.wide, device=states.device)
        hits = torch.zeros(shape, dtype=torch.bool, device=states.device)
        mixed = losses if tile.base is None else torch.zeros_like(losses)
        applied = job.weights.to(tile.wide, copy=job.weigh is not None)
        for start, stop, end in job.tiles:
            count, part = stop - start, slice(start, end)
            index = part if job.students is None else job.students[part].flatten()
            teacher = teachers.tile(part)
            logits = tile.scores(states[index], narrow_head)
            if job.bias is not None:
                logits += job.bias
            base = None
            if tile.base is not None:
                base = CrossEntropy()(tile.student(logits, teacher, part, tile.base)[0], teacher)
            if extra is not None and narrow_matrix is not None:
                logits = tile.scores(extra[index], narrow_matrix, add=True)
            student, best = tile.student(logits, teacher, part, tile.probs)
            labels = job.teacher.labels[part].unsqueeze(1)
            if job.weigh is not None:
                known = torch.where(labels >= 0, (student.label_logits - student.log_sum).exp(), 0.0)
                applied[start:stop, 0] *= job.weigh(slice(start, stop), known[:count, 0])
            hits[start:stop] = (best == labels)[:count]
            row_losses, grad = job.objective(student, teacher)
            losses[start:stop] = row_losses[:count]
            if base is not None:
                mixed[start:stop] = torch.lerp(row_losses, base[0], job.base_share)[:count]
            if any(needs):
                weights = applied[part] if end == stop else applied[part].clone()
                weights[count:] = 0.0
                grads.add(index, weights, grad, None if base is None else base[1])
        ctx.save_for_backward(*grads.sums)
        ctx.mark_non_differentiable(losses, hits)
        ctx.set_materialize_grads(False)
        return (torch.where(applied != 0, mixed, 0.0) * applied).sum(), losses, hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *(None if x is None else x.mul_(grad.to(x.dtype)) for x in ctx.saved_tensors), None
