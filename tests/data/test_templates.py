"""Tokens and loss masks: exactly the characters that the assistant wrote, at any template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specforge.data.conversations import parse_record
from specforge.data.templates import ChatTemplate
from specforge.errors import UserError
from specforge.target_files import TargetFiles
from tests.tiny import write_target

TRIMMING = (
    "{% for m in messages %}{% if m.role == 'system' %}[SYS]{{ m.content | trim }}[/SYS]{% elif m.role == 'user' %}"
    "[U]{{ m.content | trim }}[/U]{% elif m.role == 'tool' %}[T]{{ m.content }}[/T]{% else %}[A]"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ (m.content or '') | trim }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}"
    "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> TargetFiles:
    return TargetFiles.find(str(write_target(tmp_path_factory.mktemp("t") / "target")))


@pytest.fixture
def trimming(target, tmp_path) -> ChatTemplate:
    path = tmp_path / "template.jinja"
    path.write_text(TRIMMING)
    return ChatTemplate.load(target, path)


def learnt(template: ChatTemplate, row: dict) -> list[str]:
    """The text under the loss mask, of each sample."""
    found = []
    for sample in template.encode(parse_record("test", row)):
        ids = [i for i, m in zip(sample.input_ids, sample.loss_mask, strict=True) if m]
        found.append(template.tokenizer.decode(ids))
    return found


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def test_the_answer_and_its_end_token_are_learnt(target):
    template = ChatTemplate.load(target)
    assert learnt(template, {"messages": [user("Hi"), assistant("Hello.")]}) == ["Hello.<|im_end|>"]


def test_every_turn_is_learnt(target):
    template = ChatTemplate.load(target)
    row = {"messages": [user("a"), assistant("first"), user("b"), assistant("second")]}
    assert "".join(learnt(template, row)) == "first<|im_end|>second<|im_end|>"


def test_only_the_last_turn_on_request(target):
    template = ChatTemplate.load(target, last_turn_only=True)
    row = {"messages": [user("a"), assistant("first"), user("b"), assistant("second")]}
    assert learnt(template, row) == ["second<|im_end|>"]


def test_an_answer_that_was_cut_off_has_no_end_to_learn(target):
    template = ChatTemplate.load(target)
    row = {"messages": [user("Hi"), assistant("Hello, I", finish_reason="length")]}
    assert learnt(template, row) == ["Hello, I"]


def test_the_text_of_an_answer_may_look_like_the_template(target):
    template = ChatTemplate.load(target)
    row = {"messages": [user("Repeat: assistant\nHello"), assistant("assistant\nHello")]}
    assert learnt(template, row) == ["assistant\nHello<|im_end|>"]


def test_a_template_that_trims(trimming):
    row = {"messages": [{"role": "system", "content": " Be brief. "}, user(" Hi "), assistant("  Hello.  ")]}
    assert learnt(trimming, row) == ["Hello.<|im_end|>"]


def test_tool_calls_and_reasoning_are_learnt_and_tool_results_are_not(trimming):
    call = {"type": "function", "function": {"name": "add", "arguments": json.dumps({"a": 1})}}
    row = {
        "messages": [
            user("1+1?"), assistant("", tool_calls=[call]), {"role": "tool", "content": "2"},
            assistant("Two.", reasoning_content="It says 2."),
        ]
    }  # fmt: skip
    text = "".join(learnt(trimming, row))
    assert '<call>add {"a": 1}</call><|im_end|>' in text
    assert "<think>It says 2.</think>Two.<|im_end|>" in text
    assert "[T]" not in text


def test_sharegpt_is_the_same_conversation(target):
    template = ChatTemplate.load(target)
    share = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
    opened = {"messages": [user("Hi"), assistant("Hello.")]}
    assert template.encode(parse_record("a", share)) == template.encode(parse_record("b", opened))


def test_tokenised_and_formatted_records(target):
    template = ChatTemplate.load(target)
    (sample,) = template.encode(parse_record("a", {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}))
    assert (sample.input_ids, sample.loss_mask) == ((5, 6, 7), (0, 1, 1))
    assert learnt(template, {"text": "Q: one? A: two", "spans": [[11, 14]]}) == ["two"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "judge"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"input_ids": [1, -2], "loss_mask": [0, 1]}, "input_ids"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "loss_mask"),
        ([1, 2], "object"),
        ({"question": "?"}, "messages"),
    ],
)
def test_unusable_records_say_where_and_why(row, words):
    with pytest.raises(UserError, match=r"file\.jsonl, line 3") as error:
        parse_record("file.jsonl, line 3", row)
    assert words in str(error.value)


def test_a_missing_chat_template_is_named(tmp_path):
    folder = Path(write_target(tmp_path / "plain"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.load(TargetFiles.find(str(folder)))
    with pytest.raises(UserError, match="chat template"):
        template.encode(parse_record("x", {"messages": [user("Hi"), assistant("Hello.")]}))
