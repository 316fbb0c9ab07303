"""Reading training data: conversations, formatted text or token ids, from local files or a hub dataset.

Accepted records (one JSON object per line in ``.jsonl``, or a list in ``.json``):

- OpenAI: ``{"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}``
- ShareGPT: ``{"conversations": [{"from": "human", "value": ...}, ...], "system": ...}``
- formatted: ``{"prompt": ..., "response": ...}``, or ``{"text": ..., "spans": [[start, stop], ...]}`` with the
  character ranges that the assistant wrote
- tokenised: ``{"input_ids": [...], "loss_mask": [...]}``

``id`` (text or a whole number) and ``split`` (``train`` or ``heldout``) are kept, and ``regenerated`` (the token ids
that `specforge regenerate` stores) is used if present. Other fields are ignored. A null field counts as absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specforge.contracts import content_id
from specforge.errors import UserError
from specforge.files import first_line, parse_json, read_json
from specforge.packages import install_hint

_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "assistant", "bot", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response"), "tool"),
    "system": "system",
    "developer": "developer",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "train")  # OpenAI's name, Axolotl's
_TEXT_PARTS = ("text", "input_text", "output_text")
REGENERATED = "regenerated"


@dataclass(frozen=True)
class KeptTokens:
    """Token ids of one answer, stored when the target generated it."""

    prompt_ids: tuple[int, ...]  # the target's prompt
    answer_ids: tuple[int, ...]  # the target's answer, including its end token unless it was cut off
    digest: str  # hash of the conversation up to and including the answer; it differs if the text was edited later


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI form."""

    # role and content, plus reasoning_content and tool_calls if present; the arguments of a call are text or JSON
    # values, as in the record
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()  # descriptions of the tools that may be called
    kept: Mapping[int, KeptTokens] = field(default_factory=dict)  # stored tokens of answers, by message index
    tokenizer: str = ""  # fingerprint of the tokenizer and chat template that produced the stored tokens

    def digest(self, count: int) -> str:
        """Hash of the tools and of the parts of the first ``count`` messages that a chat template can read."""
        return content_id([rendered(m) for m in self.messages[:count]], list(self.tools))

    @property
    def first_answer(self) -> int | None:
        """Index of the assistant's first message that is an answer; None if there is none.

        An assistant message before the first user message (a greeting) is not an answer. Without any user message,
        the assistant answers the system prompt.
        """
        roles = [m["role"] for m in self.messages]
        opening = 1 if roles[0] != "assistant" else len(roles)
        asked = next((i for i, role in enumerate(roles) if role in ("user", "tool")), opening)
        return next((i for i, role in enumerate(roles) if i >= asked and role == "assistant"), None)

    def answers(self) -> list[int]:
        """Indices of the assistant messages that are answers and are trained on (``weight: 0`` excludes a message)."""
        first = len(self.messages) if self.first_answer is None else self.first_answer
        return [
            i for i, m in enumerate(self.messages) if i >= first and m["role"] == "assistant" and m.get("weight", 1)
        ]


def rendered(message: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a message that a chat template can read."""
    return {key: value for key, value in message.items() if key not in ("finish_reason", "weight")}


@dataclass(frozen=True)
class Formatted:
    """Text that is already formatted; ``spans`` are the character ranges that count towards the loss."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tokenised:
    """Token ids and their loss mask."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


@dataclass(frozen=True)
class DataRecord:
    """One parsed record."""

    content: Conversation | Formatted | Tokenised
    source: str  # file and line, for error messages
    id: str  # the record's id, or else the source
    split: str | None = None  # train, heldout, or None if the record names no split


class RecordError(UserError):
    """A record cannot be used; the message starts with its file and line."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}")


def read_raw(data: str, split: str = "train", subset: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield ``(source, JSON value or RecordError)`` for each record of a local file or a hub dataset.

    Args:
        data: path of a ``.jsonl`` or ``.json`` file, or the name of a hub dataset.
        split: split of a hub dataset.
        subset: configuration of a hub dataset.

    Raises:
        UserError: the file or dataset does not exist or cannot be read.
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
    if start.startswith(b"{"):  # JSON Lines under the other suffix
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
    """Parse a raw record.

    Raises:
        RecordError: the record has none of the accepted forms, or a field is malformed.
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
    name = row.get("id", source.encode(errors="replace").decode())
    if type(name) not in (str, int):
        raise RecordError(source, f"id is {short(name)}; use text or a whole number")
    content = _content(source, row)
    name = str(name)
    if not isinstance(content, Tokenised):
        _check_writable(source, [name, vars(content)])
    return DataRecord(content, source, name, split)


def short(value: Any) -> str:
    """A value for an error message, shortened to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Drop null fields: tables have every column in every row and mark missing values by null (pandas: NaN)."""
    return {key: value for key, value in fields.items() if value is not None and value == value}


def _check_writable(source: str, content: Any) -> None:
    """Reject values that JSON can express but files and tokenizers cannot store: lone surrogates, NaN, infinity."""
    try:
        json.dumps(content, ensure_ascii=False, allow_nan=False, default=vars).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start : error.start + 1].encode("unicode-escape").decode()
        raise RecordError(source, f"contains {found}, half of a surrogate pair, which is not a character") from error
    except ValueError as error:
        raise RecordError(source, "contains NaN or infinity, which are not valid JSON") from error


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
    if not isinstance(fields, Mapping):  # another tool's field of the same name
        return {}, ""
    kept = {}
    answers = _objects(source, f"{REGENERATED}.answers", fields.get("answers"))
    for i, answer in enumerate(answers):
        where = f"{REGENERATED}.answers[{i}]"
        if type(answer.get("message")) is not int:
            raise RecordError(source, f"{where}.message is not the index of a message")
        if "prompt_ids" not in answer and "answer_ids" not in answer:
            continue  # from a server that returns text only
        prompt, written = (_ids(source, f"{where}.{key}", answer.get(key)) for key in ("prompt_ids", "answer_ids"))
        kept[answer["message"]] = KeptTokens(prompt, written, str(answer.get("digest")))
    return kept, str(fields.get("tokenizer"))


def _formatted(source: str, row: Mapping[str, Any]) -> Formatted:
    text, spans = _text(source, "text", row["text"]), row["spans"]
    pairs = isinstance(spans, list) and all(isinstance(s, list) and len(s) == 2 for s in spans)
    if not pairs or not all(type(place) is int for span in spans for place in span):
        raise RecordError(source, "spans is not a list of [start, stop] pairs")
    if any(not 0 <= start <= stop <= len(text) for start, stop in spans):
        raise RecordError(source, f"a span exceeds the text of {len(text)} characters")
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
            raise RecordError(source, f"{where}.{weight} is {short(message[weight])}; use 0 (not trained on) or 1")
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
        raise RecordError(source, f"{where} has the type {short(kind)}; SpecForge trains on text only")
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
    """A copy of a message with the arguments of its tool calls as JSON text or as JSON values."""
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
    """A list of objects, given as such or as JSON text (tables store lists of heterogeneous objects as text)."""
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
