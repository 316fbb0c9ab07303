"""Reading records: whatever a file holds is used, or refused in one line that says where."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from specforge.data.conversations import RecordError, parse_record, read_raw
from specforge.errors import UserError
from tests.data.chats import chat, says, talk
from tests.fuzz import Fuzz, survives

LINE = json.dumps(talk("Hi", "Hello."))
RECORDS = [
    talk("Hi", "Hello.", id="a", split="train"),
    {
        "messages": [
            says("system", "S"),
            says("user", [{"type": "text", "text": "Hi"}]),
            says("assistant", None, tool_calls=[{"id": "1", "function": {"name": "go", "arguments": '{"a": 1}'}}]),
            says("tool", "2", tool_call_id="1"),
            says("assistant", "two", reasoning_content="R", weight=1),
        ],
        "tools": [{"type": "function", "function": {"name": "go", "parameters": {}}}],
        "regenerated": {
            "tokenizer": "t",
            "answers": [{"message": 4, "prompt_ids": [1, 2], "answer_ids": [3], "digest": "d"}],
        },
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}], "system": "S"},
    {"prompt": "Q: ", "response": "two"},
    {"text": "Q: A: two", "spans": [[6, 9]]},
    {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]},
]


def read(path: Path) -> list:
    return [parse_record(source, row) for source, row in read_raw(str(path))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", LINE + "\n\n" + LINE),
        ("d.jsonl", "\ufeff" + LINE + "\r\n" + LINE + "\r\n"),
        ("d.json", f"[{LINE}, {LINE}]"),
        ("d.json", f"\ufeff [{LINE},\n {LINE}]"),
        ("d.json", f"{LINE}\n{LINE}\n"),
        ("d.jsonl", LINE.replace("Hello.", "a\u2028b") + "\n" + LINE),
    ],
)
def test_files_that_others_write_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert len(read(tmp_path / name)) == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.jsonl", b'{"messages": [', "line 1: not valid JSON"),
        ("d.jsonl", LINE.encode() + b"\n\xff\xfe", "line 2: not UTF-8"),
        ("d.jsonl", LINE.encode("utf-16"), "line 1: not UTF-8"),
        ("d.jsonl", b"\x1f\x8b\x08\x00", "line 1: not UTF-8"),
        ("d.jsonl", b'{"messages": "\xed\xa0\x80"}', "line 1: not UTF-8"),
        ("d.jsonl", b"[" * 100_000, "line 1: not usable JSON (nested too deeply)"),
        ("d.jsonl", b'{"a": ' * 900 + b"1" + b"}" * 900, "line 1: has none of messages"),
        ("d.jsonl", b'{"input_ids": [' + b"9" * 5000 + b"]}", "line 1: not usable JSON"),
        ("d.jsonl", b"[" + LINE.encode() + b"]", "line 1: a JSON list, not an object"),
        ("d.json", b"[" * 100_000, "not usable JSON (nested too deeply)"),
        ("d.json", b"4", "holds a JSON int"),
        ("d.json", b"", "not valid JSON"),
        ("d.jsonl.gz", b"\x1f\x8b", "use a .jsonl or .json file"),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_their_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))
    assert words in str(error.value)


@pytest.mark.parametrize("depth", [800, 5000])
def test_deep_nesting_is_read_or_refused_in_one_line_wherever_it_stands(depth):
    deep: object = 1
    for _ in range(depth):
        deep = [deep]
    calls = [{"name": "go", "arguments": deep}], [{"name": "go", "arguments": "[" * 9000}]
    rows = [
        talk("Hi", "a", tools=[{"a": deep}]),
        talk("Hi", "a", id=deep),
        talk("Hi", "a", split=deep),
        {"messages": [says(deep, "a")]},
        {"messages": [says("user", deep)]},
        {"input_ids": deep},
        *({"messages": [says("user", "Hi"), says("assistant", "", tool_calls=c)]} for c in calls),
    ]
    template = chat("arguments as JSON")
    taken = [survives(lambda row=row: template.encode(parse_record("d.jsonl, line 1", row))) for row in rows]
    # From 3.12 on, Python reads and writes JSON of this depth.
    assert depth < 1000 or sys.version_info >= (3, 12) or not any(taken)


@pytest.mark.parametrize("ids", [[1, True], [1, 2.0], [1, -2], [1, "2"], [1, None], [[1], 2], 4, {"a": 1}])
def test_token_ids_are_whole_numbers(ids):
    with pytest.raises(UserError, match="input_ids is not a list of non-negative integers"):
        parse_record("d.jsonl, line 1", {"input_ids": ids, "loss_mask": [0, 1]})


@pytest.mark.parametrize(
    ("mask", "good"), [([0, 1], True), ([False, True], True), ([0, 2], False), ([1], False), (None, False)]
)
def test_loss_masks_are_zeros_and_ones(mask, good):
    row = {"input_ids": [1, 2], "loss_mask": mask}
    if good:
        assert parse_record("d.jsonl, line 1", row).content.loss_mask == (0, 1)
    else:
        with pytest.raises(UserError, match="loss_mask is not a list of 2 zeros and ones"):
            parse_record("d.jsonl, line 1", row)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read(tmp_path / "d.jsonl")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "d.jsonl").write_text(LINE)
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"d\.jsonl: cannot be read \(Permission denied\)"):
        read(tmp_path / "d.jsonl")


def test_an_id_that_is_null_is_none():
    assert parse_record("d.jsonl, line 1", talk("Hi", "a", id=None)).id == "d.jsonl, line 1"
    assert parse_record("d.jsonl, line 1", talk("Hi", "a", id=7)).id == "7"


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, fuzz: Fuzz):
    template = chat("arguments as JSON")
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in RECORDS]
    path = tmp_path / "inside" / "d.jsonl"
    path.parent.mkdir()

    def encode() -> None:
        for record in read(path):
            template.encode(record)

    for suffix, originals in ((".jsonl", [b"\n".join(lines)]), (".json", [b"[" + b",".join(lines) + b"]"])):
        path = path.with_suffix(suffix)
        for data in fuzz.bytes(originals, 600):
            path.write_bytes(data)
            survives(encode)


def test_records_of_other_shapes_are_used_or_refused_in_one_line(fuzz: Fuzz):
    template = chat("arguments as JSON")
    taken = [
        survives(lambda row=row: template.encode(parse_record("d.jsonl, line 1", row)))
        for row in fuzz.values(RECORDS, 1500)
    ]
    assert any(taken)
    assert not all(taken)


@pytest.mark.parametrize("id_", [["a"], True, 1.5, {"a": 1}])
def test_an_id_is_text_or_a_whole_number(id_):
    with pytest.raises(RecordError, match=r"d.jsonl, line 3: id is .*; use text or a whole number"):
        parse_record("d.jsonl, line 3", talk("Hi", "a", id=id_))
