"""Tokenises answers and their prompts, in as few documents as possible.

A prompt is tokenised by itself, as an inference engine does, and the tokens of its answer follow, so no token spans the
boundary. Answers share a document as long as each prompt begins with the previous prompt and answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class Refusal(Exception):
    """The chat template or the tokenizer rejects something; the message gives the reason, but not the source."""


@dataclass(frozen=True)
class TokenSample:
    """Token ids and loss mask of one document."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """The text of one answer."""

    prompt: str  # the text before the answer, generation prompt included
    # the supervised text, up to the first end token after its words, or else up to its last end token if it has one
    answer: str
    tail: str = ""  # the text after the answer
    # whether the answer reached a length limit, so that its end token does not come from the target
    cut_off: bool = False
    # number of characters of the answer up to the end of the assistant's words; None if unknown
    words: int | None = None


@dataclass(frozen=True)
class Turn:
    """One answer as tokens: the prompt, the supervised tokens, and the tokens after them."""

    prompt: tuple[int, ...]
    supervised: tuple[int, ...]
    tail: tuple[int, ...] = ()


class TurnTokenizer:
    """Tokenises prompts and answers without adding special tokens."""

    def __init__(self, tokenizer: Any, end_ids: frozenset[int]) -> None:
        self.tokenizer, self.end_ids = tokenizer, end_ids

    def encode(self, texts: Sequence[str]) -> list[tuple[tuple[int, ...], list[int]]]:
        """Token ids of each text, and the character offset where each token ends."""
        if not texts:
            return []
        found = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            (tuple(ids), [stop for _, stop in offsets])
            for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def turns(self, asked: Sequence[Asked]) -> list[Turn]:
        """Tokenise answers.

        Raises:
            Refusal: no token sequence after the prompt decodes to the answer.
        """
        encoded = self.encode([a.prompt for a in asked] + [a.prompt + a.answer + a.tail for a in asked])
        turns = []
        for a, (prompt, _), whole in zip(asked, encoded, encoded[len(asked) :], strict=False):
            ids, stops = self._following(prompt, a, *whole)
            count = sum(stop <= len(a.answer) for stop in stops)
            ends = [i for i in range(count) if ids[i] in self.end_ids]
            if ends:
                words = len(a.answer) if a.words is None else a.words
                end = next((i for i in ends if stops[i] > words), ends[-1])
                count = end if a.cut_off else end + 1
            turns.append(Turn(prompt, ids[:count], ids[count:]))
        return turns

    def _following(
        self, prompt: tuple[int, ...], asked: Asked, whole: tuple[int, ...], stops: list[int]
    ) -> tuple[tuple[int, ...], list[int]]:
        """Tokens of answer and tail after those of the prompt, and the offset in that text where each one ends."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :], [stop - len(asked.prompt) for stop in stops[len(prompt) :]]
        # The tokenizer merges across the boundary, but the target never sees such a token. Some tokenizers prepend a
        # space to the first word of a text, but not after a line break.
        text = asked.answer + asked.tail
        for before in ("", "\n"):
            (head, _), (ids, stops) = self.encode([before, before + text])
            own = ids[len(head) :]
            if ids[: len(head)] == head and self.decode(prompt + own) == self.decode(whole):
                return own, [stop - len(before) for stop in stops[len(head) :]]
        raise Refusal(f"no tokens decode to {text[:30]!r} after a prompt that ends in {asked.prompt[-30:]!r}")


def join(turns: Sequence[Turn]) -> list[TokenSample]:
    """Join turns into as few documents as possible, each answer after its own prompt."""
    samples: list[TokenSample] = []
    mask: tuple[int, ...] = ()
    for i, turn in enumerate(turns):
        mask += (0,) * (len(turn.prompt) - len(mask)) + (1,) * len(turn.supervised)
        ids = turn.prompt + turn.supervised
        following = turns[i + 1].prompt if i + 1 < len(turns) else ()
        if following[: len(ids)] != ids:
            samples.append(TokenSample(ids + turn.tail, mask + (0,) * len(turn.tail)))
            mask = ()
    return samples
