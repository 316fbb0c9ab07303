"""Multi-token prediction: one decoder layer over [token embedding, last hidden state], applied again to its own output.

The module of DeepSeek-V3 (arXiv 2412.19437, section 2.2), reused for every position as in FastMTP (arXiv
2509.18362): ``x = proj [RMSNorm(embedding); RMSNorm(hidden)]``, a Llama or Qwen3 layer, a norm, and the target's own
frozen head. ``hidden`` is the target's last hidden state at step 0 and the module's own output afterwards.

Shape legend: N tokens, R query rows, T steps, H hidden size, D draft vocabulary, h / k query / key heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig

from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import OutputHead
from specforge.inference.target_layers import LastLayer
from specforge.modeling.draft.eagle3.family import GroupedAttention, SwiGLUMLP, rotary_of_target
from specforge.modeling.draft.fields import FLAG, LAYER, NO_MATRICES, Fields, by_default
from specforge.modeling.draft.registry import Draft, register_draft
from specforge.modeling.draft.unroll import UnrollPlan
from specforge.modeling.layers.attention import Segment, ttt_attention
from specforge.modeling.layers.decode_cache import DecodeCache, attend
from specforge.modeling.layers.functional import RMSNorm, compute_dtype
from specforge.modeling.layers.rope import RotaryTable, apply_rope


class MTPWeights(NamedTuple):
    """The matrices in the compute dtype, fused; made once and used by all T steps."""

    embed: Tensor
    hidden: Tensor
    qkv: Tensor
    bias: Tensor | None
    more: tuple[Tensor, ...]
    out: Tensor
    mlp: dict[str, Tensor]


class MTPLayer(nn.Module):
    """A decoder layer under the names of Llama and Qwen."""

    self_attn: Any
    mlp: Any

    def __init__(self, config: LlamaConfig, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention
        self.mlp = mlp


@register_draft("MTPDraft", config_class=LlamaConfig)
class MTPDraft(Draft):
    """One MTP module.

    Args:
        config: a ``LlamaConfig`` with ``draft_vocab_size``; optional ``qk_norm`` (Qwen3), ``attention_bias`` (Qwen2:
            on query, key and value) and ``norm_output`` (default true: the normed output is fed back, as SGLang
            does for every family; DeepSeek's report feeds back the output before the norm) and ``mask_first`` (MiMo:
            the row of position 0 reads no embedding).
    """

    fields: ClassVar[Fields] = {
        **LAYER,
        **NO_MATRICES,
        **dict.fromkeys(("qk_norm", "attention_bias", "mask_first"), FLAG),
        "norm_output": by_default(True, FLAG),
    }
    form: ClassVar[str] = "a Llama or Qwen3 layer"
    attention: ClassVar[type[nn.Module]] = GroupedAttention

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        if config.num_hidden_layers != 1:
            raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}: an MTP module has one layer")
        size, eps = config.hidden_size, config.rms_norm_eps
        self.norm_output = bool(getattr(config, "norm_output", True))
        self.mask_first = bool(getattr(config, "mask_first", False))
        self.embed_norm, self.hidden_norm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.proj = nn.Linear(2 * size, size, bias=False)
        self.layer = MTPLayer(config, self.attention(config), self.make_mlp(config))
        self.norm = RMSNorm(size, eps)
        self.rotary = RotaryTable(config)

    @staticmethod
    def make_mlp(config: Any) -> nn.Module:
        """The layer's MLP."""
        return SwiGLUMLP(config)

    def module_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What targets keep of the module, as :meth:`start_from` takes it; parameters in ``dtype``, on the CPU."""
        return {n: x.detach().cpu().to(dtype) for n, x in self.named_parameters()}

    @torch.no_grad()
    def start_from(self, tensors: dict[str, Tensor], what: str) -> None:
        """Copy tensors by their names here.

        Raises:
            UserError: one has no place, or another shape: the layer is of another form.
        """
        own = {n: x for n, x in self.state_dict().items() if n not in ("d2t", "t2d")}
        for name in sorted(set(tensors) ^ set(own)):
            lack = "has no place in" if name in tensors else "is missing for"
            raise UserError(f"{what}: {name} {lack} {self.form} of this draft config")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise UserError(f"{what}: {name} is {tuple(tensor.shape)}, the draft's {tuple(own[name].shape)}")
            own[name].copy_(tensor)

    @torch.no_grad()
    def start_from_last_layer(self, target: TargetFiles) -> None:
        """Start as the target's last layer and final norm over the hidden state alone.

        The projection passes the normed hidden state and (near zero) reads the embedding.

        Raises:
            UserError: the target's last layer is not one of the draft's form.
        """
        last, size = LastLayer(target), self.proj.out_features
        names = [n for n in self.module_tensors(torch.float32) if n.startswith("layer.")]
        tensors = {n: last.tensor(n.removeprefix("layer.")) for n in names}
        tensors |= {"norm.weight": last.final_norm()}
        tensors |= {name: torch.ones(size) for name in ("embed_norm.weight", "hidden_norm.weight")}
        passing = torch.cat([torch.randn(size, size) * 0.002, torch.eye(size)], dim=1)
        self.start_from({**tensors, "proj.weight": passing}, f"{target.name}: its last layer")

    @torch.no_grad()
    def check_start(self, target: TargetFiles) -> None:
        """Refuse to start from a last layer that computes something else than this one.

        Raises:
            UserError: says what the difference is.
        """
        own, rotary = self.layer.state_dict(), rotary_of_target(self.rotary, self.config, target)
        experts = {name: x for name, x in own.items() if ".experts." in name}
        LastLayer(target).check(lambda states: self._layer(states, rotary), own, self.architecture, experts)

    def _layer(self, states: Tensor, rotary: RotaryTable) -> Tensor:
        """The layer's output for the states ``[n, H]`` of the tokens of one text."""
        w = self.weights(states.dtype)
        heads = self.heads(states, w, *rotary(len(states), states.device))
        whole = [Segment(row=0, start=0, stop=len(states), document=0)]
        attention = ttt_attention(*heads, whole, [])
        return self.apply_mlp(states + F.linear(attention.flatten(1), w.out), w.mlp)

    def weights(self, dtype: torch.dtype) -> MTPWeights:
        """Cast and fuse the matrices."""
        attn = self.layer.self_attn
        return self.fuse_weights((attn.q_proj, attn.k_proj, attn.v_proj), (), dtype)

    def fuse_weights(self, inputs: Iterable[nn.Linear], more: tuple[Tensor, ...], dtype: torch.dtype) -> MTPWeights:
        """The matrices, of an attention with these projections of the layer's input and ``more`` behind them."""
        biases = [p.bias.to(dtype) for p in inputs if p.bias is not None]
        embed, hidden = self.proj.weight.to(dtype).chunk(2, dim=1)
        return MTPWeights(
            embed=embed,
            hidden=hidden,
            qkv=torch.cat([p.weight.to(dtype) for p in inputs]),
            bias=torch.cat(biases) if biases else None,
            more=more,
            out=self.layer.self_attn.o_proj.weight.to(dtype),
            mlp=self.mlp_weights(dtype),
        )

    def mlp_weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The MLP's matrices in the compute dtype."""
        gate_up, down = self.layer.mlp.weights(dtype)
        return {"gate_up": gate_up, "down": down}

    def apply_mlp(self, x: Tensor, mlp: dict[str, Tensor]) -> Tensor:
        """``x + MLP(norm(x))`` of ``x [R, H]``."""
        return self.layer.post_attention_layernorm.mlp(x, **mlp)

    def heads(self, x: Tensor, w: MTPWeights, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of ``x [R, H]``, positions applied."""
        qkv = self.layer.input_layernorm.linear(x, w.qkv)
        query, key, value = self.layer.self_attn.split(qkv if w.bias is None else qkv + w.bias)
        return apply_rope(query, cos, sin), apply_rope(key, cos, sin), value

    def finish(self, x: Tensor, attention: Tensor, w: MTPWeights) -> tuple[Tensor, Tensor]:
        """Output projection, residual and MLP of ``x [R, H]``; the normed state, and the one to feed back."""
        x = x + F.linear(attention.flatten(1), w.out)
        x = self.apply_mlp(x, w.mlp)
        normed = self.norm(x)
        return normed, normed if self.norm_output else x

    def forward(self, last_hidden_states: Tensor, embeds: Tensor, plan: UnrollPlan) -> Tensor:
        """Apply the module T times.

        Args:
            last_hidden_states: ``[N, H]`` the target's.
            embeds: ``[N, H]`` the target's embedding of every token.
            plan: which rows to compute.

        Returns:
            Normed states ``[T, R, H]``, which the target's head reads.
        """
        dtype = compute_dtype(self.proj.weight)
        # Every product below names its dtype; autocast would also narrow the reductions.
        with torch.autocast(embeds.device.type, enabled=False):
            return self._unroll(last_hidden_states.to(dtype), embeds.to(dtype), plan)

    def _unroll(self, last_hidden_states: Tensor, embeds: Tensor, plan: UnrollPlan) -> Tensor:
        w = self.weights(embeds.dtype)
        embedded = self.embed_norm.linear(embeds, w.embed)
        cos, sin = self.rotary(plan.longest + plan.steps, embeds.device)
        row_positions = plan.positions[plan.rows]

        # Step 0: keys and values of every token, queries of the needed rows only.
        following = embedded[plan.next_tokens]
        if self.mask_first:
            following = following * (plan.positions > 0).unsqueeze(1)
        x = self.hidden_norm.linear(last_hidden_states, w.hidden) + following
        query, key, value = self.heads(x, w, cos[plan.positions], sin[plan.positions])
        x, query = x[plan.rows], query[plan.rows]
        states: list[Tensor] = []
        own: list[tuple[Tensor, Tensor]] = []
        hidden = x
        for step in range(plan.steps):
            if step > 0:
                x = self.hidden_norm.linear(hidden, w.hidden) + embedded[plan.row_tokens[step]]
                query, own_key, own_value = self.heads(x, w, cos[row_positions + step], sin[row_positions + step])
                own.append((own_key, own_value))
            attention = ttt_attention(query, key, value, plan.segments, own, flex=self.flex)
            normed, hidden = self.finish(x, attention, w)
            states.append(normed)
        return torch.stack(states)

    def decoder(self, head: OutputHead, dtype: torch.dtype) -> MTPDecoder:
        """The module for decoding in ``dtype`` with the target's head over the draft vocabulary."""
        return MTPDecoder(self, head, dtype)


class MTPDecoder:
    """Runs the module row by row with a key/value cache; step s of row p is one more row, at position p + s.

    Args:
        draft: the module.
        head: the target's, over the draft vocabulary.
        dtype: compute dtype.
    """

    def __init__(self, draft: MTPDraft, head: OutputHead, dtype: torch.dtype) -> None:
        self.draft, self.dtype, self.device = draft, dtype, draft.proj.weight.device
        self._weights, self._head = draft.weights(dtype), head.to(dtype)
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self.rows = 0
        attentions = [self.draft.layer.self_attn]
        self._cache = DecodeCache(self.draft.rotary, attentions, self.dtype, self.device)

    def crop(self, rows: int) -> None:
        """Keep the first ``rows`` rows."""
        self.rows = rows

    def fuse(self, last_hidden_states: Tensor) -> Tensor:
        """The target's last hidden states ``[n, H]`` as they are, in the compute dtype."""
        return last_hidden_states.to(self.dtype)

    @torch.inference_mode()
    def extend(self, hidden: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Append rows.

        Args:
            hidden: ``[n, H]`` last hidden states of committed tokens, or the state that the last call fed back.
            embeds: ``[n, H]`` embedding of the token after each row's.

        Returns:
            ``(logits [D], feedback [H])`` of the last row.
        """
        draft, w, before = self.draft, self._weights, self.rows
        self.rows = after = before + len(hidden)
        self._cache.reserve(after)
        x = draft.hidden_norm.linear(hidden, w.hidden)
        following = draft.embed_norm.linear(embeds.to(self.dtype), w.embed)
        if draft.mask_first and before == 0:
            following[0] = 0
        x = x + following
        query, key, value = draft.heads(x, w, *self._cache.angles(before, after))
        # Only the last row's output is used; the others are there for their keys.
        attention = attend(query[-1:], *self._cache.write(0, before, key, value))
        normed, feedback = draft.finish(x[-1:], attention, w)
        return self._head.scores(normed)[0], feedback[0]
