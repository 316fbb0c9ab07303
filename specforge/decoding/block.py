"""Drafts a whole block at once with a trained network: the context grows, the block is computed anew every round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge.contracts import AUX_HIDDEN_STATES, CapturePolicy
from specforge.decoding.drafters import Features
from specforge.decoding.verify import Proposal, Sampling


class BlockNetwork(Protocol):
    """A draft network that computes a block over a context with a key/value cache."""

    def reset(self) -> None:
        """Forget the context."""
        ...

    def extend(self, aux_hidden_states: Tensor) -> None:
        """Append the features ``[n, A]`` of committed tokens."""
        ...

    def block(self, embeds: Tensor) -> Tensor:
        """States ``[b, H]`` of a block with these embeddings ``[b, H]``."""
        ...


class Corrector(Protocol):
    """Corrects a block's logits by the tokens drafted so far."""

    def reset(self) -> None:
        """Begin a block."""
        ...

    def __call__(self, logits: Tensor, state: Tensor, token: int) -> Tensor:
        """The next draft's final logits ``[D]``, from its logits, its state ``[H]`` and the token before it."""
        ...


class BlockDrafter:
    """Drafts blocks with a trained network.

    Args:
        network: the network.
        embed: embeddings ``[n, H]`` of token ids ``[n]``.
        head: ``[D, H]`` rows of the target's lm_head for the draft vocabulary.
        target_ids: ``[D]`` target id of every draft id.
        vocab_size: V.
        capture: features that the network reads.
        block_size: b.
        mask_token_id: the token of every slot but the first.
        first: the slot that drafts the first token: 1 where slots predict their own token, 0 where the next one.
        corrector: of the logits, token by token; None drafts all tokens from the block alone.
        deterministic: when sampling, draft the likeliest token rather than a sample of the draft's own
            distribution. Both are lossless; the latter accepts more.
    """

    def __init__(
        self, network: BlockNetwork, embed: Callable[[Tensor], Tensor], head: Tensor, target_ids: Tensor,
        vocab_size: int, capture: CapturePolicy, *, block_size: int, mask_token_id: int, first: int,
        corrector: Corrector | None = None, deterministic: bool = False,
    ) -> None:  # fmt: skip
        self.network, self.embed, self.head, self.target_ids = network, embed, head, target_ids
        self.vocab_size, self.capture, self.deterministic = vocab_size, capture, deterministic
        self.first, self.corrector = first, corrector
        self._block = torch.full((block_size,), mask_token_id, device=target_ids.device)
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self.network.reset()
        self._last = -1
        self._features: list[Tensor] = []

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """Keep the last token and the features for the next proposal."""
        self._last = tokens[-1]
        self._features.append(features[AUX_HIDDEN_STATES])

    @torch.inference_mode()
    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """Extend the context by what was committed, then draft a block behind it; at most b tokens."""
        count = min(count, len(self._block) - self.first)
        if count == 0:
            return Proposal(())
        self.network.extend(torch.cat(self._features) if len(self._features) > 1 else self._features[0])
        self._features = []
        self._block[0] = self._last
        states = self.network.block(self.embed(self._block))[self.first : self.first + count]
        logits = F.linear(states, self.head)
        greedy = sampling.greedy or self.deterministic
        if self.corrector is None and greedy:
            return Proposal(tuple(self.target_ids[logits.argmax(-1)].tolist()))
        if self.corrector is not None:
            self.corrector.reset()
        tokens: list[int] = []
        probs: list[Tensor] = []
        token = self._last
        for state, row in zip(states, logits, strict=True):
            scores = row if self.corrector is None else self.corrector(row, state, token)
            token = self._choose(scores, sampling, generator, probs)
            tokens.append(token)
        return Proposal(tuple(tokens), torch.stack(probs) if probs else None)

    def _choose(
        self, scores: Tensor, sampling: Sampling, generator: torch.Generator | None, probs: list[Tensor]
    ) -> int:
        if sampling.greedy or self.deterministic:
            return int(self.target_ids[scores.argmax()])
        q = sampling.probs(scores.unsqueeze(0).cpu())[0]
        draft_id = int(torch.multinomial(q, 1, generator=generator))
        probs.append(torch.zeros(self.vocab_size).scatter_(0, self.target_ids.cpu(), q))
        return int(self.target_ids[draft_id])
