"""A drafter that proposes all tokens of a round in one pass of its network.

The tokens of a round are drawn independently of each other: the network has seen none of them. Verification is
lossless all the same, because each was sampled from the distribution that is reported for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from specforge.contracts import AUX_HIDDEN_STATES, CapturePolicy
from specforge.decoding.drafters import Features
from specforge.decoding.verify import Proposal, Sampling


class ParallelDecoder(Protocol):
    """A draft network that drafts several tokens in one pass, with a key/value cache of committed rows."""

    def reset(self) -> None:
        """Forget all rows."""
        ...

    def draft_logits(
        self, aux_hidden_states: Tensor, following: Tensor, embedding: Tensor, count: int
    ) -> Tensor:
        """Append committed rows, each with the token after it; logits ``[count, D]`` of the tokens behind the last."""
        ...


class ParallelDrafter:
    """Drafts γ tokens with one pass.

    Args:
        decoder: the network.
        embedding: ``[V, H]`` the target's.
        target_ids: ``[D]`` target id of every draft id.
        vocab_size: V.
        capture: features that the network reads.
        deterministic: when sampling, draft the likeliest tokens rather than samples of the draft's own
            distributions. Both are lossless.
    """

    def __init__(
        self,
        decoder: ParallelDecoder,
        embedding: Tensor,
        target_ids: Tensor,
        vocab_size: int,
        capture: CapturePolicy,
        deterministic: bool = False,
    ) -> None:
        self.decoder, self.embedding, self.target_ids = decoder, embedding, target_ids
        self.vocab_size, self.capture, self.deterministic = vocab_size, capture, deterministic
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self.decoder.reset()
        self._tokens: list[int] = []
        self._rows = 0
        self._features: list[Tensor] = []

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """Keep tokens and features for the next proposal."""
        self._tokens += tokens
        self._features.append(features[AUX_HIDDEN_STATES])

    @torch.inference_mode()
    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """Extend the cache by what was committed, and draft ``count`` tokens behind it."""
        if count == 0:
            return Proposal(())
        features = torch.cat(self._features)
        self._features = []
        first, self._rows = self._rows, self._rows + len(features)
        following = torch.tensor(self._tokens[first + 1 : self._rows + 1], device=self.target_ids.device)
        logits = self.decoder.draft_logits(features, following, self.embedding, count)
        if sampling.greedy or self.deterministic:
            return Proposal(tuple(self.target_ids[logits.argmax(-1)].tolist()))
        q = sampling.probs(logits.cpu())
        drafted = torch.multinomial(q, 1, generator=generator).squeeze(1)
        ids = self.target_ids.cpu()
        probs = torch.zeros(count, self.vocab_size).scatter_(1, ids.expand(count, -1), q)
        return Proposal(tuple(ids[drafted].tolist()), probs)
