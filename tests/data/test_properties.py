"""What holds for any conversation, at any template, with any tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from specforge.data.conversations import RecordError, parse_record
from specforge.data.prompts import PrepareOptions, prepare
from specforge.data.turns import TokenSample
from specforge.errors import UserError
from tests.data.chats import TEMPLATES, chat

# Words that a tokenizer merges, that templates look for, and that look like what a template writes.
WORDS = (
    "Hi",
    " ",
    "\n",
    "\n\n",
    "ok",
    "é",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "</think>",
    "[final]",
    ".",
    "a",
    "1",
)
text = st.lists(st.sampled_from(WORDS), max_size=4).map("".join)
call = st.sampled_from([None, [{"name": "add", "arguments": '{"a": "x"}'}], [{"name": "go", "arguments": {}}]])
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "assistant", "tool"]), "content": text},
    optional={
        "reasoning_content": text,
        "tool_calls": call,
        "weight": st.sampled_from([0, 1, None]),
        "name": st.none(),
        "finish_reason": st.sampled_from(["stop", "length"]),
    },
)
conversation = st.builds(
    lambda system, rest: [*system, *rest],
    st.lists(st.just({"role": "system", "content": "Be brief."}), max_size=1),
    st.lists(message, min_size=1, max_size=6),
)
alternating = st.lists(st.tuples(text, text), min_size=1, max_size=3).map(
    lambda turns: [
        {"role": role, "content": said}
        for turn in turns
        for role, said in zip(("user", "assistant"), turn, strict=True)
    ]
)
kinds = st.sampled_from(["bytes", "merging", "spaces"])
templates = st.sampled_from(sorted(TEMPLATES))
CHATS: dict = {}


def made(template: str, kind: str):
    if (template, kind) not in CHATS:
        CHATS[template, kind] = chat(template, kind)
    return CHATS[template, kind]


def runs(sample: TokenSample) -> list[tuple[int, int]]:
    """Where each learnt run begins and ends."""
    edges = [i for i, (a, b) in enumerate(pairwise((0, *sample.loss_mask, 0))) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


@given(messages=conversation | alternating, template=templates, kind=kinds)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_answer_is_learnt_once_behind_the_tokens_that_ask_for_it(messages, template, kind):
    used = made(template, kind)
    try:
        record = parse_record("d.jsonl, line 1", {"messages": messages})
        samples = used.encode(record)
    except RecordError:
        return
    wanted = Counter()
    for turn in record.content.answers():
        history = [
            {k: v for k, v in m.items() if k not in ("weight", "finish_reason")}
            for m in used._renderer.messages(record.content)[:turn]
        ]
        asked = used.tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
        wanted[tuple(used.tokenizer(asked, add_special_tokens=False)["input_ids"])] += 1
    found = Counter(sample.input_ids[:start] for sample in samples for start, _ in runs(sample))
    # An answer without a token of its own (empty, and cut off) has nothing to learn.
    assert found <= wanted
    cut = sum(record.content.messages[i].get("finish_reason") == "length" for i in record.content.answers())
    assert (wanted - found).total() <= cut
    for sample in samples:
        assert min(sample.input_ids) >= 0
        assert max(sample.input_ids) < used.vocab_size
        assert len(sample.input_ids) == len(sample.loss_mask)


@given(messages=alternating, kind=kinds)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_what_is_learnt_is_what_the_assistant_said_and_the_end_token(messages, kind):
    used = made("chatml", kind)
    samples = used.encode(parse_record("d.jsonl, line 1", {"messages": messages}))
    learnt = [used.decode(sample.input_ids[a:b]) for sample in samples for a, b in runs(sample)]
    for found, said in zip(learnt, [m["content"] for m in messages[1::2]], strict=True):
        behind_a_prompt = found if kind != "spaces" else found.removeprefix(" ")  # its decoder drops a first space
        assert behind_a_prompt in (f"{said}<|im_end|>", f"{said.removeprefix(' ')}<|im_end|>")


record = st.fixed_dictionaries(
    {"messages": alternating}, optional={"split": st.sampled_from(["train", "heldout", None])}
)


@given(records=st.lists(record, min_size=1, max_size=8), template=templates, holdout=st.integers(0, 4))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_nothing_that_is_held_out_is_trained_on_and_nothing_is_lost_or_doubled(records, template, holdout):
    used = made(template, "merging")
    with TemporaryDirectory() as folder:
        data = Path(folder) / "d.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in records))
        options = PrepareOptions(bad_samples="drop", holdout=holdout, min_supervised=1)
        try:
            sets, report = prepare([str(data)], used, used.vocab_size, options)
        except UserError as error:
            assume("no usable record" not in str(error))
            if "holdout is" not in str(error):
                raise
            return  # more are asked for than there are
    tasks = {name: prompts.tasks for name, prompts in sets.items()}
    prompts = {
        name: {task.input_ids[:start] for task in found for start, _ in runs(task)} for name, found in tasks.items()
    }
    assert not prompts.get("train", set()) & prompts.get("heldout", set())
    everything = [task.task_id for found in tasks.values() for task in found]
    assert len(everything) == len(set(everything))
    if not report.dropped:
        assert sum(len(found) for found in tasks.values()) == sum(
            len(used.encode(parse_record("", row))) for row in records
        )
    assert len(tasks.get("heldout", [])) >= (holdout if not any(row.get("split") for row in records) else 0)
