"""P-EAGLE's drafter, which proposes all tokens of a round in one pass of its network.

The tokens of a round are sampled independently of each other, because the network has seen none of them. Verification
is still lossless: each token is sampled from the distribution that is reported for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.contracts import CapturePolicy
from specforge.decoding.drafters import TrainedDrafter
from specforge.decoding.verify import Proposal, Sampling
from specforge.modeling.draft.peagle.network import PEagleDecoder


class PEagleDrafter(TrainedDrafter):
    """Drafts γ tokens in one pass.

    Args:
        decoder: the network.
        embedding: ``[V, H]`` the target's embedding.
        target_ids: ``[D]`` target id of every draft id.
        vocab_size: V.
        capture: features that the network reads.
    """

    def __init__(
        self, decoder: PEagleDecoder, embedding: Tensor, target_ids: Tensor, vocab_size: int, capture: CapturePolicy
    ) -> None:
        self.decoder, self.embedding = decoder, embedding
        super().__init__(target_ids, vocab_size, capture, decoder)

    @torch.inference_mode()
    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """Extend the cache by the committed tokens, and draft ``count`` tokens after them."""
        if count == 0:
            return Proposal(())
        features, following = self.take()
        logits = self.decoder.draft_logits(features, following, self.embedding, count)
        return self.choose(logits, sampling, generator)
