"""The DFlash-2 draft: DFlash with convolutions over the slots of a block, and a selection among the likeliest tokens.

The network is that of the published ``DFlash2DraftModel`` checkpoints; there is no paper. The input and output of each
sublayer pass through a causal convolution over the slots of the block, y_k = Σ_j x_{k-j} ⊙ (base_j + delta_{k,j}).
delta = W x_k depends on the slot's normed input, with one coefficient per group of channels. The convolution starts as
the identity. The head's ``selector_top_k`` likeliest tokens are scored again given the preceding token: token c after
token t, at state z, gets U(c) + Σ (A_t ⊙ P z ⊙ B_c), and the best of them is drafted.

Shape legend: R rows (whole blocks of b slots), H hidden size, J taps, g groups, M drafts, r rank, K candidates, V
vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config

from specforge.fusion import fused
from specforge.modeling.draft.dflash.network import BlockLayer, DFlash, block_size
from specforge.modeling.draft.fields import SIZE, Fields, by_default, only
from specforge.modeling.draft.registry import register_draft
from specforge.modeling.layers.decoder_layer import LayerWeights, swiglu
from specforge.modeling.layers.fp8 import linear

IN, OUT = 0, 1


class DynamicConv(nn.Module):
    """The convolutions before (``IN``) and after (``OUT``) a sublayer.

    Args:
        width: H.
        block: b.
        taps: J.
        group: channels per group.

    Raises:
        ValueError: the groups do not divide the channels, or there are more taps than slots.
    """

    def __init__(self, width: int, block: int, taps: int, group: int) -> None:
        super().__init__()
        if group < 1 or width % group or not 1 <= taps <= block:
            raise ValueError(
                f"conv_group_size is {group} and conv_kernel_size {taps}; they must be a divisor of hidden_size "
                f"{width}, and 1 to {block} slots of a block"
            )
        self.block, self.taps, self.group = block, taps, group
        self.base_kernel = nn.Parameter(torch.empty(2, taps, width))
        self.kernel_projection = nn.Linear(width, 2 * taps * (width // group), bias=False)
        self.start_as_identity()

    def start_as_identity(self) -> None:
        """Reset the parameters so that the output equals the input."""
        with torch.no_grad():
            self.base_kernel.zero_()[:, 0] = 1.0
            self.kernel_projection.weight.zero_()

    def forward(self, x: Tensor, normed: Tensor, side: int) -> Tensor:
        """Convolve ``x [R, H]`` with the coefficients that belong to the sublayer's input ``normed [R, H]``."""
        matrix = self.kernel_projection.weight.chunk(2)[side].to(x.dtype)
        delta = F.linear(normed, matrix).view(-1, self.block, self.taps, matrix.shape[0] // self.taps, 1)
        base = self.base_kernel[side].to(x.dtype).view(self.taps, -1, self.group)
        return _convolve(x.view(-1, self.block, *base.shape[1:]), delta, base).view(x.shape)


@fused(gradient=True, rows=(0,), delta=(0,))
def _convolve(rows: Tensor, delta: Tensor, base: Tensor) -> Tensor:
    """Blocks ``[n, b, groups, size]``, coefficients ``[n, b, taps, groups, 1]`` and ``[taps, groups, size]``."""
    out = rows * (base[0] + delta[:, :, 0])
    for tap in range(1, len(base)):
        more = rows[:, :-tap] * (base[tap] + delta[:, tap:, tap])
        out = out + F.pad(more, (0, 0, 0, 0, tap, 0))
    return out


class DFlash2Layer(BlockLayer):
    """DFlash's layer with convolutions around its sublayers, except for the context's keys and values."""

    mixes_slots: ClassVar[bool] = True

    def __init__(self, config: Qwen3Config, kind: str) -> None:
        super().__init__(config, kind)
        fields = config.dflash_config
        sizes = fields.get("conv_kernel_size", 2), fields.get("conv_group_size", 16)
        self.attention_conv = DynamicConv(config.hidden_size, block_size(config), *sizes)
        self.mlp_conv = DynamicConv(config.hidden_size, block_size(config), *sizes)

    def project(self, hidden: Tensor, w: LayerWeights) -> Tensor:
        """Input products of the rows ``[R, H]`` of whole blocks."""
        normed = self.input_layernorm(hidden)
        return linear(self.attention_conv(normed, normed, IN), w.hidden)

    def finish(self, hidden: Tensor, attention: Tensor, w: LayerWeights) -> Tensor:
        """As :meth:`DecoderLayer.finish`, for the rows of whole blocks."""
        out = linear(attention.flatten(1), w.out)
        hidden = hidden + self.attention_conv(out, self.input_layernorm(hidden), OUT)
        normed = self.post_attention_layernorm(hidden)
        activation = swiglu(linear(self.mlp_conv(normed, normed, IN), w.mlp["gate_up"]))
        return hidden + self.mlp_conv(linear(activation, w.mlp["down"]), normed, OUT)


class CandidateSelector(nn.Module):
    """Scores of a token given the preceding token and the state.

    Args:
        vocab_size: V, of the preceding tokens.
        draft_vocab_size: D.
        hidden_size: H.
        rank: r.
        top_k: K.
    """

    def __init__(self, vocab_size: int, draft_vocab_size: int, hidden_size: int, rank: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.predecessor_codebook = nn.Parameter(torch.randn(vocab_size, rank) * 0.02)
        self.successor_codebook = nn.Parameter(torch.randn(draft_vocab_size, rank) * 0.02)
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False)

    def context(self, states: Tensor, before: Tensor) -> Tensor:
        """A_t ⊙ P z, ``[M, r]``, for ``states [M, H]`` and the preceding tokens ``before [M]``."""
        seen = F.embedding(before, self.predecessor_codebook).to(states.dtype)
        return seen * F.linear(states, self.hidden_projection.weight.to(states.dtype))

    def choose(self, logits: Tensor, scores: Tensor) -> Tensor:
        """``logits + scores`` of the K likeliest tokens by ``logits [..., D]``; -inf elsewhere."""
        top = logits.topk(self.top_k, -1).indices
        chosen = torch.full_like(logits, -torch.inf)
        return chosen.scatter_(-1, top, logits.gather(-1, top) + scores.gather(-1, top))


_NESTED = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16}


@register_draft("DFlash2DraftModel", config_class=Qwen3Config)
class DFlash2(DFlash):
    """DFlash-2.

    Args:
        config: as for :class:`DFlash`, with ``conv_kernel_size`` (2), ``conv_group_size`` (16), ``selector_rank`` (256)
            and ``selector_top_k`` (16) in ``dflash_config``.
    """

    fields: ClassVar[Fields] = {
        **DFlash.fields,
        "dflash_config": {
            **DFlash.nested,
            "projector_type": only("dflash2"),
            **{name: by_default(value, SIZE) for name, value in _NESTED.items()},
        },
    }
    layer: ClassVar[type[BlockLayer]] = DFlash2Layer

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        fields, size = config.dflash_config, config.draft_vocab_size
        rank, top_k = fields.get("selector_rank", 256), fields.get("selector_top_k", 16)
        if top_k > size:
            raise ValueError(f"selector_top_k is {top_k}, more than the {size} tokens of the draft vocabulary")
        self.candidate_selector = CandidateSelector(config.vocab_size, size, config.hidden_size, rank, top_k)


class SelectingCorrector:
    """Selects among the candidates token by token when decoding."""

    def __init__(self, draft: DFlash2, dtype: torch.dtype) -> None:
        self.selector = draft.candidate_selector
        self._matrix = self.selector.successor_codebook.to(dtype)

    def reset(self) -> None:
        """Start a new block; the selector has no state."""

    def __call__(self, logits: Tensor, state: Tensor, token: int) -> Tensor:
        """The scores ``[D]`` of the candidates after ``token``; -inf elsewhere."""
        context = self.selector.context(state.unsqueeze(0), torch.tensor([token], device=state.device))
        return self.selector.choose(logits, F.linear(context, self._matrix)[0])
