"""The MTP module with a DeepSeek layer: multi-head latent attention and a dense MLP, under the names of DeepSeek NextN.

Shape legend: R rows, H hidden size, h heads, d / v size of a query and key head / of a value head.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from transformers import DeepseekV3Config

from specforge.errors import UserError
from specforge.modeling.draft.deepseek_eagle3 import LatentAttention
from specforge.modeling.draft.mtp import MTPDraft, MTPWeights
from specforge.modeling.draft.registry import register_draft
from specforge.target_files import TargetFiles


class PlainLatentAttention(LatentAttention):
    """Latent attention of a layer that reads H columns, as the target's own layers do."""

    input_parts: ClassVar[int] = 1


@register_draft("DeepseekMTPDraft", config_class=DeepseekV3Config)
class DeepseekMTPDraft(MTPDraft):
    """One MTP module whose layer has latent attention.

    Args:
        config: a ``DeepseekV3Config`` with the fields of :class:`~specforge.modeling.draft.mtp.MTPDraft`; of the target's
            experts it reads nothing.
    """

    form: ClassVar[str] = "a layer of latent attention and a dense MLP"
    attention: ClassVar[type[PlainLatentAttention]] = PlainLatentAttention

    def __init__(self, config: DeepseekV3Config) -> None:
        # The rotary table goes by this field, which a config of other attention may have set otherwise.
        config.head_dim = config.qk_rope_head_dim
        super().__init__(config)

    def start_from(self, tensors: dict[str, Tensor], what: str) -> None:
        """Copy tensors by their names here.

        Raises:
            UserError: the layer has experts, or is of another form.
        """
        _refuse_experts(tensors, what)
        super().start_from(tensors, what)

    def start_from_last_layer(self, target: TargetFiles) -> None:
        """Start as the target's last layer and final norm over the hidden state alone.

        Raises:
            UserError: the target's last layer has experts, or is of another form.
        """
        last = f"layers.{target.num_layers - 1}."
        _refuse_experts([n for n in target.weight_files if last in n], f"{target.name}: its last layer")
        super().start_from_last_layer(target)

    def weights(self, dtype: torch.dtype) -> MTPWeights:
        """Cast and fuse the matrices."""
        return self.fuse_weights(self.layer.self_attn.inputs(), self.layer.self_attn.more(dtype), dtype)

    def heads(self, x: Tensor, w: MTPWeights, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key ``[R, h, d]`` and value ``[R, h, v]`` of ``x [R, H]``, positions applied."""
        attn, product = self.layer.self_attn, self.layer.input_layernorm.linear(x, w.qkv)
        query = attn.queries(product[:, : attn.query_width], (cos, sin), w.more)
        key, value = attn.keys_values(product[:, attn.query_width :], (cos, sin), w.more)
        return query, key, value


def _refuse_experts(names: dict[str, Tensor] | list[str], what: str) -> None:
    expert = min((n for n in names if ".mlp.experts." in n), default=None)
    if expert:
        raise UserError(
            f"{what}: {expert} is of a mixture of experts, which an MTP draft does not have; "
            "leave init_from out to train a dense MLP from random weights"
        )
