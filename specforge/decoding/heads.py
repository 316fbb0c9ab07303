"""Drafting with heads on the target's last hidden state (Medusa, Hydra): no cache, no state but one row.

The features lag the committed tokens by one. The last row h is that of the token *before* the last committed one,
so the first head drafts the token two after h's, the next one three after, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from specforge.contracts import LAST_HIDDEN_STATES, CapturePolicy
from specforge.decoding.drafters import Features
from specforge.decoding.verify import Proposal, Sampling


class HeadDecoder(Protocol):
    """Heads over one hidden state."""

    @property
    def positions(self) -> int:
        """Number of heads."""
        ...

    def logits(self, hidden: Tensor, embeds: Sequence[Tensor]) -> Tensor:
        """Logits ``[D]`` of the next head: the k-th is given k embeddings ``[1, H]``, its hidden state ``[1, H]``."""
        ...


class HeadsDrafter:
    """Drafts a chain, one token a head.

    Args:
        decoder: the heads.
        embed: embeddings ``[n, H]`` of token ids ``[n]``.
        target_ids: ``[D]`` target id of every draft id.
        vocab_size: V.
        deterministic: when sampling, draft the likeliest token rather than a sample of the head's own
            distribution. Both are lossless; the latter accepts more.
    """

    capture: CapturePolicy | None = CapturePolicy((), last_hidden_states=True)

    def __init__(
        self, decoder: HeadDecoder, embed: Callable[[Tensor], Tensor], target_ids: Tensor, vocab_size: int,
        deterministic: bool = False,
    ) -> None:  # fmt: skip
        self.decoder, self.embed, self.target_ids = decoder, embed, target_ids
        self.vocab_size, self.deterministic = vocab_size, deterministic
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self._last_token: int | None = None
        self._hidden: Tensor | None = None

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """Keep the last committed token, and the last row of the features: that of the token before it."""
        self._last_token = tokens[-1]
        self._hidden = features[LAST_HIDDEN_STATES][-1:]

    @torch.inference_mode()
    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """Draft ``count`` tokens, or as many as there are heads."""
        assert self._hidden is not None
        assert self._last_token is not None
        token, embeds = self._last_token, list[Tensor]()
        tokens: list[int] = []
        probs: list[Tensor] = []
        for _ in range(min(count, self.decoder.positions)):
            embeds.append(self.embed(torch.tensor([token], device=self.target_ids.device)))
            logits = self.decoder.logits(self._hidden, embeds)
            if sampling.greedy or self.deterministic:
                token = int(self.target_ids[logits.argmax()])
            else:
                q = sampling.probs(logits.unsqueeze(0).cpu())[0]
                token = int(self.target_ids[int(torch.multinomial(q, 1, generator=generator))])
                probs.append(torch.zeros(self.vocab_size).scatter_(0, self.target_ids.cpu(), q))
            tokens.append(token)
        return Proposal(tuple(tokens), torch.stack(probs) if probs else None)
