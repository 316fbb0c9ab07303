"""The target's own answers to prompts: what a draft should be trained on.

A draft learns the distribution of its target, so the target's answers teach it more than anybody
else's (peers report about 10 % longer acceptance). Every assistant turn is generated anew, in order, with the
history that the target itself wrote. Records are answered in batches of similar length, and each batch is
appended and synced when it is done: a run that was killed goes on with the next batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specforge.data.conversations import Conversation, DataRecord
from specforge.data.templates import ChatTemplate
from specforge.errors import UserError
from specforge.files import disk_error, write_file
from specforge.inference.target_engine.hf import HFTargetEngine


@dataclass(frozen=True)
class RegenerateOptions:
    """How answers are generated.

    Args:
        max_new_tokens: most tokens of an answer; one that reaches it is marked as cut off.
        batch_size: conversations at a time.
        temperature: 0 for greedy.
        top_p: nucleus of sampling.
        seed: of sampling.
    """

    max_new_tokens: int = 512
    batch_size: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def regenerate(
    records: Sequence[DataRecord], engine: HFTargetEngine, template: ChatTemplate, output: Path,
    options: RegenerateOptions,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Answer every conversation and append it to a JSONL file; at the end put the file into the order of ``records``.

    Args:
        records: conversations; their assistant turns are replaced.
        engine: the target.
        template: its chat template.
        output: records whose id is in it already are skipped.
        options: decoding.

    Yields:
        Conversations and generated tokens of each finished batch.

    Raises:
        UserError: a record is not a conversation, or two have the same id.
    """
    for record in records:
        if not isinstance(record.content, Conversation):
            raise UserError(f"{record.source}: not a conversation, so it cannot be answered anew")
    ids = [record.id for record in records]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise UserError(f"id {twice!r} is used twice; answers are resumed by id")
    done = _finished(output)
    todo = [record for record in records if record.id not in done]
    todo.sort(key=_length)
    for start in range(0, len(todo), options.batch_size):
        batch = todo[start : start + options.batch_size]
        answered, tokens = _answer(batch, engine, template, options)
        _append(output, [_row(record, messages) for record, messages in zip(batch, answered, strict=True)])
        yield len(batch), tokens
    _sort(output, ids)


def _length(record: DataRecord) -> int:
    return sum(len(m["content"]) for m in record.content.messages)  # type: ignore[union-attr, misc]


def _sort(output: Path, ids: Sequence[str]) -> None:
    order = {id_: i for i, id_ in enumerate(ids)}
    lines = output.read_bytes().splitlines(keepends=True) if output.exists() else []
    ordered = sorted(lines, key=lambda line: order.get(str(json.loads(line)["id"]), len(order)))
    if ordered != lines:
        write_file(output, b"".join(ordered))


def _answer(
    batch: Sequence[DataRecord], engine: HFTargetEngine, template: ChatTemplate, options: RegenerateOptions
) -> tuple[list[list[dict[str, Any]]], int]:
    histories: list[list[dict[str, Any]]] = [[] for _ in batch]
    pending = [list(record.content.messages) for record in batch]  # type: ignore[union-attr]
    tokens = 0
    while True:
        asking = []
        for i, messages in enumerate(pending):
            while messages and messages[0]["role"] != "assistant":
                histories[i].append(messages.pop(0))
            if messages or (histories[i] and histories[i][-1]["role"] != "assistant"):
                asking.append(i)
        if not asking:
            return histories, tokens
        prompts = []
        for i in asking:
            if pending[i]:
                pending[i].pop(0)
            conversation = replace(batch[i].content, messages=tuple(histories[i]))  # type: ignore[arg-type]
            text = template.prompt(conversation)  # type: ignore[arg-type]
            prompts.append(template.tokenizer(text, add_special_tokens=False)["input_ids"])
        answers = engine.generate(
            prompts, max_new_tokens=options.max_new_tokens, end_ids=sorted(template.end_ids),
            temperature=options.temperature, top_p=options.top_p, seed=options.seed,
        )  # fmt: skip
        for i, answer in zip(asking, answers, strict=True):
            tokens += len(answer)
            ended = answer[-1] in template.end_ids
            text = template.tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=False)
            finish = "stop" if ended else "length"
            histories[i].append({"role": "assistant", "content": text, "finish_reason": finish})
            if not ended:
                # The target was cut off in mid-sentence: what the user said next does not follow from it.
                pending[i].clear()


def _row(record: DataRecord, messages: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": record.id}
    if record.split is not None:
        row["split"] = record.split
    row["messages"] = messages
    if record.content.tools:  # type: ignore[union-attr]
        row["tools"] = list(record.content.tools)  # type: ignore[union-attr]
    return row


def _finished(output: Path) -> set[str]:
    if not output.exists():
        return set()
    content = output.read_bytes()
    keep = content.rfind(b"\n") + 1
    try:
        done = {str(json.loads(line)["id"]) for line in content[:keep].splitlines() if line.strip()}
        cut_off = not content[keep:] or b'{"id":'.startswith(content[keep:][:6])
    except (ValueError, KeyError, TypeError, RecursionError):
        cut_off = False
    if not cut_off:
        raise UserError(
            f"{output}: holds something else than answers of `specforge regenerate`; name a new file"
        )
    if keep < len(content):
        os.truncate(output, keep)
    return done


def _append(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    size = output.stat().st_size if output.exists() else 0
    try:
        with output.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if output.exists():
            os.truncate(output, size)
        raise disk_error(output, error) from error
