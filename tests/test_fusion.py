"""Fused forms of the layers and losses give what the same functions give unfused."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import specforge.fusion
import specforge.losses.tiled
from specforge.fusion import allow_fusion, fused
from specforge.inference.target_head import OutputHead, TargetHead
from specforge.losses import Correction, TeacherRows, make_objective, tiled_loss
from specforge.losses.blocks import Acceptance, DPace
from specforge.modeling.draft.dflash.dflash2 import OUT, DynamicConv
from specforge.modeling.layers.decoder_layer import RMSNorm, apply_rope


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Compile on a CPU too, with another backend."""
    compiled = functools.cache(lambda f, **_: torch.compile(f, dynamic=False, fullgraph=True, backend=backend))
    for module in (specforge.fusion, specforge.losses.tiled):
        monkeypatch.setattr(module, "fuses", lambda x: specforge.fusion._allowed and len(x) > 1)
    monkeypatch.setattr(specforge.fusion, "_compiled", compiled)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where to run; on a CPU, everything but the generation of code."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if request.param == "cpu":
        compile_with(monkeypatch, "aot_eager")
    with torch._dynamo.config.patch(recompile_limit=64):
        yield request.param


def compare(run, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Fused in half precision is as near to unfused in fp64 as unfused in half precision."""
    try:
        allow_fusion(False)
        exact = run("cpu", torch.float64)
        before = run(device, dtype)
    finally:
        allow_fusion(True)
    for a, b, c in zip(exact, before, run(device, dtype), strict=True):
        scale = a.double().norm() + 1e-12
        errors = [float((x.detach().cpu().double() - a.double()).norm() / scale) for x in (b, c)]
        assert errors[1] <= 1.3 * errors[0] + 1e-5, errors


OBJECTIVES = ["kl", "ce", "reverse_kl", "js", "tv", "lk_alpha", "lk_lambda", "topk", {"kl": 0.5, "tv": 0.5}]


@pytest.mark.parametrize("rows", [96, 160])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_losses_with_a_teacher(objective, rows, device):
    students, size, vocabulary = 3, 64, 160

    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        g = torch.Generator().manual_seed(rows)
        draw = lambda *shape: torch.randn(*shape, generator=g).bfloat16().to(device, dtype)  # noqa: E731
        states = draw(rows * students, size).requires_grad_()
        head = (draw(vocabulary, size) / 4).to(dtype if dtype == torch.float64 else torch.float32).requires_grad_()
        teacher = OutputHead(draw(vocabulary, size) / 4)
        labels = torch.randint(-1, vocabulary, (rows,), generator=g).to(device)
        hidden, log_sum = draw(rows, size), torch.full((rows,), 7.0, device=device, dtype=head.dtype)
        weights = (torch.rand(rows, students, generator=g).to(device, head.dtype)) * (labels >= 0)[:, None]
        index = torch.randperm(rows * students, generator=g).view(rows, students).to(device)
        rows_of = TeacherRows(labels, hidden, teacher, log_sum)
        found = tiled_loss(
            states, OutputHead(head), rows_of, weights, make_objective(objective), students=index, chunk=32
        )
        found.loss.backward()
        return [found.loss, found.losses * (weights > 0), states.grad, head.grad]

    compare(run, device)


@pytest.mark.parametrize("kind", ["plain", "base", "final", "acceptance", "dpace"])
def test_losses_with_a_correction(kind, device):
    rows, size, vocabulary, rank = 96, 64, 160, 8

    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        g = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(*shape, generator=g).bfloat16().to(device, dtype)  # noqa: E731
        states, extra = draw(rows, size).requires_grad_(), draw(rows, rank).requires_grad_()
        matrix = draw(vocabulary, rank).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        head, labels = (
            OutputHead(draw(vocabulary, size) / 4),
            torch.randint(-1, vocabulary, (rows,), generator=g).to(device),
        )
        weights = torch.rand(rows, generator=g).to(device, matrix.dtype) * (labels >= 0)
        teacher, objective, more = TeacherRows(labels), None, {}
        if kind == "acceptance":
            teacher, objective = TeacherRows(labels, draw(rows, size), head), Acceptance(0.1, 0.9, states)
        if kind == "dpace":
            block = torch.arange(rows, device=device) // 8
            weigh = DPace(block, torch.arange(rows, device=device) % 8, 8, 0.5, "dpace")
            more = {"weigh": weigh, "firsts": [*range(0, rows + 1, 8)]}
        if kind not in ("plain", "dpace"):
            more["correction"] = Correction(extra, matrix)
        share = 0.3 if kind == "base" else 0.0
        found = tiled_loss(states, head, teacher, weights, objective, base_share=share, chunk=32, **more)
        found.loss.backward()
        noted = [objective.accept] if isinstance(objective, Acceptance) else []
        grads = [x.grad for x in (states, extra, matrix) if x.grad is not None]
        return [found.loss, found.losses * (weights > 0), *grads, *noted]

    compare(run, device)


@pytest.mark.parametrize("rows", [64, 160])
def test_layers(rows, device):
    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        g = torch.Generator().manual_seed(2)
        draw = lambda *shape: torch.randn(*shape, generator=g).bfloat16().to(device, dtype)  # noqa: E731
        norm = RMSNorm(64).to(device, torch.promote_types(dtype, torch.float32))
        with torch.no_grad():
            norm.weight.copy_(draw(64).abs() + 0.5)
        x, matrix = draw(rows, 64).requires_grad_(), (draw(64, 64) / 8).requires_grad_()
        gate_up, down = (draw(256, 64) / 8).requires_grad_(), (draw(64, 128) / 8).requires_grad_()
        angles = torch.rand(rows, 12, generator=g).to(device, norm.weight.dtype)
        y = norm.mlp(norm.linear(norm(x), matrix), gate_up, down)
        y = apply_rope(y.view(rows, 2, 32), angles.cos(), angles.sin()).flatten(1)
        y.backward(draw(rows, 64))
        return [y, *(t.grad for t in (x, matrix, gate_up, down, norm.weight))]

    compare(run, device)


@pytest.mark.parametrize("blocks", [32, 40])
def test_the_convolution_of_dflash2(blocks, device):
    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        g = torch.Generator().manual_seed(4)
        draw = lambda *shape: torch.randn(*shape, generator=g).bfloat16().to(device, dtype)  # noqa: E731
        conv = DynamicConv(64, 8, 3, 16).to(device, torch.promote_types(dtype, torch.float32))
        with torch.no_grad():
            conv.kernel_projection.weight.copy_(draw(*conv.kernel_projection.weight.shape) / 8)
            conv.base_kernel.copy_(draw(*conv.base_kernel.shape))
        x, normed = draw(blocks * 8, 64).requires_grad_(), draw(blocks * 8, 64).requires_grad_()
        y = conv(x, normed, OUT)
        y.backward(draw(blocks * 8, 64))
        return [y, x.grad, normed.grad, conv.base_kernel.grad, conv.kernel_projection.weight.grad]

    compare(run, device)


def test_the_targets_most_likely_token(device):
    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        g = torch.Generator().manual_seed(3)
        matrix, hidden = torch.randn(300, 64, generator=g), torch.randn(64, 64, generator=g)
        head = TargetHead(matrix.bfloat16(), matrix.bfloat16(), dtype).to(torch.device(device))
        found = head.rows(hidden.to(device, dtype), chunk=128)
        return [found.log_sum]

    compare(run, device)


def test_one_graph_serves_any_number_of_rows(monkeypatch):
    graphs = []
    compile_with(monkeypatch, lambda graph, _: graphs.append(graph) or graph.forward)
    function = fused(x=(0,))(lambda x: x.exp() + 1)
    for rows in (64, 96, 32, 1000):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(function(x), x.exp() + 1)
    assert len(graphs) == 1


def test_a_compiler_that_fails_does_not_end_the_run(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C compiler")

    compile_with(monkeypatch, broken)
    function = fused(x=(0,))(lambda x: x.exp() + 1)
    x = torch.randn(64, 8)
    try:
        with pytest.warns(UserWarning, match="without fused kernels, as the compiler failed: .*no C compiler"):
            torch.testing.assert_close(function(x), x.exp() + 1)
        torch.testing.assert_close(function(x), x.exp() + 1)
    finally:
        allow_fusion(True)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_form_of_a_sum_is_fixed_for_deterministic_training(deterministic, monkeypatch):
    """A compiler that takes the fastest form may take another one in the process that resumes a run."""
    given = {}

    def compile_with_options(function, **options):
        given.update(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_with_options)
    monkeypatch.setattr(specforge.fusion, "fuses", lambda x: True)
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert fused(x=(0,))(lambda x: x.sum(-1))(torch.ones(2, 3)).tolist() == [3.0, 3.0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert given["options"] == {"deterministic": deterministic}
