"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from specforge.errors import UserError
from specforge.options import NonNegativeFloat, Share, ShareBelowOne


@dataclass
class OptimizerOptions:
    """How the draft's weights are updated.

    Args:
        name: ``adamw``, or ``muon`` (Muon for the matrices of layers, AdamW for all other parameters).
        lr: peak learning rate. Muon's updates are scaled to AdamW's, so one value suits both.
        betas: AdamW's decay rates of the first and second moment.
        weight_decay: decoupled weight decay of matrices; other parameters are not decayed.
        schedule: shape after warm-up: ``cosine``, ``linear``, ``constant`` or ``wsd`` (constant, then linear decay).
        warmup_ratio: share of all steps over which the learning rate rises linearly from 0.
        decay_ratio: share of all steps, at the end, over which ``wsd`` decays.
        min_lr_ratio: learning rate at the last step, relative to the peak.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: NonNegativeFloat = 1e-4
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_ratio: Share = 0.015
    decay_ratio: Share = 0.2
    min_lr_ratio: Share = 0.0


def lr_factor(options: OptimizerOptions, total_steps: int) -> Callable[[int], float]:
    """The learning rate relative to its peak, by optimizer step (0-based)."""
    warmup = round(options.warmup_ratio * total_steps)
    decay = max(1, round(options.decay_ratio * total_steps))
    floor = options.min_lr_ratio

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if options.schedule == "constant":
            return 1.0
        if options.schedule == "wsd":
            share = max(0.0, (step - (total_steps - decay)) / decay)
            return floor + (1 - floor) * (1 - min(1.0, share))
        share = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        shape = 1 - share if options.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
        return floor + (1 - floor) * shape

    return factor


class MuonWithAdamW(Optimizer):
    """Muon for some matrices and AdamW for all other parameters.

    It is one optimizer because Lightning counts a global step, clips gradients and steps the schedule per optimizer:
    two would need manual optimization, and every step would count twice.

    Args:
        matrices: parameters for Muon (Jordan et al. 2024), its update scaled to AdamW's RMS (arXiv 2502.16982).
        others: parameters for AdamW.
        lr: learning rate of both.
        betas: AdamW's decay rates.
        weight_decay: weight decay of Muon; the other parameters are not decayed.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self._muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=0.0)
        groups = [*self._muon.param_groups, *self._adamw.param_groups]
        super().__init__(groups, {})
        self._share_state()

    def _share_state(self) -> None:
        """Make both inner optimizers work on this optimizer's parameter groups and state."""
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of both inner optimizers."""
        super().load_state_dict(state_dict)
        self._share_state()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter."""
        loss = closure() if closure is not None else None
        self._muon.step()
        self._adamw.step()
        return loss


def build_optimizer(options: OptimizerOptions, draft: nn.Module, total_steps: int) -> tuple[Optimizer, LambdaLR]:
    """The optimizer of a draft's trainable parameters, and its schedule.

    Raises:
        UserError: there is no such optimizer or schedule.
    """
    for name, kinds in get_type_hints(OptimizerOptions).items():
        if get_origin(kinds) is Literal and getattr(options, name) not in get_args(kinds):
            raise UserError(f"optimizer: {name} is {getattr(options, name)!r}; use {' or '.join(get_args(kinds))}")
    trainable = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    matrices = [p for p in trainable.values() if p.ndim == 2]
    vectors = [p for p in trainable.values() if p.ndim != 2]
    if options.name == "muon":
        layers = [p for name, p in trainable.items() if p.ndim == 2 and not _is_table(name, p)]
        tables = [p for name, p in trainable.items() if p.ndim == 2 and _is_table(name, p)]
        optimizer: Optimizer = MuonWithAdamW(
            layers, [*tables, *vectors], options.lr, options.betas, options.weight_decay
        )
    else:
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        fused = all(type(p) is nn.Parameter and p.device.type in ("cpu", "cuda") for p in trainable.values())
        optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=fused)
    return optimizer, LambdaLR(optimizer, lr_factor(options, total_steps))


def _is_table(name: str, matrix: torch.Tensor) -> bool:
    """Whether a matrix has a row per token or a single row; orthogonalised updates do not suit those."""
    return len(matrix) == 1 or any(part in name for part in ("lm_head", "embed", "codebook", "markov_w"))
