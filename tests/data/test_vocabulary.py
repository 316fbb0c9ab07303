"""The draft vocabulary: the most frequent tokens, under the conventions of serving engines."""

from __future__ import annotations

import torch

from specforge.contracts import TokenCounts
from specforge.data.vocabulary import coverage, draft_vocabulary
from specforge.modeling.draft import build_draft


def test_the_most_frequent_ids_in_ascending_order():
    supervised = torch.tensor([0, 5, 9, 1, 0, 3])
    ids = draft_vocabulary(TokenCounts(supervised, torch.zeros(6, dtype=torch.int64)), 3)
    assert ids.tolist() == [1, 2, 5]
    assert coverage(TokenCounts(supervised, torch.zeros(6)), ids) == 17 / 18


def test_prompt_tokens_count_a_tenth():
    counts = TokenCounts(torch.tensor([0, 0, 10, 2]), torch.tensor([19, 21, 0, 0]))
    assert draft_vocabulary(counts, 2).tolist() == [1, 2]


def test_d2t_are_offsets_and_t2d_is_a_mask():
    fields = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "hidden_size": 8,
        "num_attention_heads": 2,
        "head_dim": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 10,
        "draft_vocab_size": 3,
        "num_hidden_layers": 1,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]},
    }
    draft = build_draft(fields)
    draft.set_vocabulary(torch.tensor([1, 4, 9]))
    assert [i + int(draft.d2t[i]) for i in range(3)] == [1, 4, 9]
    assert draft.t2d.nonzero().flatten().tolist() == [1, 4, 9]
    assert draft.draft_ids(torch.tensor([0, 4, 9, 1])).tolist() == [-1, 1, 2, 0]
