"""What proposes tokens: nothing, the text so far (n-gram), or a chain of a trained draft.

A drafter follows one sequence. It is told the tokens that were committed and, if it asked for them, the
target's features of every token that the target has processed: all but the last committed one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from specforge.contracts import AUX_HIDDEN_STATES, CapturePolicy
from specforge.decoding.verify import Proposal, Sampling

Features = Mapping[str, Tensor]


class Drafter(Protocol):
    """Proposes the next tokens of one sequence."""

    @property
    def capture(self) -> CapturePolicy | None:
        """The features of the target that it wants; None for none."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether it drafts the likeliest token also where the target samples; settable where there is a choice."""
        ...

    def reset(self) -> None:
        """Forget the sequence."""
        ...

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """Learn of committed tokens.

        Args:
            tokens: the prompt with its first answer token, at first; later what each round committed.
            features: named tensors ``[n, width]`` of the tokens that the target processed since the last call;
                these lag the committed tokens by one. Empty unless ``capture`` asks for some.
        """
        ...

    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """Draft at most ``count`` tokens to follow the committed ones."""
        ...


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
        ...

    def crop(self, rows: int) -> None:
        """Keep the first ``rows`` rows."""
        ...

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """Draft states ``[n, H]`` of captured layers ``[n, A]``."""
        ...

    def extend(self, hidden: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Append rows; logits ``[D]`` and feedback ``[H]`` of the last one."""
        ...


class ChainDrafter:
    """Drafts one token after another with a trained network.

    Args:
        decoder: the network.
        embed: embeddings ``[n, H]`` of token ids ``[n]``.
        target_ids: ``[D]`` target id of every draft id.
        vocab_size: V.
        capture: features that the network reads.
        deterministic: when sampling, draft the likeliest token rather than a sample of the draft's own
            distribution. Both are lossless; the latter accepts more.
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
        self.decoder, self.embed, self.target_ids = decoder, embed, target_ids
        self.vocab_size, self.capture, self.deterministic = vocab_size, capture, deterministic
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self.decoder.reset()
        self._tokens: list[int] = []
        self._committed = 0  # rows made from features of the target
        self._features: list[Tensor] = []

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """Keep tokens and features for the next proposal."""
        self._tokens += tokens
        self._features.append(features[AUX_HIDDEN_STATES])

    @torch.inference_mode()
    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """Extend the cache by what was committed, then draft ``count`` tokens."""
        if count == 0:
            return Proposal(())
        self.decoder.crop(self._committed)
        features = torch.cat(self._features) if len(self._features) > 1 else self._features[0]
        self._features = []
        first = self._committed
        self._committed += len(features)
        following = torch.tensor(self._tokens[first + 1 : self._committed + 1], device=self.target_ids.device)
        logits, feedback = self.decoder.extend(self.decoder.fuse(features), self.embed(following))
        tokens: list[int] = []
        probs: list[Tensor] = []
        while True:
            token = self._choose(logits, sampling, generator, probs)
            tokens.append(token)
            if len(tokens) == count:
                break
            next_id = torch.tensor([token], device=self.target_ids.device)
            logits, feedback = self.decoder.extend(feedback.unsqueeze(0), self.embed(next_id))
        return Proposal(tuple(tokens), torch.stack(probs) if probs else None)

    def _choose(
        self, logits: Tensor, sampling: Sampling, generator: torch.Generator | None, probs: list[Tensor]
    ) -> int:
        if sampling.greedy or self.deterministic:
            return int(self.target_ids[logits.argmax()])
        q = sampling.probs(logits.unsqueeze(0).cpu())[0]
        draft_id = int(torch.multinomial(q, 1, generator=generator))
        probs.append(torch.zeros(self.vocab_size).scatter_(0, self.target_ids.cpu(), q))
        return int(self.target_ids[draft_id])
