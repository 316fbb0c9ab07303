"""Replaces the answers in conversations by answers of the target.

A draft learns the distribution of its target, so it trains best on text that the target wrote (published results report
about 10 % longer acceptance). Every assistant turn is generated in order, with the target's own earlier answers as
history. Records are answered in batches of similar length, and each finished batch is appended and synced, so an
interrupted run resumes with the next batch.

Text may tokenise differently from how it was generated, and some chat templates render an answer differently from how
it was written. A record therefore stores, next to its messages, the token ids of every prompt and answer
(``regenerated``), with the target, template and options used; `specforge prepare` uses those tokens.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from specforge.contracts import content_id
from specforge.data.conversations import REGENERATED, Conversation, DataRecord, rendered, short
from specforge.data.templates import ChatTemplate
from specforge.data.turns import Refusal
from specforge.errors import UserError
from specforge.files import LineLog, first_line, parse_json, write_file
from specforge.inference.target_engine.hf import HFTargetEngine
from specforge.options import NonNegativeFloat, PositiveInt, PositiveShare, Seed

_START = b'{"id": '


@dataclass(frozen=True)
class RegenerateOptions:
    """How answers are generated.

    Args:
        max_new_tokens: maximum number of tokens of an answer; an answer that reaches it is marked as truncated.
        batch_size: number of conversations answered together.
        temperature: sampling temperature; 0 for greedy decoding.
        top_p: nucleus sampling: sample from the smallest set of tokens with this total probability.
        seed: random seed for sampling.
    """

    max_new_tokens: PositiveInt = 512
    batch_size: PositiveInt = 32
    temperature: NonNegativeFloat = 0.0
    top_p: PositiveShare = 1.0
    seed: Seed = 0


@dataclass(frozen=True)
class _Question:
    """The part of a conversation that the target answers."""

    record: DataRecord
    asked: tuple[tuple[dict[str, Any], ...], ...]  # the messages before each answer, without the answers
    tool_results: int  # number of tool results left out because their calls are replaced

    @classmethod
    def of(cls, record: DataRecord) -> _Question:
        """Split a conversation at its answers.

        Messages that continue an answer (results of its tool calls, further answers) are left out, because they do not
        follow from the target's answer.
        """
        if not isinstance(record.content, Conversation):
            raise UserError(f"{record.source}: not a conversation, so it has no answers to replace")
        replaced = set(record.content.answers())
        asked: list[list[dict[str, Any]]] = [[]]
        answered, tool_results = False, 0
        for i, message in enumerate(record.content.messages):
            if answered and message["role"] in ("assistant", "tool"):
                tool_results += message["role"] == "tool"
            elif i in replaced:
                asked.append([])
                answered = True
            else:
                asked[-1].append(message)
                answered = False
        if not asked[-1] or asked[-1][-1]["role"] == "assistant":
            asked.pop()
        if not asked:
            raise UserError(f"{record.source}: it contains no turn for the target to answer")
        return cls(record, tuple(tuple(messages) for messages in asked), tool_results)

    @property
    def digest(self) -> str:
        """Hash of all messages that the target answers."""
        tools = list(self.record.content.tools)  # type: ignore[union-attr]
        return content_id([[rendered(m) for m in messages] for messages in self.asked], tools)


class Regeneration:
    """Answers conversations and appends them to a file.

    Args:
        records: conversations; their assistant turns are replaced.
        template: the target's chat template.
        output: JSONL file; conversations with an id that it already contains are skipped.
        options: how answers are generated.
        target: fingerprint of the target.
        dtype: compute dtype of the target.

    Attributes:
        todo: the conversations that are not answered yet.

    Raises:
        UserError: the template rejects a conversation, two have the same id, or the file comes from another target,
            template, options or conversations.
    """

    def __init__(
        self,
        records: Sequence[DataRecord],
        template: ChatTemplate,
        output: Path,
        options: RegenerateOptions,
        target: str,
        dtype: str,
    ) -> None:
        if not template.end_ids:
            raise UserError(
                f"tokenizer {template.tokenizer.name_or_path}: neither it nor generation_config.json names an end "
                "token, so answers would never end; set eos_token_id in generation_config.json"
            )
        self.template, self.output, self.options = template, output, options
        how = {key: value for key, value in asdict(options).items() if key != "batch_size"}
        self.made = {"target": target, "tokenizer": template.fingerprint, "dtype": dtype, **how}
        self.questions: dict[str, _Question] = {}
        for record in records:
            if record.id in self.questions:
                first = self.questions[record.id].record.source
                raise UserError(
                    f"{record.source}: has the same id {short(record.id)} as {first}; give each record its own"
                )
            self.questions[record.id] = _Question.of(record)
        if not records:
            raise UserError("no conversations to answer")
        done = self._finished()
        self.todo = [question for id_, question in self.questions.items() if id_ not in done]
        # Render every first prompt now, so that a record that the template rejects is reported at once.
        lengths = {question.record.id: len(_Dialogue(question, template).prompt) for question in self.todo}
        self.todo.sort(key=lambda question: lengths[question.record.id])

    def run(self, engine: Callable[[], HFTargetEngine]) -> Iterator[tuple[int, int]]:
        """Answer batch by batch, then sort the file into the order of the records.

        Args:
            engine: loads the target; called only if there is something to answer.

        Yields:
            Numbers of conversations and generated tokens of each finished batch.
        """
        target = engine() if self.todo else None
        for start in range(0, len(self.todo), self.options.batch_size):
            questions = self.todo[start : start + self.options.batch_size]
            batch = [_Dialogue(question, self.template) for question in questions]
            tokens = self._answer(batch, target)
            self.output.parent.mkdir(parents=True, exist_ok=True)
            LineLog(self.output).append(json.dumps(dialogue.row(self.made), ensure_ascii=False) for dialogue in batch)
            yield len(batch), tokens
        self._sort()

    def losses(self) -> dict[str, int]:
        """Numbers of answers cut off, turns left out and tool results left out in the whole file."""
        lost: Counter[str] = Counter()
        for row in self._rows():
            question = self.questions.get(str(row["id"]))
            if question is not None:
                finish = _finish_reasons(row)
                lost[f"answers cut off at max_new_tokens ({self.options.max_new_tokens})"] += finish.count("length")
                lost["turns left out, because the chat template rejects an earlier answer"] += len(
                    question.asked
                ) - len(finish)
                lost["tool results left out, because their calls are replaced"] += question.tool_results
        return dict(+lost)

    def _answer(self, batch: Sequence[_Dialogue], engine: Any) -> int:
        tokens, options = 0, self.options
        while asking := [dialogue for dialogue in batch if dialogue.prompt]:
            answers = engine.generate(
                [dialogue.prompt for dialogue in asking],
                max_new_tokens=options.max_new_tokens,
                end_ids=sorted(self.template.end_ids),
                temperature=options.temperature,
                top_p=options.top_p,
                seed=options.seed,
            )
            for dialogue, answer in zip(asking, answers, strict=True):
                tokens += len(answer)
                dialogue.take(answer)
        return tokens

    def _sort(self) -> None:
        order = {id_: i for i, id_ in enumerate(self.questions)}
        lines = self.output.read_bytes().splitlines(keepends=True)
        ordered = sorted(lines, key=lambda line: order.get(str(json.loads(line)["id"]), len(order)))
        if ordered != lines:
            write_file(self.output, b"".join(ordered))

    def _rows(self) -> Iterator[dict[str, Any]]:
        with self.output.open("rb") as file:
            yield from map(json.loads, file)

    def _finished(self) -> set[str]:
        """Ids that are already answered; removes an incomplete last line."""
        try:
            content = self.output.read_bytes() if self.output.exists() else b""
        except OSError as error:
            raise UserError(f"{self.output}: cannot be read ({first_line(error)})") from error
        *lines, rest = content.split(b"\n")
        done: set[str] = set()
        for number, line in enumerate(lines, 1):
            done.add(self._checked(f"{self.output}, line {number}", line, done))
        if rest:
            if rest[: len(_START)] != _START[: len(rest)]:
                raise UserError(f"{self.output}: was not written by `specforge regenerate`; choose another --output")
            os.truncate(self.output, len(content) - len(rest))
        return done

    def _checked(self, where: str, line: bytes, done: set[str]) -> str:
        """The id of a finished record, after checking that it was generated as this run would generate it."""
        other = "choose another --output"
        try:
            row = parse_json(line)
            made, id_ = row[REGENERATED], str(row["id"])
            asked, answers, messages = made["asked"], made["answers"], row["messages"]
            _ = len(answers), messages[-1].get("finish_reason"), _finish_reasons(row)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: does not name the target that answered; {other}") from error
        for key, value in self.made.items():
            if made.get(key) != value:
                raise UserError(
                    f"{where}: was generated with {key} {short(made.get(key))}, not {short(value)}; {other}"
                )
        if id_ in self.questions and asked != self.questions[id_].digest:
            raise UserError(
                f"{where}: {short(id_)} answers different messages from those in "
                f"{self.questions[id_].record.source}; {other}"
            )
        if id_ in done:
            raise UserError(f"{where}: has the same id {short(id_)} as an earlier line; {other}")
        return id_


def _finish_reasons(row: dict[str, Any]) -> list[str]:
    """``stop`` or ``length`` for each generated answer of a finished record."""
    return [row["messages"][answer["message"]].get("finish_reason") for answer in row[REGENERATED]["answers"]]


class _Dialogue:
    """A conversation that is being answered.

    Attributes:
        prompt: token ids of the prompt for the next answer; empty if there is none.
    """

    def __init__(self, question: _Question, template: ChatTemplate) -> None:
        self.question, self.template = question, template
        self.messages: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any]] = []
        try:
            self.prompt = self._ask()
        except Refusal as error:
            raise UserError(f"{question.record.source}: {error}") from error

    def _ask(self) -> list[int]:
        """Append the next messages and render the prompt."""
        messages = [*self.messages, *self.question.asked[len(self.answers)]]
        prompt = self.template.ask(self._conversation(messages))
        self.messages = messages
        return list(prompt)

    def _conversation(self, messages: Sequence[dict[str, Any]]) -> Conversation:
        content: Any = self.question.record.content
        return replace(content, messages=tuple(messages), kept={}, tokenizer="")

    def take(self, answer: list[int]) -> None:
        """Add an answer, and prepare the next prompt if there is another turn."""
        ended = answer[-1] in self.template.end_ids
        text = self.template.decode(answer[:-1] if ended else answer)
        self.messages.append({"role": "assistant", "content": text, "finish_reason": "stop" if ended else "length"})
        self.answers.append(
            {
                "message": len(self.messages) - 1,
                "prompt_ids": self.prompt,
                "answer_ids": answer,
                "digest": self._conversation(self.messages).digest(len(self.messages)),
            }
        )
        self.prompt = []
        if len(self.answers) < len(self.question.asked):
            with suppress(Refusal):  # some templates reject the target's own answers
                self.prompt = self._ask()

    def row(self, made: dict[str, Any]) -> dict[str, Any]:
        """The finished record."""
        record, content = self.question.record, self.question.record.content
        row: dict[str, Any] = {"id": record.id}
        if record.split is not None:
            row["split"] = record.split
        row["messages"] = self.messages
        if content.tools:  # type: ignore[union-attr]
            row["tools"] = list(content.tools)  # type: ignore[union-attr]
        row[REGENERATED] = {**made, "asked": self.question.digest, "answers": self.answers}
        return row
