"""Conversations to token ids and loss masks, through the tokenizer's own chat template.

What the assistant wrote is found by rendering prefixes of the conversation: the template with a
generation prompt says where an answer begins, the template with the answer says where it ends. Nothing
about any template is built in, and nothing is searched for in the rendered text. The text is tokenised
once and spans become token masks by character offsets.

Some templates change earlier turns when later ones follow (they strip old reasoning, say). Then no single
text holds every answer as the target would have written it, and the conversation becomes one sample a
turn, each with the history that the target would have seen.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge.contracts import content_id
from specforge.data.conversations import Conversation, DataRecord, Formatted, RecordError, Tokenised
from specforge.errors import UserError
from specforge.target_files import TargetFiles


@dataclass(frozen=True)
class TokenSample:
    """Token ids and the mask of what is to be learnt, of one document."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


class ChatTemplate:
    """A tokenizer with its chat template.

    Args:
        tokenizer: a fast transformers tokenizer.
        end_ids: ids that end a turn; what the template puts behind the last one is not learnt.
        last_turn_only: supervise only the last answer of a conversation.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int] = (), last_turn_only: bool = False) -> None:
        if not tokenizer.is_fast:
            raise UserError(f"tokenizer {tokenizer.name_or_path}: has no fast form, so no character offsets")
        self.tokenizer = tokenizer
        self.last_turn_only = last_turn_only
        ends = {tokenizer.eos_token_id, *end_ids}
        self.end_ids = frozenset(i for i in ends if i is not None)

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
            UserError: there is no tokenizer in the target's folder.
        """
        from transformers import AutoTokenizer, GenerationConfig

        try:
            tokenizer = AutoTokenizer.from_pretrained(target.folder)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"{target.folder}: no usable tokenizer ({str(error).splitlines()[0]})") from error
        if chat_template is not None:
            try:
                tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
            except OSError as error:
                raise UserError(f"{chat_template}: cannot be read ({error.strerror})") from error
        ends: list[int] = []
        if (target.folder / "generation_config.json").exists():
            eos = GenerationConfig.from_pretrained(target.folder).eos_token_id
            ends = list(eos) if isinstance(eos, list) else [eos]
        return cls(tokenizer, ends, last_turn_only)

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary, the merges and the template."""
        return content_id(self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template or "")

    def encode(self, record: DataRecord) -> list[TokenSample]:
        """Token samples of a record: one, or one a turn where the template changes earlier turns.

        Raises:
            RecordError: the template refuses the conversation, or nothing in it is to be learnt.
        """
        content = record.content
        if isinstance(content, Tokenised):
            samples = [TokenSample(content.input_ids, content.loss_mask)]
            if max(content.input_ids, default=0) >= len(self.tokenizer):
                raise RecordError(record.source, f"a token id is not below {len(self.tokenizer)}")
        elif isinstance(content, Formatted):
            samples = [self._tokenise(content.text, content.spans, ())]
        else:
            samples = self._conversation(record.source, content)
        for sample in samples:
            if not any(sample.loss_mask):
                raise RecordError(record.source, "the loss mask is empty: the assistant wrote nothing")
        return samples

    def prompt(self, conversation: Conversation) -> str:
        """Text that asks for the next answer."""
        return self._render(conversation, len(conversation.messages), generate=True)

    def _conversation(self, source: str, conversation: Conversation) -> list[TokenSample]:
        turns = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        if not turns:
            raise RecordError(source, "the loss mask is empty: there is no assistant message")
        if self.last_turn_only:
            turns = turns[-1:]
        try:
            whole = self._render(conversation, len(conversation.messages))
            spans = [self._span(conversation, turn, whole) for turn in turns]
            if all(span is not None for span in spans):
                cut = [conversation.messages[turn].get("finish_reason") == "length" for turn in turns]
                return [self._tokenise(whole, [s for s in spans if s is not None], cut)]
            return [self._single_turn(source, conversation, turn) for turn in turns]
        except RecordError:
            raise
        except Exception as error:  # a template is a program; whatever it raises concerns this record
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RecordError(source, f"the chat template refuses it ({reason})") from error

    def _single_turn(self, source: str, conversation: Conversation, turn: int) -> TokenSample:
        text = self._render(conversation, turn + 1)
        span = self._span(conversation, turn, text)
        if span is None:
            raise RecordError(source, f"the chat template hides where messages[{turn}] begins")
        return self._tokenise(text, [span], [conversation.messages[turn].get("finish_reason") == "length"])

    def _span(self, conversation: Conversation, turn: int, text: str) -> tuple[int, int] | None:
        """Characters of an answer in ``text``; None where the text does not hold it as it was generated."""
        before = self._render(conversation, turn)
        asked = self._render(conversation, turn, generate=True)
        answered = self._render(conversation, turn + 1)
        start = len(os.path.commonprefix([asked, answered]))  # noqa: RUF071 - characters are meant
        if not answered.startswith(before) or start < len(before) or not text.startswith(answered):
            return None
        return start, len(answered)

    def _render(self, conversation: Conversation, count: int, generate: bool = False) -> str:
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"tokenizer {self.tokenizer.name_or_path}: has no chat template; give one with --chat_template FILE"
            )
        if count == 0:
            return ""
        messages = [
            {k: v for k, v in m.items() if k != "finish_reason"} for m in conversation.messages[:count]
        ]
        text: str = self.tokenizer.apply_chat_template(
            messages, tools=list(conversation.tools) or None, tokenize=False, add_generation_prompt=generate
        )
        return text

    def _tokenise(self, text: str, spans: Sequence[tuple[int, int]], cut_off: Sequence[bool]) -> TokenSample:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        mask = [0] * len(ids)
        for number, (start, stop) in enumerate(spans):
            inside = [i for i, (a, b) in enumerate(offsets) if start <= a and b <= stop and a < b]
            ends = [i for i in inside if ids[i] in self.end_ids]
            cut = number < len(cut_off) and cut_off[number]
            if ends:
                # An answer cut off at a length limit was not ended by the target.
                inside = [i for i in inside if i < ends[-1] or (i == ends[-1] and not cut)]
            for i in inside:
                mask[i] = 1
        return TokenSample(tuple(ids), tuple(mask))
