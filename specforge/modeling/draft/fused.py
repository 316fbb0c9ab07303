"""What the EAGLE-3 family shares: ``fc`` over captured layers, a first layer that also reads an embedding, a head.

Shape legend: N tokens, R rows, A captured layers x target hidden size, H hidden size, D draft vocabulary, h / k
query / key heads, d / v size of a query and key head / of a value head.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specforge.modeling.draft.registry import Draft, copy_into
from specforge.modeling.layers.functional import RMSNorm, norm_heads
from specforge.modeling.layers.rope import RotaryTable
from specforge.target_files import TargetFiles

Angles = tuple[Tensor, Tensor]


class LayerWeights(NamedTuple):
    """A layer's matrices in the compute dtype, fused; made once and used by all T steps.

    Attributes:
        embed: columns of the attention's input projections that read the embedding; none in a layer that reads
            states only.
        hidden: columns that read the carried state.
        more: further matrices of the attention.
        out: output projection.
        gate_up: gate and up projections of the MLP.
        down: down projection.
    """

    embed: Tensor
    hidden: Tensor
    more: tuple[Tensor, ...]
    out: Tensor
    gate_up: Tensor
    down: Tensor


class Eagle3Attention(nn.Module):
    """What an attention has to supply: its projections of the layer's input, and heads made of the products.

    Attributes:
        heads: h.
        kv_heads: k.
        head_dim: d, of queries and keys.
        value_dim: v.
        query_width: how many columns of the fused product make the queries; they come first.
        o_proj: output projection, from ``h v`` to H.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    query_width: int
    o_proj: nn.Linear

    @abstractmethod
    def inputs(self) -> list[nn.Linear]:
        """The projections of the layer's input, those of the queries first."""

    def more(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Further matrices that the heads take, in the compute dtype."""
        return ()

    @abstractmethod
    def queries(self, product: Tensor, angles: Angles, more: tuple[Tensor, ...]) -> Tensor:
        """Rotated queries ``[R, h, d]`` of the first ``query_width`` columns."""

    @abstractmethod
    def keys_values(self, product: Tensor, angles: Angles, more: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Rotated keys ``[R, k, d]`` and values ``[R, k, v]`` of the other columns."""


class GroupedAttention(nn.Module):
    """Projections to heads and back, under the names of Llama and Qwen.

    Args:
        config: sizes; ``attention_bias`` (Qwen2: on query, key and value), and ``qk_norm`` (Qwen3).
        qk_norm: whether there are norms of query and key heads where the config does not say.
    """

    def __init__(self, config: Any, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = self.value_dim = config.head_dim
        hidden, bias = config.hidden_size, bool(getattr(config, "attention_bias", False))
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        normed = getattr(config, "qk_norm", qk_norm)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if normed else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if normed else None

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed query ``[R, h, d]`` and key ``[R, k, d]``, and value, of ``qkv [R, (h + 2 k) d]``."""
        heads = qkv.unflatten(1, (-1, self.head_dim))
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return norm_heads(self.q_norm, query), norm_heads(self.k_norm, key), value.contiguous()


class SwiGLUMLP(nn.Module):
    """Gate, up and down projections of a Llama MLP."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gate and up matrices, fused, and the down matrix, in the compute dtype."""
        gate_up = torch.cat([self.gate_proj.weight.to(dtype), self.up_proj.weight.to(dtype)])
        return gate_up, self.down_proj.weight.to(dtype)


class Eagle3Layer(nn.Module):
    """A decoder layer that reads a token embedding beside the carried hidden state.

    Args:
        config: sizes of the MLP and eps of the norms.
        attention: its attention; where that reads H columns only, the layer is an ordinary one.
    """

    def __init__(self, config: Any, attention: Eagle3Attention) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.doubled = attention.inputs()[0].in_features > size
        if self.doubled:
            self.hidden_norm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.self_attn = attention
        self.mlp = SwiGLUMLP(config)

    @property
    def state_norm(self) -> RMSNorm:
        """The norm of the carried state."""
        return self.hidden_norm if self.doubled else self.input_layernorm

    def weights(self, dtype: torch.dtype) -> LayerWeights:
        """Cast and fuse the layer's matrices."""
        attn = self.self_attn
        inputs = torch.cat([p.weight.to(dtype) for p in attn.inputs()])
        split = inputs.shape[1] - attn.o_proj.out_features
        gate_up, down = self.mlp.weights(dtype)
        return LayerWeights(
            embed=inputs[:, :split],
            hidden=inputs[:, split:],
            more=attn.more(dtype),
            out=attn.o_proj.weight.to(dtype),
            gate_up=gate_up,
            down=down,
        )

    def finish(self, hidden: Tensor, attention: Tensor, w: LayerWeights) -> Tensor:
        """Output projection, residual and MLP: ``hidden [R, H]``, ``attention [R, h, v]`` to ``[R, H]``."""
        hidden = hidden + F.linear(attention.flatten(1), w.out)
        return self.post_attention_layernorm.mlp(hidden, w.gate_up, w.down)


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

    @property
    @abstractmethod
    def entry(self) -> Eagle3Layer:
        """The layer that reads the embedding beside the fused features."""

    @torch.no_grad()
    def start_from_target(self, target: TargetFiles) -> None:
        """Start near the target: its last layer reads the last captured one, and its own head reads that.

        What has no counterpart stays as it is: the embedding's half of the attention input, and what ``fc`` reads of
        the other captured layers.

        Raises:
            UserError: the target's last layer is none of the draft's kind and dimensions.
        """
        last, layer, width = target.num_layers - 1, self.entry, self.fc.out_features
        doubled = {id(p.weight) for p in layer.self_attn.inputs()}
        pairs = [
            (p[:, width:] if id(p) in doubled else p, f"self_attn.{name}")
            for name, p in layer.self_attn.named_parameters()
        ]
        pairs += [(p, f"mlp.{name}") for name, p in layer.mlp.named_parameters()]
        pairs += [
            (layer.hidden_norm.weight, "input_layernorm.weight"),
            (layer.post_attention_layernorm.weight, "post_attention_layernorm.weight"),
        ]
        for parameter, name in pairs:
            copy_into(parameter, target.layer_tensor(last, name), f"{target.name}: {name} of layer {last}")
        copy_into(self.norm.weight, target.final_norm(), f"{target.name}: its final norm")
        copy_into(self.lm_head.weight, target.lm_head()[self.target_ids.cpu()], f"{target.name}: its lm_head")
        self.fc.weight[:, -width:] += torch.eye(width, device=self.fc.weight.device)

    def fuse(self, aux_hidden_states: Tensor, dtype: torch.dtype) -> Tensor:
        """Fuse captured layers ``[N, A]`` into draft states ``[N, H]``."""
        features = aux_hidden_states.to(dtype)
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = features.chunk(len(self.layer_ids), dim=-1)
            features = torch.cat([norm(x) for norm, x in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return F.linear(features, self.fc.weight.to(dtype))
