"""Conversations to token ids and loss masks, through the tokenizer's own chat template.

An answer is learnt behind exactly the tokens that the target is asked with for it: the template's text for the
messages before it, with a generation prompt, tokenised as an engine does. The tokens of the answer follow them, so the
border between the two is always one between tokens, as it is in serving. What the answer is says the template too: its
text for the messages up to the answer, from where the generation prompt ends. Nothing about any template is built in.

Answers of a conversation share one document as long as each one's prompt begins with the prompt and the tokens of the
one before. Where it does not (the template drops old reasoning, or the tokenizer reads old text otherwise than it was
written), a new document begins, with the history that the target is shown then.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from specforge.contracts import content_id
from specforge.data.conversations import (
    Conversation,
    DataRecord,
    Formatted,
    KeptTokens,
    RecordError,
    Tokenised,
    rendered,
    short,
    with_arguments,
)
from specforge.data.turns import Asked, Refusal, TokenSample, Turn, TurnTokenizer, join
from specforge.errors import UserError
from specforge.files import first_line, read_json
from specforge.target_files import TargetFiles

# Templates that write the day of asking would make other samples of the same data every day; this is the date that
# Llama's templates write where they are not told one.
_DATE = date(2024, 7, 26)
_DATE_MACRO = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(
        f"|replace('%{d}', '{_DATE.strftime('%' + d)}')" for d in [*"aAbBcdDeFhHIjmMpSTuUVwWxXyY", "-d", "-m"]
    )
    + " }}{% endmacro %}\n"
)


class ChatTemplate:
    """A tokenizer with its chat template.

    Args:
        tokenizer: a fast transformers tokenizer.
        end_ids: ids that end a turn; what the template puts behind the last one is not learnt.
        last_turn_only: supervise only the last answer of a conversation.
        vocab_size: rows of the target's embedding; ids beyond it are refused.

    Attributes:
        fingerprint: hash of the vocabulary, the merges and the template.
        notes: what users should be told of the records, and how often.
    """

    def __init__(
        self, tokenizer: Any, end_ids: Sequence[int] = (), last_turn_only: bool = False, vocab_size: int | None = None
    ) -> None:  # fmt: skip
        if not tokenizer.is_fast:
            raise UserError(f"tokenizer {tokenizer.name_or_path}: has no fast form, so no character offsets")
        self.tokenizer = tokenizer
        self.last_turn_only = last_turn_only
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        ends = {tokenizer.eos_token_id, *end_ids}
        self.end_ids = frozenset(i for i in ends if i is not None)
        self.fingerprint = content_id(tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template or "")
        self._dated = "strftime_now" in str(tokenizer.chat_template)
        tokenizer.chat_template = _with_fixed_date(tokenizer.chat_template)
        self.notes: Counter[str] = Counter()
        self._tokens = TurnTokenizer(tokenizer, self.end_ids)

    @classmethod
    def load(
        cls, target: TargetFiles, chat_template: Path | None = None, last_turn_only: bool = False
    ) -> ChatTemplate:
        """The tokenizer of a target.

        Args:
            target: where it lies.
            chat_template: a Jinja file to use instead of the tokenizer's own template.
            last_turn_only: supervise only the last answer of a conversation.

        Raises:
            UserError: there is no tokenizer in the target's folder, or a file cannot be read.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(target.folder, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises plain exceptions
            raise UserError(f"{target.folder}: no usable tokenizer ({first_line(error)})") from error
        if chat_template is not None:
            try:
                tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{chat_template}: cannot be read ({first_line(error)})") from error
        return cls(tokenizer, _end_ids(target.folder), last_turn_only, target.vocab_size)

    def encode(self, record: DataRecord) -> list[TokenSample]:
        """Token samples of a record: one, or several where its answers do not share a text.

        Raises:
            RecordError: the template refuses the conversation, or nothing in it is to be learnt.
            UserError: there is no usable chat template.
        """
        try:
            samples = self._samples(record.content)
            for sample in samples:
                self._check(sample.input_ids)
        except Refusal as error:
            raise RecordError(record.source, str(error)) from error
        return samples

    def ask(self, conversation: Conversation) -> tuple[int, ...]:
        """Token ids that ask for the next answer.

        Raises:
            Refusal: the template or the tokenizer does not take the conversation.
        """
        messages = self._messages(conversation)
        ((prompt, _),) = self._tokens.encode([self._render(messages, conversation.tools, generate=True)])
        if not prompt:
            raise Refusal("the chat template renders nothing of it")
        self._check(prompt)
        return prompt

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self._tokens.decode(ids)

    def _samples(self, content: Conversation | Formatted | Tokenised) -> list[TokenSample]:
        if isinstance(content, Tokenised):
            samples = [TokenSample(content.input_ids, content.loss_mask)]
        else:
            turns = self._spans(content) if isinstance(content, Formatted) else self._answers(content)
            samples = join([turn for turn in turns if turn.learnt])
        if not samples or not any(samples[0].loss_mask):
            raise Refusal("the loss mask is empty: nothing in it is an answer to be learnt")
        return samples

    def _check(self, ids: Sequence[int]) -> None:
        top = max(ids)
        if top >= self.vocab_size:
            name = repr(self.tokenizer.convert_ids_to_tokens(top)) if top < len(self.tokenizer) else "a token"
            raise Refusal(
                f"{name} has the id {top}, beyond the {self.vocab_size} tokens of the target's embedding"
            )

    def _spans(self, content: Formatted) -> list[Turn]:
        text, spans = content.text, _merged(content.spans)
        ends = [*(start for start, _ in spans[1:]), len(text)]
        return self._tokens.turns(
            [
                Asked(text[:start], text[start:stop], text[stop:end])
                for (start, stop), end in zip(spans, ends, strict=False)
            ]
        )

    def _answers(self, conversation: Conversation) -> list[Turn]:
        wanted = conversation.answers()
        if self.last_turn_only:
            wanted = wanted[-1:]
        kept = self._kept(conversation)
        others = [i for i in wanted if i not in kept]
        messages = self._messages(conversation) if others else []
        asked = [
            replace(
                self._answer(messages, conversation.tools, i),
                cut_off=conversation.messages[i].get("finish_reason") == "length",
            )
            for i in others
        ]
        turns = dict(zip(others, self._tokens.turns(asked), strict=True))
        return [turns[i] if i in turns else Turn(kept[i].prompt_ids, kept[i].answer_ids) for i in wanted]

    def _kept(self, conversation: Conversation) -> dict[int, KeptTokens]:
        """Kept tokens that belong to this tokenizer and template, and to the text as it is now."""
        if conversation.kept and conversation.tokenizer != self.fingerprint:
            self.notes[
                "records with token ids of another tokenizer or chat template, learnt from their text"
            ] += 1
            return {}
        kept = {i: k for i, k in conversation.kept.items() if k.digest == conversation.digest(i + 1)}
        if len(kept) < len(conversation.kept):
            self.notes["records edited since their token ids were kept, learnt from their text"] += 1
        return kept

    def _messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """Messages as the template takes them: most read the arguments of a call as values, some join them as text."""
        if self._dated:
            self.notes[
                f"records with {_DATE} for the day that the template writes, so that samples stay as they are"
            ] += 1
        plain = [rendered(message) for message in conversation.messages]
        for message in plain:
            if "reasoning_content" in message:
                message["thinking"] = message["reasoning_content"]  # the name that some templates read
        values = [with_arguments(message, as_text=False) for message in plain]
        arguments = [c["function"]["arguments"] for m in values for c in m.get("tool_calls", ())]
        if not arguments:
            return values
        try:
            text = self._render(values, conversation.tools)
        except Refusal:
            pass
        else:
            if not any(_printed(a, text) for a in arguments):
                return values
        texts = [with_arguments(message, as_text=True) for message in plain]
        try:
            self._render(texts, conversation.tools)
        except Refusal:
            return values
        return texts

    def _answer(self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]], turn: int) -> Asked:
        before, message = messages[:turn], messages[turn]
        asked = self._render(before, tools, generate=True)
        answered = self._render([*before, message], tools)
        start = len(asked) if answered.startswith(asked) else len(_common([asked, answered]))
        opened, answer = asked[start:], answered[start:]
        if opened.strip() and message["content"].startswith(opened):
            # The template removes what its generation prompt opens (reasoning), but the message has it all.
            answer = message["content"][len(opened) :] + self._frame(before, tools)[1]
        elif opened.strip():
            raise Refusal(
                f"messages[{turn}]: the chat template asks with a text that ends in {asked[-30:]!r}, but renders this "
                "answer without it; let the target answer (`specforge regenerate`), or give another --chat_template"
            )
        self._check_answer(before, message, tools, answered, opened + answer)
        if self._is(asked, before, tools):
            header = self._frame(before, tools)[0][len(asked) :]
            if header.strip():
                raise Refusal(
                    f"messages[{turn}]: the chat template has no generation prompt, so nothing asks for the "
                    f"{short(header)} that it writes before an answer; give one that has with --chat_template FILE"
                )
        return Asked(asked, answer)

    def _frame(self, before: list[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> tuple[str, str]:
        """What the template puts before an answer, the messages included, and what it puts behind."""
        zero, one = (self._render([*before, _says(text)], tools) for text in ("0", "1"))
        header = _common([zero, one])
        return header, zero[len(header) + 1 :]

    def _check_answer(
        self, before: list[dict[str, Any]], message: dict[str, Any], tools: Sequence[dict[str, Any]],
        answered: str, shown: str,
    ) -> None:  # fmt: skip
        """Refuse an answer that the template leaves out, and note one of which it leaves out a part."""
        where = f"messages[{len(before)}]"
        words = [text for key in ("content", "reasoning_content") if (text := message.get(key, "").strip())]
        missing = [text for text in words if text not in shown]
        if "tool_calls" in message:
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            if self._is(answered, [*before, rest], tools):
                raise Refusal(f"{where}: the chat template renders nothing of its tool calls")
        elif words and missing == words and self._is(answered, [*before, _says("")], tools):
            raise Refusal(f"{where}: the chat template renders nothing of it")
        if missing:
            self.notes["answers of which the chat template leaves out a part, such as reasoning"] += 1

    def _is(self, text: str, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> bool:
        try:
            return self._render(messages, tools) == text
        except Refusal:
            return False

    def _render(
        self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]], generate: bool = False
    ) -> str:
        from jinja2 import TemplateSyntaxError

        name, template = self.tokenizer.name_or_path, self.tokenizer.chat_template
        if not template or (isinstance(template, dict) and "default" not in template):
            kind = "chat template called default" if template else "chat template"
            raise UserError(f"tokenizer {name}: has no {kind}; give one with --chat_template FILE")
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=generate
            )
        except TemplateSyntaxError as error:
            raise UserError(
                f"tokenizer {name}: its chat template is not Jinja ({first_line(error)})"
            ) from error
        except Exception as error:  # a template is a program; whatever it raises concerns these messages
            raise Refusal(f"the chat template refuses it ({first_line(error)})") from error
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refusal("the chat template's text holds half of a surrogate pair") from error
        return text


def _printed(arguments: Any, text: str) -> bool:
    """Whether a text has a mapping or a list as Python prints it, ``{'a': 1}``, rather than as JSON."""
    printed = str(arguments)
    return isinstance(arguments, (dict, list)) and printed in text and printed != json.dumps(arguments)


def _says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _common(texts: list[str]) -> str:
    return os.path.commonprefix(texts)  # noqa: RUF071 - characters are meant


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, those that touch or overlap as one, without empty ones."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def _with_fixed_date(template: Any) -> Any:
    if isinstance(template, dict):
        return {name: _with_fixed_date(text) for name, text in template.items()}
    dated = isinstance(template, str) and "strftime_now" in template
    return _DATE_MACRO + template if dated else template


def _end_ids(folder: Path) -> list[int]:
    """End tokens that generation_config.json names."""
    path = folder / "generation_config.json"
    fields = read_json(path) if path.exists() else {}
    ends = fields.get("eos_token_id") if isinstance(fields, dict) else None
    ends = ends if isinstance(ends, list) else [ends]
    return [i for i in ends if type(i) is int]
