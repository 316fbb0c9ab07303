"""Replaces the answers in conversations by answers of the target.

A draft learns the distribution of its target, so it trains best on text that the target wrote (published results report
about 10 % longer acceptance). Every assistant turn is generated in order, with the target's own earlier answers as
history. The target answers batches of records of similar length; a server answers many records at a time, each by
itself. What is answered is appended and synced at once, so an interrupted run loses what was in flight at most.

Text may tokenise differently from how it was generated, and some chat templates render an answer differently from how
it was written. A record therefore stores, next to its messages, the token ids of every prompt and answer
(``regenerated``), with the target, template and options used; `specforge prepare` uses those tokens. A server that
returns no token ids answers messages instead, and the record has its text only.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from specforge.contracts import content_id
from specforge.data.conversations import REGENERATED, Conversation, DataRecord, RecordError, rendered, short
from specforge.data.templates import ChatTemplate
from specforge.data.turns import Refusal
from specforge.errors import UserError
from specforge.files import LineLog, first_line, parse_json, write_file
from specforge.inference.openai_server import ChatServer, Sampling, TokenServer, in_flight
from specforge.inference.server_client import RefusedError
from specforge.inference.target_engine.base import TargetEngine
from specforge.options import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    PresencePenalty,
    Seed,
    Share,
)

Writer = TargetEngine | TokenServer  # what continues token ids

logger = logging.getLogger(__name__)

_START = b'{"id": '
_ENGINE = ("engine", "dtype", "server", "model")  # what the engine stores about itself
_OTHER = "choose another --output"
_BAD_REQUEST = (400, 413, 422)  # HTTP: the server refuses this conversation, not every request


@dataclass(frozen=True)
class RegenerateOptions:
    """How answers are generated.

    Args:
        max_new_tokens: maximum number of tokens of an answer; an answer that reaches it is marked as truncated.
        batch_size: number of conversations answered together.
        temperature: sampling temperature; 0 for greedy decoding.
        top_p: nucleus sampling: sample from the smallest set of tokens with this total probability.
        top_k: sample from the k most likely tokens; 0 for all.
        min_p: leave out tokens that are less likely than this share of the most likely token's probability; needs a
            server.
        presence_penalty: lowers the logits of tokens that the answer already contains; needs a server.
        repetition_penalty: above 1, makes tokens that the prompt or the answer already contains less likely; needs a
            server.
        seed: random seed for sampling; with a server, each answer has a seed of its own, derived from this one.
    """

    max_new_tokens: PositiveInt = 512
    batch_size: PositiveInt = 32
    temperature: NonNegativeFloat = 0.0
    top_p: PositiveShare = 1.0
    top_k: NonNegativeInt = 0
    min_p: Share = 0.0
    presence_penalty: PresencePenalty = 0.0
    repetition_penalty: PositiveFloat = 1.0
    seed: Seed = 0

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(**{f.name: getattr(self, f.name) for f in fields(Sampling)})

    def recorded(self) -> dict[str, Any]:
        """The options that decide what is generated; new ones only if they are used, so that older files resume."""
        later = {f.name: f.default for f in fields(Sampling) if f.name not in ("temperature", "top_p")}
        found = {key: value for key, value in asdict(self).items() if key != "batch_size"}
        return {key: value for key, value in found.items() if key not in later or value != later[key]}


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

    Attributes:
        todo: the conversations that are not answered yet.
        refused: the conversations that a server refuses to answer in this run (file and line), and why.

    Raises:
        UserError: there is no conversation, the template rejects one, two have the same id, or the file comes from
            another target, template, options or conversations.
    """

    def __init__(
        self,
        records: Sequence[DataRecord],
        template: ChatTemplate,
        output: Path,
        options: RegenerateOptions,
        target: str,
    ) -> None:
        if not template.end_ids:
            raise UserError(
                f"tokenizer {template.tokenizer.name_or_path}: neither it nor generation_config.json names an end "
                "token, so answers would never end; set eos_token_id in generation_config.json"
            )
        self.template, self.output, self.options = template, output, options
        self.made = {"target": target, "tokenizer": template.fingerprint, **options.recorded()}
        self._answered_by: dict[str, tuple[str, dict[str, Any]]] = {}  # what the file names, and where it does first
        self.refused: dict[str, str] = {}
        self.questions: dict[str, _Question] = {}
        for record in records:
            if record.id in self.questions:
                first = self.questions[record.id].record.source
                raise UserError(
                    f"{record.source}: has the same id {short(record.id)} as {first}; give each record its own"
                )
            self.questions[record.id] = _Question.of(record)
        if not records:
            raise UserError("--data holds no conversations to answer")
        done = self._finished()
        self.todo = [question for id_, question in self.questions.items() if id_ not in done]
        # Render every first prompt now, so that a record that the template rejects is reported at once.
        lengths = {question.record.id: len(_Dialogue(question, template).prompt) for question in self.todo}
        self.todo.sort(key=lambda question: lengths[question.record.id])

    def answered_by(self, engine: Mapping[str, str]) -> None:
        """Name what answers; before :meth:`run`.

        Args:
            engine: what the engine stores about itself, such as the compute dtype.

        Raises:
            UserError: the file comes from another engine.
        """
        for where, before in self._answered_by.values():
            _check_made(where, before, engine)
        self.made = {key: self.made[key] for key in ("target", "tokenizer")} | dict(engine) | self.made

    def run(self, engine: Callable[[], Writer | ChatServer]) -> Iterator[tuple[int, int]]:
        """Answer, then sort the file into the order of the records.

        Args:
            engine: loads the target or connects to a server; called only if there is something to answer.

        Yields:
            Numbers of conversations and generated tokens, whenever some are finished.
        """
        if self.todo:
            with closing(engine()) as writer:
                yield from self._answer(writer)
        self._sort()

    def _answer(self, writer: Writer | ChatServer) -> Iterator[tuple[int, int]]:
        limit = writer.concurrency
        size = 1 if limit else self.options.batch_size
        batches = [self.todo[i : i + size] for i in range(0, len(self.todo), size)]
        answered = partial(self._answered, writer)
        for batch, tokens in in_flight(answered, batches, limit) if limit else map(answered, batches):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            rows = [dialogue.row(self.made) for dialogue in batch if dialogue.answers]
            LineLog(self.output).append(json.dumps(row, ensure_ascii=False) for row in rows)
            yield len(rows), tokens

    def losses(self) -> dict[str, int]:
        """Numbers of answers cut off, turns left out and tool results left out in the whole file."""
        lost: Counter[str] = Counter()
        most = self.options.max_new_tokens
        for row in self._rows():
            question = self.questions.get(str(row["id"]))
            if question is not None:
                answers = row[REGENERATED]["answers"]
                cut = [a for a, reason in zip(answers, _finish_reasons(row), strict=True) if reason == "length"]
                early = sum(len(a.get("answer_ids", ())) not in (0, most) for a in cut)
                lost[f"answers cut off at max_new_tokens ({most})"] += len(cut) - early
                lost["answers cut off at the server's maximum length"] += early
                lost[f"turns left out, because {self._rejecting} an earlier answer"] += len(question.asked) - len(
                    answers
                )
                lost["tool results left out, because their calls are replaced"] += question.tool_results
        return dict(+lost)

    @property
    def _rejecting(self) -> str:
        return "the chat template" + (" or the server" if "server" in self.made else "") + " rejects"

    def _answered(self, writer: Writer | ChatServer, questions: Sequence[_Question]) -> tuple[list[_Dialogue], int]:
        """Answer all turns of some conversations; also returns the number of generated tokens."""
        batch, tokens = [_Dialogue(question, self.template) for question in questions], 0
        write = self._write_messages if isinstance(writer, ChatServer) else self._write_tokens
        while asking := [dialogue for dialogue in batch if dialogue.prompt]:
            try:
                tokens += write(writer, asking)  # type: ignore[arg-type]
            except (RefusedError, RecordError) as error:
                if isinstance(error, RefusedError) and error.status not in _BAD_REQUEST:
                    raise
                for dialogue in asking:
                    self._leave_out(dialogue, str(error))
        return batch, tokens

    def _leave_out(self, dialogue: _Dialogue, reason: str) -> None:
        dialogue.prompt = []
        source = dialogue.question.record.source
        if dialogue.answers:  # without the question that is not answered
            del dialogue.messages[dialogue.answers[-1]["message"] + 1 :]
        else:
            self.refused[source] = reason
        logger.warning("%s: answer %d is left out (%s)", source, len(dialogue.answers) + 1, reason)

    def _write_tokens(self, writer: Writer, asking: Sequence[_Dialogue]) -> int:
        options = self.options
        unused = {"min_p": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
        answers = writer.generate(
            [dialogue.prompt for dialogue in asking],
            max_new_tokens=options.max_new_tokens,
            end_ids=sorted(self.template.end_ids),
            seed=asking[0].seed(options.seed) if writer.concurrency else options.seed,
            **{key: value for key, value in vars(options.sampling).items() if value != unused.get(key)},
        )
        for dialogue, answer in zip(asking, answers, strict=True):
            dialogue.take(answer)
        return sum(map(len, answers))

    def _write_messages(self, server: ChatServer, asking: Sequence[_Dialogue]) -> int:
        tokens = 0
        for dialogue in asking:
            answer, count = server.answer(
                dialogue.messages,
                dialogue.tools,
                self.options.sampling,
                max_new_tokens=self.options.max_new_tokens,
                prompt_tokens=len(dialogue.prompt),
                seed=dialogue.seed(self.options.seed),
            )
            dialogue.take_message(answer)
            tokens += count
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
        """The id of a finished record, after checking that it was generated as this run would generate it.

        What answered is only noted, for :meth:`answered_by`.
        """
        try:
            row = parse_json(line)
            made, id_ = row[REGENERATED], str(row["id"])
            asked, answers, messages = made["asked"], made["answers"], row["messages"]
            _ = len(answers), messages[-1].get("finish_reason"), _finish_reasons(row)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: does not name the target that answered; {_OTHER}") from error
        by = {key: made[key] for key in _ENGINE if key in made}
        self._answered_by.setdefault(json.dumps(by), (where, by))
        rest = {key: value for key, value in made.items() if key not in (*_ENGINE, "asked", "answers")}
        _check_made(where, rest, self.made)
        if id_ in self.questions and asked != self.questions[id_].digest:
            raise UserError(
                f"{where}: {short(id_)} answers different messages from those in "
                f"{self.questions[id_].record.source}; {_OTHER}"
            )
        if id_ in done:
            raise UserError(f"{where}: has the same id {short(id_)} as an earlier line; {_OTHER}")
        return id_


def _check_made(where: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in dict.fromkeys([*now, *before]):
        if before.get(key) != now.get(key):
            values = f"{short(before.get(key))}, not {short(now.get(key))}"
            raise UserError(f"{where}: was generated with {key} {values}; {_OTHER}")


def _finish_reasons(row: dict[str, Any]) -> list[str]:
    """``stop``, ``length`` or ``tool_calls`` for each generated answer of a finished record."""
    return [row["messages"][answer["message"]].get("finish_reason") for answer in row[REGENERATED]["answers"]]


class _Dialogue:
    """A conversation that is being answered.

    Attributes:
        prompt: token ids of the prompt for the next answer; empty if there is none.
        messages: those before the next answer.
        tools: what the answer may call.
    """

    def __init__(self, question: _Question, template: ChatTemplate) -> None:
        self.question, self.template = question, template
        self.tools: tuple[dict[str, Any], ...] = question.record.content.tools  # type: ignore[union-attr]
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

    def seed(self, seed: int) -> int:
        """The seed of the next answer, whatever else is answered; below 2^31."""
        return int(content_id(seed, self.question.record.id, len(self.answers))[:8], 16) >> 1

    def take(self, answer: Sequence[int]) -> None:
        """Add an answer as token ids, and prepare the next prompt if there is another turn."""
        ended = answer[-1] in self.template.end_ids
        text = self.template.decode(answer[:-1] if ended else answer)
        self.messages.append({"role": "assistant", "content": text, "finish_reason": "stop" if ended else "length"})
        self._go_on(
            {
                "prompt_ids": self.prompt,
                "answer_ids": list(answer),
                "digest": self._conversation(self.messages).digest(len(self.messages)),
            }
        )

    def take_message(self, answer: dict[str, Any]) -> None:
        """Add an answer as a message, and prepare the next prompt if there is another turn."""
        self.messages.append(answer)
        self._go_on({})

    def _go_on(self, tokens: dict[str, Any]) -> None:
        self.answers.append({"message": len(self.messages) - 1, **tokens})
        self.prompt = []
        if len(self.answers) < len(self.question.asked):
            with suppress(Refusal):  # some templates reject the target's own answers
                self.prompt = self._ask()

    def row(self, made: dict[str, Any]) -> dict[str, Any]:
        """The finished record."""
        record = self.question.record
        row: dict[str, Any] = {"id": record.id}
        if record.split is not None:
            row["split"] = record.split
        row["messages"] = self.messages
        if self.tools:
            row["tools"] = list(self.tools)
        row[REGENERATED] = {**made, "asked": self.question.digest, "answers": self.answers}
        return row
