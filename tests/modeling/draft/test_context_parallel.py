"""How rows are shared among ranks, and how keys and values come together again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specforge.modeling.draft.context_parallel import Share, own, zigzag
from specforge.modeling.draft.plan import ROUND
from tests.threads import on_ranks


@pytest.mark.parametrize("count", [0, 1, 3, 12, 50])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_zigzag_shares_all_items_evenly_in_number_and_in_work(count, ranks):
    parts = zigzag(np.arange(count), ranks)
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 2
    if count % (2 * ranks) == 0:
        assert len({int(part.sum()) for part in parts}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(5, 40), (0, 3, 2)])
def test_gathered_keys_and_values_are_those_of_all_and_their_gradients_are_summed(dtype, sizes):
    tokens = np.random.default_rng(0).permutation(sum(sizes))
    parts = [np.sort(part) for part in np.split(tokens, np.cumsum(sizes)[:-1])]
    key, value = (torch.arange(len(tokens) * n).view(len(tokens), 2, -1).to(dtype) for n in (8, 6))

    def run(group):
        share = Share.of(parts, group)
        mine = [own(x, share).requires_grad_() for x in (key, value)]
        every = share.gather(*mine)
        ((group.rank() + 1) * (every[0].sum() + 2 * every[1].sum())).backward()
        return every, [x.grad for x in mine]

    for part, (every, grads) in zip(parts, on_ranks(len(sizes), run), strict=True):
        assert torch.equal(every[0], key)
        assert torch.equal(every[1], value)
        total = sum(range(1, len(sizes) + 1))
        for grad, each in zip(grads, (1, 2), strict=True):
            assert len(grad) % ROUND == 0
            assert (grad[: len(part)] == each * total).all()
            assert not grad[len(part) :].any()
