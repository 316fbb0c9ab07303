"""Conversations to token ids and loss masks, through the tokenizer's own chat template.

Every answer follows exactly the tokens that prompt the target for it: the template's text for the messages before it,
with a generation prompt, tokenised as an inference engine does (`rendering.py`, `turns.py`). If the record contains the
target's own tokens (`specforge regenerate`), those are used instead of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from specforge.contracts import content_id
from specforge.data.conversations import Conversation, DataRecord, Formatted, KeptTokens, RecordError, Tokenised
from specforge.data.rendering import Renderer
from specforge.data.turns import Asked, Refusal, TokenSample, Turn, TurnTokenizer, join
from specforge.errors import UserError
from specforge.files import first_line, read_json


class TokenizerFolder(Protocol):
    """The parts of a target that tokenisation needs."""

    @property
    def folder(self) -> Path:
        """Folder with the tokenizer's files."""

    @property
    def vocab_size(self) -> int:
        """Rows of the target's embedding."""


class ChatTemplate:
    """A tokenizer with its chat template.

    Args:
        tokenizer: a fast transformers tokenizer.
        end_ids: tokens that end an answer; text that the template adds after one is not supervised.
        last_turn_only: supervise only the last answer of a conversation.
        vocab_size: rows of the target's embedding; larger token ids are rejected.

    Attributes:
        fingerprint: hash of the vocabulary, the merges and the template.
        notes: remarks on the records for the user, with their counts.
    """

    def __init__(
        self, tokenizer: Any, end_ids: Sequence[int] = (), last_turn_only: bool = False, vocab_size: int | None = None
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path}: is not a fast tokenizer, so it has no character offsets"
            )
        self.tokenizer = tokenizer
        self.last_turn_only = last_turn_only
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        ends = {tokenizer.eos_token_id, *end_ids}
        self.end_ids = frozenset(i for i in ends if i is not None)
        self.fingerprint = content_id(tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template or "")
        self._renderer = Renderer(tokenizer)
        self.notes = self._renderer.notes
        self._tokens = TurnTokenizer(tokenizer, self.end_ids)

    @classmethod
    def load(
        cls, target: TokenizerFolder, chat_template: Path | None = None, last_turn_only: bool = False
    ) -> ChatTemplate:
        """Load the tokenizer of a target.

        Args:
            target: the target's folder.
            chat_template: a Jinja file to use instead of the tokenizer's own template.
            last_turn_only: supervise only the last answer of a conversation.

        Raises:
            UserError: the folder has no usable tokenizer, or a file cannot be read.
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
        """Tokenise a record; returns several samples if its answers do not share one text.

        Raises:
            RecordError: the template rejects the conversation, or no token is supervised.
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
        """Token ids that prompt the target for the next answer.

        Raises:
            Refusal: the template or the tokenizer rejects the conversation.
        """
        messages = self._renderer.messages(conversation)
        ((prompt, _),) = self._tokens.encode([self._renderer.render(messages, conversation.tools, generate=True)])
        if not prompt:
            raise Refusal("the chat template renders no text for it")
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
            samples = join([turn for turn in turns if turn.supervised])
        if not samples or not any(samples[0].loss_mask):
            raise Refusal("the loss mask is empty: it contains no answer to train on")
        return samples

    def _check(self, ids: Sequence[int]) -> None:
        top = max(ids)
        if top >= self.vocab_size:
            name = repr(self.tokenizer.convert_ids_to_tokens(top)) if top < len(self.tokenizer) else "a token"
            raise Refusal(f"{name} has the id {top}, beyond the {self.vocab_size} tokens of the target's embedding")

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
        messages = self._renderer.messages(conversation) if others else []
        asked = [
            replace(
                self._renderer.answer(messages, conversation.tools, i),
                cut_off=conversation.messages[i].get("finish_reason") == "length",
            )
            for i in others
        ]
        if others:
            self._renderer.note_left_out(messages[: others[-1]], conversation.tools, asked[-1].prompt)
        turns = dict(zip(others, self._tokens.turns(asked), strict=True))
        return [turns[i] if i in turns else Turn(kept[i].prompt_ids, kept[i].answer_ids) for i in wanted]

    def _kept(self, conversation: Conversation) -> dict[int, KeptTokens]:
        """Stored tokens that match this tokenizer and template, and the current text."""
        if conversation.kept and conversation.tokenizer != self.fingerprint:
            self.notes["records with token ids of another tokenizer or chat template; their text is used"] += 1
            return {}
        kept = {i: k for i, k in conversation.kept.items() if k.digest == conversation.digest(i + 1)}
        if len(kept) < len(conversation.kept):
            self.notes["records edited since their token ids were stored; their text is used"] += 1
        return kept


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort spans, drop empty ones, and merge those that touch or overlap."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def _end_ids(folder: Path) -> list[int]:
    """End tokens in generation_config.json."""
    path = folder / "generation_config.json"
    fields = read_json(path) if path.exists() else {}
    ends = fields.get("eos_token_id") if isinstance(fields, dict) else None
    ends = ends if isinstance(ends, list) else [ends]
    return [i for i in ends if type(i) is int]
