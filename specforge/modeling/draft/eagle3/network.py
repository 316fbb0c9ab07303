"""The EAGLE-3 draft: one decoder layer over [token embedding, fused target features], with any attention.

The network of arXiv 2503.01840: ``fc`` fuses the captured layers, ``midlayer`` is a decoder layer whose attention
input is twice as wide, ``norm`` and ``lm_head`` give logits over the draft vocabulary. EAGLE-3.1 adds one norm
per captured layer before ``fc`` (``fc_norm``) and feeds the normed state to the next step (``norm_output``).

An attention supplies its projections (:class:`~specforge.modeling.draft.eagle3.family.Eagle3Attention`); the unroll and
the decoder are the same for all.

The input of the attention is ``[RMSNorm(embedding); RMSNorm(hidden)]``. A matrix product splits over such
a concatenation, and the embedding half at step s is that of step 0 shifted by s tokens, so it is
computed once for all T steps.

Shape legend: N tokens, R query rows, T steps, H hidden size, A captured layers x target hidden size,
D draft vocabulary, h / k query / key heads, d / v size of a query and key head / of a value head.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge.modeling.draft.eagle3.family import Eagle3Attention, Eagle3Layer, FusedDraft
from specforge.modeling.draft.fields import FLAG, Fields
from specforge.modeling.draft.unroll import UnrollPlan
from specforge.modeling.layers.attention import ttt_attention
from specforge.modeling.layers.decode_cache import DecodeCache, attend
from specforge.modeling.layers.functional import compute_dtype


class Eagle3Draft(FusedDraft):
    """Base of EAGLE-3 drafts: one layer, unrolled in training, run row by row in decoding.

    Args:
        config: see :class:`~specforge.modeling.draft.eagle3.family.FusedDraft`; optional ``norm_output`` (EAGLE-3.1).

    Attributes:
        attention: the attention's class, made from the config.

    Raises:
        ValueError: a field is missing or asks for a network that this class is not.
    """

    fields: ClassVar[Fields] = {**FusedDraft.fields, "norm_output": FLAG}
    attention: ClassVar[type[Eagle3Attention]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm_output = bool(getattr(config, "norm_output", False))

    def build_layers(self, config: Any) -> None:
        """One layer."""
        if config.num_hidden_layers != 1:
            raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}: an EAGLE-3 draft has one layer")
        self.midlayer = Eagle3Layer(config, self.attention(config))

    @property
    def entry(self) -> Eagle3Layer:
        """The one layer."""
        return self.midlayer

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

    def _unroll(self, aux_hidden_states: Tensor, embeds: Tensor, plan: UnrollPlan, dtype: torch.dtype) -> Tensor:
        layer, attn, w = self.midlayer, self.midlayer.self_attn, self.midlayer.weights(dtype)
        width = attn.query_width
        embed = layer.read(embeds.to(dtype), w)
        cos, sin = self.rotary(plan.longest + plan.steps, embeds.device)
        row_positions = plan.positions[plan.rows]

        # Step 0: keys and values of every token, queries of the needed rows only.
        fused = self.fuse(aux_hidden_states, dtype)
        hidden = fused[plan.rows]
        product = layer.hidden_norm.linear(fused, w.hidden[width:]) + embed[plan.next_tokens, width:]
        key, value = attn.keys_values(product, (cos[plan.positions], sin[plan.positions]), w.more)
        product = layer.hidden_norm.linear(hidden, w.hidden[:width]) + embed[plan.row_tokens[0], :width]

        states: list[Tensor] = []
        own: list[tuple[Tensor, Tensor]] = []
        for step in range(plan.steps):
            angles = cos[row_positions + step], sin[row_positions + step]
            if step > 0:
                product = layer.hidden_norm.linear(hidden, w.hidden) + embed[plan.row_tokens[step]]
                own.append(attn.keys_values(product[:, width:], angles, w.more))
            query = attn.queries(product[:, :width], angles, w.more)
            attention = ttt_attention(query, key, value, plan.segments, own, flex=self.flex)
            hidden = layer.finish(hidden, attention, w)
            normed = self.norm(hidden)
            states.append(normed)
            if self.norm_output:
                hidden = normed
        return torch.stack(states)

    def decoder(self, dtype: torch.dtype) -> Eagle3Decoder:
        """A snapshot of the draft for decoding in ``dtype``."""
        return Eagle3Decoder(self, dtype)


class Eagle3Decoder:
    """Runs the draft row by row with a key/value cache; later changes of the draft's weights do not reach it.

    Rows are consecutive: the row of position p is the p-th that :meth:`extend` was given. A chain step is
    one more row, because at step s the training-time test also places row p at position p+s.

    Args:
        draft: the network.
        dtype: compute dtype.
    """

    def __init__(self, draft: Eagle3Draft, dtype: torch.dtype) -> None:
        self.draft, self.dtype = draft, dtype
        self.device = draft.fc.weight.device
        self._weights = draft.midlayer.weights(dtype)
        self._lm_head = draft.lm_head.weight.to(dtype)
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self.rows = 0
        attentions = [self.draft.midlayer.self_attn]
        self._cache = DecodeCache(self.draft.rotary, attentions, self.dtype, self.device)

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
        self._cache.reserve(after)
        product = layer.read(embeds.to(self.dtype), w)
        product = product + layer.hidden_norm.linear(hidden, w.hidden)
        key, value = attn.keys_values(product[:, attn.query_width :], self._cache.angles(before, after), w.more)
        keys, values = self._cache.write(0, before, key, value)
        self.rows = after
        # Only the last row's output is used; the others are there for their keys.
        query = attn.queries(product[-1:, : attn.query_width], self._cache.angles(after - 1, after), w.more)
        hidden = layer.finish(hidden[-1:], attend(query, keys, values), w)
        normed = self.draft.norm(hidden)
        logits = F.linear(normed, self._lm_head)
        return logits[0], (normed if self.draft.norm_output else hidden)[0]
