"""The worked examples in the docstrings of the plans: six tokens, the last three supervised."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from specforge.modeling.draft.dflash.plan import plan_blocks
from specforge.modeling.draft.eagle3.plan import plan_unroll
from specforge.modeling.draft.peagle.plan import plan_peagle
from specforge.modeling.draft.plan import ROUND

LENGTHS, SPANS = [6], [(3, 6)]


def test_the_unroll():
    plan = plan_unroll(LENGTHS, SPANS, steps=2)
    assert plan.count == 3
    assert len(plan.rows) == len(plan.labels) == ROUND
    assert plan.labels[:3].tolist() == [3, 4, 5]
    assert plan.rows[:4].tolist() == [0, 1, 2, 3]
    assert plan.students[:3].T.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert plan.valid[:3].all()
    assert not plan.valid[3:].any()
    assert plan.row_tokens[:, :4].tolist() == [[1, 2, 3, 4], [2, 3, 4, 5]]


def test_the_unroll_of_each_of_two_ranks():
    """Rows 0 and 3 are the first rank's, 1 and 2 the second's; so are tokens 4 and 5, which are no rows."""
    plans = [plan_unroll(LENGTHS, SPANS, 2, None, SimpleNamespace(rank=lambda r=r: r, size=lambda: 2)) for r in (0, 1)]
    for plan, tokens, rows in zip(plans, ([0, 3, 4], [1, 2, 5]), ([0, 3], [1, 2]), strict=True):
        assert len(plan.share.tokens) == ROUND
        assert plan.share.tokens[:3].tolist() == tokens
        assert plan.share.tokens[plan.rows[:2]].tolist() == rows
        assert plan.positions[:3].tolist() == tokens
        assert plan.read[plan.row_tokens[:, :2]].tolist() == [[row + 1 for row in rows], [row + 2 for row in rows]]
        assert plan.read[plan.next_tokens[:3]].tolist() == [min(token + 1, 5) for token in tokens]
        assert plan.share.order.tolist() == [0, ROUND, ROUND + 1, 1, 2, ROUND + 2]
    assert [plan.supervised for plan in plans] == [1, 2]
    assert [plan.labels[: plan.count].tolist() for plan in plans] == [[3, 5], [3, 4, 5]]
    assert [plan.valid[: plan.count].tolist() for plan in plans] == [
        [[False, True], [True, False]],
        [[True, False], [True, True], [False, True]],
    ]
    assert [[(x.row, x.start, x.stop) for x in plan.segments] for plan in plans] == [
        [(0, 0, 1), (1, 3, 4)],
        [(0, 1, 3)],
    ]


def test_the_depths_of_peagle():
    plan = plan_peagle(LENGTHS, SPANS, depths=3)
    assert plan.labels[:3].tolist() == [3, 4, 5]
    assert plan.rows[:3].tolist() == [1, 2, 3]
    assert plan.anchors[:5].tolist() == [0, 0, 1, 1, 2]
    assert plan.depths[:6].tolist() == [1, 2, 1, 2, 1, 0]
    assert plan.valid[:3].tolist() == [[True, True, False], [True, True, True], [True, True, True]]
    assert plan.students[2].tolist() == [2, ROUND + 4, ROUND + 3]


def test_the_blocks():
    plan = plan_blocks(LENGTHS, SPANS, np.array([3, 4]), depths=2)
    assert (plan.blocks, plan.count) == (2, 3)
    assert plan.anchors.tolist() == [3, 4, 4, 4]
    found = zip(plan.block[:3].tolist(), plan.depth[:3].tolist(), plan.labels[:3].tolist(), strict=True)
    assert list(found) == [(0, 0, 4), (0, 1, 5), (1, 0, 5)]
    assert plan.firsts == (0, 2, 3)
