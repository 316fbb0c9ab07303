"""Acceptance metrics that are summed over batches and ranks before any ratio is formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from specforge.eval.tau import Rounds, jump, products, tau_of_sums


class AcceptanceLength(Metric):
    """Exact offline τ of greedy decoding, with an interval clustered by prompt.

    The state consists of integer sums (n, ΣN, ΣR, ΣN², ΣNR, ΣR² and counts by position), so the result does not
    depend on how prompts are distributed over batches and ranks.
    """

    full_state_update = False
    sums: Tensor
    drafted: Tensor
    accepted: Tensor

    def __init__(self, gamma: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gamma = gamma
        self.add_state("sums", torch.zeros(6, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("drafted", torch.zeros(gamma, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("accepted", torch.zeros(gamma, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, answers: Sequence[np.ndarray]) -> None:
        """Add one prompt: one ``[starts, γ]`` bool array per answer, from :func:`specforge.eval.tau.chains`."""
        tokens = rounds = 0
        for accept in answers:
            replayed, drafted, accepted = jump(accept[:, : self.gamma])
            tokens += int(replayed.tokens)
            rounds += int(replayed.rounds)
            self.drafted += torch.from_numpy(drafted).to(self.device)
            self.accepted += torch.from_numpy(accepted).to(self.device)
        if rounds:
            self.sums += torch.from_numpy(products(Rounds(tokens, rounds))).to(self.device)

    def compute(self) -> dict[str, Any]:
        """``tau`` (a :class:`Tau`) and ``acceptance [γ]``, P(position k accepted | all before it accepted)."""
        acceptance = (self.accepted.double() / self.drafted.clamp(min=1)).tolist()
        return {"tau": tau_of_sums(self.sums.tolist()), "acceptance": acceptance}
