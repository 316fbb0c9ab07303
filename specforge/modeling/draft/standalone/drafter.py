"""Drafter with a separate small language model and its key/value cache.

It never reads the first token of a text: SGLang shifts the draft's input by one token, for a stand-alone model as for
EAGLE, and drafting here must match SGLang's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specforge.decoding.drafters import Features, TrainedDrafter, joined
from specforge.decoding.verify import Proposal, Sampling


class StandaloneDrafter(TrainedDrafter):
    """Drafts one token after another with a causal LM, and removes rejected tokens from its cache.

    Args:
        model: a transformers causal LM in eval mode.
        target_ids: ``[D]`` target id of every row of its head.
        vocab_size: V.
    """

    def __init__(self, model: Any, target_ids: Tensor, vocab_size: int) -> None:
        self.model = model
        super().__init__(target_ids.cpu(), vocab_size, None)

    def reset(self) -> None:
        """Forget the sequence."""
        from transformers import DynamicCache

        super().reset()
        self._cache = DynamicCache()
        self._cached: list[int] = []  # tokens whose keys and values the cache holds

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """Record committed tokens; accepted drafts stay in the cache."""
        start = len(self._tokens)
        self._tokens += tokens if self._tokens else tokens[1:]
        kept = min(start, len(self._cached))
        while kept < len(self._cached) and self._cached[kept] == self._tokens[kept]:
            kept += 1
        if kept < len(self._cached):
            self._cache.crop(kept - len(self._cached))
            del self._cached[kept:]

    @torch.inference_mode()
    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """Read the tokens committed since the last call, then draft ``count`` tokens."""
        new: Sequence[int] = self._tokens[len(self._cached) :]
        parts: list[Proposal] = []
        while len(parts) < count:
            parts.append(self.choose(self._read(new), sampling, generator))
            new = parts[-1].tokens
        return joined(parts)

    def _read(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens to the cache; logits ``[1, D]`` on the CPU after the last."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        output = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cached += tokens
        return output.logits[0, -1:].cpu()  # type: ignore[no-any-return]
