"""The target's output head: a matrix, and whatever its class adds to the product."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from specforge.inference.target_head import OutputHead, TargetHead, distance

G = torch.Generator().manual_seed(0)
EMBEDDING, MATRIX, BIAS, STATES = (torch.randn(*shape, generator=G) for shape in ((50, 8), (50, 8), (50,), (6, 8)))
SCORES = STATES @ MATRIX.T + BIAS


def test_logits_are_the_product_with_bias_and_cap():
    torch.testing.assert_close(OutputHead(MATRIX, BIAS).logits(STATES), SCORES)
    torch.testing.assert_close(OutputHead(MATRIX, BIAS, 2.0).logits(STATES), 2 * torch.tanh(SCORES / 2))
    torch.testing.assert_close(OutputHead(MATRIX, BIAS, 2.0).scores(STATES), SCORES)


def test_a_capped_head_in_bf16_caps_in_fp32():
    logits = OutputHead(MATRIX, BIAS, 2.0).to(torch.bfloat16).logits(STATES.bfloat16())
    assert logits.dtype == torch.float32


def test_a_product_with_the_head_forgets_nothing():
    head = TargetHead(EMBEDDING, OutputHead(MATRIX, BIAS, 2.0), torch.float32)
    torch.testing.assert_close(F.linear(STATES, head.lm_head), 2 * torch.tanh(SCORES / 2))
    for product in (
        lambda: STATES @ head.lm_head,
        lambda: torch.mm(STATES, head.lm_head),
        lambda: torch.stack([head.lm_head]),
    ):
        with pytest.raises(TypeError):
            product()


def test_a_plain_head_is_its_matrix():
    head = TargetHead(EMBEDDING, MATRIX, torch.float32)
    assert head.lm_head is head.head.weight


@pytest.mark.parametrize("output", [OutputHead(MATRIX), OutputHead(MATRIX, BIAS), OutputHead(MATRIX, BIAS, 2.0)])
def test_rows_and_the_head_of_a_draft_vocabulary(output):
    head, ids = TargetHead(EMBEDDING, output, torch.float32), torch.tensor([3, 7, 41])
    logits = output.logits(STATES)
    rows = head.rows(STATES, chunk=16)
    torch.testing.assert_close(rows.log_sum, logits.logsumexp(-1))
    assert torch.equal(rows.argmax, logits.argmax(-1))
    torch.testing.assert_close(head.sliced(ids).logits(STATES), logits[:, ids])
    assert head.sliced(ids) is head.sliced(ids)
    torch.testing.assert_close(head.logits(STATES), logits)


def test_tied_matrices_stay_one_in_every_dtype():
    head = TargetHead(EMBEDDING, OutputHead(EMBEDDING, BIAS), torch.float64)
    assert head.head.weight is head.embedding
    assert head.to(torch.device("cpu")).head.weight is head.embedding
    assert head.dtype == head.head.bias.dtype == torch.float64


def test_distance_is_of_distributions():
    assert distance(SCORES, SCORES + 5.0) < 1e-5
    assert distance(SCORES, SCORES * 2.0) > 0.5
    assert distance(SCORES, SCORES * torch.nan) == torch.inf
