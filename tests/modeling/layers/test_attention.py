"""Merged products give the attention of the union of their keys, and its gradients: fp64 against a dense softmax."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from specforge.modeling.layers.attention import Product, additive_mask, merged_attention

ROWS, KEYS, HEADS, KV_HEADS, SIZE = 6, 14, 4, 2, 8
TRIANGLE = torch.ones(3, 3, dtype=torch.bool).tril()
SOME = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 1]]).bool()


def products(dtype: torch.dtype) -> Iterator[Product]:
    """Two causal runs of three rows; then four of the rows, one of which sees nothing more, against two key ranges."""
    yield Product(slice(0, 6), (slice(8, 14),), causal=True, runs=2)
    yield Product(slice(1, 5), (slice(0, 2), slice(4, 8)), mask=additive_mask(SOME, dtype), merge=True)


def visible(own: int) -> Tensor:
    """``[R, K + S R]``: the same as one dense mask."""
    seen = torch.zeros(ROWS, KEYS + own * ROWS, dtype=torch.bool)
    seen[:3, 8:11] = seen[3:, 11:14] = TRIANGLE
    seen[1:5, [0, 1, 4, 5, 6, 7]] = SOME
    for step in range(own):
        seen[:, KEYS + step * ROWS :][:, :ROWS] = torch.eye(ROWS, dtype=torch.bool)
    return seen


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    scores = torch.einsum("rhd,khd->hrk", query, key) * SIZE**-0.5
    return torch.einsum("hrk,khd->rhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("own", [0, 2])
def test_products_share_one_softmax(own):
    generator = torch.Generator().manual_seed(0)
    sizes = [(ROWS, HEADS), (KEYS, KV_HEADS), (KEYS, KV_HEADS), *[(ROWS, KV_HEADS)] * (2 * own)]
    tensors = [torch.randn(*x, SIZE, dtype=torch.float64, generator=generator, requires_grad=True) for x in sizes]
    query, key, value, *rest = tensors
    out = merged_attention(query, key, value, products, list(zip(rest[0::2], rest[1::2], strict=True)))
    expected = dense(query, torch.cat([key, *rest[0::2]]), torch.cat([value, *rest[1::2]]), visible(own))
    torch.testing.assert_close(out, expected)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=generator)
    found, wanted = (torch.autograd.grad((x * weight).sum(), tensors) for x in (out, expected))
    for grad, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, reference)


def test_rows_in_no_product_are_zero():
    query = torch.randn(3, HEADS, SIZE, requires_grad=True)
    key, value = torch.randn(2, 5, KV_HEADS, SIZE)
    out = merged_attention(query, key, value, lambda dtype: [Product(slice(0, 2), (slice(0, 5),))])
    assert not out[2].any()
    (grad,) = torch.autograd.grad(out.sum(), query)
    assert not grad[2].any()
    assert grad[:2].any()
