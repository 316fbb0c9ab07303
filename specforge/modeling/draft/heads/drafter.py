"""Drafter with heads on the target's last hidden state (Medusa, Hydra), without a cache.

The features lag the committed tokens by one. The last row h belongs to the token *before* the last committed one, so
the first head drafts the token two after h's, the second head the token three after it, and so on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specforge.contracts import CapturePolicy
from specforge.decoding.drafters import TrainedDrafter, joined
from specforge.decoding.verify import Proposal, Sampling
from specforge.modeling.draft.heads.network import HeadsDecoder


class HeadsDrafter(TrainedDrafter):
    """Drafts a chain, one token per head.

    Args:
        decoder: the heads.
        embed: maps token ids ``[n]`` to embeddings ``[n, H]``.
        target_ids: ``[D]`` target id of every draft id.
        vocab_size: V.
    """

    def __init__(
        self, decoder: HeadsDecoder, embed: Callable[[Tensor], Tensor], target_ids: Tensor, vocab_size: int
    ) -> None:
        self.decoder, self.embed = decoder, embed
        super().__init__(target_ids, vocab_size, CapturePolicy((), last_hidden_states=True))

    @torch.inference_mode()
    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """Draft ``count`` tokens, or as many as there are heads."""
        features, following = self.take()
        token, embeds, parts = following[-1:], list[Tensor](), list[Proposal]()
        for _ in range(min(count, self.decoder.positions)):
            embeds.append(self.embed(token))
            logits = self.decoder.logits(features[-1:], embeds)
            parts.append(self.choose(logits[None], sampling, generator))
            token = torch.tensor(parts[-1].tokens, device=self.target_ids.device)
        return joined(parts)
