"""The MTP module with a DeepSeek layer: multi-head latent attention, and a dense MLP or a mixture of experts.

The experts are those of transformers (DeepSeek-V3, arXiv 2412.19437, equations 12 to 16): sigmoid scores, a router bias
that affects only the selection, groups, a shared expert. The bias is not trained, and no balance loss is added.

Shape legend: R rows, H hidden size, h heads, d / v size of a query and key head / of a value head.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from specforge.errors import UserError
from specforge.modeling.draft.fields import EXPERTS, FLAG, LATENT, Fields, only
from specforge.modeling.draft.mtp.network import MTPDraft
from specforge.modeling.draft.registry import register_draft
from specforge.modeling.layers.decoder_layer import Attention, RMSNorm
from specforge.modeling.layers.latent_attention import LatentAttention

_GATE_UP, _DOWN = "layer.mlp.experts.gate_up_proj", "layer.mlp.experts.down_proj"
_BIAS = "layer.mlp.gate.e_score_correction_bias"


class MixtureOfExperts(DeepseekV3MoE):  # type: ignore[misc]
    """Transformers' mixture of experts, with the methods of :class:`SwiGLUMLP`; randomly initialised."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The matrices in the compute dtype; the router's stays as it is, because it multiplies in fp32."""
        return {name: x if name.startswith("gate.") else x.to(dtype) for name, x in self.named_parameters()}

    def residual(self, x: Tensor, norm: RMSNorm, weights: dict[str, Tensor]) -> Tensor:
        """``x + MoE(norm(x))`` for ``x [R, H]`` and :meth:`weights`."""
        return x + functional_call(self, weights, (norm(x),))


@register_draft("DeepseekMTPDraft", config_class=DeepseekV3Config)
class DeepseekMTPDraft(MTPDraft):
    """One MTP module whose layer has latent attention.

    Args:
        config: a ``DeepseekV3Config`` with the fields of :class:`~specforge.modeling.draft.mtp.network.MTPDraft`;
            ``moe`` (default false) selects a mixture of experts, with the config's sizes, instead of the dense MLP.
    """

    fields: ClassVar[Fields] = {**MTPDraft.fields, **LATENT, **EXPERTS, "moe": FLAG, "qk_norm": only(False)}
    form: ClassVar[str] = "a DeepSeek layer"

    def __init__(self, config: DeepseekV3Config) -> None:
        config.moe = bool(getattr(config, "moe", False))
        # The eager loop over the selected experts runs on any device and in any dtype.
        config._experts_implementation = "eager"
        # The size of the rotary table, which a config of another attention may have set otherwise.
        config.head_dim = config.qk_rope_head_dim
        super().__init__(config)

    @staticmethod
    def build_attention(config: DeepseekV3Config) -> Attention:
        """Latent attention."""
        return LatentAttention(config)

    @staticmethod
    def build_mlp(config: DeepseekV3Config) -> nn.Module | None:
        """A dense MLP, or with ``moe`` a mixture of experts."""
        return MixtureOfExperts(config) if config.moe else None

    def module_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """One tensor per expert and projection; the router's bias keeps its dtype, as in DeepSeek's checkpoints."""
        found = super().module_tensors(dtype)
        found |= {n: x.detach().cpu() for n, x in self.named_buffers() if n == _BIAS}
        if _GATE_UP in found:
            gate, up = found.pop(_GATE_UP).chunk(2, dim=1)
            stacked = {"gate_proj": gate, "up_proj": up, "down_proj": found.pop(_DOWN)}
            for name, experts in stacked.items():
                found |= {_expert(i, name): x for i, x in enumerate(experts)}
        return found

    def start_from(self, tensors: dict[str, Tensor], what: str) -> None:
        """Copy tensors by name; those of the experts are separate."""
        tensors = dict(tensors)
        count = self.config.num_local_experts if self.config.moe else 0
        every = [_expert(i, n) for i in range(count) for n in ("gate_proj", "up_proj", "down_proj")]
        for name in every:
            if name not in tensors:
                raise UserError(f"{what}: {name} is missing for {self.form} of this draft config")
        if every:
            gate, up, down = (torch.stack([tensors.pop(n) for n in every[k::3]]) for k in range(3))
            tensors |= {_GATE_UP: torch.cat([gate, up], dim=1), _DOWN: down}
        super().start_from(tensors, what)


def _expert(index: int, projection: str) -> str:
    return f"layer.mlp.experts.{index}.{projection}.weight"
