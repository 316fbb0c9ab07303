"""What is held out is never trained on: conversations that share anything with it stay on its side, or are left out."""

from __future__ import annotations

import pytest

from specforge.contracts import PromptTask
from specforge.data.splits import Member, assign, prompts_of
from specforge.errors import UserError


def members(*keys: str, split: dict[int, str] | None = None) -> list[Member]:
    """Conversations whose prompts are the letters of a word; each has a sample of its own."""
    named = split or {}
    return [
        Member(named.get(i), (f"sample {i}",), frozenset(letter.encode() for letter in word))
        for i, word in enumerate(keys)
    ]


def test_a_draw_takes_conversations_and_is_that_of_its_seed():
    drawn = [assign(members(*"abcdefghij"), 3, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [splits.count("heldout") for splits in drawn] == [3, 3, 3]


def test_conversations_that_share_a_prompt_are_drawn_together():
    for seed in range(20):
        splits = assign(members("ab", "bc", "cd", "e", "f", "g"), 2, seed)
        assert splits[0] == splits[1] == splits[2]
        assert splits.count("heldout") >= 2
        assert "train" in splits


def test_the_same_sample_twice_is_one_conversation():
    twice = [Member(None, ("s",), frozenset()), Member(None, ("s",), frozenset()), Member(None, ("t",), frozenset())]
    for seed in range(5):
        splits = assign(twice, 1, seed)
        assert splits[0] == splits[1] != splits[2]


def test_what_shares_a_prompt_with_a_named_held_out_one_is_left_out():
    splits = assign(members("a", "a", "b", "a", split={0: "train", 1: "heldout"}))
    assert splits == [None, "heldout", "train", None]


def test_what_shares_a_prompt_with_a_named_training_one_is_not_drawn():
    for seed in range(10):
        splits = assign(members("a", "a", "b", "c", split={0: "train"}), 1, seed)
        assert splits[:2] == ["train", "train"]
        assert splits.count("heldout") == 1


def test_named_splits_and_a_draw_among_the_others():
    splits = assign(members(*"abcdef", split={0: "heldout", 1: "train"}), 2, 0)
    assert splits[:2] == ["heldout", "train"]
    assert splits[2:].count("heldout") == 2


@pytest.mark.parametrize(
    ("given", "count", "words"),
    [
        (members("a", "b"), 3, "only 2 conversations name no split"),
        (members("a", "b"), 2, "leaves nothing to train on"),
        (members("a", "a", "a"), 1, "those that share a prompt stay together"),
        (members("a", "b", split={0: "train", 1: "train"}), 1, "only 0 conversations name no split"),
    ],
)
def test_a_draw_of_too_many_is_refused(given, count, words):
    with pytest.raises(UserError, match=words):
        assign(given, count)


def test_only_held_out_conversations_are_no_mistake():
    assert assign(members("a", "b", split={0: "heldout", 1: "heldout"})) == ["heldout", "heldout"]


def test_prompts_are_the_tokens_before_each_learnt_run():
    def hashes(ids: list[int], mask: list[int], special: tuple[int, ...] = ()) -> list[bytes]:
        return list(prompts_of(PromptTask("", tuple(ids), tuple(mask)), special))

    long = hashes([1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 1, 1])
    assert long == [*hashes([1, 2, 9], [0, 0, 1]), *hashes([1, 2, 3, 4, 7], [0, 0, 0, 0, 1])]
    assert hashes([1, 2], [1, 1]) == []  # learnt from its first token: nothing is asked
    assert hashes([1, 2], [0, 1], special=(1,)) == []  # a token that only begins a text asks nothing
