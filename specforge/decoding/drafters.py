"""What proposes tokens: nothing, the text so far (n-gram), or a chain of a trained draft.

A drafter follows one sequence. It is told the tokens that were committed and, if it asked for them, the
target's features of every token that the target has processed: all but the last committed one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        """The features of the target that it wants; None for none."""

    @property
    def deterministic(self) -> bool:
        """Whether it drafts the likeliest token also where the target samples; settable where there is a choice."""

    def reset(self) -> None:
        """Forget the sequence."""

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """Learn of committed tokens.

        Args:
            tokens: the prompt with its first answer token, at first; later what each round committed.
            features: named tensors ``[n, width]`` of the tokens that the target processed since the last call;
                these lag the committed tokens by one. Empty unless ``capture`` asks for some.
        """

    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """Draft at most ``count`` tokens to follow the committed ones."""


class NoDrafter:
    """Proposes nothing: plain decoding, one token a pass."""

    capture: CapturePolicy | None = None
    deterministic = True

    def reset(self) -> None:
        """Nothing to forget."""

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """Nothing to learn."""

    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """No tokens."""
        return Proposal(())


class NGramDrafter:
    """Prompt lookup: continues the latest earlier occurrence of the last tokens (no training; Saxena 2023).

    Args:
        longest: longest suffix to look for; shorter ones are tried after it.
    """

    capture: CapturePolicy | None = None
    deterministic = True

    def __init__(self, longest: int = 3) -> None:
        self.longest = longest
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self._tokens: list[int] = []
        # For every n-gram that has a follower: the position behind its latest occurrence.
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(self.longest)]

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """Index the n-grams that now have a follower."""
        for token in tokens:
            end = len(self._tokens)
            for n in range(1, min(self.longest, end) + 1):
                self._after[n - 1][tuple(self._tokens[end - n :])] = end
            self._tokens.append(token)

    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """What followed the longest suffix that occurred before."""
        end = len(self._tokens)
        for n in range(min(self.longest, end), 0, -1):
            after = self._after[n - 1].get(tuple(self._tokens[end - n :]))
            if after is not None:
                return Proposal(tuple(self._tokens[after : after + count]))
        return Proposal(())


class ChainDecoder(Protocol):
    """A draft network that decodes row by row, with a key/value cache."""

    rows: int

    def reset(self) -> None:
        """Forget all rows."""

    def crop(self, rows: int) -> None:
        """Keep the first ``rows`` rows."""

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """Draft states ``[n, H]`` of captured layers ``[n, A]``."""

    def extend(self, hidden: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Append rows; logits ``[D]`` and feedback ``[H]`` of the last one."""


class TrainedDrafter:
    """What drafters with a trained network share: what was observed since the last proposal, and the choice of tokens.

    Args:
        target_ids: ``[D]`` target id of every draft id.
        vocab_size: V.
        capture: features that the network reads: captured layers, else the last hidden states; None for none.
        deterministic: when sampling, draft the likeliest token rather than a sample of the draft's own
            distribution. Both are lossless; the latter accepts more.
    """

    def __init__(
        self, target_ids: Tensor, vocab_size: int, capture: CapturePolicy | None, deterministic: bool = False
    ) -> None:
        self.target_ids, self.vocab_size = target_ids, vocab_size
        self.capture, self.deterministic = capture, deterministic
        self._feature = AUX_HIDDEN_STATES if capture and capture.layer_ids else LAST_HIDDEN_STATES
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self._tokens: list[int] = []
        self._committed = 0  # tokens whose features were taken
        self._features: list[Tensor] = []

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """Keep tokens and features for the next proposal."""
        self._tokens += tokens
        self._features.append(features[self._feature])

    def take(self) -> tuple[Tensor, Tensor]:
        """Features ``[n, width]`` observed since the last call, and the token ``[n]`` that follows each one's."""
        features = torch.cat(self._features)
        self._features = []
        first, self._committed = self._committed, self._committed + len(features)
        following = self._tokens[first + 1 : self._committed + 1]
        return features, torch.tensor(following, device=self.target_ids.device)

    def choose(self, logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Proposal:
        """One token for each row of ``logits [n, D]``, independently of each other."""
        if sampling.greedy or self.deterministic:
            return Proposal(tuple(self.target_ids[logits.argmax(-1)].tolist()))
        q, ids = sampling.probs(logits.cpu()), self.target_ids.cpu()
        drafted = torch.multinomial(q, 1, generator=generator).squeeze(1)
        probs = torch.zeros(len(q), self.vocab_size).scatter_(1, ids.expand(len(q), -1), q)
        return Proposal(tuple(ids[drafted].tolist()), probs)


def joined(parts: Sequence[Proposal]) -> Proposal:
    """Proposals of one drafter as one, in order."""
    tokens = tuple(token for part in parts for token in part.tokens)
    probs = [part.probs for part in parts if part.probs is not None]
    return Proposal(tokens, torch.cat(probs) if probs else None)


class ChainDrafter(TrainedDrafter):
    """Drafts one token after another with a trained network.

    Args:
        decoder: the network.
        embed: embeddings ``[n, H]`` of token ids ``[n]``.
        target_ids: see :class:`TrainedDrafter`, as for what follows.
        vocab_size: V.
        capture: features that the network reads.
        deterministic: whether the likeliest token is drafted when sampling too.
    """

    def __init__(
        self,
        decoder: ChainDecoder,
        embed: Callable[[Tensor], Tensor],
        target_ids: Tensor,
        vocab_size: int,
        capture: CapturePolicy,
        deterministic: bool = False,
    ) -> None:
        self.decoder, self.embed = decoder, embed
        super().__init__(target_ids, vocab_size, capture, deterministic)

    def reset(self) -> None:
        """Forget the sequence."""
        super().reset()
        self.decoder.reset()

    @torch.inference_mode()
    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """Extend the cache by what was committed, then draft ``count`` tokens."""
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
