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

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specforge.fusion import fused, fuses
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
        hidden_index: ``[M]`` row of ``hidden`` of each label, ascending; None if every label has its own.
        repeats: how often each row of ``hidden`` is in ``hidden_index``; on the host, which need not ask the device.
    """

    labels: Tensor
    hidden: Tensor | None = None
    head: OutputHead | None = None
    log_sum: Tensor | None = None
    hidden_index: Tensor | None = None
    repeats: Sequence[int] = ()


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


def default_chunk(vocabulary: int, students: int, device: torch.device, itemsize: int = 4) -> int:
    """Labels of a tile whose logits of ``itemsize`` bytes fit the cache of a CPU core, or are enough to fill a GPU."""
    tile = _TILE_BYTES.get(device.type, _TILE_BYTES_ACCELERATOR)
    labels = max(1, tile // (itemsize * vocabulary * students))
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
    objective = objective or CrossEntropy()
    itemsize = states.itemsize if _is_fused(objective, states) else 4
    chunk = chunk or default_chunk(len(head), steps, states.device, itemsize)
    if teacher.hidden is not None and teacher.head is not None:
        teacher = teacher._replace(hidden=teacher.hidden.to(states.dtype), head=teacher.head.to(states.dtype))
    tiles = _block_tiles(firsts, chunk) if firsts else [(x, min(x + chunk, count)) for x in range(0, count, chunk)]
    round_to = 1 if firsts is None else _ROUND
    job = _Job(
        head.bias,
        teacher,
        weights.reshape(-1, steps),
        objective,
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

    @property
    def most_labels(self) -> int:
        """Labels of the largest tile."""
        return max((end - start for start, _, end in self.tiles), default=0)


def _is_fused(objective: Objective, states: Tensor) -> bool:
    """Whether a tile is judged in one compiled piece."""
    return objective.elementwise and states.dtype in (torch.bfloat16, torch.float16) and fuses(states)


class _Verdict(NamedTuple):
    """What the loss says of a tile; gradients are by the logits, before the rows' weights."""

    losses: Tensor  # [C, T]
    mixed: Tensor  # [C, T] with the base logits' share
    hits: Tensor  # [C, T]
    known: Tensor  # [C, T] log-probabilities of the labels
    own: Tensor  # [C, T, D] gradient of the losses: that of the correction, but for its share
    slope: Tensor  # [C, T, D] gradient of the mixed losses: that of the head


class _Tile:
    """Scratch memory for one tile, reused by all tiles so that it stays in cache."""

    def __init__(self, job: _Job, head: Tensor, matrix: Tensor | None, like: Tensor) -> None:
        self.job, self.head, self.matrix, self.steps = job, head, matrix, job.weights.shape[1]
        self.wide = torch.promote_types(like.dtype, torch.float32)
        self.fused = _is_fused(job.objective, like)
        if self.fused:
            return
        rows = job.most_labels * self.steps
        new = lambda dtype: torch.empty(rows, len(head), dtype=dtype, device=like.device)  # noqa: E731
        self.logits, self.probs = new(self.wide), new(self.wide)
        self.base = new(self.wide) if job.base_share > 0 else None
        self.product = self.logits if like.dtype == self.wide else new(like.dtype)

    def judge(self, states: Tensor, extra: Tensor | None, teacher: Teacher, part: slice) -> _Verdict:
        """The verdict on the rows of ``states`` and, if there is a correction, of its states ``extra``."""
        job = self.job
        if self.fused:
            more = None if extra is None or self.matrix is None else extra @ self.matrix.t()
            share = torch.full((), job.base_share, device=states.device) if job.base_share > 0 else None
            verdict, found = _judge(states @ self.head.t(), more, job.bias, *teacher, share, job.objective, self.steps)
            job.objective.keep(part, *found)
            return verdict
        logits = self.scores(states, self.head)
        if job.bias is not None:
            logits += job.bias
        base = None
        if self.base is not None:
            base = CrossEntropy()(self.student(logits, teacher, part, self.base)[0], teacher)
        if extra is not None and self.matrix is not None:
            logits = self.scores(extra, self.matrix, add=True)
        student, best = self.student(logits, teacher, part, self.probs)
        known = student.label_logits - student.log_sum
        losses, grad, *found = job.objective(student, teacher)
        job.objective.keep(part, *found)
        if base is None:
            return _Verdict(losses, losses, best == teacher.labels, known, grad, grad)
        mixed = torch.lerp(losses, base[0], job.base_share)
        return _Verdict(losses, mixed, best == teacher.labels, known, grad, base[1].lerp_(grad, 1 - job.base_share))

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

    def narrow(self, grad: Tensor) -> Tensor:
        """The gradient tile ``[C T, D]`` in the compute dtype."""
        flat = grad.flatten(0, 1)
        return flat if flat.dtype == self.head.dtype else self.product[: len(flat)].copy_(flat)


@fused(product=(0,), more=(0,), labels=(0,), probs=(0,), entropy=(0,), full=(0,))
def _judge(
    product: Tensor,
    more: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    probs: Tensor,
    entropy: Tensor,
    full: Tensor,
    share: Tensor | None,
    objective: Objective,
    steps: int,
) -> tuple[_Verdict, list[Tensor]]:
    """:meth:`_Tile.judge` of the products ``[C T, D]``, in one piece; gradients have the products' dtype."""
    teacher = Teacher(labels, probs, entropy, full)
    logits = product.float().unflatten(0, (-1, steps))
    if bias is not None:
        logits = logits + bias
    base = None if share is None else CrossEntropy()(_student(logits, labels), teacher)
    if more is not None:
        logits = logits + more.float().unflatten(0, (-1, steps))
    student = _student(logits, labels)
    losses, grad, *found = objective(student, teacher)
    hits, known, narrow = logits.argmax(-1) == labels, student.label_logits - student.log_sum, product.dtype
    own = grad.to(narrow)
    if base is None or share is None:
        return _Verdict(losses, losses, hits, known, own, own), found
    slope = torch.lerp(grad, base[1], share).to(narrow)
    return _Verdict(losses, torch.lerp(losses, base[0], share), hits, known, own, slope), found


def _student(logits: Tensor, labels: Tensor) -> Student:
    log_sum = logits.logsumexp(-1)
    at = labels.expand(logits.shape[:2]).unsqueeze(-1)
    return Student(
        (logits - log_sum.unsqueeze(-1)).exp(), logits, log_sum, logits.gather(-1, at).squeeze(-1), slice(0, 0)
    )


class _Teachers:
    """The teacher's side of the tiles, computed for several of them at once."""

    def __init__(self, rows: TeacherRows, objective: Objective, labels: int) -> None:
        self.rows, self.objective = rows, objective
        self.ahead = labels * _TEACHER_TILES if rows.hidden_index is None else labels
        self.ends = list(accumulate(rows.repeats))
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
            picked = slice(bisect_right(self.ends, part.start), bisect_left(self.ends, part.stop) + 1)
            inverse = rows.hidden_index[part] - picked.start
        logits = rows.head.logits(rows.hidden[picked])
        probs, log_sum, entropy = _softmax(logits, reads.draft_vocabulary)
        full = probs
        if reads.full_vocabulary and rows.log_sum is not None:
            full = probs * (log_sum - rows.log_sum[picked]).exp_().clamp_(max=1).unsqueeze(1)
        if inverse is not None:
            full = full[inverse]
            probs = probs[inverse] if reads.draft_vocabulary else full
        return Teacher(labels, probs.unsqueeze(1), entropy.unsqueeze(1), full.unsqueeze(1))


@fused(logits=(0,))
def _softmax(logits: Tensor, entropies: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities ``[C, D]`` of ``logits``, their log-sum-exp ``[C]``, and their entropy ``[C]`` if it is wanted."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probs = logits.softmax(-1)
    top, best = logits.max(-1)
    log_sum = top - probs.gather(-1, best.unsqueeze(-1)).squeeze(-1).log()
    return probs, log_sum, log_sum - torch.linalg.vecdot(probs, logits) if entropies else log_sum


class _Gradients:
    """Gradients of the states, the head, the correction's states and its matrix, accumulated tile by tile."""

    def __init__(self, tile: _Tile, given: Sequence[Tensor | None], needs: Sequence[bool], share: float) -> None:
        self.tile, self.given, self.share = tile, given, share
        # Those of matrices are sums over all tiles, in fp32 or wider; those of states are sums of few rows.
        self.sums = [
            torch.zeros_like(x, dtype=tile.wide if number % 2 else None) if x is not None and needed else None
            for number, (x, needed) in enumerate(zip(given, needs, strict=True))
        ]

    def add(self, index: slice | Tensor, weights: Tensor, verdict: _Verdict) -> None:
        """Add those of a tile."""
        scale = weights.reshape(-1, 1).to(self.tile.head.dtype)
        if self.given[2] is not None:
            self._add(2, index, verdict.own, scale * (1 - self.share) if self.share else scale)
        self._add(0, index, verdict.slope, scale)

    def _add(self, which: int, index: slice | Tensor, grad: Tensor, scale: Tensor) -> None:
        """Add to the gradients of states and of the matrix that they are multiplied with."""
        (states, matrix), (of_states, of_matrix) = self.given[which : which + 2], self.sums[which : which + 2]
        if states is None or matrix is None or (of_states is None and of_matrix is None):
            return
        slope = self.tile.narrow(grad)
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
            elif slope.is_cuda:  # the products are summed in fp32 without being stored
                torch.addmm(of_matrix, slope.t(), scaled, out_dtype=of_matrix.dtype, out=of_matrix)
            else:
                of_matrix += slope.t() @ scaled


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, extra: Tensor | None, matrix: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = job.weights.shape
        needs = [job.train and need for need in ctx.needs_input_grad[:4]]
        narrow_head, narrow_matrix = head.to(states.dtype), None if matrix is None else matrix.to(states.dtype)
        tile = _Tile(job, narrow_head, narrow_matrix, states)
        grads = _Gradients(tile, (states, narrow_head, extra, narrow_matrix), needs, job.base_share)
        teachers = _Teachers(job.teacher, job.objective, job.most_labels)
        losses = torch.zeros(shape, dtype=tile.wide, device=states.device)
        hits = torch.zeros(shape, dtype=torch.bool, device=states.device)
        mixed = losses if job.base_share == 0 else torch.zeros_like(losses)
        applied = job.weights.to(tile.wide, copy=job.weigh is not None)
        for start, stop, end in job.tiles:
            count, part = stop - start, slice(start, end)
            index = part if job.students is None else job.students[part].flatten()
            verdict = tile.judge(states[index], None if extra is None else extra[index], teachers.tile(part), part)
            labels = job.teacher.labels[part].unsqueeze(1)
            if job.weigh is not None:
                known = torch.where(labels >= 0, verdict.known.exp(), 0.0)
                applied[start:stop, 0] *= job.weigh(slice(start, stop), known[:count, 0])
            hits[start:stop] = (verdict.hits & (labels >= 0))[:count]
            losses[start:stop], mixed[start:stop] = verdict.losses[:count], verdict.mixed[:count]
            if any(needs):
                weights = applied[part] if end == stop else applied[part].clone()
                weights[count:] = 0.0
                grads.add(index, weights, verdict)
        ctx.save_for_backward(*grads.sums)
        ctx.mark_non_differentiable(losses, hits)
        ctx.set_materialize_grads(False)
        return (torch.where(applied != 0, mixed, 0.0) * applied).sum(), losses, hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *(None if x is None else x.mul_(grad.to(x.dtype)) for x in ctx.saved_tensors), None
