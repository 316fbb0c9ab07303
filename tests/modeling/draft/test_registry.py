"""A draft's vocabulary: its target ids follow every change, and are the same tensor as long as there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PretrainedConfig

from specforge.modeling.draft import Draft


def make(size: int = 4, vocab: int = 10) -> Draft:
    return Draft(PretrainedConfig(vocab_size=vocab, draft_vocab_size=size))


def test_target_ids_follow_the_vocabulary():
    draft, ids = make(), torch.tensor([1, 3, 4, 9])
    assert draft.target_ids.tolist() == [0, 1, 2, 3]
    draft.set_vocabulary(ids)
    assert torch.equal(draft.target_ids, ids)
    assert draft.target_ids is draft.to(torch.bfloat16).target_ids
    assert draft.draft_ids(torch.arange(10)).tolist() == [-1, 0, -1, 1, 2, -1, -1, -1, -1, 3]


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "as a part"])
@pytest.mark.parametrize("assign", [False, True])
def test_target_ids_follow_loading(wrapped, assign):
    source, draft = make(), make()
    source.set_vocabulary(torch.tensor([1, 3, 4, 9]))
    old = draft.target_ids
    if wrapped:
        torch.nn.ModuleDict({"draft": draft}).load_state_dict(
            {f"draft.{name}": x for name, x in source.state_dict().items()}, assign=assign
        )
    else:
        draft.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(draft.target_ids, source.target_ids)
    assert draft.target_ids is not old
    assert set(draft.state_dict()) == {"d2t", "t2d"}


def test_a_copy_has_target_ids_of_its_own():
    draft = make()
    other = copy.deepcopy(draft)
    source = make()
    source.set_vocabulary(torch.tensor([1, 3, 4, 9]))
    other.load_state_dict(source.state_dict())
    assert other.target_ids.tolist() == [1, 3, 4, 9]
    assert draft.target_ids.tolist() == [0, 1, 2, 3]
