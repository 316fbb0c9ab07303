"""The EAGLE-3 draft with a Llama layer, under the names that serving engines load (``LlamaForCausalLMEagle3``)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from transformers import LlamaConfig

from specforge.modeling.draft.eagle3.family import Angles, Eagle3Attention, grouped_heads
from specforge.modeling.draft.eagle3.network import Eagle3Draft
from specforge.modeling.draft.fields import FLAG, Fields
from specforge.modeling.draft.registry import register_draft
from specforge.modeling.layers.rope import apply_rope


class LlamaEagle3Attention(Eagle3Attention):
    """Grouped-query attention with rotary positions.

    Args:
        config: a ``LlamaConfig``; ``attention_bias`` adds biases to all four projections.
        width: columns of its input; by default the doubled one, 2H.
    """

    def __init__(self, config: LlamaConfig, width: int | None = None) -> None:
        super().__init__()
        width = width or 2 * config.hidden_size
        self.heads, self.kv_heads = grouped_heads(config)
        bias = bool(config.attention_bias)
        self.head_dim = self.value_dim = config.head_dim
        self.query_width = self.heads * self.head_dim
        self.q_proj = nn.Linear(width, self.query_width, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.query_width, config.hidden_size, bias=bias)

    def inputs(self) -> list[nn.Linear]:
        """Query, key and value projections."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def queries(self, product: Tensor, angles: Angles, more: tuple[Tensor, ...]) -> Tensor:
        """``[R, h, d]``."""
        return apply_rope(product.unflatten(1, (self.heads, self.head_dim)), *angles)

    def keys_values(self, product: Tensor, angles: Angles, more: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """``[R, k, d]`` each."""
        key, value = product.unflatten(1, (-1, self.head_dim)).chunk(2, dim=1)
        # A contiguous copy, so that the fused product is not kept for the sake of its last third.
        return apply_rope(key, *angles), value.contiguous()


@register_draft("LlamaForCausalLMEagle3", config_class=LlamaConfig)
class LlamaEagle3(Eagle3Draft):
    """EAGLE-3 draft with a Llama layer.

    Args:
        config: a ``LlamaConfig`` with the fields of :class:`~specforge.modeling.draft.eagle3.network.Eagle3Draft`.
    """

    fields: ClassVar[Fields] = {**Eagle3Draft.fields, "attention_bias": FLAG}
    attention: ClassVar[type[Eagle3Attention]] = LlamaEagle3Attention
