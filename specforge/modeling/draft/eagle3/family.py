"""What the EAGLE-3 family shares: ``fc`` over captured layers, a first layer that also reads an embedding, a head.

Shape legend: N tokens, R rows, A captured layers x target hidden size, H hidden size, D draft vocabulary, h / k
query / key heads, d / v size of a query and key head / of a value head.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specforge.inference.target_files import TargetFiles
from specforge.inference.target_layers import LastLayer
from specforge.modeling.draft.fields import (
    FLAG,
    LAYER,
    LAYER_IDS,
    SIZE,
    Fields,
    draft_rope,
    only,
    quoted,
    required,
    rope_fields,
)
from specforge.modeling.draft.registry import Draft, copy_into
from specforge.modeling.layers.attention import Segment, ttt_attention
from specforge.modeling.layers.functional import RMSNorm, norm_heads
from specforge.modeling.layers.rope import ROPE_TYPES, RotaryTable

Angles = tuple[Tensor, Tensor]


class LayerWeights(NamedTuple):
    """A layer's matrices in the compute dtype, fused; made once and used by all T steps.

    Attributes:
        embed: columns of the attention's input projections that read the embedding; none in a layer that reads
            states only.
        hidden: columns that read the carried state.
        bias: of the input projections, or None.
        more: further matrices of the attention.
        out: output projection.
        out_bias: its bias, or None.
        gate_up: gate and up projections of the MLP.
        down: down projection.
    """

    embed: Tensor
    hidden: Tensor
    bias: Tensor | None
    more: tuple[Tensor, ...]
    out: Tensor
    out_bias: Tensor | None
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


def grouped_heads(config: Any) -> tuple[int, int]:
    """Query heads and key heads, which share them.

    Raises:
        ValueError: they cannot be shared evenly.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads is {heads}, not a multiple of num_key_value_heads, {kv_heads}")
    return heads, kv_heads


class GroupedAttention(nn.Module):
    """Projections to heads and back, under the names of Llama and Qwen.

    Args:
        config: sizes; ``attention_bias`` (Qwen2: on query, key and value), and ``qk_norm`` (Qwen3).
        qk_norm: whether there are norms of query and key heads where the config does not say.
    """

    def __init__(self, config: Any, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads = grouped_heads(config)
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
        config: sizes of the MLP, eps of the norms, and ``norm_before_residual`` (the
            attention's output is added to the normed state instead of the state).
        attention: its attention; where that reads H columns only, the layer is an ordinary one.
    """

    def __init__(self, config: Any, attention: Eagle3Attention) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.doubled = attention.inputs()[0].in_features > size
        if self.doubled:
            self.hidden_norm = RMSNorm(size, eps)
        self.norm_before_residual = self.doubled and bool(getattr(config, "norm_before_residual", False))
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
        biases = [p.bias.to(dtype) for p in attn.inputs() if p.bias is not None]
        split = inputs.shape[1] - attn.o_proj.out_features
        gate_up, down = self.mlp.weights(dtype)
        return LayerWeights(
            embed=inputs[:, :split],
            hidden=inputs[:, split:],
            bias=torch.cat(biases) if biases else None,
            more=attn.more(dtype),
            out=attn.o_proj.weight.to(dtype),
            out_bias=None if attn.o_proj.bias is None else attn.o_proj.bias.to(dtype),
            gate_up=gate_up,
            down=down,
        )

    def read(self, embeds: Tensor, w: LayerWeights) -> Tensor:
        """Products of the input projections with embeddings ``[R, H]``, biases included."""
        product = self.input_layernorm.linear(embeds, w.embed)
        return product if w.bias is None else product + w.bias

    def carry(self, hidden: Tensor, w: LayerWeights) -> Tensor:
        """Products of the input projections of a layer that reads states ``[R, H]`` only."""
        product = self.state_norm.linear(hidden, w.hidden)
        return product if w.bias is None else product + w.bias

    def finish(self, hidden: Tensor, attention: Tensor, w: LayerWeights) -> Tensor:
        """Output projection, residual and MLP: ``hidden [R, H]``, ``attention [R, h, v]`` to ``[R, H]``."""
        if self.norm_before_residual:
            hidden = self.hidden_norm(hidden)
        hidden = hidden + F.linear(attention.flatten(1), w.out, w.out_bias)
        return self.post_attention_layernorm.mlp(hidden, w.gate_up, w.down)


def rotary_of_target(own: RotaryTable, config: Any, target: TargetFiles) -> RotaryTable:
    """The rotary positions with which a draft's layer is compared with the target's layer.

    A derived draft may simplify the target's positions (:func:`draft_rope`). That is no reason to refuse it, so the
    layers are then compared with the target's positions. Positions that the user chose are compared as they are.

    Args:
        own: the draft's table.
        config: the draft's config.
        target: the target.
    """

    def table(rope: Mapping[str, Any] | None) -> RotaryTable | None:
        if rope is None or rope["rope_type"] not in ROPE_TYPES:
            return None
        changed = copy.copy(config)
        changed.rope_parameters = dict(rope)
        return RotaryTable(changed)

    if table(draft_rope(target.config)) in (None, own):
        return own
    return table(rope_fields({"rope_parameters": target.config.get("rope_parameters")})) or own


_CAPTURED = "eagle_aux_hidden_state_layer_ids"


class FusedDraft(Draft):
    """Base of drafts that read captured layers of the target, fused.

    Args:
        config: a transformers config with ``draft_vocab_size`` and ``eagle_config``; optional
            ``target_hidden_size`` (default ``hidden_size``), ``fc_norm`` (a norm of each captured layer, EAGLE-3.1),
            ``norm_before_fc`` (one norm over all of them), ``norm_before_residual`` and ``attention_bias``.

    Attributes:
        layer_ids: the captured layers.
        fc: from A to H.
        norm: what ``lm_head`` reads is normed by it.
        lm_head: from H to D.
    """

    fields: ClassVar[Fields] = {
        **LAYER,
        "tie_word_embeddings": only(False),
        "norm_before_residual": FLAG,
        "norm_before_fc": FLAG,
        "fc_norm": FLAG,
        "num_aux_hidden_states": SIZE,
        "eagle_config": {
            _CAPTURED: required(LAYER_IDS),
            "norm_before_fc": FLAG,
            "use_aux_hidden_state": only(True),
            "use_input_layernorm_in_first_layer": only(True),
            "use_last_layernorm": only(True),
        },
    }

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layer_ids = tuple(config.eagle_config[_CAPTURED])
        count = getattr(config, "num_aux_hidden_states", len(self.layer_ids))
        if count != len(self.layer_ids):
            raise ValueError(f"num_aux_hidden_states is {count}, but {_CAPTURED} is {list(self.layer_ids)}")
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

    @staticmethod
    def spell(config: dict[str, Any]) -> None:
        """Layer ids name the outputs of layers. VLLM's top-level field names inputs, so its ids are one higher."""
        eagle, above = config.get("eagle_config", {}), config.pop(_CAPTURED, None)
        if not isinstance(eagle, Mapping):
            return
        own = {key: x for key, x in eagle.items() if key != _CAPTURED or x not in ([], ())}
        if above is not None:
            if not isinstance(above, list) or not all(type(layer) is int for layer in above):
                raise ValueError(f"{_CAPTURED} is {quoted(above)}, not a list of layers")
            below = [layer - 1 for layer in above]
            if list(own.setdefault(_CAPTURED, below)) != below:
                raise ValueError(
                    f"{_CAPTURED} is {quoted(above)}, but {quoted(own[_CAPTURED])} in eagle_config; the top-level ids "
                    "must be one higher, because vLLM counts layers by their inputs"
                )
        if own or "eagle_config" in config:
            config["eagle_config"] = own
        if config.pop("use_aux_norm", False):  # SGLang's older name
            config["fc_norm"] = True

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
        last, layer, width = LastLayer(target), self.entry, self.fc.out_features
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
            copy_into(parameter, last.tensor(name), f"{target.name}: {name} of its last layer")
        copy_into(self.norm.weight, last.final_norm(), f"{target.name}: its final norm")
        copy_into(self.lm_head.weight, target.lm_head()[self.target_ids.cpu()], f"{target.name}: its lm_head")
        self.fc.weight[:, -width:] += torch.eye(width, device=self.fc.weight.device)
        rotary = rotary_of_target(self.rotary, self.config, target)
        last.check(lambda states: self._layer(states, rotary), [name for _, name in pairs], self.architecture)

    def _layer(self, states: Tensor, rotary: RotaryTable) -> Tensor:
        """The first layer's output for the states ``[n, H]`` of the tokens of one text, with embeddings of zero."""
        layer, attn, w = self.entry, self.entry.self_attn, self.entry.weights(states.dtype)
        product, angles = layer.carry(states, w), rotary(len(states), states.device)
        query = attn.queries(product[:, : attn.query_width], angles, w.more)
        key, value = attn.keys_values(product[:, attn.query_width :], angles, w.more)
        whole = [Segment(row=0, start=0, stop=len(states), document=0)]
        return layer.finish(states, ttt_attention(query, key, value, whole, []), w)

    def fuse(self, aux_hidden_states: Tensor, dtype: torch.dtype) -> Tensor:
        """Fuse captured layers ``[N, A]`` into draft states ``[N, H]``."""
        features = aux_hidden_states.to(dtype)
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = features.chunk(len(self.layer_ids), dim=-1)
            features = torch.cat([norm(x) for norm, x in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return F.linear(features, self.fc.weight.to(dtype))
