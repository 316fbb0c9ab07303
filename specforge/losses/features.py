"""Distance between the states that the two heads read: the feature loss of EAGLE and HASS."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def feature_distance(states: Tensor, students: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
    """Σ weight · mean over H of the smooth L1 distance (EAGLE, arXiv 2401.15077, section 4.2).

    Shape legend: S states, M labels, T students of each, H hidden size.

    Args:
        states: ``[S, H]`` the draft's normed states.
        students: ``[M, T]`` the state that predicts label m at step t; any where the weight is 0.
        weights: ``[M, T]`` weight of each row; 0 drops it.
        hidden: ``[M, H]`` the target's last hidden state that predicts the label.

    Returns:
        A scalar in fp32 or wider.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=states.device)
    with torch.autocast(states.device.type, enabled=False):
        for student, weight in zip(students.t(), weights.t(), strict=True):
            apart = F.smooth_l1_loss(states[student].to(wide), hidden.to(wide), reduction="none")
            total = total + apart.mean(-1) @ weight.to(wide)
    return total
