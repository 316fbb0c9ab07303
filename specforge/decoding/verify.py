"""Lossless verification of drafted tokens: greedy, or by rejection sampling.

The emitted tokens do not depend on the draft: greedy output equals the target's token for token, and sampled output has
exactly the target's distribution (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specforge.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from logits."""

    temperature: float = 0.0  # sampling temperature; 0 takes the most likely token
    top_p: float = 1.0  # nucleus sampling: keep the smallest set of tokens with at least this total probability
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError(
                f"sampling: temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k} "
                "(required: temperature >= 0, 0 < top_p <= 1, top_k >= 0)"
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    def probs(self, logits: Tensor) -> Tensor:
        """Probabilities ``[n, V]`` in fp32 of ``logits [n, V]``, after temperature, top-k and top-p."""
        scores = logits.float()
        if self.greedy:
            return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
        ids = torch.empty(len(scores), 0, dtype=torch.int64)
        scores = TemperatureLogitsWarper(self.temperature)(ids, scores)
        if self.top_k:
            scores = TopKLogitsWarper(self.top_k)(ids, scores)
        if self.top_p < 1.0:
            scores = TopPLogitsWarper(self.top_p)(ids, scores)
        return scores.softmax(-1)


class Proposal(NamedTuple):
    """Drafted tokens."""

    tokens: Sequence[int]  # target ids, in order
    # [n, V] fp32 distributions that the tokens were sampled from; None for a deterministic draft
    probs: Tensor | None = None


class Verdict(NamedTuple):
    """The number of ``accepted`` drafted tokens, and the target's ``next`` token after them."""

    accepted: int
    next: int


def verify(
    proposal: Proposal, target_logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None
) -> Verdict:
    """Accept a prefix of the drafted tokens and emit one token of the target.

    Args:
        proposal: n drafted tokens.
        target_logits: ``[n + 1, V]``, the target's logits for each drafted token and for the token after the last.
        sampling: the target's sampler; ``proposal.probs`` must come from the same sampler.
        generator: random generator for the acceptance decisions.
    """
    if sampling.greedy:
        return _verify_greedy(proposal.tokens, target_logits)
    target = sampling.probs(target_logits)
    uniform = torch.rand(len(proposal.tokens), generator=generator)
    for position, token in enumerate(proposal.tokens):
        p = target[position]
        q = None if proposal.probs is None else proposal.probs[position]
        ratio = p[token] if q is None else p[token] / q[token]
        if uniform[position] < ratio:
            continue
        residual = p.clone() if q is None else (p - q).clamp_(min=0)
        if q is None:
            residual[token] = 0.0
        return Verdict(position, int(torch.multinomial(residual, 1, generator=generator)))
    return Verdict(len(proposal.tokens), int(torch.multinomial(target[-1], 1, generator=generator)))


def _verify_greedy(tokens: Sequence[int], target_logits: Tensor) -> Verdict:
    best = target_logits.argmax(-1).tolist()
    for position, token in enumerate(tokens):
        if best[position] != token:
            return Verdict(position, best[position])
    return Verdict(len(tokens), best[-1])
