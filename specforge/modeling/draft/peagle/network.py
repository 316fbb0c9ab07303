"""The P-EAGLE draft: all tokens of a round in one pass (arXiv 2602.01469).

It has EAGLE-3's layer at the bottom and Llama layers above. Drafted tokens after the first read the embedding of a mask
token and, instead of the target's features, one learned vector of the same width (``mask_hidden``). Names of tensors
are those that vLLM loads (``PEagleDraftModel``, an EAGLE-3 draft with ``layers.*`` and ``mask_hidden``).

Shape legend: N tokens, R tokens that predict a label at depth 0, E deep elements, H hidden size, A captured layers x
target hidden size, D draft vocabulary, k key heads, d head size, n new rows, c drafted tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig

from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft.eagle3.network import MASKS, EagleDraft, LlamaEagle3
from specforge.modeling.draft.fields import FLAG, TOKEN, Fields, only, quoted, required
from specforge.modeling.draft.peagle.attention import deep_attention
from specforge.modeling.draft.peagle.plan import PEaglePlan
from specforge.modeling.draft.registry import register_draft
from specforge.modeling.layers.attention import ttt_attention
from specforge.modeling.layers.decode_cache import CachedDecoder, cached_attention
from specforge.modeling.layers.decoder_layer import DecoderLayer, GroupedAttention, LayerWeights, compute_dtype


@register_draft("PEagleDraftModel", config_class=LlamaConfig)
class PEagleDraft(EagleDraft):
    """P-EAGLE draft.

    Args:
        config: a ``LlamaConfig`` with the fields of :class:`~specforge.modeling.draft.eagle3.network.EagleDraft`,
            ``num_hidden_layers``, ``mask_token_id``, and optional ``embed_requires_grad`` (the draft trains an
            embedding of its own).

    Attributes:
        mask_hidden: ``[1, 1, A]`` features of a mask token.
        embed_tokens: the draft's own embedding; None if it uses the target's frozen one.
    """

    fields: ClassVar[Fields] = {
        **EagleDraft.fields,
        "attention_bias": FLAG,
        "qk_norm": FLAG,
        "mask_token_id": required(TOKEN),
        "embed_requires_grad": FLAG,
        "parallel_drafting": only(True),
    }

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.mask_token_id = config.mask_token_id
        if self.mask_token_id >= config.vocab_size:
            raise ValueError(f"mask_token_id is {self.mask_token_id}, but the target has {config.vocab_size} tokens")
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, self.fc.in_features))
        own = getattr(config, "embed_requires_grad", False)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if own else None

    @classmethod
    def is_described_by(cls, config: Mapping[str, Any]) -> bool:
        """VLLM uses the name of EAGLE-3's architecture and adds a mask token."""
        names = {LlamaEagle3.architecture, *LlamaEagle3.other_names}
        named = not names.isdisjoint(config.get("architectures", ()))
        return named and any(config.get(name) is not None for name in MASKS)

    @staticmethod
    def translate(config: dict[str, Any]) -> None:
        """As for EAGLE-3, and rename vLLM's fields for the mask token."""
        EagleDraft.translate(config)
        for name in MASKS:
            mask = config.pop(name, config.get("mask_token_id"))
            if mask is not None and config.setdefault("mask_token_id", mask) != mask:
                raise ValueError(f"{name} is {quoted(mask)}, but mask_token_id is {quoted(config['mask_token_id'])}")

    def build_layers(self, config: LlamaConfig) -> None:
        """Build a layer over [embedding, features], and Llama layers above it."""
        size = config.hidden_size
        self.layers = nn.ModuleList(
            DecoderLayer(config, GroupedAttention(config, size if i else 2 * size, out_bias=True))
            for i in range(config.num_hidden_layers)
        )

    @property
    def first_layer(self) -> DecoderLayer:
        """The first layer."""
        return self.decoder_layers[0]

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers, from the bottom up."""
        return cast("list[DecoderLayer]", list(self.layers))

    @torch.no_grad()
    def start_from_target(self, target: TargetFiles) -> None:
        """As for EAGLE-3; upper layers start as the identity, and an embedding of the draft's own as the target's."""
        super().start_from_target(target)
        self.start_embedding(target)
        for layer in self.decoder_layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()

    @torch.no_grad()
    def start_embedding(self, target: TargetFiles) -> None:
        """Copy the target's embedding into the draft's own, if it has one."""
        if self.embed_tokens is not None:
            self.embed_tokens.weight.copy_(target.embedding())

    def embed(self, input_ids: Tensor, embedding: Tensor) -> Tensor:
        """Embeddings ``[n, H]`` of ``input_ids [n]``: the draft's own, or the target's ``embedding [V, H]``."""
        return F.embedding(input_ids, embedding if self.embed_tokens is None else self.embed_tokens.weight)

    def forward(self, aux_hidden_states: Tensor, input_ids: Tensor, embedding: Tensor, plan: PEaglePlan) -> Tensor:
        """Run all depths at once.

        Args:
            aux_hidden_states: ``[N, A]`` captured layers, concatenated.
            input_ids: ``[N]`` tokens.
            embedding: ``[V, H]`` the target's embedding; not used if the draft has its own.
            plan: the elements to compute, from :func:`~specforge.modeling.draft.peagle.plan.plan_peagle`.

        Returns:
            ``[R + E, H]`` normed states for ``lm_head``, in the compute dtype: those of the tokens ``plan.rows``, then
            those of the deep elements.
        """
        dtype = compute_dtype(self.fc.weight)
        # Every product below names its dtype; autocast would also narrow the reductions.
        with torch.autocast(input_ids.device.type, enabled=False):
            weights = [layer.weights(dtype) for layer in self.decoder_layers]
            tokens = len(input_ids)
            position = torch.cat([plan.positions, plan.positions[plan.anchors] + plan.depths])
            cos, sin = (x[position] for x in self.rotary(plan.longest + plan.students.shape[1], position.device))
            embeds = self.embed(torch.cat([input_ids, input_ids.new_full((1,), self.mask_token_id)]), embedding)
            hidden, product = self.first_inputs(aux_hidden_states, embeds, plan.next_tokens, weights[0])
            hidden = torch.cat([hidden[:-1], hidden[-1:].expand(len(plan.anchors), -1)])
            product = torch.cat([product[:-1], product[-1:].expand(len(plan.anchors), -1)])
            last = len(weights) - 1

            def run(i: int, layer: DecoderLayer, hidden: Tensor, product: Tensor | None) -> Tensor:
                product = layer.project(hidden, weights[i]) if product is None else product
                heads = layer.attention_heads(product, (cos, sin), weights[i])
                attention = _all_attention(heads, tokens, plan, plan.rows if i == last else None, flex=self.flex)
                if i == last:
                    hidden = torch.cat([hidden[plan.rows], hidden[tokens:]])
                return layer.finish(hidden, attention, weights[i])

            for i, layer in enumerate(self.decoder_layers):
                hidden = self.run_layer(run, i, layer, hidden, None if i else product)
            return self.norm(hidden)

    def first_inputs(
        self, aux_hidden_states: Tensor, embeds: Tensor, next_tokens: Tensor, w: LayerWeights
    ) -> tuple[Tensor, Tensor]:
        """States and input products of the first layer, for n tokens and one mask token.

        All mask tokens have the same ones; they differ only in their positions, which are applied later.

        Args:
            aux_hidden_states: ``[n, A]`` captured layers of the tokens.
            embeds: ``[m, H]`` embeddings, the last one that of the mask token.
            next_tokens: ``[n]`` index of the embedding that each token reads.
            w: the first layer's weights.

        Returns:
            States ``[n + 1, H]`` and input products ``[n + 1, O]``; the last row is the mask token's.
        """
        layer, dtype = self.first_layer, w.out.dtype
        features = torch.cat([aux_hidden_states.to(dtype), self.mask_hidden[0].to(dtype)])
        hidden = self.fuse(features, dtype)
        embed = layer.project_embedding(embeds.to(dtype), w)
        embed = torch.cat([embed[next_tokens], embed[-1:]])
        return hidden, layer.state_norm.linear(hidden, w.hidden) + embed

    def decoder(self, dtype: torch.dtype) -> PEagleDecoder:
        """A snapshot of the draft for decoding in ``dtype``."""
        return PEagleDecoder(self, dtype)


def _all_attention(
    heads: tuple[Tensor, Tensor, Tensor], tokens: int, plan: PEaglePlan, rows: Tensor | None, *, flex: bool
) -> Tensor:
    """Attention of all elements, or of the tokens ``rows`` and the deep elements."""
    query, key, value = heads
    segments, packing = (plan.documents, plan.document_packing) if rows is None else (plan.segments, plan.row_packing)
    shallow = query[:tokens] if rows is None else query[rows]
    key, own_key = key[:tokens], key[tokens:]
    value, own_value = value[:tokens], value[tokens:]
    return torch.cat(
        [
            ttt_attention(shallow, key, value, segments, [], packing=packing, flex=flex),
            deep_attention(
                query[tokens:], key, value, (own_key, own_value), plan.anchors, plan.depths, plan.chunks, flex=flex
            ),
        ]
    )


class PEagleDecoder(CachedDecoder):
    """Runs the draft with a key/value cache of the committed tokens, on a snapshot of its weights."""

    def __init__(self, draft: PEagleDraft, dtype: torch.dtype) -> None:
        super().__init__(draft.decoder_layers, draft.rotary, dtype)
        self.draft, self._lm_head = draft, draft.lm_head.weight.to(dtype)

    @torch.inference_mode()
    def draft_logits(self, aux_hidden_states: Tensor, following: Tensor, embedding: Tensor, count: int) -> Tensor:
        """Append committed rows, and draft the tokens after the last of them.

        Args:
            aux_hidden_states: ``[n, A]`` captured layers of tokens that the target has processed, at least one.
            following: ``[n]`` the token after each of them.
            embedding: ``[V, H]`` the target's embedding; not used if the draft has its own.
            count: c.

        Returns:
            ``[c, D]`` logits of the next tokens.
        """
        draft, new = self.draft, len(following)
        order = torch.arange(new, device=self.device)
        ids = torch.cat([following, following.new_tensor([draft.mask_token_id])])
        hidden, product = draft.first_inputs(aux_hidden_states, draft.embed(ids, embedding), order, self._weights[0])
        rows = torch.cat([order, order.new_full((count - 1,), new)])
        hidden, product = hidden[rows], product[rows]
        end = self.rows + len(rows)
        self.reserve(end)
        angles = self.angles(self.rows, end)
        # A mask token has the position of a chain's next row and sees the same keys: plain causal attention.
        seen = torch.arange(end, device=self.device) <= torch.arange(self.rows, end, device=self.device)[:, None]
        for i, (layer, w) in enumerate(zip(self.layers, self._weights, strict=True)):
            if i > 0:
                product = layer.project(hidden, w)
            query, key, value = layer.attention_heads(product, angles, w)
            # The next call overwrites the rows of the mask tokens.
            keys, values = self.write(i, self.rows, key, value)
            if i == len(self._weights) - 1:
                query, hidden, seen = query[-count:], hidden[-count:], seen[-count:]
            hidden = layer.finish(hidden, cached_attention(query, keys, values, seen), w)
        self.rows += new
        return F.linear(draft.norm(hidden), self._lm_head)
