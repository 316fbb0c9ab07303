"""Drafters propose tokens: none at all, those that followed earlier in the text, or those of a trained draft.

A drafter follows one sequence. It receives the committed tokens and, if it asks for them, the target's features of all
tokens that the target has processed: all but the last committed one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy
from specforge.decoding.verify import Proposal, Sampling

Features = Mapping[str, Tensor]


class Drafter(Protocol):
    """Proposes the next tokens of one sequence."""

    @property
    def capture(self) -> CapturePolicy | None:
        """The target's features that it needs; None if it needs none."""

    @property
    def deterministic(self) -> bool:
        """Whether it drafts the most likely token even if the target samples; settable for trained drafters."""

    def reset(self) -> None:
        """Forget the sequence."""

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """Take in committed tokens.

        Args:
            tokens: in the first call, the prompt and the first token of the answer; later, what each round committed.
            features: named tensors ``[n, width]`` of the tokens that the target has processed since the last call,
                which lag the committed tokens by one. Empty unless ``capture`` asks for some.
        """

    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """Draft at most ``count`` tokens to follow the committed ones."""


class NoDrafter:
    """Proposes nothing: plain decoding, one token per pass."""

    capture: CapturePolicy | None = None
    deterministic = True

    def reset(self) -> None:
        """There is no state."""

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """There is no state."""

    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """No tokens."""
        return Proposal(())


@dataclass(eq=False)
class NGramDrafter(NoDrafter):
    """Prompt lookup: continues the latest earlier occurrence of the last tokens (no training; Saxena 2023)."""

    longest: int = 3  # longest suffix to look up; shorter ones are tried if it has not occurred

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self._tokens: list[int] = []
        # Maps every n-gram that has a follower to the position of the follower at its latest occurrence.
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(self.longest)]

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """Index the n-grams that now have a follower."""
        for token in tokens:
            end = len(self._tokens)
            for n in range(1, min(self.longest, end) + 1):
                self._after[n - 1][tuple(self._tokens[end - n :])] = end
            self._tokens.append(token)

    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """The tokens that followed the longest suffix that has occurred before."""
        end = len(self._tokens)
        for n in range(min(self.longest, end), 0, -1):
            after = self._after[n - 1].get(tuple(self._tokens[end - n :]))
            if after is not None:
                return Proposal(tuple(self._tokens[after : after + count]))
        return Proposal(())


class Resettable(Protocol):
    """A network with a key/value cache."""

    def reset(self) -> None:
        """Empty the cache."""


class TrainedDrafter:
    """Base of drafters with a trained network: collects what is observed between proposals, and chooses tokens.

    Args:
        target_ids: ``[D]`` target id of every draft id.
        vocab_size: V.
        capture: features that the network reads: captured layers or else the last hidden states; None for none.
        network: emptied when the sequence is forgotten; None if it has no cache of its own.

    Attributes:
        deterministic: when sampling, draft the most likely token instead of sampling from the draft's distribution.
            Both are lossless; sampling from the distribution has more tokens accepted.
    """

    deterministic = False

    def __init__(
        self, target_ids: Tensor, vocab_size: int, capture: CapturePolicy | None, network: Resettable | None = None
    ) -> None:
        self.target_ids, self.vocab_size, self.capture = target_ids, vocab_size, capture
        self._network = network
        self._feature = AUX_HIDDEN_STATES if capture and capture.layer_ids else LAST_HIDDEN_STATES
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self._tokens: list[int] = []
        self._committed = 0  # tokens whose features were taken
        self._features: list[Tensor] = []
        if self._network is not None:
            self._network.reset()

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """Keep tokens and features for the next proposal."""
        self._tokens += tokens
        self._features.append(features[self._feature])

    def take(self) -> tuple[Tensor, Tensor]:
        """Features ``[n, width]`` observed since the last call, and the token ``[n]`` that follows each of them."""
        features = torch.cat(self._features)
        self._features = []
        first, self._committed = self._committed, self._committed + len(features)
        following = self._tokens[first + 1 : self._committed + 1]
        return features, torch.tensor(following, device=self.target_ids.device)

    def choose(self, logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Proposal:
        """One token per row of ``logits [n, D]``, chosen independently."""
        if sampling.greedy or self.deterministic:
            return Proposal(tuple(self.target_ids[logits.argmax(-1)].tolist()))
        q, ids = sampling.probs(logits.cpu()), self.target_ids.cpu()
        drafted = torch.multinomial(q, 1, generator=generator).squeeze(1)
        probs = torch.zeros(len(q), self.vocab_size).scatter_(1, ids.expand(len(q), -1), q)
        return Proposal(tuple(ids[drafted].tolist()), probs)


def joined(parts: Sequence[Proposal]) -> Proposal:
    """Concatenate proposals of one drafter."""
    tokens = tuple(token for part in parts for token in part.tokens)
    probs = [part.probs for part in parts if part.probs is not None]
    return Proposal(tokens, torch.cat(probs) if probs else None)


class ChainDecoder(Resettable, Protocol):
    """A draft network that decodes row by row, with a key/value cache."""

    rows: int

    def crop(self, rows: int) -> None:
        """Keep the first ``rows`` rows of the cache."""

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """Map captured layers ``[n, A]`` to draft states ``[n, H]``."""

    def extend(self, hidden: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Append rows; returns logits ``[D]`` and feedback ``[H]`` of the last one."""


class ChainDrafter(TrainedDrafter):
    """Drafts one token after another with a trained network.

    Args:
        decoder: the network.
        embed: maps token ids ``[n]`` to embeddings ``[n, H]``.
        target_ids: ``[D]`` target id of every draft id.
        vocab_size: V.
        capture: features that the network reads.
    """

    def __init__(
        self,
        decoder: ChainDecoder,
        embed: Callable[[Tensor], Tensor],
        target_ids: Tensor,
        vocab_size: int,
        capture: CapturePolicy,
    ) -> None:
        self.decoder, self.embed = decoder, embed
        super().__init__(target_ids, vocab_size, capture, decoder)

    @torch.inference_mode()
    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """Extend the cache by the committed tokens, then draft ``count`` tokens."""
        if count == 0:
            return Proposal(())
        self.decoder.crop(self._committed)
        features, following = self.take()
        logits, feedback = self.decoder.extend(self.decoder.fuse(features), self.embed(following))
        parts = [self.choose(logits[None], sampling, generator)]
        while len(parts) < count:
            token = torch.tensor(parts[-1].tokens, device=self.target_ids.device)
            logits, feedback = self.decoder.extend(feedback[None], self.embed(token))
            parts.append(self.choose(logits[None], sampling, generator))
        return joined(parts)
