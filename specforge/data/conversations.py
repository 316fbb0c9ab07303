"""Reading training data: conversations, formatted text or token ids, from local files or a hub dataset.

Accepted records (one JSON object a line in ``.jsonl``, or a list in ``.json``):

- OpenAI: ``{"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}``
- ShareGPT: ``{"conversations": [{"from": "human", "value": ...}, ...]}``
- formatted: ``{"prompt": ..., "response": ...}``, or ``{"text": ..., "spans": [[start, stop], ...]}`` with
  character offsets of what the assistant wrote
- tokenised: ``{"input_ids": [...], "loss_mask": [...]}``

``id`` and ``split`` (``train`` or ``heldout``) are kept where present; other fields are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge.errors import UserError

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "assistant": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "function": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip
_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI form, with ``reasoning_content`` and ``tool_calls`` where they have them."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()


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
    elif path.suffix == ".json":
        yield from _json_rows(path)
    elif path.suffix == ".jsonl":
        yield from _jsonl_rows(path)
    else:
        raise UserError(f"{path}: use a .jsonl or .json file, or the name of a hub dataset")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            source = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                yield source, json.loads(line)
            except UnicodeDecodeError as error:
                yield source, RecordError(source, f"not UTF-8 ({error.reason})")
            except json.JSONDecodeError as error:
                yield source, RecordError(source, f"not valid JSON ({error.msg} at column {error.colno})")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from specforge.files import read_json

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
            f"data {name!r}: no such file; for hub datasets install the extra: pip install 'specforge[hub]'"
        ) from error
    try:
        rows = load_dataset(name, subset, split=split, streaming=True)
        for number, row in enumerate(rows):
            yield f"{name}[{split}], row {number}", row
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"data {name!r}: no such file, and not readable as a hub dataset ({reason})"
        ) from error


def parse_record(source: str, row: Any) -> DataRecord:
    """Turn a raw record into one of the accepted forms.

    Raises:
        RecordError: it is none of them, or a field is malformed.
    """
    if isinstance(row, RecordError):
        raise row
    if not isinstance(row, Mapping):
        raise RecordError(source, f"a JSON {type(row).__name__}, not an object")
    split = row.get("split")
    if split not in (None, "train", "heldout"):
        raise RecordError(source, f"split is {split!r}; use train or heldout")
    name = str(row.get("id", source))
    return DataRecord(_content(source, row), source, name, split)


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
        raise RecordError(
            source, "has none of messages, conversations, prompt and response, text and spans, input_ids"
        )
    if not isinstance(messages, list) or not messages:
        raise RecordError(source, "messages is not a list with at least one message")
    parsed = tuple(_message(source, i, m) for i, m in enumerate(messages))
    return Conversation(parsed, _tools(source, row.get("tools")))


def _tokenised(source: str, row: Mapping[str, Any]) -> Tokenised:
    ids, mask = row["input_ids"], row.get("loss_mask")
    if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise RecordError(source, "input_ids is not a list of non-negative integers")
    if not isinstance(mask, list) or len(mask) != len(ids) or any(m not in (0, 1) for m in mask):
        raise RecordError(source, f"loss_mask is not a list of {len(ids)} zeros and ones")
    return Tokenised(tuple(ids), tuple(int(m) for m in mask))


def _formatted(source: str, row: Mapping[str, Any]) -> Formatted:
    text = _text(source, "text", row["text"])
    try:
        spans = tuple((int(start), int(stop)) for start, stop in row["spans"])
    except (TypeError, ValueError) as error:
        raise RecordError(source, "spans is not a list of [start, stop] pairs") from error
    if any(not 0 <= start <= stop <= len(text) for start, stop in spans):
        raise RecordError(source, f"a span lies outside the text of {len(text)} characters")
    return Formatted(text, spans)


def _message(source: str, index: int, message: Any) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RecordError(source, f"{where} is not an object")
    name = message.get("role", message.get("from"))
    role = _ROLES.get(str(name))
    if role is None:
        raise RecordError(
            source, f"{where} has the role {name!r}; use one of {', '.join(sorted(set(_ROLES.values())))}"
        )
    parsed: dict[str, Any] = {"role": role}
    content = message.get("content", message.get("value"))
    if content is None and not message.get("tool_calls"):
        raise RecordError(source, f"{where} has no content")
    parsed["content"] = _text(source, f"{where}.content", content if content is not None else "")
    reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
    if reasoning is not None:
        parsed["reasoning_content"] = _text(source, f"{where}.reasoning_content", reasoning)
    if message.get("tool_calls"):
        parsed["tool_calls"] = _tool_calls(source, where, message["tool_calls"])
    for key in ("name", "tool_call_id", "finish_reason"):
        if message.get(key) is not None:
            parsed[key] = message[key]
    return parsed


def _text(source: str, where: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value):
        return "".join(str(p.get("text", "")) for p in value)
    raise RecordError(source, f"{where} is not text (SpecForge trains on text only)")


def _tool_calls(source: str, where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RecordError(source, f"{where}.tool_calls is not a list")
    parsed = []
    for call in calls:
        function = dict(call.get("function", call)) if isinstance(call, Mapping) else {}
        if "name" not in function:
            raise RecordError(source, f"{where}.tool_calls has a call without a function name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _loads(
                source, f"{where}.tool_calls: arguments of {function['name']}", arguments or "{}"
            )
        parsed.append({**call, "type": "function", "function": {**function, "arguments": arguments}})
    return parsed


def _tools(source: str, tools: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(tools, str):
        tools = _loads(source, "tools", tools) if tools.strip() else None
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RecordError(source, "tools is not a list of objects")
    return tuple(dict(tool) for tool in tools)


def _loads(source: str, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(source, f"{where} is not valid JSON ({error.msg})") from error
