"""Multi-token prediction: one decoder layer over [token embedding, last hidden state], repeatedly fed its own output.

This is the module of DeepSeek-V3 (arXiv 2412.19437, section 2.2), reused for every position as in FastMTP (arXiv
2509.18362): ``x = proj [RMSNorm(embedding); RMSNorm(hidden)]``, a Llama or Qwen3 layer, a norm, and the target's frozen
head. ``hidden`` is the target's last hidden state at step 0, and the module's own output afterwards.

Shape legend: N tokens, R query rows, T steps, H hidden size, D draft vocabulary, h / k query / key heads, d head size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import OutputHead
from specforge.inference.target_layers import LastLayer
from specforge.modeling.draft.eagle3.plan import UnrollPlan
from specforge.modeling.draft.fields import FLAG, LAYER, NO_MATRICES, Fields, by_default
from specforge.modeling.draft.registry import Draft, register_draft
from specforge.modeling.draft.starting import rotary_of_target
from specforge.modeling.layers.attention import ttt_attention
from specforge.modeling.layers.decode_cache import CachedDecoder, cached_attention
from specforge.modeling.layers.decoder_layer import (
    Attention,
    DecoderLayer,
    GroupedAttention,
    LayerWeights,
    RMSNorm,
    RotaryTable,
    compute_dtype,
)
from specforge.modeling.layers.fp8 import Matrix, as_matrix


@register_draft("MTPDraft", config_class=LlamaConfig)
class MTPDraft(Draft):
    """One MTP module.

    Args:
        config: a ``LlamaConfig`` with ``draft_vocab_size``; optional ``qk_norm`` (Qwen3), ``attention_bias`` (Qwen2: of
            query, key and value), ``norm_output`` (default true: the normed output is fed back, as in SGLang for every
            family; in DeepSeek's report it is the output before the norm) and ``mask_first`` (MiMo: the row of position
            0 reads no embedding).
    """

    fields: ClassVar[Fields] = {
        **LAYER,
        **NO_MATRICES,
        **dict.fromkeys(("qk_norm", "attention_bias", "mask_first"), FLAG),
        "norm_output": by_default(True, FLAG),
    }
    form: ClassVar[str] = "a Llama or Qwen3 layer"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        if config.num_hidden_layers != 1:
            raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}: an MTP module has one layer")
        size, eps = config.hidden_size, config.rms_norm_eps
        self.norm_output = bool(getattr(config, "norm_output", True))
        self.mask_first = bool(getattr(config, "mask_first", False))
        self.embed_norm, self.hidden_norm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.proj = nn.Linear(2 * size, size, bias=False)
        self.layer = DecoderLayer(config, self.build_attention(config), self.build_mlp(config))
        self.norm = RMSNorm(size, eps)
        self.rotary = RotaryTable(config)

    @staticmethod
    def build_attention(config: Any) -> Attention:
        """Build the layer's attention."""
        return GroupedAttention(config)

    @staticmethod
    def build_mlp(config: Any) -> nn.Module | None:
        """Build the layer's MLP; None for the default."""
        return None

    def module_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The module's tensors as targets store them, in ``dtype`` on the CPU; the input of :meth:`start_from`."""
        return {n: x.detach().cpu().to(dtype) for n, x in self.named_parameters()}

    @torch.no_grad()
    def start_from(self, tensors: dict[str, Tensor], what: str) -> None:
        """Copy tensors by name.

        Raises:
            UserError: the tensors belong to another form of layer: one is unknown, missing or of another shape.
        """
        own = {n: x for n, x in self.state_dict().items() if n not in ("d2t", "t2d")}
        for name in sorted(set(tensors) ^ set(own)):
            lack = "does not belong to" if name in tensors else "is missing for"
            raise UserError(f"{what}: {name} {lack} {self.form} of this draft config")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise UserError(f"{what}: {name} is {tuple(tensor.shape)}, but the draft's is {tuple(own[name].shape)}")
            own[name].copy_(tensor)

    @torch.no_grad()
    def start_from_last_layer(self, target: TargetFiles) -> None:
        """Initialise from the target's last layer and final norm.

        The projection passes the normed hidden state through, with weights near zero for the embedding.

        Raises:
            UserError: the target's last layer does not have the form of the draft's.
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
        """Check that the target's last layer computes the same as the draft's.

        Raises:
            UserError: describes the difference.
        """
        own, rotary = self.layer.state_dict(), rotary_of_target(self.rotary, self.config, target)
        experts = {name: x for name, x in own.items() if ".experts." in name}
        LastLayer(target).check(lambda states: self.layer.run(states, rotary), own, self.architecture, experts)

    def proj_weights(self, dtype: torch.dtype) -> tuple[Matrix, Matrix]:
        """The columns of ``proj`` that read the embedding and the hidden state, ``[H, H]`` each."""
        embed, hidden = self.proj.weight.to(dtype).chunk(2, dim=1)
        return as_matrix(embed, self.fp8), as_matrix(hidden, self.fp8)

    def finish(self, x: Tensor, attention: Tensor, w: LayerWeights) -> tuple[Tensor, Tensor]:
        """The rest of the layer for ``x [R, H]``: the normed state, and the state to feed back."""
        x = self.layer.finish(x, attention, w)
        normed = self.norm(x)
        return normed, normed if self.norm_output else x

    def forward(self, last_hidden_states: Tensor, embeds: Tensor, plan: UnrollPlan) -> Tensor:
        """Apply the module T times.

        Args:
            last_hidden_states: ``[N, H]`` the target's last hidden states.
            embeds: ``[N, H]`` the target's embedding of every token.
            plan: the rows to compute, from :func:`~specforge.modeling.draft.eagle3.plan.plan_unroll`.

        Returns:
            Normed states ``[T, R, H]`` for the target's head.
        """
        dtype = compute_dtype(self.proj.weight)
        # Every product below names its dtype; autocast would also narrow the reductions.
        with torch.autocast(embeds.device.type, enabled=False):
            return self._unroll(last_hidden_states.to(dtype), embeds.to(dtype), plan)

    def _unroll(self, last_hidden_states: Tensor, embeds: Tensor, plan: UnrollPlan) -> Tensor:
        layer, w = self.layer, self.layer.weights(embeds.dtype)
        embed_weight, hidden_weight = self.proj_weights(embeds.dtype)
        embedded = self.embed_norm.linear(embeds, embed_weight)
        cos, sin = self.rotary(plan.longest + plan.steps, embeds.device)
        row_positions = plan.positions[plan.rows]

        # Step 0: keys and values of every token, queries of the needed rows only.
        following = embedded[plan.next_tokens]
        if self.mask_first:
            following = following * (plan.positions > 0).unsqueeze(1)
        x = self.hidden_norm.linear(last_hidden_states, hidden_weight) + following
        query, key, value = layer.attention_heads(layer.project(x, w), (cos[plan.positions], sin[plan.positions]), w)
        x, query = x[plan.rows], query[plan.rows]

        def run(step: int, x: Tensor, query: Tensor | None, *own: Tensor) -> tuple[Tensor, ...]:
            """Normed and fed-back state of a step, and from step 1 on its rows' own key and value."""
            more: tuple[Tensor, ...] = ()
            if query is None:
                x = self.hidden_norm.linear(x, hidden_weight) + embedded[plan.row_tokens[step]]
                angles = cos[row_positions + step], sin[row_positions + step]
                query, *new = layer.attention_heads(layer.project(x, w), angles, w)
                more = tuple(new)
            own = (*own, *more)
            pairs = list(zip(own[0::2], own[1::2], strict=True))
            attention = ttt_attention(query, key, value, plan.segments, pairs, packing=plan.packing, flex=self.flex)
            return *self.finish(x, attention, w), *more

        states: list[Tensor] = []
        own: list[Tensor] = []
        hidden = x
        for step in range(plan.steps):
            normed, hidden, *more = self.run_layer(run, step, hidden, None if step else query, *own)
            states.append(normed)
            own += more
        return torch.stack(states)

    def decoder(self, head: OutputHead, dtype: torch.dtype) -> MTPDecoder:
        """A snapshot of the module for decoding in ``dtype``, with the target's head over the draft vocabulary."""
        return MTPDecoder(self, head, dtype)


class MTPDecoder(CachedDecoder):
    """Runs the module row by row with a key/value cache; step s of row p is one more row, at position p+s."""

    def __init__(self, draft: MTPDraft, head: OutputHead, dtype: torch.dtype) -> None:
        super().__init__([draft.layer], draft.rotary, dtype)
        self.draft, self._head = draft, head.to(dtype)
        with torch.no_grad():
            self._proj = draft.proj_weights(dtype)

    def fuse(self, last_hidden_states: Tensor) -> Tensor:
        """The target's last hidden states ``[n, H]`` in the compute dtype."""
        return last_hidden_states.to(self.dtype)

    @torch.inference_mode()
    def extend(self, hidden: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Append rows.

        Args:
            hidden: ``[n, H]`` last hidden states of committed tokens, or the feedback of the last call.
            embeds: ``[n, H]`` embedding of the token that follows each row's.

        Returns:
            ``(logits [D], feedback [H])`` of the last row.
        """
        draft, layer, w, before = self.draft, self.draft.layer, self._weights[0], self.rows
        embed_weight, hidden_weight = self._proj
        self.rows = after = before + len(hidden)
        self.reserve(after)
        x = draft.hidden_norm.linear(hidden, hidden_weight)
        following = draft.embed_norm.linear(embeds.to(self.dtype), embed_weight)
        if draft.mask_first and before == 0:
            following[0] = 0
        x = x + following
        query, key, value = layer.attention_heads(layer.project(x, w), self.angles(before, after), w)
        # Of the last row the output is needed, of the others only keys and values.
        attention = cached_attention(query[-1:], *self.write(0, before, key, value))
        normed, feedback = draft.finish(x[-1:], attention, w)
        return self._head.scores(normed)[0], feedback[0]
