"""`specforge regenerate`: what the target was asked and what it wrote is what `specforge prepare` makes samples of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specforge.cli.main import main
from specforge.data.conversations import parse_record
from specforge.data.prompts import PromptSet
from specforge.errors import UserError
from specforge.inference.regenerate import RegenerateOptions, Regeneration
from tests.data.chats import TEMPLATES, chat, learnt, says, talk
from tests.fuzz import Fuzz, survives
from tests.tiny import write_target

END = "<|im_end|>"


class Writes:
    """A target that writes what a test says; a text that does not end in an end token was cut off.

    Args:
        template: whose tokenizer.
        answers: a text, or token ids, for each call in turn and each prompt in it.
    """

    concurrency = 0

    def __init__(self, template, *answers: list) -> None:
        self.template, self.answers = template, list(answers)
        self.asked: list[list[int]] = []

    def close(self) -> None:
        pass

    def generate(self, prompts, **options) -> list[list[int]]:
        self.asked += prompts
        given = self.answers.pop(0)
        assert len(given) == len(prompts)
        return [
            a if isinstance(a, list) else self.template.tokenizer(a, add_special_tokens=False)["input_ids"]
            for a in given
        ]


def work(template, output: Path, *rows: dict, target: str = "t", dtype: str = "float32", **options) -> Regeneration:
    records = [parse_record(f"d.jsonl, line {i}", row) for i, row in enumerate(rows, 1)]
    made = Regeneration(records, template, output, RegenerateOptions(**options), target)
    made.answered_by({"dtype": dtype})
    return made


def answered(template, output: Path, rows: list[dict], *answers: list, **options) -> tuple[list[dict], Writes, dict]:
    """The rows of the file, the target that was asked, and what the file lacks."""
    run, engine = work(template, output, *rows, **options), Writes(template, *answers)
    list(run.run(lambda: engine))
    return [json.loads(line) for line in output.read_text().splitlines()], engine, run.losses()


def samples(template, rows: list[dict]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    found = [s for row in rows for s in template.encode(parse_record("a.jsonl, line 1", row))]
    return [(s.input_ids, s.loss_mask) for s in found]


# Tokens.


def test_what_is_learnt_are_the_tokens_that_the_target_wrote(tmp_path):
    """Here it wrote "ok" and a line break as three tokens, which its tokenizer would read as one."""
    template = chat("chatml", "merging")
    wrote = [template.tokenizer.convert_tokens_to_ids(c) for c in ("o", "k", "Ċ", END)]
    rows, engine, _ = answered(template, tmp_path / "a.jsonl", [talk("Hi", "-")], [wrote])
    assert rows[0]["messages"][1] == {"role": "assistant", "content": "ok\n", "finish_reason": "stop"}
    ((ids, mask),) = samples(template, rows)
    assert list(ids) == [*engine.asked[0], *wrote]
    assert mask == (0,) * len(engine.asked[0]) + (1,) * 4
    through_text = samples(template, [{"messages": rows[0]["messages"]}])
    assert through_text[0][0] != ids


def test_every_turn_was_asked_with_what_the_target_is_shown_then(tmp_path):
    template = chat("chatml", "merging")
    tokens = template.tokenizer.convert_tokens_to_ids
    odd, plain = [*map(tokens, ("o", "k", "Ċ")), tokens(END)], [tokens("a"), tokens(END)]
    rows, engine, lost = answered(
        template, tmp_path / "a.jsonl", [talk("1", "-", "2", "-", "3", "-")], [plain], [odd], [plain]
    )
    assert lost == {}
    found = samples(template, rows)
    # The second answer comes back as other tokens, so the third one's prompt does not go on from it.
    assert [sum(mask) for _, mask in found] == [2 + 4, 2]
    assert list(found[0][0]) == [*engine.asked[1], *odd]
    assert list(found[1][0]) == [*engine.asked[2], *plain]


@pytest.mark.parametrize("template", ["opens reasoning", "channels", "date", "alternating", "drops old reasoning"])
def test_prompts_that_open_reasoning_or_channels_come_back(tmp_path, template):
    used = chat(template)
    text = {"opens reasoning": "R\n</think>\n\nHello.", "channels": "[analysis]R[final]Hello."}.get(template, "Hello.")
    rows, engine, _ = answered(used, tmp_path / "a.jsonl", [talk("Hi", "-", id="x", split="heldout")], [text + END])
    assert rows[0]["messages"][1]["content"] == text
    assert (rows[0]["id"], rows[0]["split"]) == ("x", "heldout")
    ((ids, mask),) = samples(used, rows)
    assert list(ids[: mask.index(1)]) == engine.asked[0]
    assert used.decode(ids[mask.index(1) :]) == text + END
    assert all(mask[mask.index(1) :])


def test_no_template_is_needed_for_kept_tokens(tmp_path):
    used = chat("channels")
    rows, _, _ = answered(used, tmp_path / "a.jsonl", [talk("Hi", "-")], [f"[final]a{END}"])
    with pytest.raises(UserError, match="channel markers"):
        samples(used, [{"messages": rows[0]["messages"]}])
    assert samples(used, rows)


def test_an_answer_that_is_empty_is_its_end_token(tmp_path):
    used = chat()
    rows, engine, lost = answered(used, tmp_path / "a.jsonl", [talk("Hi", "-")], [END])
    assert rows[0]["messages"][1]["content"] == ""
    assert lost == {}
    assert samples(used, rows)[0] == ((*engine.asked[0], *used.end_ids), (0,) * len(engine.asked[0]) + (1,))


def test_tokens_of_another_tokenizer_or_template_give_way_to_the_text(tmp_path):
    used, other = chat(), chat("default system prompt")
    rows, _, _ = answered(used, tmp_path / "a.jsonl", [talk("Hi", "-")], [f"a{END}"])
    assert learnt(other, rows[0]) == learnt(other, {"messages": rows[0]["messages"]})
    assert list(other.notes) == ["records with token ids of another tokenizer or chat template; their text is used"]


def test_tokens_of_text_that_was_edited_give_way_to_the_text(tmp_path):
    used = chat()
    rows, engine, _ = answered(used, tmp_path / "a.jsonl", [talk("1", "-", "2", "-")], [f"a{END}"], [f"b{END}"])
    asked = [used.decode(prompt) for prompt in engine.asked]
    weighted = json.loads(json.dumps(rows[0]))
    weighted["messages"][1]["weight"] = 0
    assert learnt(used, weighted) == [f"{asked[1]}«b{END}»"]
    assert not used.notes
    edited = json.loads(json.dumps(rows[0]))
    edited["messages"][3]["content"] = "c"
    assert learnt(used, edited) == [f"{asked[0]}«a{END}»\n{asked[1].removeprefix(f'{asked[0]}a{END}')[1:]}«c{END}»\n"]
    edited["messages"][0]["content"] = "7"
    assert learnt(used, edited)[0].startswith("<|im_start|>user\n7")
    assert used.notes == {"records edited since their token ids were stored; their text is used": 2}
    shortened = {**rows[0], "messages": rows[0]["messages"][:2]}
    assert learnt(used, shortened) == [f"{asked[0]}«a{END}»"]


# What is left out, and said.


def test_turns_after_an_answer_that_was_cut_off_are_answered_too(tmp_path):
    used = chat()
    rows, _, lost = answered(
        used,
        tmp_path / "a.jsonl",
        [talk("1", "-", "2", "-", "3", "-"), talk("1", "-")],
        ["abc", f"a{END}"],
        [f"b{END}"],
        ["cde"],
        max_new_tokens=3,
    )
    assert [m["content"] for m in rows[0]["messages"]] == ["1", "abc", "2", "b", "3", "cde"]
    assert [m["finish_reason"] for m in rows[0]["messages"][1::2]] == ["length", "stop", "length"]
    assert lost == {"answers cut off at max_new_tokens (3)": 2}
    (text,) = learnt(used, rows[0])
    assert "«abc»" + END in text
    assert f"«b{END}»" in text
    assert text.endswith("«cde»")


def test_results_of_calls_that_are_replaced_are_left_out_with_the_answers_to_them(tmp_path):
    used = chat("arguments as JSON")
    call = [{"function": {"name": "go", "arguments": "{}"}}]
    row = {
        "messages": [
            says("user", "1"),
            says("assistant", None, tool_calls=call),
            says("tool", "x"),
            says("tool", "y"),
            says("assistant", "-"),
            says("user", "2"),
            says("assistant", "-"),
        ]
    }
    rows, _, lost = answered(used, tmp_path / "a.jsonl", [row], [f"a{END}"], [f"b{END}"])
    assert [(m["role"], m["content"]) for m in rows[0]["messages"]] == [
        ("user", "1"),
        ("assistant", "a"),
        ("user", "2"),
        ("assistant", "b"),
    ]
    assert lost == {"tool results left out, because their calls are replaced": 2}


def test_what_nobody_asks_for_and_what_has_no_weight_stays_as_it_is(tmp_path):
    used = chat("arguments added")
    call = [{"function": {"name": "go", "arguments": '{"a":1}'}}]
    row = {
        "messages": [
            says("assistant", "Welcome."),
            says("user", "1"),
            says("assistant", None, tool_calls=call, weight=0),
            says("tool", "x"),
            says("assistant", "-"),
        ]
    }
    rows, engine, lost = answered(used, tmp_path / "a.jsonl", [row], [f"a{END}"])
    assert lost == {}
    assert [m["content"] for m in rows[0]["messages"]] == ["Welcome.", "1", "", "x", "a"]
    assert rows[0]["messages"][2]["tool_calls"][0]["function"]["arguments"] == '{"a":1}'  # as OpenAI has it
    assert learnt(used, rows[0]) == [f"{used.decode(engine.asked[0])}«a{END}»"]


def test_a_conversation_that_ends_with_a_question_is_answered(tmp_path):
    rows, _, _ = answered(chat(), tmp_path / "a.jsonl", [talk("1")], [f"a{END}"])
    assert [m["content"] for m in rows[0]["messages"]] == ["1", "a"]


def test_two_answers_in_a_row_are_one(tmp_path):
    row = {"messages": [says("user", "1"), says("assistant", "-"), says("assistant", "-")]}
    rows, _, lost = answered(chat("alternating"), tmp_path / "a.jsonl", [row], [f"a{END}"])
    assert [m["content"] for m in rows[0]["messages"]] == ["1", "a"]
    assert lost == {}


def test_a_template_that_does_not_take_an_answer_back_ends_the_conversation(tmp_path):
    rows, _, lost = answered(chat("channels"), tmp_path / "a.jsonl", [talk("1", "-", "2", "-")], [f"[final]a{END}"])
    assert [m["content"] for m in rows[0]["messages"]] == ["1", "[final]a"]
    assert lost == {"turns left out, because the chat template rejects an earlier answer": 1}


# Going on.

ROWS = [talk("1", "-", id="a"), talk("2", "-", id="b", split="train")]


@pytest.fixture
def half(tmp_path) -> Path:
    """A file in which the first of two conversations is answered."""
    answered(chat(), tmp_path / "a.jsonl", ROWS[:1], [f"x{END}"])
    return tmp_path / "a.jsonl"


def test_what_is_answered_is_not_asked_again(half):
    rows, engine, _ = answered(chat(), half, ROWS, [f"y{END}"])
    assert len(engine.asked) == 1
    assert [row["messages"][1]["content"] for row in rows] == ["x", "y"]


def test_nothing_is_loaded_where_all_is_answered(half):
    assert list(work(chat(), half, *ROWS[:1]).run(lambda: pytest.fail("the target was loaded"))) == []


@pytest.mark.parametrize("cut", [1, 8, 200])
def test_a_line_that_a_crash_cut_off_is_answered_again(half, cut):
    whole = half.read_bytes()
    half.write_bytes(whole + whole.replace(b'"a"', b'"b"')[:cut])
    rows, _, _ = answered(chat(), half, ROWS, [f"y{END}"])
    assert [row["id"] for row in rows] == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "another"}, "generated with target 't', not 'another'"),
        ({"dtype": "bfloat16"}, "generated with dtype 'float32', not 'bfloat16'"),
        ({"max_new_tokens": 99}, "generated with max_new_tokens 512, not 99"),
        ({"temperature": 0.5}, "generated with temperature 0.0, not 0.5"),
        ({"seed": 3}, "generated with seed 0, not 3"),
        ({"top_p": 0.5}, "generated with top_p 1.0, not 0.5"),
    ],
)
def test_answers_made_otherwise_are_not_mixed_in(half, change, words):
    before = half.read_bytes()
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1: was {words}"):
        work(chat(), half, *ROWS, **change)
    assert half.read_bytes() == before


def test_answers_through_another_template_are_not_mixed_in(half):
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: was generated with tokenizer"):
        work(chat("default system prompt"), half, *ROWS)


def test_a_batch_size_may_change(half):
    assert len(work(chat(), half, *ROWS, batch_size=1).todo) == 1


@pytest.mark.parametrize(
    "row",
    [
        talk("3", "-", id="a"),
        talk("1", "-", "2", "-", id="a"),
        talk("1", "-", id="a", tools=[{"name": "x"}]),
        {"id": "a", "messages": [says("system", "S"), *ROWS[0]["messages"]]},
    ],
)
def test_an_id_that_asks_something_else_now_is_refused(half, row):
    with pytest.raises(
        UserError, match=r"a\.jsonl, line 1: 'a' answers different messages from those in d\.jsonl, line 1"
    ):
        work(chat(), half, row)


def test_other_answers_of_others_are_the_same_question(half):
    assert work(chat(), half, talk("1", "another answer", id="a")).todo == []


@pytest.mark.parametrize(
    "content",
    [
        "my notes",
        "my notes\n",
        '{"id": "a", "messages": []}\n',
        json.dumps(talk("1", "-", id="a")) + "\n",
        "[1, 2]\n",
        "\n",
        "4",
        '{"id": "a", "messages": [1], "regenerated": {"asked": 1, "answers": []}}\n',
    ],
)
def test_a_file_that_regenerate_did_not_write_stays_as_it_is(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"a\.jsonl.*choose another --output"):
        work(chat(), tmp_path / "a.jsonl", *ROWS)
    assert (tmp_path / "a.jsonl").read_text() == content


def test_a_damaged_file_is_gone_on_with_or_refused_in_one_line(half, fuzz: Fuzz):
    original = half.read_bytes()
    template = chat()
    for data in fuzz.bytes([original + original.replace(b'"a"', b'"b"')], 200):
        half.write_bytes(data)
        survives(lambda: work(template, half, *ROWS))


# What is refused before anything is answered.


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([ROWS[0], talk("2", "-", id="a")], r"d\.jsonl, line 2: has the same id 'a' as d\.jsonl, line 1"),
        ([talk("1", "-", id=1), talk("2", "-", id="1")], r"has the same id '1' as"),
        ([{"prompt": "1", "response": "2"}], r"d\.jsonl, line 1: not a conversation"),
        ([{"messages": [says("assistant", "-")]}], r"d\.jsonl, line 1: it contains no turn for the target to answer"),
        ([{"messages": [says("user", "1"), says("assistant", "-", weight=0)]}], "no turn for the target to answer"),
        ([{"messages": [says("user", "1"), says("user", "2")]}], r"d\.jsonl, line 1: .*roles must alternate"),
        ([], "no conversations to answer"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        work(chat("alternating"), tmp_path / "a.jsonl", *rows)
    assert not (tmp_path / "a.jsonl").exists()


def test_a_tokenizer_without_an_end_token_is_named(tmp_path):
    template = chat()
    template.end_ids = frozenset()
    with pytest.raises(UserError, match="names an end token"):
        work(template, tmp_path / "a.jsonl", *ROWS)


def test_a_token_beyond_the_embedding_is_not_asked_with(tmp_path):
    with pytest.raises(UserError, match=r"line 1: .* beyond the 256 tokens of the target's embedding"):
        work(chat(vocab_size=256), tmp_path / "a.jsonl", *ROWS)


# The commands.


def test_regenerate_then_prepare_gives_what_was_asked_and_written(tmp_path, capsys):
    target = write_target(tmp_path / "tiny")
    (target / "chat_template.jinja").write_text(TEMPLATES["opens reasoning"])
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(talk(f"{i}?", "-", "and?", "-")) + "\n" for i in range(5)))
    output = tmp_path / "a.jsonl"
    words = [
        "regenerate",
        "--data",
        data,
        "--target",
        target,
        "--output",
        output,
        "--max_new_tokens",
        4,
        "--batch_size",
        2,
        "--dtype",
        "float32",
    ]
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert "5 conversations answered now, 0 before" in said
    assert "10 answers cut off at max_new_tokens (4)" in " ".join(said.split())
    words = ["prepare", "--data", output, "--target", target, "--output", tmp_path / "p"]
    assert main([str(word) for word in words]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    kept = [answer for row in rows for answer in row["regenerated"]["answers"]]
    assert len(kept) == 10
    tasks = PromptSet.load(tmp_path / "p" / "train").tasks
    assert [task.input_ids for task in tasks] == [tuple(k["prompt_ids"] + k["answer_ids"]) for k in kept]
    assert "their text is used" not in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--max_new_tokens", "--batch_size", "--temperature", "--top_p", "--seed"])
def test_numbers_out_of_range_are_refused(target, conversations, tmp_path, capsys, option):
    words = ["regenerate", "--data", conversations, "--target", target, "--output", tmp_path / "a.jsonl", option, -1]
    assert main([str(word) for word in words]) == 2
    assert option.strip("-") in capsys.readouterr().err
