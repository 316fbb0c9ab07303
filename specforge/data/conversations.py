"""Reading training data: conversations, formatted text or token ids, from local files or a hub dataset.

Accepted records (one JSON object a line in ``.jsonl``, or a list in ``.json``):

- OpenAI: ``{"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}``
- ShareGPT: ``{"conversations": [{"from": "human", "value": ...}, ...], "system": ...}``
- formatted: ``{"prompt": ..., "response": ...}``, or ``{"text": ..., "spans": [[start, stop], ...]}`` with
  character offsets of what the assistant wrote
- tokenised: ``{"input_ids": [...], "loss_mask": [...]}``

``id`` and ``split`` (``train`` or ``heldout``) are kept where present, and ``regenerated`` (the token ids that
`specforge regenerate` keeps) is used; other fields are ignored. A field that is null counts as absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specforge.contracts import content_id
from specforge.errors import UserError
from specforge.extras import install_hint
from specforge.files import first_line, parse_json, read_json

_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "train")  # OpenAI's name, Axolotl's
_TEXT_PARTS = ("text", "input_text", "output_text")
REGENERATED = "regenerated"


@dataclass(frozen=True)
class KeptTokens:
    """Token ids of one answer, kept when the target wrote it.

    Attributes:
        prompt_ids: what the target was asked with.
        answer_ids: what it wrote, its end token included unless it was cut off.
        digest: of the conversation up to and including the answer; another one means that the text was edited since.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI form.

    Attributes:
        messages: with ``reasoning_content`` and ``tool_calls`` where they have them; the arguments of a call are text
            or JSON values, as they were given.
        tools: descriptions of the tools that may be called.
        kept: tokens of answers, by the index of their message.
        tokenizer: fingerprint of the tokenizer and chat template that the kept tokens belong to.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    kept: Mapping[int, KeptTokens] = field(default_factory=dict)
    tokenizer: str = ""

    def digest(self, count: int) -> str:
        """Hash of the tools and of what a chat template can see of the first ``count`` messages."""
        return content_id([rendered(m) for m in self.messages[:count]], list(self.tools))

    @property
    def first_answer(self) -> int | None:
        """Index of the assistant's first message that answers something; None where there is none.

        Nobody asks for what the assistant says before the user's first message (a greeting); where no user speaks at
        all, the system prompt is what is answered.
        """
        roles = [m["role"] for m in self.messages]
        opening = 1 if roles[0] != "assistant" else len(roles)
        asked = next((i for i, role in enumerate(roles) if role in ("user", "tool")), opening)
        return next((i for i, role in enumerate(roles) if i >= asked and role == "assistant"), None)

    def answers(self) -> list[int]:
        """Indices of the assistant's messages that answer something and are to be learnt (``weight: 0``: are not)."""
        first = len(self.messages) if self.first_answer is None else self.first_answer
        return [
            i for i, m in enumerate(self.messages) if i >= first and m["role"] == "assistant" and m.get("weight", 1)
        ]


def rendered(message: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a message that a chat template can see."""
    return {key: value for key, value in message.items() if key not in ("finish_reason", "weight")}


@dataclass(frozen=True)
class Formatted:
    """Text that went through a template already; ``spans`` are character offsets of the supervised parts."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tokenised:
    """Token ids and their loss mask."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


@dataclass(frozen=True)
class DataRecord:
    """One parsed record.

    Attributes:
        content: what it holds.
        source: file and line, for messages.
        id: its own id, or the source.
        split: ``train``, ``heldout``, or None where the record does not say.
    """

    content: Conversation | Formatted | Tokenised
    source: str
    id: str
    split: str | None = None


class RecordError(UserError):
    """One record cannot be used; the message starts with its file and line."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}")


def read_raw(data: str, split: str = "train", subset: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield ``(source, JSON value or RecordError)`` of a local file or a hub dataset.

    Args:
        data: path of a ``.jsonl`` or ``.json`` file, or the name of a hub dataset.
        split: split of a hub dataset.
        subset: configuration of a hub dataset.

    Raises:
        UserError: there is no such file or dataset.
    """
    path = Path(data).expanduser()
    if not path.exists():
        yield from _hub_rows(data, split, subset)
    elif path.is_dir():
        raise UserError(f"{path}: is a folder; name the files in it")
    elif path.suffix in (".json", ".jsonl"):
        try:
            yield from _json_rows(path) if path.suffix == ".json" else _jsonl_rows(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    else:
        raise UserError(f"{path}: use a .jsonl or .json file, or the name of a hub dataset")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            source = f"{path}, line {number}"
            if line.strip():
                try:
                    yield source, parse_json(line)
                except ValueError as error:
                    yield source, RecordError(source, str(error))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"{"):  # one record a line, under the other suffix
        yield from _jsonl_rows(path)
        return
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds a JSON {type(rows).__name__}, not a list of records")
    for number, row in enumerate(rows):
        yield f"{path}, record {number}", row


def _hub_rows(name: str, split: str, subset: str | None) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"data {name!r}: no such file; hub datasets need the package datasets: {install_hint('hub')}"
        ) from error
    try:
        rows = load_dataset(name, subset, split=split, streaming=True)
        for number, row in enumerate(rows):
            yield f"{name}[{split}], row {number}", row
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"data {name!r}: no such file, and not readable as a hub dataset ({first_line(error)})"
        ) from error


def parse_record(source: str, row: Any) -> DataRecord:
    """Turn a raw record into one of the accepted forms.

    Raises:
        RecordError: it is none of them, or a field is malformed.
    """
    if isinstance(row, RecordError):
        raise row
    try:
        return _record(source, row)
    except RecursionError as error:
        raise RecordError(source, "is nested too deeply") from error


def _record(source: str, row: Any) -> DataRecord:
    if not isinstance(row, Mapping):
        raise RecordError(source, f"a JSON {type(row).__name__}, not an object")
    row = _without_nulls(row)
    split = row.get("split")
    if split not in (None, "train", "heldout"):
        raise RecordError(source, f"split is {short(split)}; use train or heldout")
    name = str(row.get("id", source.encode(errors="replace").decode()))
    content = _content(source, row)
    if not isinstance(content, Tokenised):
        _check_writable(source, [name, vars(content)])
    return DataRecord(content, source, name, split)


def short(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Tables have every column in every row: null there (NaN where pandas wrote it) says that there is no value."""
    return {key: value for key, value in fields.items() if value is not None and value == value}


def _check_writable(source: str, content: Any) -> None:
    """Refuse what no file and no tokenizer takes, which JSON can nevertheless spell."""
    try:
        json.dumps(content, ensure_ascii=False, allow_nan=False, default=vars).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start : error.start + 1].encode("unicode-escape").decode()
        raise RecordError(source, f"holds {found}, half of a surrogate pair, which is no character") from error
    except ValueError as error:
        raise RecordError(source, "holds NaN or infinity, which JSON does not have") from error


def _content(source: str, row: Mapping[str, Any]) -> Conversation | Formatted | Tokenised:
    if "input_ids" in row:
        return _tokenised(source, row)
    if "text" in row and "spans" in row:
        return _formatted(source, row)
    if "prompt" in row and "response" in row:
        prompt, response = _text(source, "prompt", row["prompt"]), _text(source, "response", row["response"])
        return Formatted(prompt + response, ((len(prompt), len(prompt) + len(response)),))
    messages = row.get("messages", row.get("conversations"))
    if messages is None:
        raise RecordError(source, "has none of messages, conversations, prompt and response, text and spans, input_ids")
    if not isinstance(messages, list) or not messages:
        raise RecordError(source, "messages is not a list with at least one message")
    parsed = [_message(source, f"messages[{i}]", m) for i, m in enumerate(messages)]
    system = row.get("system")
    if "messages" not in row and isinstance(system, str) and system and parsed[0]["role"] != "system":
        parsed.insert(0, {"role": "system", "content": system})
    tools = _objects(source, "tools", row.get("tools"))
    kept, tokenizer = _kept(source, row.get(REGENERATED))
    return Conversation(tuple(parsed), tuple(tools), kept, tokenizer)


def _tokenised(source: str, row: Mapping[str, Any]) -> Tokenised:
    ids, mask = _ids(source, "input_ids", row["input_ids"]), row.get("loss_mask")
    if not isinstance(mask, list) or len(mask) != len(ids) or any(m not in (0, 1) for m in mask):
        raise RecordError(source, f"loss_mask is not a list of {len(ids)} zeros and ones")
    return Tokenised(ids, tuple(int(m) for m in mask))


def _ids(source: str, where: str, ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise RecordError(source, f"{where} is not a list of non-negative integers")
    return tuple(ids)


def _kept(source: str, fields: Any) -> tuple[dict[int, KeptTokens], str]:
    if not isinstance(fields, Mapping):  # some other tool's field of the same name
        return {}, ""
    kept = {}
    answers = _objects(source, f"{REGENERATED}.answers", fields.get("answers"))
    for i, answer in enumerate(answers):
        where = f"{REGENERATED}.answers[{i}]"
        if type(answer.get("message")) is not int:
            raise RecordError(source, f"{where}.message is not the index of a message")
        prompt, written = (_ids(source, f"{where}.{key}", answer.get(key)) for key in ("prompt_ids", "answer_ids"))
        kept[answer["message"]] = KeptTokens(prompt, written, str(answer.get("digest")))
    return kept, str(fields.get("tokenizer"))


def _formatted(source: str, row: Mapping[str, Any]) -> Formatted:
    text, spans = _text(source, "text", row["text"]), row["spans"]
    pairs = isinstance(spans, list) and all(isinstance(s, list) and len(s) == 2 for s in spans)
    if not pairs or not all(type(place) is int for span in spans for place in span):
        raise RecordError(source, "spans is not a list of [start, stop] pairs")
    if any(not 0 <= start <= stop <= len(text) for start, stop in spans):
        raise RecordError(source, f"a span lies outside the text of {len(text)} characters")
    return Formatted(text, tuple((start, stop) for start, stop in spans))


def _message(source: str, where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RecordError(source, f"{where} is not an object")
    message = _without_nulls(message)
    name = message.get("role", message.get("from"))
    role = _ROLES.get(str(name).strip().lower())
    if role is None:
        raise RecordError(
            source, f"{where} has the role {short(name)}; use one of {', '.join(sorted(set(_ROLES.values())))}"
        )
    legacy = [message["function_call"]] if message.get("function_call") else None
    calls = _tool_calls(source, where, message.get("tool_calls") or legacy)
    reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
    content = message.get("content", message.get("value"))
    if content is None and not calls and not reasoning:
        raise RecordError(source, f"{where} has no content")
    parsed: dict[str, Any] = {"role": role, "content": ""}
    if content is not None:
        parsed["content"] = _text(source, f"{where}.content", content)
    if reasoning:
        parsed["reasoning_content"] = _text(source, f"{where}.reasoning_content", reasoning)
    if calls:
        parsed["tool_calls"] = calls
    weight = next((key for key in _WEIGHTS if key in message), None)
    if role == "assistant" and weight is not None:
        if message[weight] not in (0, 1):
            raise RecordError(source, f"{where}.{weight} is {short(message[weight])}; use 0 (not learnt) or 1")
        parsed["weight"] = int(message[weight])
    return parsed | {key: message[key] for key in ("name", "tool_call_id", "finish_reason") if key in message}


def _text(source: str, where: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_part(source, f"{where}[{i}]", part) for i, part in enumerate(value))
    raise RecordError(source, f"{where} is a JSON {type(value).__name__}, not text")


def _part(source: str, where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RecordError(source, f"{where} is a JSON {type(part).__name__}, not text")
    kind, text = part.get("type", "text"), part.get("text")
    if kind not in _TEXT_PARTS:
        raise RecordError(source, f"{where} is of the type {short(kind)}; SpecForge trains on text only")
    return "" if text is None else _text(source, f"{where}.text", text)


def _tool_calls(source: str, where: str, calls: Any) -> list[dict[str, Any]]:
    parsed = []
    for call in _objects(source, f"{where}.tool_calls", calls):
        function = call.get("function") or call
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RecordError(source, f"{where}.tool_calls has a call without a function name")
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments.strip():
            _parse(source, f"{where}.tool_calls: arguments of {short(function['name'])}", arguments)
        function = {**function, "arguments": arguments or {}}
        parsed.append({**_without_nulls(call), "type": "function", "function": function})
    return parsed


def with_arguments(message: Mapping[str, Any], *, as_text: bool) -> dict[str, Any]:
    """A message whose tool calls have their arguments as JSON text, or as the values that the text says."""
    calls = []
    for call in message.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        if as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not as_text and isinstance(arguments, str):
            arguments = parse_json(arguments) if arguments.strip() else {}
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls} if calls else dict(message)


def _objects(source: str, where: str, value: Any) -> list[dict[str, Any]]:
    """A list of objects, or its JSON text, which is how tables keep lists of different objects."""
    if isinstance(value, str):
        value = _parse(source, where, value) if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise RecordError(source, f"{where} is not a list of objects")
    return [dict(item) for item in value]


def _parse(source: str, where: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise RecordError(source, f"{where}: {error}") from error
