"""Answers behind the tokens that ask for them, as few documents as possible.

The tokens of an answer follow those of its prompt, which is tokenised by itself, as an engine does it; so the border
between the two is always one between tokens. Answers share a document as long as each one's prompt begins with the
prompt and the tokens of the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class Refusal(Exception):
    """The chat template or the tokenizer cannot take something; the message says why, but not where it came from."""


@dataclass(frozen=True)
class TokenSample:
    """Token ids and the mask of what is to be learnt, of one document."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """The text of one answer.

    Attributes:
        prompt: what asks for it.
        answer: what is learnt, up to the first end token behind its words, else to its last one if there is one.
        tail: what stands behind it.
        cut_off: whether the answer reached a length limit, so that its end token is not the target's.
        words: characters of the answer up to the end of what the assistant said; None where that is not known.
    """

    prompt: str
    answer: str
    tail: str = ""
    cut_off: bool = False
    words: int | None = None


@dataclass(frozen=True)
class Turn:
    """One answer in tokens: what the target is asked with, what is learnt, and what stands behind that."""

    prompt: tuple[int, ...]
    learnt: tuple[int, ...]
    tail: tuple[int, ...] = ()


class TurnTokenizer:
    """A tokenizer, without special tokens of its own.

    Args:
        tokenizer: a fast transformers tokenizer.
        end_ids: ids that end an answer.
    """

    def __init__(self, tokenizer: Any, end_ids: frozenset[int]) -> None:
        self.tokenizer, self.end_ids = tokenizer, end_ids

    def encode(self, texts: Sequence[str]) -> list[tuple[tuple[int, ...], list[int]]]:
        """Token ids of each text, and where in it each token ends."""
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
        """Answers in tokens.

        Raises:
            Refusal: no tokens give an answer's text behind its prompt.
        """
        encoded = self.encode([a.prompt for a in asked] + [a.prompt + a.answer + a.tail for a in asked])
        turns = []
        for a, (prompt, _), whole in zip(asked, encoded, encoded[len(asked) :], strict=False):
            ids, stops = self._behind(prompt, a, *whole)
            count = sum(stop <= len(a.answer) for stop in stops)
            ends = [i for i in range(count) if ids[i] in self.end_ids]
            if ends:
                words = len(a.answer) if a.words is None else a.words
                end = next((i for i in ends if stops[i] > words), ends[-1])
                count = end if a.cut_off else end + 1
            turns.append(Turn(prompt, ids[:count], ids[count:]))
        return turns

    def _behind(
        self, prompt: tuple[int, ...], asked: Asked, whole: tuple[int, ...], stops: list[int]
    ) -> tuple[tuple[int, ...], list[int]]:
        """Tokens of answer and tail behind those of the prompt, and where in that text each one ends."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :], [stop - len(asked.prompt) for stop in stops[len(prompt) :]]
        # The tokenizer would merge across the border, which the target never sees. Some tokenizers put a space before
        # a text's first word; behind a line break they do not.
        text = asked.answer + asked.tail
        for before in ("", "\n"):
            (head, _), (ids, stops) = self.encode([before, before + text])
            own = ids[len(head) :]
            if ids[: len(head)] == head and self.decode(prompt + own) == self.decode(whole):
                return own, [stop - len(before) for stop in stops[len(head) :]]
        raise Refusal(f"no tokens give {text[:30]!r} behind a prompt that ends in {asked.prompt[-30:]!r}")


def join(turns: Sequence[Turn]) -> list[TokenSample]:
    """As few documents as hold every answer behind its own prompt."""
    samples: list[TokenSample] = []
    mask: tuple[int, ...] = ()
    for i, turn in enumerate(turns):
        mask += (0,) * (len(turn.prompt) - len(mask)) + (1,) * len(turn.learnt)
        ids = turn.prompt + turn.learnt
        following = turns[i + 1].prompt if i + 1 < len(turns) else ()
        if following[: len(ids)] != ids:
            samples.append(TokenSample(ids + turn.tail, mask + (0,) * len(turn.tail)))
            mask = ()
    return samples
