"""Drafter of the block families: the context's cache grows, and every round computes a new block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from specforge.contracts import CapturePolicy
from specforge.decoding.drafters import TrainedDrafter, joined
from specforge.decoding.verify import Proposal, Sampling
from specforge.inference.target_head import OutputHead
from specforge.modeling.draft.dflash.network import BlockDecoder


class Corrector(Protocol):
    """Corrects a block's logits given the tokens drafted so far."""

    def reset(self) -> None:
        """Start a new block."""

    def __call__(self, logits: Tensor, state: Tensor, token: int) -> Tensor:
        """The next draft's final logits ``[D]``, from its own logits, its state ``[H]`` and the preceding token."""


class BlockDrafter(TrainedDrafter):
    """Drafts blocks with a trained network.

    Args:
        network: the network.
        embed: embeddings ``[n, H]`` of token ids ``[n]``.
        head: the target's head over the draft vocabulary.
        target_ids: ``[D]`` target id of every draft id.
        vocab_size: V.
        capture: features that the network reads.
        block_size: b.
        mask_token_id: the token of every slot but the first.
        first: the slot that drafts the first token: 1 where slots predict their own token, 0 where the next one.
        corrector: of the logits, token by token; None drafts all tokens from the block alone.
    """

    def __init__(
        self,
        network: BlockDecoder,
        embed: Callable[[Tensor], Tensor],
        head: OutputHead,
        target_ids: Tensor,
        vocab_size: int,
        capture: CapturePolicy,
        *,
        block_size: int,
        mask_token_id: int,
        first: int,
        corrector: Corrector | None = None,
    ) -> None:
        self.network, self.embed, self.head = network, embed, head
        self.first, self.corrector = first, corrector
        self._block = torch.full((block_size,), mask_token_id, device=target_ids.device)
        super().__init__(target_ids, vocab_size, capture, network)

    @torch.inference_mode()
    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """Extend the context by the committed tokens, and draft a block after it; at most b tokens."""
        count = min(count, len(self._block) - self.first)
        if count == 0:
            return Proposal(())
        features, following = self.take()
        self.network.extend(features)
        self._block[0] = following[-1]
        states = self.network.block(self.embed(self._block))[self.first : self.first + count]
        logits = self.head.scores(states)
        if self.corrector is None:
            return self.choose(logits, sampling, generator)
        self.corrector.reset()
        token, parts = self._tokens[-1], list[Proposal]()
        for state, row in zip(states, logits, strict=True):
            parts.append(self.choose(self.corrector(row, state, token)[None], sampling, generator))
            token = parts[-1].tokens[0]
        return joined(parts)
