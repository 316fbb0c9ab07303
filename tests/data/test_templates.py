"""Tokens and loss masks: exactly the characters that the assistant wrote, at any template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specforge.data.conversations import parse_record
from specforge.data.templates import ChatTemplate
from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from tests.data.chats import chat, says, talk, tokenizer
from tests.data.chats import learnt as marked
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
            user("1+1?"),
            assistant("", tool_calls=[call]),
            {"role": "tool", "content": "2"},
            assistant("Two.", reasoning_content="It says 2."),
        ]
    }
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


# How answers meet their prompts.


def test_an_answer_whose_tokens_would_merge_with_its_prompt_follows_it():
    """In one text two line breaks are one token, which the target can never write behind the first."""
    template = chat("chatml", "merging")
    (sample,) = template.encode(parse_record("a", talk("Hi", "\nok")))
    asked = template.tokenizer("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    start = sample.loss_mask.index(1)
    assert list(sample.input_ids[:start]) == asked
    assert template.tokenizer.convert_ids_to_tokens(sample.input_ids[start])[0] == "Ċ"
    whole = template.tokenizer(template.decode(sample.input_ids))["input_ids"]
    assert list(sample.input_ids) != whole


def test_an_answer_that_the_tokenizer_reads_otherwise_later_ends_its_document():
    template = chat("chatml", "merging")
    assert marked(template, talk("1", "\nok", "2", "two")) == [
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n«\nok<|im_end|>»\n",
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n\nok<|im_end|>\n<|im_start|>user\n2<|im_end|>\n"
        "<|im_start|>assistant\n«two<|im_end|>»\n",
    ]


def test_only_the_answers_that_do_not_go_on_from_one_another_have_documents_of_their_own():
    template = chat("chatml", "merging")
    samples = template.encode(parse_record("a", talk("1", "one", "2", "\nok", "3", "three", "4", "four")))
    assert [sum(a < b for a, b in zip(s.loss_mask, s.loss_mask[1:], strict=False)) for s in samples] == [2, 2]


def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_before_an_answer():
    template = chat("plain", "spaces")
    (sample,) = template.encode(parse_record("a", {"prompt": "Q: ", "response": "Hi"}))
    assert template.tokenizer.convert_ids_to_tokens(list(sample.input_ids)) == ["▁", "Q", ":", "▁", "H", "i"]
    assert sample.loss_mask == (0, 0, 0, 0, 1, 1)


def test_a_date_does_not_change_samples_from_day_to_day(monkeypatch):
    import datetime

    from transformers.utils import chat_template_utils

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    for pattern in ("%d %b %Y", "%Y-%m-%d", "%B %-d, %Y", "%A %H:%M"):
        text = f"  {{% set day = strftime_now('{pattern}') %}}\n{{{{ day }}}}|"
        text += "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
        wanted = datetime.date(2024, 7, 26).strftime(pattern)
        assert marked(chat(text), talk("Hi", "a")) == [f"{wanted}|Hi<|im_end|>«a<|im_end|>»"]


def test_a_date_leaves_the_rest_of_a_template_as_it_is():
    for start in ("\n", "  ", "", "  {% if true %}\n{% endif %}\n"):
        plain = start + "x{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
        dated = plain + "{% if false %}{{ strftime_now('%Y') }}{% endif %}"
        assert marked(chat(dated), talk("Hi", "a")) == marked(chat(plain), talk("Hi", "a"))


def test_reasoning_has_both_names_that_templates_read():
    """Later versions of transformers see to this themselves."""
    row = {"messages": [user("Hi"), assistant("a", reasoning="R")]}
    *_, message = chat()._renderer.messages(parse_record("a", row).content)
    assert message["reasoning_content"] == message["thinking"] == "R"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("opens reasoning", "answers that follow '<think>\\n'"),
        ("shows or opens reasoning", "answers that follow '<|im_start|>assistant\\n<think>'"),
        ("date", "records in which the template prints 2024-07-26"),
        ("asks with a line break", None),
        ("chatml", None),
    ],
)
def test_users_are_told_what_a_template_makes_of_their_data(template, words):
    used = chat(template)
    for _ in range(2):
        used.encode(parse_record("a", talk("Hi", "a")))
    assert [(note.startswith(words), count) for note, count in used.notes.items()] == ([(True, 2)] if words else [])


def test_messages_that_the_template_does_not_show_are_counted():
    used = chat(
        "{% for m in messages if m.role != 'developer' %}{{ m.role }}: {{ m.content|tojson }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = {
        "messages": [
            says("developer", 'Be "brief".'),
            says("system", '"So"'),
            user("Hi"),
            assistant("a"),
            user("Hi"),
            assistant("b"),
        ]
    }
    used.encode(parse_record("a", row))
    assert used.notes == {"developer messages that the chat template omits": 1}


# What a target's folder may hold.


def folder_with(tmp_path: Path, template: object) -> TargetFiles:
    folder = Path(write_target(tmp_path / "target"))
    if isinstance(template, bytes):
        (folder / "chat_template.jinja").write_bytes(template)
    else:
        (folder / "chat_template.jinja").unlink()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return TargetFiles.find(str(folder))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (b"{% for m in messages %}", "not Jinja"),
        (b"{{ nothing.at.all }}", "rejects it"),
        (b"{{ 1 // 0 }}", "rejects it"),
        (b"{{ raise_exception('a\nb') }}", r"rejects it \(a\)"),
        (b"{{ raise_exception('') }}", "rejects it"),
        (b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "rejects it"),
        (b"{{ ''.__class__.__mro__ }}", "rejects it"),
        (b"", "has no chat template"),
        (b"{{ '' }}", "omits it"),
        (b"\xff\xfe", "no usable tokenizer"),
        ([{"name": "rag", "template": "{{ 1 }}"}], "no chat template called default"),
        (4, "rejects it"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_one_line(tmp_path, template, words):
    with pytest.raises(UserError, match=words) as error:
        ChatTemplate.load(folder_with(tmp_path, template)).encode(parse_record("x", talk("Hi", "a")))
    assert "\n" not in str(error.value)


def test_of_several_templates_the_default_is_used(tmp_path):
    default = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    files = folder_with(tmp_path, [{"name": "default", "template": default}, {"name": "rag", "template": "{{ 1 }}"}])
    assert learnt(ChatTemplate.load(files), talk("Hi", "a")) == ["a<|im_end|>"]


@pytest.mark.parametrize("content", [b"\xff", None])
def test_a_template_file_that_cannot_be_read_is_named(target, tmp_path, content):
    path = tmp_path / "t.jinja"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"t\.jinja: cannot be read"):
        ChatTemplate.load(target, path)


@pytest.mark.parametrize(
    "content", ["[" * 9000, '{"model": 4}', "", '{"version": "1.0", "model": {"type": "no such"}}']
)
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path, content):
    folder = Path(write_target(tmp_path / "target"))
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="no usable tokenizer"):
        ChatTemplate.load(TargetFiles.find(str(folder)))


def test_a_tokenizer_without_a_fast_form_is_named():
    class Slow:
        is_fast, name_or_path = False, "models/slow"

    with pytest.raises(UserError, match="models/slow: is not a fast tokenizer"):
        ChatTemplate(Slow())


def test_a_tokenizer_without_an_end_token_learns_whole_answers():
    made = tokenizer()
    made.eos_token = None
    made.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    template = ChatTemplate(made)
    assert template.end_ids == frozenset()
    assert marked(template, talk("Hi", "a")) == ["Hi|«a|»"]


@pytest.mark.parametrize(
    ("ends", "wanted"), [(7, {7, 256}), ([7, 8], {7, 8, 256}), (None, {256}), ("x", {256}), ([True], {256})]
)
def test_end_tokens_are_those_of_the_tokenizer_and_of_the_generation_config(tmp_path, ends, wanted):
    folder = Path(write_target(tmp_path / "target"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    end = ChatTemplate.load(TargetFiles.find(str(folder)))
    assert {i if i != end.tokenizer.eos_token_id else 256 for i in end.end_ids} == wanted


def test_damaged_templates_render_or_are_refused_in_one_line(fuzz):
    from tests.data.chats import TEMPLATES
    from tests.fuzz import survives

    row = talk("Hi", "a", "and?", "b")
    for data in fuzz.bytes([text.encode() for text in TEMPLATES.values()], 200):
        template = chat(data.decode(errors="replace"))
        survives(lambda template=template: template.encode(parse_record("x", row)))
