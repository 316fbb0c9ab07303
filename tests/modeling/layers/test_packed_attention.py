"""The layout of rows for the flash kernel, and what the kernel gives, against attention by document in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from specforge.modeling.draft.eagle3.plan import plan_unroll
from specforge.modeling.layers import packed_attention
from specforge.modeling.layers.attention import ttt_attention
from specforge.modeling.layers.packed_attention import Packing, Segment, pack

BATCHES = {
    "whole": ((64, 64), [(0, 64), (64, 128)]),
    "answers": ((90, 3, 170, 41), [(10, 90), (94, 263), (280, 304)]),
    "turns": ((200, 130), [(40, 120), (128, 200), (230, 300), (310, 330)]),
    "one": ((33,), [(20, 33)]),
    "padded": ((50, 60), [(1, 50), (80, 110)]),
}


def device_plan(name: str, steps: int, device: str = "cpu"):
    lengths, spans = BATCHES[name]
    return plan_unroll(lengths, spans, steps, sum(lengths) + 14 * (name == "padded")).to(torch.device(device))


def places(packing: Packing) -> np.ndarray:
    return np.arange(packing.num_rows) if packing.places is None else packing.places.numpy()


@pytest.mark.parametrize("name", BATCHES)
def test_a_document_has_its_rows_and_keys_and_ends_with_its_last_row(name):
    plan = device_plan(name, 3)
    packing = plan.packing
    assert packing is not None
    query_ends, key_ends = packing.query_ends.numpy(), packing.key_ends.numpy()
    begin = np.asarray(plan.positions) == 0
    for place, token in zip(places(packing), plan.rows.numpy()[: packing.num_rows], strict=True):
        document = np.searchsorted(query_ends, place, side="right") - 1
        keys = packing.tokens.numpy()[key_ends[document] : key_ends[document + 1]]
        assert begin[keys[0]]
        assert (np.diff(keys) == 1).all()
        # As many keys after the row's own token as places after the row's.
        assert query_ends[document + 1] - place == keys[-1] + 1 - token
    assert packing.most_queries == np.diff(query_ends).max()
    assert packing.most_keys == np.diff(key_ends).max()
    if packing.rows is not None:
        assert (packing.rows.numpy()[places(packing)] == np.arange(packing.num_rows)).all()


def test_rows_far_apart_are_not_packed():
    assert pack([Segment(0, 10, 20, 0), Segment(10, 500, 510, 0)]) is None
    assert pack([]) is None


def dense(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """What :func:`half_attention` computes."""
    scores = dense_scores(query, key, causal)
    return torch.einsum("blhk,bkhd->blhd", scores.softmax(-1), repeated(value, query)), scores.logsumexp(-1)


def dense_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`half_attention_backward` computes, by FlashAttention-2's formula (arXiv 2307.08691, section 3.1)."""
    probs = (dense_scores(query, key, causal) - lse.unsqueeze(-1)).exp()
    slope = torch.einsum("blhd,bkhd->blhk", grad, repeated(value, query)) - (grad * out).sum(-1, keepdim=True)
    slope = slope * probs * query.shape[-1] ** -0.5
    summed = lambda x: x.unflatten(2, (key.shape[2], -1)).sum(3)  # noqa: E731
    return (
        torch.einsum("blhk,bkhd->blhd", slope, repeated(key, query)),
        summed(torch.einsum("blhk,blhd->bkhd", slope, query)),
        summed(torch.einsum("blhk,blhd->bkhd", probs, grad)),
    )


def dense_scores(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    scores = torch.einsum("blhd,bkhd->blhk", query, repeated(key, query)) / query.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[1], scores.shape[3]).triu(1).bool()[:, None]
    return scores.masked_fill(hidden, -torch.inf) if causal else scores


def repeated(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat_interleave(query.shape[2] // x.shape[2], 2)


@pytest.mark.parametrize("name", BATCHES)
def test_products_by_document_are_merged_exactly(name, monkeypatch):
    """The form for long documents, with a plain softmax in place of the kernels."""
    monkeypatch.setattr(packed_attention, "half_attention", dense)
    monkeypatch.setattr(packed_attention, "half_attention_backward", dense_backward)
    monkeypatch.setattr(packed_attention, "_LONG", 1)
    plan = device_plan(name, 4)
    g, real = torch.Generator().manual_seed(0), plan.packing.num_rows
    sizes = [(len(plan.rows), 4), (len(plan.positions), 2), (len(plan.positions), 2), *[(len(plan.rows), 2)] * 6]
    given = [torch.randn(*size, 16, generator=g, dtype=torch.float64, requires_grad=True) for size in sizes]
    own = list(zip(given[3::2], given[4::2], strict=True))
    weight = torch.randn(real, 4, 16, generator=g, dtype=torch.float64)
    results = []
    for form in (
        lambda: ttt_attention(*given[:3], plan.segments, own),
        lambda: packed_attention.packed_attention(*given[:3], plan.packing, own),
    ):
        out = form()[:real]
        results.append([out, *torch.autograd.grad((out * weight).sum(), given)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(
    ("steps", "heads", "size", "value"), [(0, (4, 4), 64, 64), (1, (8, 2), 64, 64), (3, (8, 2), 128, 96)]
)
@pytest.mark.parametrize("name", BATCHES)
def test_the_kernel_gives_output_and_gradients_of_attention_by_document(
    name, steps, heads, size, value, long, monkeypatch
):
    monkeypatch.setattr(packed_attention, "_LONG", 1 if long else 8192)
    g = torch.Generator().manual_seed(0)
    plan = device_plan(name, steps + 1)
    rows, tokens = len(plan.rows), len(plan.positions)
    real = plan.packing.num_rows
    draw = lambda *shape: torch.randn(*shape, generator=g).bfloat16()  # noqa: E731
    given = [draw(rows, heads[0], size), draw(tokens, heads[1], size), draw(tokens, heads[1], value)]
    for _ in range(steps):
        given += [draw(rows, heads[1], size), draw(rows, heads[1], value)]
    weight = draw(rows, heads[0], value)
    weight[real:] = 0

    def run(device: str, dtype: torch.dtype, packing: Packing | None) -> list[torch.Tensor]:
        x = [t.to(device, dtype).requires_grad_() for t in given]
        own = list(zip(x[3::2], x[4::2], strict=True))
        out = ttt_attention(*x[:3], plan.segments, own, packing=packing)
        out.backward(weight.to(device, dtype))
        return [out.detach()[:real].double().cpu(), *(t.grad.double().cpu() for t in x)]

    exact = run("cpu", torch.float64, None)
    packing = plan.to(torch.device("cuda")).packing
    found, products = run("cuda", torch.bfloat16, packing), run("cuda", torch.bfloat16, None)
    again = run("cuda", torch.bfloat16, packing)
    for a, b, c, d in zip(exact, found, products, again, strict=True):
        errors = [(x - a).norm() / a.norm() for x in (b, c)]
        assert max(errors) < 6e-3, errors
        assert long or torch.equal(b, d)
