"""Losses of block drafters through the frozen head of the target, in cache-sized tiles; logits are never stored.

The gradient is computed in the forward pass while a tile's probabilities are in cache (as in Liger,
arXiv 2410.10989). The head takes no gradient. Some drafters add a low-rank correction to its logits, whose matrix
is trained; its product joins the head's in the tile.

Shape legend: M rows, C rows of a tile, H hidden size, r rank of a correction, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from specforge.inference.target_head import OutputHead
from specforge.losses.chunked import add_product, default_chunk

# Tiles that end where a block does are padded to a multiple of this (see specforge.modeling.draft.plan.ROUND).
_ROUND = 32


class Correction(NamedTuple):
    """A trained addition to the logits: ``states [M, r] @ matrix [D, r]ᵀ``."""

    states: Tensor
    matrix: Tensor


class RowLoss(Protocol):
    """A loss of single rows with its gradient."""

    def __call__(self, probs: Tensor, log_probs: Tensor, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Loss of each row of a tile, and its gradient by the logits.

        Args:
            probs: ``[C, D]`` the draft's probabilities; may be overwritten.
            log_probs: ``[C]`` log-probability of the label.
            labels: ``[C]`` draft id of the label; arbitrary where the row has no weight.
            rows: which of the M rows they are.
        """


Weigh = Callable[[slice, Tensor], Tensor]
"""Weights ``[C]`` of a tile's rows, from which rows they are and the draft's probability of each label ``[C]``."""


class BlockLoss(NamedTuple):
    """Result of :func:`block_loss`.

    Attributes:
        loss: scalar, Σ weight · loss; the only one that carries a gradient.
        losses: ``[M]`` unweighted loss of each row.
        hits: ``[M]`` bool, whether the draft's likeliest token is the label.
    """

    loss: Tensor
    losses: Tensor
    hits: Tensor


class HardLabel:
    """Cross-entropy with the label, -log q(label)."""

    def __call__(self, probs: Tensor, log_probs: Tensor, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """∂/∂z = q - 1[label]."""
        index = labels.unsqueeze(1)
        return -log_probs, probs.scatter_add_(1, index, probs.new_full(index.shape, -1.0))


@dataclass(frozen=True)
class _Job:
    head: OutputHead
    labels: Tensor
    weights: Tensor
    objective: RowLoss
    tiles: Sequence[tuple[int, int]]
    weigh: Weigh | None
    base_share: float
    train: bool


class _Tile:
    """Scratch for one tile, reused by all of them so that it stays in cache."""

    def __init__(self, rows: int, like: Tensor, vocabulary: int, mixed: bool) -> None:
        self.wide = torch.promote_types(like.dtype, torch.float32)
        new = lambda dtype: torch.empty(rows, vocabulary, dtype=dtype, device=like.device)  # noqa: E731
        self.logits, self.probs = new(self.wide), new(self.wide)
        self.base = new(self.wide) if mixed else None
        self.product = self.logits if like.dtype == self.wide else new(like.dtype)

    def scores(self, states: Tensor, matrix: Tensor, add: bool = False) -> Tensor:
        """``states @ matrixᵀ`` in fp32 or wider; with ``add``, added to the logits that are there."""
        rows = len(states)
        if self.product is self.logits:
            return self.logits[:rows].addmm_(states, matrix.t(), beta=float(add))
        product = torch.mm(states, matrix.t(), out=self.product[:rows])
        return self.logits[:rows].add_(product) if add else self.logits[:rows].copy_(product)

    def softmax(self, logits: Tensor, labels: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities ``[C, D]``, log-probability of the labels and the likeliest draft ids, ``[C]`` each."""
        probs = torch.softmax(logits, -1, out=out[: len(logits)])
        top, best = logits.max(-1)
        log_sum = top - probs.gather(1, best.unsqueeze(1)).squeeze(1).log()
        return probs, logits.gather(1, labels.unsqueeze(1)).squeeze(1) - log_sum, best

    def slope(self, grad: Tensor) -> Tensor:
        """The gradient tile in the compute dtype."""
        return grad if grad.dtype == self.product.dtype else self.product[: len(grad)].copy_(grad)


class _BlockLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, extra: Tensor | None, matrix: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = len(states)
        most = max((stop - start for start, stop in job.tiles), default=0) + _ROUND
        tile = _Tile(min(most, rows), states, len(job.head), mixed=job.base_share > 0)
        losses = torch.zeros(rows, dtype=tile.wide, device=states.device)
        total = torch.zeros((), dtype=tile.wide, device=states.device)
        hits = torch.zeros(rows, dtype=torch.bool, device=states.device)
        narrow = None if matrix is None else matrix.to(states.dtype)
        grads = _Grads(job, states, extra, narrow, tile)
        for start, stop in job.tiles:
            count = stop - start
            part = slice(start, min(start + -(-count // _ROUND) * _ROUND, rows))
            labels = job.labels[part].clamp(min=0)
            logits = tile.scores(states[part], job.head.weight)
            if job.head.bias is not None:
                logits += job.head.bias
            base = None
            if tile.base is not None:
                _, base_log_probs, _ = tile.softmax(logits, labels, tile.base)
                base = HardLabel()(tile.base[: len(labels)], base_log_probs, labels, part)
            if extra is not None and narrow is not None:
                logits = tile.scores(extra[part], narrow, add=True)
            probs, log_probs, best = tile.softmax(logits, labels, tile.probs)
            weights = job.weights[part].to(tile.wide, copy=True)
            if job.weigh is not None:
                known = torch.where(job.labels[start:stop] >= 0, log_probs[:count].exp(), 0.0)
                weights[:count] *= job.weigh(slice(start, stop), known)
            weights[count:] = 0.0
            row_losses, grad = job.objective(probs, log_probs, labels, part)
            losses[start:stop] = row_losses[:count]
            hits[start:stop] = (best == job.labels[part])[:count]
            mixed = row_losses if base is None else torch.lerp(row_losses, base[0], job.base_share)
            total += torch.where(weights != 0, mixed, 0.0) @ weights
            if job.train:
                grads.add(part, weights, grad, None if base is None else base[1])
        ctx.save_for_backward(grads.states, grads.extra, grads.matrix)
        ctx.mark_non_differentiable(losses, hits)
        ctx.set_materialize_grads(False)
        return total, losses, hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *(None if x is None else x.mul_(grad.to(x.dtype)) for x in ctx.saved_tensors), None


class _Grads:
    """Gradients by the states, the correction's states and its matrix, gathered tile by tile."""

    def __init__(self, job: _Job, states: Tensor, extra: Tensor | None, matrix: Tensor | None, tile: _Tile) -> None:
        self.job, self.given, self.matrix_given, self.tile = job, extra, matrix, tile
        self.states = torch.zeros_like(states) if job.train else None
        self.extra = torch.zeros_like(extra) if job.train and extra is not None else None
        self.matrix = (
            torch.zeros(matrix.shape, dtype=tile.wide, device=matrix.device)
            if job.train and matrix is not None
            else None
        )

    def add(self, part: slice, weights: Tensor, grad: Tensor, base: Tensor | None) -> None:
        """Add a tile's, given the gradients by its corrected and (where they count) its plain logits."""
        assert self.states is not None
        share = self.job.base_share
        scale = weights.to(self.states.dtype).unsqueeze(1)
        if base is not None:
            base.lerp_(grad, 1 - share)
        if self.given is not None and self.extra is not None:
            assert self.matrix is not None
            assert self.matrix_given is not None
            slope = self.tile.slope(grad)
            own = scale * (1 - share)
            self.extra[part] += (slope @ self.matrix_given).mul_(own)
            add_product(self.matrix, slope, self.given[part] * own)
        self.states[part] += (self.tile.slope(grad if base is None else base) @ self.job.head.weight).mul_(scale)


def block_loss(
    states: Tensor,
    head: OutputHead,
    labels: Tensor,
    weights: Tensor,
    *,
    correction: Correction | None = None,
    objective: RowLoss | None = None,
    base_share: float = 0.0,
    weigh: Weigh | None = None,
    firsts: Sequence[int] | None = None,
    chunk: int | None = None,
) -> BlockLoss:
    """Loss of the rows that block drafting supervises.

    Args:
        states: ``[M, H]`` the draft's normed states; their dtype is the compute dtype.
        head: the target's, for the draft vocabulary; frozen. Its cap, which changes no order, is left out.
        labels: ``[M]`` draft id of each row's label, -1 where it is outside the draft vocabulary.
        weights: ``[M]`` weight of each row in the sum; 0 drops it.
        correction: added to the head's logits.
        objective: the loss of a row; cross-entropy with the label if not given.
        base_share: share of the loss that is the cross-entropy of the logits without the correction.
        weigh: a further factor of the weights that depends on the draft's probabilities, without a gradient.
        firsts: at which rows a tile may begin, the number of rows last; for a ``weigh`` that looks at whole blocks.
        chunk: rows at a time; chosen by :func:`default_chunk` when None. It does not change the result.
    """
    chunk = chunk or default_chunk(len(head), 1, states.device)
    tiles = _tiles(len(states) if firsts is None else firsts, chunk)
    extra, matrix = (None, None) if correction is None else correction
    job = _Job(
        head.to(states.dtype),
        labels,
        weights,
        objective or HardLabel(),
        tiles,
        weigh,
        base_share,
        torch.is_grad_enabled(),
    )
    with torch.autocast(states.device.type, enabled=False):
        return BlockLoss(*_BlockLoss.apply(states, extra, matrix, job))  # type: ignore[no-untyped-call]


def _tiles(rows: int | Sequence[int], chunk: int) -> list[tuple[int, int]]:
    """Runs of about ``chunk`` rows that begin where one may."""
    if isinstance(rows, int):
        return [(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
    tiles = []
    start = 0
    for previous, stop in zip(rows, [*rows[1:], rows[-1]], strict=True):
        if stop - start > chunk and previous > start:
            tiles.append((start, previous))
            start = previous
    return [*tiles, (start, rows[-1])] if rows[-1] > start else tiles


class DPace:
    """D-PACE's weights: what a right token adds to the expected length of the accepted prefix (arXiv 2605.18810).

    With the smoothed confidence s = (1 - α) q(label) + α of each supervised draft (1 where there is none) and
    C_k = Π_{j≤k} s_j, the weight of draft k is Σ_{j≥k} C_j over supervised j.

    Args:
        block: ``[M]`` block of each row.
        depth: ``[M]`` which draft of its block it is.
        drafts: T, drafts of a block.
        alpha: α.
        form: ``dpace``; or one factor of it alone: ``prefix``, C_k, or ``continuation``, Σ_{j≥k} C_j / C_k.
    """

    def __init__(self, block: Tensor, depth: Tensor, drafts: int, alpha: float, form: str) -> None:
        self.block, self.depth, self.drafts, self.alpha, self.form = block, depth, drafts, alpha, form

    def __call__(self, rows: slice, probs: Tensor) -> Tensor:
        """Weights of some whole blocks' rows, given the draft's probabilities of the labels, ``[C]`` each."""
        block = self.block[rows] - self.block[rows.start]
        at = block, self.depth[rows]
        smooth = probs.new_ones(int(block[-1]) + 1, self.drafts)
        valid = torch.zeros_like(smooth)
        smooth[at], valid[at] = (1 - self.alpha) * probs + self.alpha, 1.0
        prefix = smooth.cumprod(1)
        following = (prefix * valid).flip(1).cumsum(1).flip(1)
        weights = {"dpace": following, "prefix": prefix, "continuation": following / prefix}[self.form]
        return weights[at]


class Acceptance:
    """DSpark's loss: ce · (-log q(label)) + l1 · ‖q - p‖₁ with the target's whole p (arXiv 2607.05147).

    Rows of one label share a teacher row, so they should follow one another.

    Args:
        head: the target's, for the draft vocabulary.
        hidden: ``[N, H]`` the target's last hidden states.
        tokens: ``[M]`` flat token of each row's label, which ``hidden`` of the token before predicts.
        log_sum: ``[N]`` fp32 log-sum-exp of every token's logits over the whole vocabulary; None where the draft's
            vocabulary is the whole one.
        ce: weight of the cross-entropy.
        l1: weight of the distance.

    Attributes:
        accept: ``[M]`` the probability Σ min(p, q) = 1 - ‖q - p‖₁ / 2 that a sampled draft is accepted; filled tile
            by tile.
    """

    def __init__(
        self, head: OutputHead, hidden: Tensor, tokens: Tensor, log_sum: Tensor | None, ce: float, l1: float
    ) -> None:
        self.head, self.hidden, self.tokens, self.log_sum = head, hidden, tokens, log_sum
        self.ce, self.l1 = ce, l1
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.accept = torch.zeros(len(tokens), dtype=wide, device=tokens.device)

    def __call__(self, probs: Tensor, log_probs: Tensor, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """∂‖q - p‖₁/∂z = 2 q ⊙ (Σ_{q≤p} q - 1[q ≤ p])."""
        tokens, inverse = torch.unique_consecutive(self.tokens[rows], return_inverse=True)
        logits = self.head.logits(self.hidden[tokens - 1]).to(probs.dtype)
        teacher = (
            logits.softmax(-1) if self.log_sum is None else (logits - self.log_sum[tokens - 1].unsqueeze(1)).exp_()
        )
        p = teacher[inverse]
        inside = torch.where(probs <= p, probs, 0.0)
        accept = torch.minimum(p, probs, out=p).sum(-1)
        self.accept[rows] = accept
        share = inside.sum(-1).mul_(2 * self.l1).add_(self.ce).unsqueeze(1)
        grad = probs.mul_(share).sub_(inside, alpha=2 * self.l1)
        index = labels.unsqueeze(1)
        grad.scatter_add_(1, index, grad.new_full(index.shape, -self.ce))
        return -self.ce * log_probs + self.l1 * 2 * (1 - accept), grad
