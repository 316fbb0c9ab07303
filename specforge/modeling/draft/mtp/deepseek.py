"""The MTP module with a DeepSeek layer: multi-head latent attention, and a dense MLP or a mixture of experts.

The experts are transformers' own (DeepSeek-V3, arXiv 2412.19437, equations 12 to 16): sigmoid scores, a router bias
that only chooses, groups, a shared expert. That bias is not trained, and no balance loss is added.

Shape legend: R rows, H hidden size, h heads, d / v size of a query and key head / of a value head.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from specforge.errors import UserError
from specforge.modeling.draft.eagle3.deepseek import EXPERTS, LATENT, LatentAttention
from specforge.modeling.draft.eagle3.family import SwiGLUMLP
from specforge.modeling.draft.fields import FLAG, Fields, only
from specforge.modeling.draft.mtp.network import MTPDraft, MTPWeights
from specforge.modeling.draft.registry import register_draft

_GATE_UP, _DOWN = "layer.mlp.experts.gate_up_proj", "layer.mlp.experts.down_proj"
_BIAS = "layer.mlp.gate.e_score_correction_bias"


class PlainLatentAttention(LatentAttention):
    """Latent attention of a layer that reads H columns, as the target's own layers do."""

    input_parts: ClassVar[int] = 1


@register_draft("DeepseekMTPDraft", config_class=DeepseekV3Config)
class DeepseekMTPDraft(MTPDraft):
    """One MTP module whose layer has latent attention.

    Args:
        config: a ``DeepseekV3Config`` with the fields of :class:`~specforge.modeling.draft.mtp.network.MTPDraft`;
            ``moe`` (default false) for a mixture of experts of the config's numbers instead of the dense MLP.
    """

    fields: ClassVar[Fields] = {**MTPDraft.fields, **LATENT, **EXPERTS, "moe": FLAG, "qk_norm": only(False)}
    form: ClassVar[str] = "a DeepSeek layer"
    attention: ClassVar[type[PlainLatentAttention]] = PlainLatentAttention

    def __init__(self, config: DeepseekV3Config) -> None:
        config.moe = bool(getattr(config, "moe", False))
        # Its loop over the experts that are hit runs on any device and in any dtype.
        config._experts_implementation = "eager"
        # The rotary table goes by this field, which a config of other attention may have set otherwise.
        config.head_dim = config.qk_rope_head_dim
        super().__init__(config)

    @staticmethod
    def make_mlp(config: Any) -> nn.Module:
        """A dense MLP, or with ``moe`` transformers' mixture of experts, at random."""
        if not config.moe:
            return SwiGLUMLP(config)
        mlp = DeepseekV3MoE(config)
        for parameter in mlp.parameters():
            nn.init.normal_(parameter, std=0.02)
        return mlp

    def module_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """One tensor an expert and projection; the router's bias keeps its dtype, as in DeepSeek's checkpoints."""
        found = super().module_tensors(dtype)
        found |= {n: x.detach().cpu() for n, x in self.named_buffers() if n == _BIAS}
        if _GATE_UP in found:
            gate, up = found.pop(_GATE_UP).chunk(2, dim=1)
            stacked = {"gate_proj": gate, "up_proj": up, "down_proj": found.pop(_DOWN)}
            for name, experts in stacked.items():
                found |= {_expert(i, name): x for i, x in enumerate(experts)}
        return found

    def start_from(self, tensors: dict[str, Tensor], what: str) -> None:
        """Copy tensors by their names here, those of experts one by one.

        Raises:
            UserError: one has no place, or another shape: the layer is of another form.
        """
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

    def mlp_weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The MLP's matrices in the compute dtype; the router makes its own of its weight, in fp32."""
        if not self.config.moe:
            return super().mlp_weights(dtype)
        own = self.layer.mlp.named_parameters()
        return {name: x if name.startswith("gate.") else x.to(dtype) for name, x in own}

    def apply_mlp(self, x: Tensor, mlp: dict[str, Tensor]) -> Tensor:
        """``x + MLP(norm(x))`` of ``x [R, H]``."""
        if not self.config.moe:
            return super().apply_mlp(x, mlp)
        return x + functional_call(self.layer.mlp, mlp, (self.layer.post_attention_layernorm(x),))

    def weights(self, dtype: torch.dtype) -> MTPWeights:
        """Cast and fuse the matrices."""
        return self.fuse_weights(self.layer.self_attn.inputs(), self.layer.self_attn.more(dtype), dtype)

    def heads(self, x: Tensor, w: MTPWeights, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key ``[R, h, d]`` and value ``[R, h, v]`` of ``x [R, H]``, positions applied."""
        attn, product = self.layer.self_attn, self.layer.input_layernorm.linear(x, w.qkv)
        query = attn.queries(product[:, : attn.query_width], (cos, sin), w.more)
        key, value = attn.keys_values(product[:, attn.query_width :], (cos, sin), w.more)
        return query, key, value


def _expert(index: int, projection: str) -> str:
    return f"layer.mlp.experts.{index}.{projection}.weight"
