"""What the EAGLE-3 family shares: ``fc`` over captured layers, and a trainable head over the draft vocabulary.

Shape legend: N tokens, A captured layers x target hidden size, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specforge.modeling.draft.registry import Draft
from specforge.modeling.layers.functional import RMSNorm
from specforge.modeling.layers.rope import RotaryTable


class FusedDraft(Draft):
    """Base of drafts that read captured layers of the target, fused.

    Args:
        config: a transformers config with ``draft_vocab_size`` and ``eagle_config``; optional
            ``target_hidden_size`` (default ``hidden_size``), ``fc_norm`` (a norm of each captured layer, EAGLE-3.1)
            and ``norm_before_fc`` (one norm over all of them).

    Attributes:
        layer_ids: the captured layers.
        fc: from A to H.
        norm: what ``lm_head`` reads is normed by it.
        lm_head: from H to D.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layer_ids = tuple(config.eagle_config["eagle_aux_hidden_state_layer_ids"])
        width = getattr(config, "target_hidden_size", None) or config.hidden_size
        eps = config.rms_norm_eps
        fused = width * len(self.layer_ids)
        before = config.eagle_config.get("norm_before_fc", getattr(config, "norm_before_fc", False))
        self.input_norm = RMSNorm(fused, eps) if before else None
        per_layer = getattr(config, "fc_norm", False)
        self.fc_norm = nn.ModuleList(RMSNorm(width, eps) for _ in self.layer_ids) if per_layer else None
        self.fc = nn.Linear(fused, config.hidden_size, bias=False)
        self.build_layers(config)
        self.norm = RMSNorm(config.hidden_size, eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary = RotaryTable(config)

    @abstractmethod
    def build_layers(self, config: Any) -> None:
        """Make what lies between ``fc`` and ``norm``."""

    def fuse(self, aux_hidden_states: Tensor, dtype: torch.dtype) -> Tensor:
        """Fuse captured layers ``[N, A]`` into draft states ``[N, H]``."""
        features = aux_hidden_states.to(dtype)
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = features.chunk(len(self.layer_ids), dim=-1)
            features = torch.cat([norm(x) for norm, x in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return F.linear(features, self.fc.weight.to(dtype))
