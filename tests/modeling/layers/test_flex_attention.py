"""FlexAttention gives what the fused kernels give, for every attention of a draft layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from lightning_modules import algorithms
from specforge.errors import UserError
from specforge.modeling.draft import build_draft, config_fields
from specforge.modeling.draft.dflash.attention import block_attention
from specforge.modeling.draft.dflash.plan import plan_blocks, sample_anchors
from specforge.modeling.draft.eagle3.plan import plan_unroll
from specforge.modeling.draft.peagle.attention import deep_attention
from specforge.modeling.draft.peagle.plan import plan_peagle
from specforge.modeling.layers.attention import ttt_attention
from specforge.modeling.layers.flex_attention import Visibility, visible_attention

LENGTHS, PADDED = (90, 3, 170, 41), 320
SPANS = [(10, 60), (70, 88), (100, 240), (270, 304)]
HEADS, KV_HEADS, SIZE = 4, 2, 32


class Case(NamedTuple):
    """An attention, by FlexAttention or not; its random tensors; the rows that are not padding."""

    run: Callable[[list[Tensor], bool], Tensor]
    tensors: list[Tensor]
    real: slice


def ttt(steps: int, value: int = SIZE) -> Case:
    plan = plan_unroll(LENGTHS, SPANS, steps + 1, PADDED)
    rows, generator = len(plan.rows), torch.Generator().manual_seed(0)
    sizes = [(rows, HEADS, SIZE), (PADDED, KV_HEADS, SIZE), (PADDED, KV_HEADS, value)]
    sizes += [(rows, KV_HEADS, SIZE), (rows, KV_HEADS, value)] * steps
    tensors = [torch.randn(*size, generator=generator) for size in sizes]

    def run(x: list[Tensor], flex: bool) -> Tensor:
        own = list(zip(x[3::2], x[4::2], strict=True))
        return ttt_attention(*x[:3], plan.segments, own, flex=flex)

    return Case(run, tensors, slice(0, max(s.row + s.stop - s.start for s in plan.segments)))


def blocks(window: int | None, causal: bool = False) -> Case:
    size, generator = 8, torch.Generator().manual_seed(0)
    anchors = sample_anchors(LENGTHS, SPANS, 7, ["a", "b", "c", "d"])
    plan = plan_blocks(LENGTHS, SPANS, anchors, size - 1, PADDED)
    rows = len(plan.anchors) * size
    sizes = [(rows, HEADS), *[(PADDED, KV_HEADS)] * 2, *[(rows, KV_HEADS)] * 2]
    tensors = [torch.randn(*size, SIZE, generator=generator) for size in sizes]

    def run(x: list[Tensor], flex: bool) -> Tensor:
        return block_attention(*x, plan.anchors.to(x[0].device), plan.groups, window, causal=causal, flex=flex)

    return Case(run, tensors, slice(0, plan.blocks * size))


def deep() -> Case:
    generator = torch.Generator().manual_seed(0)
    plan = plan_peagle(LENGTHS, SPANS, 5, PADDED)
    rows = len(plan.anchors)
    sizes = [(rows, HEADS), *[(PADDED, KV_HEADS)] * 2, *[(rows, KV_HEADS)] * 2]
    tensors = [torch.randn(*size, SIZE, generator=generator) for size in sizes]

    def run(x: list[Tensor], flex: bool) -> Tensor:
        anchors, depths = plan.anchors.to(x[0].device), plan.depths.to(x[0].device)
        return deep_attention(*x[:3], (x[3], x[4]), anchors, depths, plan.chunks, flex=flex)

    return Case(run, tensors, slice(0, plan.chunks[-1].stop))


CASES = {
    "first_step": lambda: ttt(0),
    "later_step": lambda: ttt(3),
    "narrow_values": lambda: ttt(2, value=24),
    "full_blocks": lambda: blocks(None),
    "sliding_blocks": lambda: blocks(16, causal=True),
    "sliding_blocks_seen_in_both_directions": lambda: blocks(16),
    "deep": deep,
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_as_the_fused_kernels(name):
    run, tensors, real = CASES[name]()
    torch.testing.assert_close(run(tensors, True)[real], run(tensors, False)[real], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CASES)
def test_the_same_gradients_as_the_fused_kernels(name):
    run, tensors, real = CASES[name]()
    found = []
    for flex in (False, True):
        inputs = [x.cuda().requires_grad_() for x in tensors]
        out = run(inputs, flex)[real]
        (out * torch.sin(torch.arange(out.numel(), device="cuda").view(out.shape))).sum().backward()
        found.append([out, *(x.grad for x in inputs)])
    for fused, flexed in zip(*found, strict=True):
        torch.testing.assert_close(flexed, fused, atol=2e-5, rtol=2e-5)


def test_a_row_sees_what_its_sight_says():
    """By brute force: a softmax over a mask of every row and key."""
    rng = np.random.default_rng(0)
    rows, tokens, steps = 40, 70, 2
    low = torch.from_numpy(rng.integers(0, 30, rows))
    high = low + torch.from_numpy(rng.integers(0, 40, rows))
    group, order = (torch.from_numpy(rng.integers(0, 6, rows)) for _ in range(2))
    group = group.sort().values
    query = torch.randn(rows, 1, 16, dtype=torch.float64)
    key, value = (torch.randn(tokens, 1, 16, dtype=torch.float64) for _ in range(2))
    own = [(torch.randn(rows, 1, 16, dtype=torch.float64),) * 2 for _ in range(steps)]
    out = visible_attention(query, key, value, own, Visibility(low, high, group, order))
    keys = torch.cat([key, *(k for k, _ in own)])[:, 0]
    values = torch.cat([value, *(v for _, v in own)])[:, 0]
    for row in range(rows):
        seen = [low[row] <= k < high[row] for k in range(tokens)]
        seen += [group[r] == group[row] and order[r] <= order[row] for _ in range(steps) for r in range(rows)]
        weights = (keys @ query[row, 0] / 4).masked_fill(~torch.tensor(seen), -torch.inf).softmax(0)
        torch.testing.assert_close(out[row, 0], weights @ values)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_no_tile_with_a_visible_key_is_skipped_and_every_full_tile_is_visible(steps):
    rng = np.random.default_rng(steps)
    rows, tokens = 400, 700
    low = torch.from_numpy(np.sort(rng.integers(0, 500, rows)))
    high = low + torch.from_numpy(rng.choice([0, 3, 60, 400, 600], rows))
    group = torch.from_numpy(np.sort(rng.integers(0, 60, rows)))
    visibility = Visibility(low, high.clamp(max=tokens), group, torch.from_numpy(rng.integers(0, 3, rows)))
    mask = visibility.block_mask(tokens, steps)
    row, key = torch.arange(rows)[:, None], torch.arange(tokens + steps * rows)
    visible = visibility.allows(row, key, torch.tensor(tokens))
    full = create_block_mask(lambda b, h, r, k: visible[r, k], None, None, rows, len(key), "cpu")

    def tiles(count: torch.Tensor, indices: torch.Tensor) -> set[tuple[int, int]]:
        return {(i, int(j)) for i in range(count.shape[-1]) for j in indices[0, 0, i, : count[0, 0, i]]}

    some, every = tiles(mask.kv_num_blocks, mask.kv_indices), tiles(mask.full_kv_num_blocks, mask.full_kv_indices)
    exact = tiles(full.kv_num_blocks, full.kv_indices), tiles(full.full_kv_num_blocks, full.full_kv_indices)
    assert not some & every
    assert exact[0] | exact[1] <= some | every
    assert every <= exact[1]
    if steps:  # and hardly any tile is computed in vain
        assert len(some | every) <= 1.2 * len(exact[0] | exact[1])


def test_training_by_it_on_a_cpu_is_refused_by_name():
    run, tensors, _ = CASES["deep"]()
    with pytest.raises(UserError, match="flex_attention trains on accelerators only"):
        run([x.requires_grad_() for x in tensors], True)


@pytest.mark.parametrize("algorithm", ["eagle3", "mtp", "standalone", "dflash"])
def test_a_kernel_that_a_draft_has_not_is_refused_by_name(algorithm, target):
    kernel = "flash_attention_2"  # a stand-alone draft may ask transformers for it, which asks for its package
    with pytest.raises(UserError, match=r"attn_implementation is flash_attention_2; the draft has|[Ff]lash"):
        algorithms()[algorithm](str(target), draft_config={"draft_vocab_size": 64, "attn_implementation": kernel})


def test_a_checkpoint_does_not_carry_the_kernel(target):
    fields = {"draft_vocab_size": 64, "attn_implementation": "flex_attention"}
    draft = algorithms()["eagle3"](str(target), draft_config=fields).draft
    assert draft.flex
    assert not build_draft(config_fields(draft)).flex
