"""Awkward conversations: what is learnt of each, written out, or what it is refused for.

Text between « and » is learnt. ``¦`` stands between samples. For every answer of every case, the tokens before
it are compared with those that the target is asked with, made here by transformers alone.
"""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from specforge.data.conversations import parse_record
from specforge.errors import UserError
from tests.data.chats import chat, learnt, says, talk

U, A, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
CALL = [{"type": "function", "function": {"name": "add", "arguments": '{"a": "x"}'}}]


def messages(*items: dict, **more) -> dict:
    return {"messages": list(items), **more}


def user(content: object = "Hi", **more) -> dict:
    return says("user", content, **more)


def assistant(content: object, **more) -> dict:
    return says("assistant", content, **more)


# Name: (template, record, the marked text or words of the refusal).
CASES: dict[str, tuple[str, dict, str]] = {
    # Who is asked.
    "every answer": ("chatml", talk("1", "one", "2", "two"), f"{U}1{END}\n{A}«one{END}»\n{U}2{END}\n{A}«two{END}»\n"),
    "a greeting that nobody asked for is context": (
        "chatml",
        messages(assistant("Welcome."), user(), assistant("Hello.")),
        f"{A}Welcome.{END}\n{U}Hi{END}\n{A}«Hello.{END}»\n",
    ),
    "so is one behind a system prompt": (
        "chatml",
        messages(says("system", "S"), assistant("Welcome."), user(), assistant("Hello.")),
        f"<|im_start|>system\nS{END}\n{A}Welcome.{END}\n{U}Hi{END}\n{A}«Hello.{END}»\n",
    ),
    "and with a default system prompt": (
        "default system prompt",
        messages(assistant("Welcome."), user(), assistant("Hello.")),
        f"<|im_start|>system\nBe brief.{END}\n{A}Welcome.{END}\n{U}Hi{END}\n{A}«Hello.{END}»\n",
    ),
    "a greeting alone": ("chatml", messages(assistant("Welcome.")), "it contains no answer to train on"),
    "a system prompt alone asks": (
        "chatml",
        messages(says("system", "S"), assistant("yes")),
        f"<|im_start|>system\nS{END}\n{A}«yes{END}»\n",
    ),
    "two answers in a row": (
        "chatml",
        messages(user(), assistant("a"), assistant("b")),
        f"{U}Hi{END}\n{A}«a{END}»\n{A}«b{END}»\n",
    ),
    "what follows the last answer teaches nothing": ("chatml", talk("Hi", "a", "and?"), f"{U}Hi{END}\n{A}«a{END}»\n"),
    "a developer": (
        "chatml",
        messages(says("Developer", "D"), user(), assistant("a")),
        f"<|im_start|>developer\nD{END}\n{U}Hi{END}\n{A}«a{END}»\n",
    ),
    # How the template asks.
    "no header": (
        "alternating",
        talk("1", "one", "2", "two"),
        f"[INST] 1 [/INST]« one{END}»[INST] 2 [/INST]« two{END}»",
    ),
    "roles that do not alternate": ("alternating", messages(user(), user(), assistant("a")), "roles must alternate"),
    "a system prompt where roles alternate": (
        "alternating",
        messages(says("system", "S"), user(), assistant("a")),
        "roles must alternate",
    ),
    "generation tags": ("generation tags", talk("Hi", "a"), f"{U}Hi{END}\n{A}«a{END}»"),
    "a header that nobody asks with": ("no generation prompt", talk("Hi", "a"), "no generation prompt"),
    "a line break that is only asked with": (
        "asks with a line break",
        talk("1", "one", "2", "two"),
        f"{U}1{END}{A}\n«one{END}»¦{U}1{END}{A}one{END}{U}2{END}{A}\n«two{END}»",
    ),
    "a template that trims": ("trims", talk(" Hi ", "  a  "), f"[user]Hi{END}[assistant]«a{END}»"),
    "no end token": ("plain", talk("1", "one", "2", "two"), "user: 1\nassistant:« one\n»user: 2\nassistant:« two\n»"),
    "a date is the same every day": ("date", talk("Hi", "a"), f"Today is 26 Jul 2024.\n{U}Hi{END}\n{A}«a{END}»\n"),
    "text that looks like the template": (
        "chatml",
        talk("Say assistant\na", "assistant\na"),
        f"{U}Say assistant\na{END}\n{A}«assistant\na{END}»\n",
    ),
    "an answer that holds an end token": ("chatml", talk("Hi", f"a{END}b"), f"{U}Hi{END}\n{A}«a{END}b{END}»\n"),
    "a system prompt that moves to the last question": (
        "system prompt before the last question",
        messages(says("system", "S"), user("1"), assistant("one"), user("2"), assistant("two")),
        f"[INST]S 1[/INST]«one{END}»¦[INST]1[/INST]one{END}[INST]S 2[/INST]«two{END}»",
    ),
    "the same with a space before the answer": (
        "system prompt before the last question, space before the answer",
        messages(says("system", "S"), user("1"), assistant("one"), user("2"), assistant("two")),
        f"[INST]S 1[/INST]« one{END}»¦[INST]1[/INST] one{END}[INST]S 2[/INST]« two{END}»",
    ),
    "nothing is learnt behind the token that ends an answer": (
        "ends a text once more",
        talk("1", "one", "2", "two"),
        f"{U}1{END}\n{A}«one{END}»\n{U}2{END}\n{A}«two{END}»\n{END}",
    ),
    "whatever the answer's words are": (
        "ends a text once more",
        talk("1", f"one{END}two ", "2", ""),
        f"{U}1{END}\n{A}«one{END}two {END}»\n{U}2{END}\n{A}«{END}»\n{END}",
    ),
    "of an answer that was cut off, not even that token": (
        "ends a text once more",
        messages(user(), assistant("one", finish_reason="length")),
        f"{U}Hi{END}\n{A}«one»{END}\n{END}",
    ),
    "a tool result that is closed otherwise once it is answered": (
        "tool results closed otherwise when answered",
        messages(user(), assistant("?"), says("tool", "2"), assistant("a")),
        f"{U}Hi{END}\n{A}«?{END}»\n<|im_start|>tool\n2{END}\n{A}«a{END}»\n",
    ),
    "an empty reasoning that is only asked with a line break": (
        "shows no reasoning, asks with a line break",
        talk("Hi", "a"),
        f"{U}Hi{END}\n{A}<think>\n«</think>a{END}»\n",
    ),
    "a template that always asks": (
        "always asks",
        talk("1", "one", "2", "two"),
        f"[user]1{END}[assistant]«[answer]one{END}»[user]2{END}[assistant]«[answer]two{END}»[assistant]",
    ),
    # Reasoning.
    "reasoning that the template drops later": (
        "drops old reasoning",
        messages(user("1"), assistant("one", reasoning_content="R"), user("2"), assistant("two", thinking="Q")),
        f"{U}1{END}\n{A}«<think>R</think>one{END}»\n¦{U}1{END}\n{A}one{END}\n{U}2{END}\n{A}«<think>Q</think>two{END}»\n",
    ),
    "reasoning that the template never shows": (
        "chatml",
        messages(user(), assistant("a", reasoning_content="R")),
        f"{U}Hi{END}\n{A}«a{END}»\n",
    ),
    "nothing but reasoning": (
        "drops old reasoning",
        messages(user(), assistant(None, reasoning="R")),
        f"{U}Hi{END}\n{A}«<think>R</think>{END}»\n",
    ),
    "nothing but reasoning that the template never shows": (
        "chatml",
        messages(user(), assistant(None, reasoning="R")),
        "messages[1]: the chat template omits it",
    ),
    "reasoning that the prompt opens and the message lacks": (
        "opens reasoning",
        talk("Hi", "<a>"),
        f"{U}Hi{END}\n{A}<think>\n«<a>{END}»\n",
    ),
    "reasoning that the prompt opens and closes": (
        "closes reasoning",
        talk("1", "<b>", "2", "two"),
        f"{U}1{END}\n{A}<think></think>«<b>{END}»\n¦{U}1{END}\n{A}<b>{END}\n{U}2{END}\n{A}<think></think>«two{END}»\n",
    ),
    "reasoning that the prompt opens and the template can close": (
        "shows or opens reasoning",
        messages(user("1"), assistant("one"), user("2"), assistant("two", reasoning_content="R")),
        f"{U}1{END}\n{A}<think>«</think>one{END}»\n¦{U}1{END}\n{A}</think>one{END}\n{U}2{END}\n{A}<think>«R</think>two{END}»\n",
    ),
    "half of what the prompt closes with": (
        "shows half of what it asks with",
        talk("1", "one"),
        f"{U}1{END}\n{A}<think></think>«one{END}»\n",
    ),
    "reasoning behind a prompt that closes it": (
        "shows or closes reasoning",
        messages(user(), assistant("a", reasoning_content="R")),
        "the prompt of the chat template ends in",
    ),
    "reasoning that the prompt opens and the message has": (
        "opens reasoning",
        talk("1", "<think>\nR</think>one", "2", "<think>\nQ</think>two"),
        f"{U}1{END}\n{A}<think>\n«R</think>one{END}»\n¦{U}1{END}\n{A}one{END}\n{U}2{END}\n{A}<think>\n«Q</think>two{END}»\n",
    ),
    "channels": (
        "channels",
        messages(user(), assistant("a", reasoning_content="R")),
        f"{U}Hi{END}<|im_start|>assistant«[analysis]R{END}<|im_start|>assistant[final]a{END}»",
    ),
    "channel markers in an answer": ("channels", talk("Hi", "[final]a"), "content holds channel markers"),
    # Tools.
    "arguments as JSON": (
        "arguments as JSON",
        messages(user(), assistant(None, tool_calls=CALL), says("tool", "2"), assistant("It is 2.")),
        f'{U}Hi{END}\n{A}«<call>add {{"a": "x"}}</call>{END}»\n<|im_start|>tool\n2{END}\n{A}«It is 2.{END}»\n',
    ),
    "arguments by name": (
        "arguments by name",
        messages(user(), assistant("", tool_calls=CALL)),
        f"{U}Hi{END}\n{A}«<call>add a=x;</call>{END}»\n",
    ),
    "arguments that are added to text": (
        "arguments added",
        messages(user(), assistant("", tool_calls=CALL)),
        f'{U}Hi{END}\n{A}«<call>add {{"a": "x"}}</call>{END}»\n',
    ),
    "arguments that are printed": (
        "arguments printed",
        messages(user(), assistant("", tool_calls=CALL)),
        f'{U}Hi{END}\n{A}«<call>add {{"a": "x"}}</call>{END}»\n',
    ),
    "arguments given as values and added to text": (
        "arguments added",
        messages(user(), assistant("", tool_calls=[{"function": {"name": "add", "arguments": {"a": "é"}}}])),
        f'{U}Hi{END}\n{A}«<call>add {{"a": "é"}}</call>{END}»\n',
    ),
    "arguments that are missing": (
        "arguments as JSON",
        messages(user(), assistant("", tool_calls=[{"function": {"name": "go", "arguments": None}}])),
        f"{U}Hi{END}\n{A}«<call>go {{}}</call>{END}»\n",
    ),
    "a call in the old form": (
        "arguments as JSON",
        messages(user(), assistant(None, function_call={"name": "go", "arguments": "{}"})),
        f"{U}Hi{END}\n{A}«<call>go {{}}</call>{END}»\n",
    ),
    "calls as JSON text": (
        "arguments as JSON",
        messages(user(), assistant(None, tool_calls=json.dumps(CALL))),
        f'{U}Hi{END}\n{A}«<call>add {{"a": "x"}}</call>{END}»\n',
    ),
    "a call that the template ignores": (
        "chatml",
        messages(user(), assistant(None, tool_calls=CALL)),
        "messages[1]: the chat template omits its tool calls",
    ),
    "a call that the template ignores, with words": (
        "chatml",
        messages(user(), assistant("Wait.", tool_calls=CALL)),
        "messages[1]: the chat template omits its tool calls",
    ),
    "a call that the template ignores, not to be learnt": (
        "chatml",
        messages(user(), assistant("", tool_calls=CALL, weight=0), says("tool", "2"), assistant("2.")),
        f"{U}Hi{END}\n{A}{END}\n<|im_start|>tool\n2{END}\n{A}«2.{END}»\n",
    ),
    "a call shown instead of words": (
        "calls instead of content",
        messages(user(), assistant("Wait.", tool_calls=CALL)),
        f"{U}Hi{END}\n{A}«<call>add</call>{END}»\n",
    ),
    "arguments that are not JSON": (
        "arguments as JSON",
        messages(user(), assistant("", tool_calls=[{"name": "go", "arguments": "{a"}])),
        "messages[1].tool_calls: arguments of 'go': not valid JSON",
    ),
    "a call without a name": (
        "arguments as JSON",
        messages(user(), assistant("", tool_calls=[{"function": None}])),
        "without a function name",
    ),
    # What is text, and what is there at all.
    "weight 0 is context": (
        "chatml",
        messages(user("1"), assistant("one", weight=0), user("2"), assistant("two", weight=1.0)),
        f"{U}1{END}\n{A}one{END}\n{U}2{END}\n{A}«two{END}»\n",
    ),
    "train false is context": (
        "chatml",
        messages(user("1"), assistant("one", train=False), user("2"), assistant("two", train=True)),
        f"{U}1{END}\n{A}one{END}\n{U}2{END}\n{A}«two{END}»\n",
    ),
    "weight 0 everywhere": ("chatml", messages(user(), assistant("a", weight=0)), "it contains no answer to train on"),
    "another weight": ("chatml", messages(user(), assistant("a", weight=0.5)), "messages[1].weight is 0.5"),
    "null in every column": (
        "chatml",
        messages(
            user(name=None, tool_calls=None),
            assistant("a", tool_calls=None, reasoning_content=None, weight=None),
            prompt=None,
            response=None,
            text=None,
            spans=None,
            input_ids=None,
            loss_mask=None,
            tools=None,
            split=None,
            conversations=None,
            regenerated=None,
            id=None,
        ),
        f"{U}Hi{END}\n{A}«a{END}»\n",
    ),
    "NaN in a column": ("chatml", talk("Hi", "a", tools=float("nan"), text=float("nan")), f"{U}Hi{END}\n{A}«a{END}»\n"),
    "NaN in arguments": (
        "arguments as JSON",
        messages(user(), assistant("", tool_calls=[{"name": "go", "arguments": {"a": float("nan")}}])),
        "contains NaN",
    ),
    "columns of other tools": (
        "chatml",
        messages(user(audio=None, x=1), assistant("a", refusal=None, annotations=[]), prompt="Hi", regenerated=True),
        f"{U}Hi{END}\n{A}«a{END}»\n",
    ),
    "a null part": (
        "chatml",
        messages(user(), assistant([{"type": "text", "text": None}, {"type": "text", "text": "a"}])),
        f"{U}Hi{END}\n{A}«a{END}»\n",
    ),
    "parts of other forms": (
        "chatml",
        messages(user([{"type": "input_text", "text": "H"}, "i"]), assistant([{"type": "output_text", "text": "a"}])),
        f"{U}Hi{END}\n{A}«a{END}»\n",
    ),
    "an image": (
        "chatml",
        messages(user([{"type": "image_url", "image_url": {"url": "x"}}]), assistant("a")),
        "messages[0].content[0] has the type 'image_url'",
    ),
    "content that is no text": ("chatml", messages(user(4), assistant("a")), "messages[0].content is a JSON int"),
    "content 0": ("chatml", messages(user(0), assistant("a")), "messages[0].content is a JSON int"),
    "no content": ("chatml", messages(user(None), assistant("a")), "messages[0] has no content"),
    "an empty answer": ("chatml", talk("Hi", ""), f"{U}Hi{END}\n{A}«{END}»\n"),
    "an answer of spaces": ("chatml", talk("Hi", "  "), f"{U}Hi{END}\n{A}«  {END}»\n"),
    "an answer of spaces that are trimmed": ("trims", talk("Hi", "  "), f"[user]Hi{END}[assistant]«{END}»"),
    "an answer that was cut off": (
        "chatml",
        messages(user(), assistant("a", finish_reason="length")),
        f"{U}Hi{END}\n{A}«a»{END}\n",
    ),
    "half of a surrogate pair": ("chatml", talk("Hi \ud83d", "a"), "half of a surrogate pair"),
    "half of a surrogate pair in a tool": (
        "chatml",
        talk("Hi", "a", tools=[{"name": "\udc00"}]),
        "half of a surrogate pair",
    ),
    "half of a surrogate pair in a template": (
        "{{ messages[-1].content + '\\ud83d' }}",
        talk("Hi", "a"),
        "half of a surrogate pair",
    ),
    # ShareGPT.
    "ShareGPT": (
        "chatml",
        {"system": "S", "conversations": [{"from": "Human", "value": "Hi"}, {"from": " GPT", "value": "a"}]},
        f"<|im_start|>system\nS{END}\n{U}Hi{END}\n{A}«a{END}»\n",
    ),
    "ShareGPT with a greeting and a tool": (
        "chatml",
        {
            "conversations": [
                {"from": "gpt", "value": "Welcome."},
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": "add"},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "2."},
            ]
        },
        f"{A}Welcome.{END}\n{U}Hi{END}\n{A}«add{END}»\n<|im_start|>tool\n2{END}\n{A}«2.{END}»\n",
    ),
    # Text that went through a template.
    "prompt and response": ("chatml", {"prompt": "Q: ", "response": "two"}, "Q: «two»"),
    "no prompt": ("chatml", {"prompt": "", "response": "two"}, "«two»"),
    "spans": ("chatml", {"text": "Q: a A: b Q: c A: d.", "spans": [[18, 19], [8, 9]]}, "Q: a A: «b» Q: c A: «d»."),
    "spans that overlap, touch and are empty": (
        "chatml",
        {"text": "abcdef", "spans": [[2, 4], [1, 3], [4, 5], [0, 0]]},
        "a«bcde»f",
    ),
    "a span of numbers that are none": ("chatml", {"text": "abc", "spans": [[0, True]]}, "spans is not a list"),
    "a span outside": ("chatml", {"text": "abc", "spans": [[0, 4]]}, "a span exceeds the text"),
}


def expected_refusal(words: str) -> bool:
    return "«" not in words


@pytest.mark.parametrize("name", CASES)
def test_what_is_learnt(name):
    template, row, wanted = CASES[name]
    if expected_refusal(wanted):
        with pytest.raises(UserError, match=r"^d\.jsonl, line 1: ") as error:
            learnt(chat(template), row)
        assert wanted in str(error.value)
    else:
        assert "¦".join(learnt(chat(template), row)) == wanted


@pytest.mark.parametrize("kind", ["bytes", "merging", "spaces"])
@pytest.mark.parametrize(
    "name", [n for n, (_, row, wanted) in CASES.items() if not expected_refusal(wanted) and "spans" not in row]
)
def test_the_tokens_before_an_answer_are_those_that_the_target_is_asked_with(name, kind):
    template, row, _ = CASES[name]
    made = chat(template, kind)
    record = parse_record("d.jsonl, line 1", row)
    asked = set(asked_with(made, row, record))
    for sample in made.encode(record):
        starts = [i for i, (a, b) in enumerate(pairwise((0, *sample.loss_mask))) if b and not a]
        assert starts
        for start in starts:
            assert sample.input_ids[:start] in asked, made.decode(sample.input_ids[:start])


def asked_with(made, row: dict, record) -> list[tuple[int, ...]]:
    """Tokens that ask for each of the assistant's messages, as an engine makes them."""
    if "prompt" in row and "response" in row and row["prompt"] is not None:
        return [tuple(made.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"])]
    found = []
    for i, message in enumerate(record.content.messages):
        if message["role"] == "assistant" and i:
            history = [with_values(m, made) for m in record.content.messages[:i]]
            text = made.tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
            found.append(tuple(made.tokenizer(text, add_special_tokens=False)["input_ids"]))
    return found


def with_values(message: dict, made) -> dict:
    if "c.function.arguments }}" in made.tokenizer.chat_template or "tool_calls" not in message:
        return message
    calls = [
        {"function": {**c["function"], "arguments": json.loads(c["function"]["arguments"])}}
        for c in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
