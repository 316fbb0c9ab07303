"""`specforge prepare`: splits, policies, what is written."""

from __future__ import annotations

import pytest
import torch

from specforge.cli import main
from specforge.data.prompts import PromptSet
from specforge.errors import UserError
from tests.tiny import conversation, write_conversations


def run(data, target, output, *options):
    return main(
        ["prepare", "--data", str(data), "--target", str(target), "--output", str(output), *map(str, options)]
    )


def test_records_that_name_their_split_go_there(prompts):
    assert len(PromptSet.load(prompts / "heldout").tasks) == 8
    assert len(PromptSet.load(prompts / "train").tasks) == 32


def test_a_seeded_draw_where_they_do_not(target, tmp_path):
    data = tmp_path / "d.jsonl"
    import json

    data.write_text("".join(json.dumps({"messages": conversation(i)["messages"]}) + "\n" for i in range(20)))
    for name in ("a", "b"):
        assert run(data, target, tmp_path / name, "--holdout", 5) == 0
    first, second = (PromptSet.load(tmp_path / name / "heldout").tasks for name in ("a", "b"))
    assert first == second
    trained = {t.task_id for t in PromptSet.load(tmp_path / "a" / "train").tasks}
    assert not trained & {t.task_id for t in first}


def test_counts_are_those_of_the_tokens(prompts):
    found = PromptSet.load(prompts / "train")
    supervised = torch.zeros(len(found.counts.supervised), dtype=torch.int64)
    context = supervised.clone()
    for task in found.tasks:
        for token, learnt in zip(task.input_ids, task.loss_mask, strict=True):
            (supervised if learnt else context)[token] += 1
    assert torch.equal(found.counts.supervised, supervised)
    assert torch.equal(found.counts.context, context)


def test_long_samples_are_cut_or_dropped_on_request(target, conversations, tmp_path):
    assert run(conversations, target, tmp_path / "cut", "--max_length", 60, "--long_samples", "truncate") == 0
    assert run(conversations, target, tmp_path / "drop", "--max_length", 60, "--long_samples", "drop") == 0
    cut, kept = (PromptSet.load(tmp_path / n / "train").tasks for n in ("cut", "drop"))
    assert max(len(t.input_ids) for t in cut) == 60
    assert 0 < len(kept) < len(cut)


def test_the_same_conversations_give_the_same_ids(target, conversations, prompts, tmp_path):
    again = write_conversations(tmp_path / "again.jsonl")
    assert run(again, target, tmp_path / "out") == 0
    ids = [[t.task_id for t in PromptSet.load(p / "train").tasks] for p in (prompts, tmp_path / "out")]
    assert ids[0] == ids[1]


def test_a_folder_without_prompts_is_refused(tmp_path):
    with pytest.raises(UserError, match="specforge prepare"):
        PromptSet.load(tmp_path)
