"""`specforge prepare`: splits, policies, what is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import specforge.files
from specforge.cli.main import main
from specforge.data.prompts import PromptSet, identity, load_splits
from specforge.errors import UserError
from specforge.eval.held_out import with_prompt
from tests.data.chats import TEMPLATES, says, talk
from tests.fuzz import Fuzz, survives
from tests.tiny import conversation, write_conversations, write_target


def run(data, target, output, *options):
    return main(["prepare", "--data", str(data), "--target", str(target), "--output", str(output), *map(str, options)])


def test_records_that_name_their_split_go_there(prompts):
    assert len(PromptSet.load(prompts / "heldout").tasks) == 8
    assert len(PromptSet.load(prompts / "train").tasks) == 32


def test_a_seeded_draw_where_they_do_not(target, tmp_path):
    data = tmp_path / "d.jsonl"
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


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(count: int) -> list[dict]:
    return [talk(f"{i}?", f"It is {i}.") for i in range(count)]


def texts(folder: Path) -> dict[str, list[str]]:
    """The first learnt byte run of each sample, by split."""
    return {name: sorted(t.source for t in prompts.tasks) for name, prompts in load_splits(folder).items()}


# Splits.


def test_conversations_are_held_out_not_samples(target, tmp_path):
    """The template here changes earlier turns, so that each turn is a sample of its own."""
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATES["drops old reasoning"])
    rows = [talk(f"a{i}", "one", f"b{i}", "two", f"c{i}", "three") for i in range(8)]
    for row in rows:
        for answer in row["messages"][1::2]:
            answer["reasoning_content"] = "R"
    data = write(tmp_path / "d.jsonl", *rows)
    assert run(data, target, tmp_path / "p", "--holdout", 3, "--chat_template", template) == 0
    found = texts(tmp_path / "p")
    assert len(found["heldout"]) == 9
    assert len(set(found["heldout"])) == 3
    assert not set(found["heldout"]) & set(found["train"])


def test_nothing_that_shares_a_prompt_with_a_held_out_conversation_is_trained_on(target, tmp_path, capsys):
    rows = [
        talk("1?", "one", split="heldout"),
        talk("1?", "one"),
        talk("1?", "uno", split="train"),
        talk("1?", "one", "2?", "two"),
        talk("1? ", "one"),
    ]
    assert run(write(tmp_path / "d.jsonl", *rows), target, tmp_path / "p") == 0
    data = tmp_path / "d.jsonl"
    assert texts(tmp_path / "p") == {"train": [f"{data}, line 5"], "heldout": [f"{data}, line 1"]}
    assert "3 conversations that share a prompt with a held-out one" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["last turn only", "weight"])
def test_what_begins_as_a_held_out_conversation_is_not_trained_on(target, tmp_path, how):
    """Even where the common beginning is not learnt in one of them."""
    rows = [talk("1?", "one", "2?", "two", split="heldout"), talk("1?", "one", split="train"), talk("3?", "three")]
    if how == "weight":
        rows[0]["messages"][1]["weight"] = 0
    options = ["--last_turn_only", "true"] if how == "last turn only" else []
    assert run(write(tmp_path / "d.jsonl", *rows), target, tmp_path / "p", *options) == 0
    data = tmp_path / "d.jsonl"
    assert texts(tmp_path / "p") == {"train": [f"{data}, line 3"], "heldout": [f"{data}, line 1"]}


def test_a_split_that_some_records_name_leaves_the_draw_to_the_others(target, tmp_path):
    rows = [*numbered(6), talk("a", "b", split="heldout"), talk("c", "d", split="train")]
    assert run(write(tmp_path / "d.jsonl", *rows), target, tmp_path / "p", "--holdout", 2) == 0
    found = texts(tmp_path / "p")
    assert len(found["heldout"]) == 3
    assert [f"{tmp_path / 'd.jsonl'}, line 7"][0] in found["heldout"]
    assert [f"{tmp_path / 'd.jsonl'}, line 8"][0] in found["train"]


@pytest.mark.parametrize(
    ("holdout", "words"),
    [(-3, "at least 0, not -3"), (6, "leaves nothing to train on"), (7, "only 6 conversations"), ("x", "holdout")],
)
def test_a_draw_that_cannot_be_is_refused(target, tmp_path, capsys, holdout, words):
    data = write(tmp_path / "d.jsonl", *numbered(6))
    assert run(data, target, tmp_path / "p", "--holdout", holdout) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_documents_that_ask_nothing_can_be_held_out(target, tmp_path):
    rows = [{"text": f"The number {i} is {i}.", "spans": [[0, 12]]} for i in range(6)]
    assert run(write(tmp_path / "d.jsonl", *rows), target, tmp_path / "p", "--holdout", 2) == 0
    assert len(texts(tmp_path / "p")["heldout"]) == 2


# What is written.


def test_a_second_preparation_replaces_both_splits_at_once(target, tmp_path):
    data = write(tmp_path / "d.jsonl", *numbered(6))
    assert run(data, target, tmp_path / "p", "--holdout", 2) == 0
    assert run(data, target, tmp_path / "p") == 0
    assert list(texts(tmp_path / "p")) == ["train"]


def test_a_preparation_that_is_killed_between_two_files_leaves_the_old_pair_or_the_new_one(
    target, tmp_path, monkeypatch
):
    data = write(tmp_path / "d.jsonl", *numbered(8))
    for seed in (0, 1):
        assert run(data, target, tmp_path / str(seed), "--holdout", 3, "--seed", seed) == 0
    known = {identity(load_splits(tmp_path / str(seed))) for seed in (0, 1)}
    assert len(known) == 2
    for place in range(1, 9):
        folder = Path(shutil.copytree(tmp_path / "0", tmp_path / f"killed-{place}"))
        calls = iter(range(1, 100))

        def replace(source: Path, to: Path, calls=calls, place=place, real=os.replace) -> None:
            if next(calls) == place:
                raise KeyboardInterrupt
            real(source, to)

        monkeypatch.setattr(specforge.files.os, "replace", replace)
        run(data, target, folder, "--holdout", 3, "--seed", 1)
        monkeypatch.undo()
        assert identity(load_splits(folder)) in known


def test_a_folder_that_holds_anything_else_is_not_written_into(target, conversations, tmp_path, capsys):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "notes.txt").write_text("mine")
    (tmp_path / "q").write_text("mine")
    (tmp_path / "r" / "train").mkdir(parents=True)
    (tmp_path / "r" / "train" / "notes.txt").write_text("mine")
    for name in "pqr":
        assert run(conversations, target, tmp_path / name) == 2
        assert str(tmp_path / name) in capsys.readouterr().err
    assert (tmp_path / "p" / "notes.txt").read_text() == (tmp_path / "q").read_text() == "mine"


def test_prompt_sets_of_the_first_version_are_read(prompts, tmp_path):
    """They lie in folders of their own, one written after the other."""
    for name, found in load_splits(prompts).items():
        found.save(tmp_path / name)
        assert json.loads((tmp_path / name / "prompts.json").read_text()).keys() == {
            "format",
            "tokenizer",
            "task_ids",
            "sources",
        }
    assert identity(load_splits(tmp_path)) == identity(load_splits(prompts))


def test_damaged_prompt_sets_are_refused_in_one_line(prompts, tmp_path, fuzz: Fuzz):
    folder = Path(shutil.copytree(prompts / "heldout", tmp_path / "inside"))

    def load() -> None:
        for task in PromptSet.load(folder).tasks:
            assert len(task.input_ids) == len(task.loss_mask) > 0
            assert 1 in task.loss_mask
            assert all(type(text) is str for text in (task.task_id, task.source))

    for name in ("prompts.json", "prompts.safetensors"):
        original = (folder / name).read_bytes()
        for data in fuzz.bytes([original], 150):
            (folder / name).write_bytes(data)
            survives(load)
        (folder / name).write_bytes(original)
    fields = json.loads((folder / "prompts.json").read_text())
    for value in fuzz.values([fields], 150):
        (folder / "prompts.json").write_text(json.dumps(value))
        survives(load)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("input_ids", lambda x: x.to(torch.int64)),
        ("input_ids", lambda x: x[:-1]),
        ("input_ids", lambda x: x + 10**6),
        ("input_ids", lambda x: x - 10**6),
        ("input_ids", lambda x: x[None]),
        ("loss_mask", lambda x: x * 2),
        ("loss_mask", lambda x: x * 0),
        ("loss_mask", lambda x: x.bool()),
        ("offsets", lambda x: x[1:]),
        ("offsets", lambda x: x.flip(0)),
        ("offsets", lambda x: x.double()),
        ("offsets", lambda x: x[:0]),
        ("offsets", lambda x: torch.cat([x[:1], x[:1], x[2:]])),
        ("supervised_counts", lambda x: x[:5]),
        ("context_counts", lambda x: x.float()),
        ("context_counts", lambda x: x[None]),
    ],
)
def test_tensors_of_the_wrong_form_are_refused(prompts, tmp_path, name, change):
    folder = Path(shutil.copytree(prompts / "heldout", tmp_path / "p"))
    tensors = load_file(folder / "prompts.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "prompts.safetensors")
    with pytest.raises(UserError, match="is damaged"):
        PromptSet.load(folder)


def test_a_missing_half_of_a_prompt_set_is_named(prompts, tmp_path):
    folder = Path(shutil.copytree(prompts / "heldout", tmp_path / "p"))
    (folder / "prompts.safetensors").unlink()
    with pytest.raises(UserError, match=r"prompts\.safetensors"):
        PromptSet.load(folder)


# Tokens.


def test_a_token_beyond_the_embedding_is_refused_with_its_record(tmp_path, capsys):
    target = write_target(tmp_path / "small", vocab_size=258)  # the tokenizer has 259 tokens
    rows = [talk("a", "b"), talk("a <|im_start|>", "b")]
    assert run(write(tmp_path / "d.jsonl", *rows), target, tmp_path / "p") == 2
    error = capsys.readouterr().err
    assert "d.jsonl, line 1" in error
    assert "'<|im_start|>' has the id 258, beyond the 258 tokens" in error


@pytest.mark.parametrize(
    ("ids", "good"), [([259, 263], True), ([1, 264], False), ([1, 2**40], False), ([1, -1], False)]
)
def test_token_ids_are_those_of_the_embedding(target, tmp_path, capsys, ids, good):
    data = write(tmp_path / "d.jsonl", {"input_ids": ids, "loss_mask": [0, 1]})
    assert run(data, target, tmp_path / "p") == (0 if good else 2)
    assert good or "d.jsonl, line 1" in capsys.readouterr().err


# Limits.


def test_a_sample_of_which_a_cut_leaves_nothing_to_learn_is_left_out(target, tmp_path, capsys):
    rows = [talk("a" * 80, "b"), talk("a", "b" * 80)]
    options = ("--max_length", 70, "--long_samples", "truncate")
    assert run(write(tmp_path / "d.jsonl", *rows), target, tmp_path / "p", *options) == 0
    assert len(texts(tmp_path / "p")["train"]) == 1
    assert "1 too long, 1 truncated, kept" in capsys.readouterr().out


def test_data_of_which_nothing_is_left_says_why(target, tmp_path, capsys):
    rows = [talk("a", "b" * 90), talk("a", None)]
    options = ("--max_length", 70, "--long_samples", "drop", "--bad_samples", "drop")
    assert run(write(tmp_path / "d.jsonl", *rows), target, tmp_path / "p", *options) == 2
    assert "no usable record (1 too long, 1 unusable)" in capsys.readouterr().err


# What is said.


def test_lengths_a_marked_sample_and_whether_anything_is_held_out(target, tmp_path, capsys):
    rows = [*numbered(9), talk("long?", "yes " * 40), talk("1?", "It is 1.")]
    rows[0]["messages"][1]["content"] = "[bold]It[/bold] is :zero: \x1b[31m."
    assert run(write(tmp_path / "d.jsonl", *rows), target, tmp_path / "p") == 0
    out = capsys.readouterr().out
    assert "assistant\n«[bold]It[/bold] is :zero: \ufffd[31m.<|im_end|>»\n" in out
    assert f"({tmp_path / 'd.jsonl'}, line 1)" in out
    assert "10 samples" in out
    assert "lengths: median 31, 95th percentile 186, longest 186" in out
    assert "1 duplicate" in out
    assert "nothing is held out" in out
    assert run(write(tmp_path / "d.jsonl", *rows), target, tmp_path / "p", "--holdout", 2) == 0
    assert "nothing is held out" not in capsys.readouterr().out


def test_reasoning_that_the_template_leaves_out_is_counted(target, tmp_path, capsys):
    rows = [{"messages": [says("user", f"{i}?"), says("assistant", "a", reasoning_content="R")]} for i in range(3)]
    assert run(write(tmp_path / "d.jsonl", *rows), target, tmp_path / "p") == 0
    assert "3 answers that the chat template renders only in part" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["words", "list", "repeated", "plus", "equals"])
def test_several_files_in_any_form(target, tmp_path, form):
    a, b = (str(write(tmp_path / f"{name}.jsonl", talk(name, "x"))) for name in "ab")
    words = {
        "words": ["--data", a, b],
        "list": ["--data", f"[{a}, {b}]"],
        "repeated": ["--data", a, "--data", b],
        "plus": ["--data", a, "--data+", b],
        "equals": [f"--data={a}", b],
    }
    assert main(["prepare", *words[form], "--target", str(target), "--output", str(tmp_path / "p")]) == 0
    assert texts(tmp_path / "p") == {"train": [f"{a}, line 1", f"{b}, line 1"]}


# What is asked of them.


def test_samples_that_are_learnt_from_their_first_token_ask_nothing(target, tmp_path, capsys):
    rows = [{"text": "A cow has legs.", "spans": [[0, 5]]}, talk("a", "b")]
    data = write(tmp_path / "d.jsonl", *rows)
    assert run(data, target, tmp_path / "p") == 0
    tasks = PromptSet.load(tmp_path / "p" / "train").tasks
    assert with_prompt(tasks, tmp_path, print) == tasks[1:]
    assert "left out: 1 samples" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no prompt to answer"):
        with_prompt(tasks[:1], tmp_path, print)
