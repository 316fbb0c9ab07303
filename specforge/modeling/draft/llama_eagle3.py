"""The EAGLE-3 draft: one Llama layer over [token embedding, fused target features].

The network of arXiv 2503.01840 under the names that serving engines load (``LlamaForCausalLMEagle3``):
``fc`` fuses the captured layers, ``midlayer`` is a Llama decoder layer whose attention input is twice as
wide, ``norm`` and ``lm_head`` give logits over the draft vocabulary. EAGLE-3.1 adds one norm per captured
layer before ``fc`` (``fc_norm``) and feeds the normed state to the next step (``norm_output``).

The input of the attention is ``[RMSNorm(embedding); RMSNorm(hidden)]``. A matrix product splits over such
a concatenation, and the embedding half at step s is that of step 0 shifted by s tokens, so it is
computed once for all T steps.

Shape legend: N tokens, R query rows, T steps, H hidden size, A captured layers x target hidden size,
D draft vocabulary, h / k query / key heads, d head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig

from specforge.errors import UserError
from specforge.modeling.draft.registry import Draft, register_draft
from specforge.modeling.draft.unroll import UnrollPlan
from specforge.modeling.layers.attention import ttt_attention
from specforge.modeling.layers.functional import RMSNorm, compute_dtype
from specforge.modeling.layers.rope import RotaryTable, apply_rope
from specforge.target_files import TargetFiles


class _Weights(NamedTuple):
    """The layer's matrices in the compute dtype, fused; made once and used by all T steps."""

    embed_qkv: Tensor
    hidden_qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


class Eagle3Attention(nn.Module):
    """Projections of the doubled attention input, ``[R, 2H]`` to heads and back."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        width = 2 * config.hidden_size
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def inputs(self) -> dict[str, nn.Linear]:
        """The projections of the doubled input, by their letters."""
        return {"q": self.q_proj, "k": self.k_proj, "v": self.v_proj}


class SwiGLUMLP(nn.Module):
    """Gate, up and down projections of a Llama MLP."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class Eagle3Layer(nn.Module):
    """A Llama decoder layer that reads a token embedding beside the carried hidden state."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.hidden_size, eps)
        self.hidden_norm = RMSNorm(config.hidden_size, eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps)
        self.self_attn = Eagle3Attention(config)
        self.mlp = SwiGLUMLP(config)

    def weights(self, dtype: torch.dtype) -> _Weights:
        """Cast and fuse the layer's matrices."""
        attn, mlp = self.self_attn, self.mlp
        qkv = torch.cat([p.weight.to(dtype) for p in attn.inputs().values()])
        half = qkv.shape[1] // 2
        return _Weights(
            embed_qkv=qkv[:, :half],
            hidden_qkv=qkv[:, half:],
            out=attn.o_proj.weight.to(dtype),
            gate_up=torch.cat([mlp.gate_proj.weight.to(dtype), mlp.up_proj.weight.to(dtype)]),
            down=mlp.down_proj.weight.to(dtype),
        )

    def finish(self, hidden: Tensor, attention: Tensor, w: _Weights) -> Tensor:
        """Output projection, residual and MLP: ``hidden [R, H]``, ``attention [R, h, d]`` to ``[R, H]``."""
        hidden = hidden + F.linear(attention.flatten(1), w.out)
        return self.post_attention_layernorm.mlp(hidden, w.gate_up, w.down)


@register_draft("LlamaForCausalLMEagle3", config_class=LlamaConfig)
class LlamaEagle3(Draft):
    """EAGLE-3 draft with Llama layers.

    Args:
        config: a ``LlamaConfig`` with ``draft_vocab_size`` and ``eagle_config``; optional
            ``target_hidden_size`` (default ``hidden_size``), ``fc_norm`` and ``norm_output`` (EAGLE-3.1) and
            ``norm_before_fc`` (one norm over the concatenated features).

    Raises:
        ValueError: a field is missing or asks for a network that this class is not.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        if config.num_hidden_layers != 1:
            raise ValueError(
                f"num_hidden_layers is {config.num_hidden_layers}: an EAGLE-3 draft has one layer"
            )
        self.layer_ids = tuple(config.eagle_config["eagle_aux_hidden_state_layer_ids"])
        width = getattr(config, "target_hidden_size", None) or config.hidden_size
        eps = config.rms_norm_eps
        self.norm_output = bool(getattr(config, "norm_output", False))
        fused = width * len(self.layer_ids)
        before = config.eagle_config.get("norm_before_fc", getattr(config, "norm_before_fc", False))
        self.input_norm = RMSNorm(fused, eps) if before else None
        per_layer = getattr(config, "fc_norm", False)
        self.fc_norm = nn.ModuleList(RMSNorm(width, eps) for _ in self.layer_ids) if per_layer else None
        self.fc = nn.Linear(fused, config.hidden_size, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = RMSNorm(config.hidden_size, eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary = RotaryTable(config)

    @torch.no_grad()
    def start_from_target(self, target: TargetFiles) -> None:
        """Start near the target: its last layer reads the last captured one, and its own head reads that.

        What has no counterpart stays random: the embedding's half of the attention input, and (near zero) what
        ``fc`` reads of the other captured layers.

        Raises:
            UserError: the target's last layer is no Llama layer of the draft's dimensions.
        """
        last, layer, width = target.num_layers - 1, self.midlayer, self.fc.out_features
        half = [
            (p.weight[:, width:], f"self_attn.{n}_proj.weight") for n, p in layer.self_attn.inputs().items()
        ]
        whole = [(layer.self_attn.o_proj.weight, "self_attn.o_proj.weight")]
        whole += [(p, f"mlp.{name}") for name, p in layer.mlp.named_parameters()]
        norms = [
            (layer.hidden_norm.weight, "input_layernorm.weight"),
            (layer.post_attention_layernorm.weight, "post_attention_layernorm.weight"),
        ]
        for parameter, name in [*half, *whole, *norms]:
            _copy(parameter, target.layer_tensor(last, name), f"{target.name}: {name} of layer {last}")
        _copy(self.norm.weight, target.final_norm(), f"{target.name}: its final norm")
        _copy(self.lm_head.weight, target.lm_head()[self.target_ids.cpu()], f"{target.name}: its lm_head")
        self.fc.weight.normal_(std=0.002)
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

    def forward(self, aux_hidden_states: Tensor, embeds: Tensor, plan: UnrollPlan) -> Tensor:
        """Run the training-time test.

        Args:
            aux_hidden_states: ``[N, A]`` captured layers, concatenated.
            embeds: ``[N, H]`` the target's embedding of every token.
            plan: which rows to compute, from :func:`plan_unroll`.

        Returns:
            ``[T, R, H]`` normed states, what ``lm_head`` reads, in the compute dtype.
        """
        dtype = compute_dtype(self.fc.weight)
        # Every product below names its dtype; autocast would also narrow the reductions.
        with torch.autocast(embeds.device.type, enabled=False):
            return self._unroll(aux_hidden_states, embeds, plan, dtype)

    def _unroll(
        self, aux_hidden_states: Tensor, embeds: Tensor, plan: UnrollPlan, dtype: torch.dtype
    ) -> Tensor:
        layer, attn, w = self.midlayer, self.midlayer.self_attn, self.midlayer.weights(dtype)
        q_width = attn.heads * attn.head_dim
        embed_qkv = layer.input_layernorm.linear(embeds.to(dtype), w.embed_qkv)
        cos, sin = self.rotary(plan.longest + plan.steps, embeds.device)
        row_positions = plan.positions[plan.rows]

        # Step 0: keys and values of every token, queries of the needed rows only.
        fused = self.fuse(aux_hidden_states, dtype)
        hidden = fused[plan.rows]
        kv = layer.hidden_norm.linear(fused, w.hidden_qkv[q_width:])
        key, value = self._heads(kv + embed_qkv[plan.next_tokens, q_width:])
        key = apply_rope(key, cos[plan.positions], sin[plan.positions])
        query = layer.hidden_norm.linear(hidden, w.hidden_qkv[:q_width])
        query = query + embed_qkv[plan.row_tokens[0], :q_width]

        states: list[Tensor] = []
        own: list[tuple[Tensor, Tensor]] = []
        for step in range(plan.steps):
            angles = cos[row_positions + step], sin[row_positions + step]
            if step > 0:
                qkv = layer.hidden_norm.linear(hidden, w.hidden_qkv) + embed_qkv[plan.row_tokens[step]]
                query, (own_key, own_value) = qkv[:, :q_width], self._heads(qkv[:, q_width:])
                # A contiguous copy, so that the fused product is not kept for the sake of its last third.
                own.append((apply_rope(own_key, *angles), own_value.contiguous()))
            query = apply_rope(query.unflatten(1, (attn.heads, attn.head_dim)), *angles)
            hidden = layer.finish(hidden, ttt_attention(query, key, value, plan.segments, own), w)
            normed = self.norm(hidden)
            states.append(normed)
            if self.norm_output:
                hidden = normed
        return torch.stack(states)

    def _heads(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        key, value = kv.unflatten(1, (-1, self.midlayer.self_attn.head_dim)).chunk(2, dim=1)
        return key, value

    def decoder(self, dtype: torch.dtype) -> Eagle3Decoder:
        """A snapshot of the draft for decoding in ``dtype``."""
        return Eagle3Decoder(self, dtype)


def _copy(parameter: Tensor, value: Tensor, what: str) -> None:
    if parameter.shape != value.shape:
        raise UserError(
            f"{what} is {tuple(value.shape)}, the draft's {tuple(parameter.shape)}: it cannot start there"
        )
    parameter.copy_(value)


class Eagle3Decoder:
    """Runs the draft row by row with a key/value cache; later changes of the draft's weights do not reach it.

    Rows are consecutive: the row of position p is the p-th that :meth:`extend` was given. A chain step is
    one more row, because at step s the training-time test also places row p at position p+s.

    Args:
        draft: the network.
        dtype: compute dtype.
    """

    def __init__(self, draft: LlamaEagle3, dtype: torch.dtype) -> None:
        self.draft, self.dtype = draft, dtype
        self.device = draft.fc.weight.device
        self._weights = draft.midlayer.weights(dtype)
        self._lm_head = draft.lm_head.weight.to(dtype)
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self.rows = 0
        self._cos, self._sin = self.draft.rotary(0, self.device)
        attn = self.draft.midlayer.self_attn
        empty = torch.empty(0, attn.kv_heads, attn.head_dim, dtype=self.dtype, device=self.device)
        self._keys, self._values = empty, empty

    def crop(self, rows: int) -> None:
        """Keep the first ``rows`` rows."""
        self.rows = rows

    @torch.inference_mode()
    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """Fuse captured layers ``[n, A]`` of committed tokens into draft states ``[n, H]``."""
        return self.draft.fuse(aux_hidden_states, self.dtype)

    @torch.inference_mode()
    def extend(self, hidden: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Append rows.

        Args:
            hidden: ``[n, H]`` fused features of committed tokens, or the state that the last call fed back.
            embeds: ``[n, H]`` embedding of the token after each row's.

        Returns:
            ``(logits [D], feedback [H])`` of the last row: the next token's distribution over the draft
            vocabulary, and the state to feed to the next chain step.
        """
        layer, attn, w = self.draft.midlayer, self.draft.midlayer.self_attn, self._weights
        before, after = self.rows, self.rows + hidden.shape[0]
        self._grow(after)
        q_width = attn.heads * attn.head_dim
        qkv = layer.input_layernorm.linear(embeds.to(self.dtype), w.embed_qkv)
        qkv = qkv + layer.hidden_norm.linear(hidden, w.hidden_qkv)
        angles = self._cos[before:after], self._sin[before:after]
        key, value = self.draft._heads(qkv[:, q_width:])
        self._keys[before:after], self._values[before:after] = apply_rope(key, *angles), value
        self.rows = after
        # Only the last row's output is used; the others are there for their keys.
        query = qkv[-1:, :q_width].unflatten(1, (attn.heads, attn.head_dim))
        query = apply_rope(query, *(x[-1:] for x in angles))
        attention = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None], self._keys[:after].transpose(0, 1)[None],
            self._values[:after].transpose(0, 1)[None], enable_gqa=True,
        )  # fmt: skip
        hidden = layer.finish(hidden[-1:], attention[0].transpose(0, 1), w)
        normed = self.draft.norm(hidden)
        logits = F.linear(normed, self._lm_head)
        return logits[0], (normed if self.draft.norm_output else hidden)[0]

    def _grow(self, rows: int) -> None:
        room = self._keys.shape[0]
        if rows <= room:
            return
        more = max(128, 2 * rows) - room
        self._keys, self._values = (
            torch.cat([x, x.new_empty(more, *x.shape[1:])]) for x in (self._keys, self._values)
        )
        self._cos, self._sin = self.draft.rotary(self._keys.shape[0], self.device)
