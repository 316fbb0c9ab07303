"""The target's own answers to prompts: what a draft should be trained on.

A draft learns the distribution of its target, so the target's answers teach it more than anybody
else's (peers report about 10 % longer acceptance). Every assistant turn is generated anew, in order, with the
history that the target itself wrote. Records are answered in batches of similar length, and each batch is
appended and synced when it is done: a run that was killed goes on with the next batch.

Text does not always come back as the tokens that it was written as, and not every chat template shows an answer as
it was written. So a record keeps, beside its messages, the token ids of every prompt and answer (``regenerated``), with
the target, template and options that they come from; `specforge prepare` learns those tokens.
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
from specforge.files import disk_error, first_line, parse_json, write_file
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
    """A conversation that the target answers.

    Attributes:
        record: where it comes from.
        asked: messages before each answer, the answers left out.
        tool_results: how many are left out, because they answer calls that are replaced.
    """

    record: DataRecord
    asked: tuple[tuple[dict[str, Any], ...], ...]
    tool_results: int

    @classmethod
    def of(cls, record: DataRecord) -> _Question:
        """Split a conversation at its answers.

        Behind an answer, whatever goes on with it (results of its tool calls, further answers) is left out up to the
        next message of somebody else: it does not follow from what the target writes instead.
        """
        if not isinstance(record.content, Conversation):
            raise UserError(f"{record.source}: not a conversation, so it cannot be answered anew")
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
            raise UserError(f"{record.source}: there is nothing in it for the target to answer")
        return cls(record, tuple(tuple(messages) for messages in asked), tool_results)

    @property
    def digest(self) -> str:
        """Hash of all that the target is asked."""
        tools = list(self.record.content.tools)  # type: ignore[union-attr]
        return content_id([[rendered(m) for m in messages] for messages in self.asked], tools)


class Regeneration:
    """Answers to conversations, in a file that grows.

    Args:
        records: conversations; their assistant turns are replaced.
        template: the target's chat template.
        output: JSONL file; records whose id is in it already are skipped.
        options: decoding.
        target: fingerprint of the target.
        dtype: compute dtype of the target.

    Attributes:
        todo: the records that are to be answered.

    Raises:
        UserError: a record cannot be asked, two have the same id, or the file was not made from the same target,
            template, options and conversations.
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
                "token, so no answer would end; set eos_token_id there"
            )
        self.template, self.output, self.options = template, output, options
        how = {key: value for key, value in asdict(options).items() if key != "batch_size"}
        self.made = {"target": target, "tokenizer": template.fingerprint, "dtype": dtype, **how}
        self.questions: dict[str, _Question] = {}
        for record in records:
            if record.id in self.questions:
                first = self.questions[record.id].record.source
                raise UserError(f"{record.source}: has the id {short(record.id)} of {first}; give each record its own")
            self.questions[record.id] = _Question.of(record)
        if not records:
            raise UserError("no conversations to answer")
        done = self._finished()
        self.todo = [question for id_, question in self.questions.items() if id_ not in done]
        # Asked before anything is answered, so that a record which cannot be asked is known at once.
        lengths = {question.record.id: len(_Dialogue(question, template).prompt) for question in self.todo}
        self.todo.sort(key=lambda question: lengths[question.record.id])

    def run(self, engine: Callable[[], HFTargetEngine]) -> Iterator[tuple[int, int]]:
        """Answer batch by batch; at the end put the file into the order of the records.

        Args:
            engine: makes the target; called only where something is to be answered.

        Yields:
            Conversations and generated tokens of each finished batch.
        """
        target = engine() if self.todo else None
        for start in range(0, len(self.todo), self.options.batch_size):
            questions = self.todo[start : start + self.options.batch_size]
            batch = [_Dialogue(question, self.template) for question in questions]
            tokens = self._answer(batch, target)
            self._append([dialogue.row(self.made) for dialogue in batch])
            yield len(batch), tokens
        self._sort()

    def losses(self) -> dict[str, int]:
        """What the whole file lacks, by reason."""
        lost: Counter[str] = Counter()
        for row in self._rows():
            question = self.questions.get(str(row["id"]))
            if question is not None:
                answers = row[REGENERATED]["answers"]
                finish = row["messages"][-1].get("finish_reason")
                lost[f"answers cut off at {self.options.max_new_tokens} tokens"] += finish == "length"
                lost["later turns left out"] += len(question.asked) - len(answers)
                lost["tool results left out, since their calls are replaced"] += question.tool_results
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
        """Ids that are answered already; a line that a crash cut off is removed."""
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
        """The id of a finished record, which must have been made as this run makes them."""
        other = "choose another --output"
        try:
            row = parse_json(line)
            made, id_ = row[REGENERATED], str(row["id"])
            asked, answers, messages = made["asked"], made["answers"], row["messages"]
            _ = len(answers), messages[-1].get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: does not say which target answered; {other}") from error
        for key, value in self.made.items():
            if made.get(key) != value:
                raise UserError(
                    f"{where}: was generated with {key} {short(made.get(key))}, not {short(value)}; {other}"
                )
        if id_ in self.questions and asked != self.questions[id_].digest:
            raise UserError(
                f"{where}: {short(id_)} answers other messages than {self.questions[id_].record.source} has; {other}"
            )
        if id_ in done:
            raise UserError(f"{where}: has the id {short(id_)} of a line before it; {other}")
        return id_

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        size = self.output.stat().st_size if self.output.exists() else 0
        try:
            with self.output.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self.output.exists():
                os.truncate(self.output, size)
            raise disk_error(self.output, error) from error


class _Dialogue:
    """A conversation while it is answered.

    Attributes:
        prompt: token ids that ask for the next answer; none where there is no more.
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
        """Put the next messages behind the last answer."""
        messages = [*self.messages, *self.question.asked[len(self.answers)]]
        prompt = self.template.ask(self._conversation(messages))
        self.messages = messages
        return list(prompt)

    def _conversation(self, messages: Sequence[dict[str, Any]]) -> Conversation:
        content: Any = self.question.record.content
        return replace(content, messages=tuple(messages), kept={}, tokenizer="")

    def take(self, answer: list[int]) -> None:
        """Add an answer, and ask for the next one, if there is one."""
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
        # Where the target was cut off in mid-sentence, what the user said next does not follow from it; and some
        # templates do not take back what the target wrote.
        if ended and len(self.answers) < len(self.question.asked):
            with suppress(Refusal):
                self.prompt = self._ask()

    def row(self, made: dict[str, Any]) -> dict[str, Any]:
        """The record with its answers."""
        record, content = self.question.record, self.question.record.content
        row: dict[str, Any] = {"id": record.id}
        if record.split is not None:
            row["split"] = record.split
        row["messages"] = self.messages
        if content.tools:  # type: ignore[union-attr]
            row["tools"] = list(content.tools)  # type: ignore[union-attr]
        row[REGENERATED] = {**made, "asked": self.question.digest, "answers": self.answers}
        return row
