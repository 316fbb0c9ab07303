"""The tiled head and its objectives against the same losses written plainly, with autograd in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from specforge.inference.target_head import OutputHead
from specforge.losses import Correction, TeacherRows, feature_distance, make_objective, tiled_loss
from specforge.losses.blocks import Acceptance, Candidates, DPace

M, T, S, H, R, D, V = 37, 3, 50, 8, 4, 21, 30


def _kl(z: Tensor, p: Tensor, full: Tensor, labels: Tensor) -> Tensor:
    return (p * (p.log() - z.log_softmax(-1))).sum(-1)


def _reverse_kl(z: Tensor, p: Tensor, full: Tensor, labels: Tensor) -> Tensor:
    return (z.softmax(-1) * (z.log_softmax(-1) - p.log())).sum(-1)


def _js(z: Tensor, p: Tensor, full: Tensor, labels: Tensor) -> Tensor:
    q = z.softmax(-1)
    middle = ((p + q) / 2).log()
    return ((p * (p.log() - middle)).sum(-1) + (q * (q.log() - middle)).sum(-1)) / 2


def _overlap(z: Tensor, full: Tensor) -> Tensor:
    return torch.minimum(z.softmax(-1), full).sum(-1)


def _tv(z: Tensor, p: Tensor, full: Tensor, labels: Tensor) -> Tensor:
    return 1 - _overlap(z, full)


def _ce(z: Tensor, p: Tensor, full: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), labels.expand(z.shape[:-1]).flatten(), reduction="none").view(z.shape[:-1])


def _topk(z: Tensor, p: Tensor, full: Tensor, labels: Tensor) -> Tensor:
    best, ids = p.topk(4, -1)
    return -(best * z.log_softmax(-1).gather(-1, ids.expand(*z.shape[:-1], -1))).sum(-1)


def _lk_alpha(z: Tensor, p: Tensor, full: Tensor, labels: Tensor) -> Tensor:
    return -_overlap(z, full).log()


def _lk_lambda(z: Tensor, p: Tensor, full: Tensor, labels: Tensor) -> Tensor:
    accept = _overlap(z, full)
    share = torch.exp(-3.0 * accept.detach())
    return share * _kl(z, p, full, labels) + (1 - share) * (1 - accept)


def _mix(z: Tensor, p: Tensor, full: Tensor, labels: Tensor) -> Tensor:
    return 0.3 * _ce(z, p, full, labels) + 0.7 * _tv(z, p, full, labels)


PLAIN: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "js": _js,
    "tv": _tv,
    "ce": _ce,
    "topk": _topk,
    "lk_alpha": _lk_alpha,
    "lk_lambda": _lk_lambda,
    "mix": _mix,
}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_same(loss: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(
        torch.autograd.grad(loss * 0.7, inputs), torch.autograd.grad(expected * 0.7, inputs), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("chunk", [1, 5, None])
@pytest.mark.parametrize("part", ["whole vocabulary", "part of it"])
@pytest.mark.parametrize("name", PLAIN)
def test_objectives_are_their_definitions_for_several_students_of_a_label(name, part, chunk):
    states, matrix = draw(S, H).requires_grad_(), draw(D, H).requires_grad_()
    bias, hidden, whole = draw(D), draw(M, H), draw(D if part == "whole vocabulary" else V, H)
    students, weights = torch.randint(S, (M, T)), torch.rand(M, T, dtype=torch.float64)
    weights[3, 1] = weights[7] = 0.0
    labels = torch.randint(D, (M,))
    labels[7] = -1
    objective = make_objective({"ce": 0.3, "tv": 0.7} if name == "mix" else name, topk=4)
    log_sum = F.linear(hidden, whole).logsumexp(-1) if len(whole) > D else None
    teacher = TeacherRows(labels, hidden, OutputHead(whole[:D]), log_sum)
    found = tiled_loss(states, OutputHead(matrix, bias), teacher, weights, objective, students=students, chunk=chunk)
    z = F.linear(states[students], matrix, bias)
    p = F.linear(hidden, whole[:D]).softmax(-1).unsqueeze(1)
    full = F.linear(hidden, whole).softmax(-1)[:, :D].unsqueeze(1)
    losses = PLAIN[name](z, p, full, labels.clamp(min=0).unsqueeze(1))
    assert_same(found.loss, (losses * weights).sum(), states, matrix)
    torch.testing.assert_close(found.losses[weights != 0], losses[weights != 0].detach())
    assert found.hits.equal(z.argmax(-1) == labels.unsqueeze(1))


@pytest.mark.parametrize("chunk", [1, 6, None])
@pytest.mark.parametrize("base_share", [0.0, 0.4])
def test_a_correction_is_added_to_the_logits_of_a_frozen_head(base_share, chunk):
    states, extra, matrix = (x.requires_grad_() for x in (draw(M, H), draw(M, R), draw(D, R)))
    head, labels, weights = OutputHead(draw(D, H), draw(D)), torch.randint(D, (M,)), torch.rand(M, dtype=torch.float64)
    found = tiled_loss(
        states,
        head,
        TeacherRows(labels),
        weights,
        correction=Correction(extra, matrix),
        base_share=base_share,
        chunk=chunk,
    )
    base = head.scores(states)
    final = base + extra @ matrix.t()
    losses = torch.lerp(*(F.cross_entropy(z, labels, reduction="none") for z in (final, base)), base_share)
    assert_same(found.loss, (losses * weights).sum(), states, extra, matrix)
    torch.testing.assert_close(found.losses, F.cross_entropy(final, labels, reduction="none").detach())


@pytest.mark.parametrize("chunk", [1, 6, None])
@pytest.mark.parametrize("partial", [False, True])
def test_acceptance_shares_teacher_rows_between_the_rows_of_a_label(partial, chunk):
    states, whole, hidden = draw(M, H).requires_grad_(), draw(V if partial else D, H), draw(11, H)
    head, weights = OutputHead(draw(D, H)), torch.rand(M, dtype=torch.float64)
    of_label, labels = torch.randint(11, (M,)).sort().values, torch.randint(D, (M,))
    full = F.linear(hidden, whole)
    log_sum, repeats = full.logsumexp(-1) if partial else None, of_label.bincount(minlength=11).tolist()
    teacher = TeacherRows(labels, hidden, OutputHead(whole[:D]), log_sum, of_label, repeats)
    objective = Acceptance(0.1, 0.9, states)
    found = tiled_loss(states, head, teacher, weights, objective, chunk=chunk)
    z = head.scores(states)
    apart = (z.softmax(-1) - full.softmax(-1)[of_label, :D]).abs().sum(-1)
    outside = 1 - full.softmax(-1)[of_label, :D].sum(-1)  # the part of p that the draft cannot reach
    losses = 0.1 * F.cross_entropy(z, labels, reduction="none") + 0.9 * (apart + outside)
    assert_same(found.loss, (losses * weights).sum(), states)
    torch.testing.assert_close(objective.accept, 1 - (apart + outside).detach() / 2)


@pytest.mark.parametrize("chunk", [1, 6, None])
def test_candidates_are_scored_again_and_hold_the_label(chunk):
    states, context, matrix = (x.requires_grad_() for x in (draw(M, H), draw(M, R), draw(D, R)))
    head, labels, weights = OutputHead(draw(D, H)), torch.randint(D, (M,)), torch.rand(M, dtype=torch.float64)
    objective = Candidates(context, matrix, 5, 0.3)
    result = tiled_loss(states, head, TeacherRows(labels), weights, objective, chunk=chunk)
    found = result.loss + 0.3 * (objective.entropy() * weights).sum()
    logs = head.scores(states).log_softmax(-1)
    ids = logs.topk(5, -1).indices
    best = (logs.gather(1, ids) + (matrix[ids] @ context.unsqueeze(2)).squeeze(2)).argmax(1)
    assert objective.hits.equal(ids[torch.arange(M), best] == labels)
    missing = ~(ids == labels.unsqueeze(1)).any(1)
    ids[missing, -1] = labels[missing]
    again = logs.gather(1, ids) + (matrix[ids] @ context.unsqueeze(2)).squeeze(2)
    second = F.cross_entropy(again, (ids == labels.unsqueeze(1)).int().argmax(1), reduction="none")
    expected = ((F.nll_loss(logs, labels, reduction="none") + 0.3 * second) * weights).sum()
    assert_same(found, expected, states, context, matrix)


@pytest.mark.parametrize("chunk", [1, 6, 17, None])
@pytest.mark.parametrize("form", ["dpace", "prefix", "continuation"])
def test_weights_from_whole_blocks_do_not_depend_on_the_tiles(form, chunk):
    counts = [3, 5, 1, 4, 5, 5, 2]
    block = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    depth, rows = torch.cat([torch.arange(n) for n in counts]), sum(counts)
    states, head = draw(rows, H).requires_grad_(), OutputHead(draw(D, H))
    labels, firsts = torch.randint(D, (rows,)), [0, *torch.tensor(counts).cumsum(0).tolist()]
    weigh = DPace(block, depth, 5, 0.5, form)
    ones = torch.ones(rows, dtype=torch.float64)
    found = tiled_loss(states, head, TeacherRows(labels), ones, weigh=weigh, firsts=firsts, chunk=chunk)
    losses, expected = F.cross_entropy(head.scores(states), labels, reduction="none"), []
    for b, count in enumerate(counts):
        prefix = (0.5 * (-losses[block == b].detach()).exp() + 0.5).cumprod(0)
        rest = [prefix[k:count].sum() for k in range(count)]
        form_of = {"prefix": prefix, "dpace": torch.stack(rest), "continuation": torch.stack(rest) / prefix}
        expected.append(form_of[form])
    assert_same(found.loss, (losses * torch.cat(expected)).sum(), states)


def test_no_gradient_is_made_where_none_is_wanted():
    states, matrix = draw(S, H).requires_grad_(), draw(D, H)
    teacher, weights = TeacherRows(torch.randint(D, (S,))), torch.ones(S, dtype=torch.float64)
    with torch.no_grad():
        assert not tiled_loss(states, OutputHead(matrix), teacher, weights).loss.requires_grad
    result = tiled_loss(states, OutputHead(matrix), teacher, weights)
    assert result.loss.requires_grad
    assert not result.losses.requires_grad
    result.loss.backward()
    assert matrix.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_round_and_no_more(dtype):
    states, matrix, hidden, whole = draw(S, H), draw(D, H), draw(M, H), draw(D, H)
    students, weights = torch.randint(S, (M, T)), torch.rand(M, T)
    labels, gradients = torch.randint(D, (M,)), []
    for kind in (torch.float64, dtype):
        own = [x.to(kind).requires_grad_() for x in (states, matrix)]
        teacher = TeacherRows(labels, hidden, OutputHead(whole), None)
        result = tiled_loss(own[0], OutputHead(own[1]), teacher, weights, make_objective("kl"), students=students)
        gradients.append([x.double() for x in torch.autograd.grad(result.loss, own)])
    for exact, rounded in zip(*gradients, strict=True):
        assert (rounded - exact).norm() / exact.norm() < (1e-6 if dtype == torch.float32 else 0.02)


def test_the_feature_distance_is_a_weighted_mean_over_the_width():
    states, students, weights, hidden = draw(S, H), torch.randint(S, (M, T)), torch.rand(M, T), draw(M, H)
    apart = F.smooth_l1_loss(states[students], hidden.unsqueeze(1).expand(-1, T, -1), reduction="none").mean(-1)
    torch.testing.assert_close(feature_distance(states, students, weights, hidden), (apart * weights).sum())
