"""The DFlash backbone: a few decoder layers that draft a whole block at once from the target's features.

The captured layers are fused to a context, which every draft layer reads through its own key and value projections, as
keys and values only (DFlash, arXiv 2602.06036, section 4). A block is the embedding of a known token, the anchor,
followed by mask tokens. It sees the context strictly before the anchor, whose own features are not available when
drafting, and itself in both directions. Embedding and head are the target's, frozen.

Other block drafters add heads to this backbone and keep its names (``DFlashDraftModel``).

Shape legend: N tokens, n blocks, b slots of a block, R = n b rows, M selected rows, H hidden size, A captured layers
x target hidden size, h / k query / key heads, d head size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Qwen3Config

from specforge.modeling.draft.context_parallel import own
from specforge.modeling.draft.dflash.attention import block_attention
from specforge.modeling.draft.dflash.plan import BlockPlan
from specforge.modeling.draft.fields import (
    ANYTHING,
    FLAG,
    KINDS_OF_LAYERS,
    LAYER,
    LAYER_IDS,
    NO_MATRICES,
    SIZE,
    TOKEN,
    Fields,
    by_default,
    move_fields,
    only,
    required,
    whole,
)
from specforge.modeling.draft.registry import Draft, register_draft
from specforge.modeling.layers.decode_cache import CachedDecoder, cached_attention
from specforge.modeling.layers.decoder_layer import (
    Angles,
    DecoderLayer,
    GroupedAttention,
    LayerWeights,
    RMSNorm,
    RotaryTable,
    apply_rope,
    compute_dtype,
)
from specforge.modeling.layers.fp8 import as_matrix, linear


class BlockLayer(DecoderLayer):
    """A Qwen3 or Llama decoder layer whose keys and values also come from the context.

    Attributes:
        window: size of the window of a sliding layer; None for a full layer.
        causal: whether a slot sees no later slot of its block.
        mixes_slots: whether slots read one another outside the attention, so that the last layer needs all of them.
    """

    mixes_slots: ClassVar[bool] = False

    def __init__(self, config: Qwen3Config, kind: str) -> None:
        super().__init__(config, GroupedAttention(config, qk_norm=True))
        self.window: int | None = config.sliding_window if kind == "sliding_attention" else None
        self.causal = self.window is not None and getattr(config, "is_causal", None) is not False

    def inject(self, context: Tensor, angles: Angles, w: LayerWeights) -> tuple[Tensor, Tensor]:
        """Keys and values ``[N, k, d]`` of the context ``[N, H]``, which is not normed again."""
        product = linear(context, w.hidden[self.self_attn.query_width :])
        return self.self_attn.keys_values(product, angles, w.more)  # type: ignore[no-any-return]


def block_size(config: Qwen3Config) -> int:
    """Slots of a block: the field of ``dflash_config``, else of the config, else 16."""
    return int(config.dflash_config.get("block_size", getattr(config, "block_size", 16)))


@register_draft("DFlashDraftModel", Qwen3Config, other_names=("QwenDFlashDraftModel",))
class DFlash(Draft):
    """The DFlash backbone.

    Args:
        config: a ``Qwen3Config`` with ``block_size`` and ``dflash_config`` (``mask_token_id``, ``target_layer_ids``; a
            ``block_size`` there takes precedence). ``layer_types`` with ``sliding_window`` selects sliding layers,
            which are causal within the block unless ``is_causal`` is false; ``qk_norm: false`` selects Llama layers;
            optional ``target_hidden_size`` and ``draft_vocab_size``.

    Attributes:
        nested: the fields inside ``dflash_config``.
        layer: the class of the layers.
        block_size: b.
        mask_token_id: the token of slots 1 and later.
        layer_ids: captured layers.
    """

    nested: ClassVar[Fields] = {
        "mask_token_id": required(TOKEN),
        "target_layer_ids": required(LAYER_IDS),
        "block_size": whole(1, 4096),
        "num_target_layers": ANYTHING,
        "use_swa": only(False),
    }
    fields: ClassVar[Fields] = {
        **LAYER,
        **NO_MATRICES,
        "block_size": whole(1, 4096),
        "num_target_layers": ANYTHING,
        "qk_norm": by_default(True, FLAG),
        "layer_types": KINDS_OF_LAYERS,
        "use_sliding_window": FLAG,
        "sliding_window": SIZE,
        "max_window_layers": SIZE,
        "is_causal": by_default(None, only(False)),
        "dflash_config": nested,
    }
    layer: ClassVar[type[BlockLayer]] = BlockLayer

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        fields = config.dflash_config
        self.block_size = block_size(config)
        self.mask_token_id, self.layer_ids = fields["mask_token_id"], tuple(fields["target_layer_ids"])
        kinds = config.layer_types
        if "sliding_attention" not in kinds:
            config.is_causal = None  # full layers never are
        _check(config, self.block_size, self.drafts)
        width, eps = getattr(config, "target_hidden_size", None) or config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(width * len(self.layer_ids), config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, eps)
        self.layers = nn.ModuleList(self.layer(config, kind) for kind in kinds)
        self.norm = RMSNorm(config.hidden_size, eps)
        self.rotary = RotaryTable(config)

    @staticmethod
    def translate(config: dict[str, Any]) -> None:
        """Move top-level fields of other projects into ``dflash_config``; a ``sliding_window`` implies its use."""
        if config.get("sliding_window") is not None and "use_sliding_window" not in config:
            if "sliding_attention" not in (config.get("layer_types") or ()):
                raise ValueError("sliding_window is set, but no entry of layer_types is sliding_attention")
            config["use_sliding_window"] = True
        nested = config.get("dflash_config", {})
        if not isinstance(nested, dict):
            return
        names = ("mask_token_id", "target_layer_ids")
        move_fields(config, nested, dict(zip(names, names, strict=True)), "in dflash_config")
        move_fields(nested, config, {"causal": "is_causal"}, "at the top level")
        if nested:
            config["dflash_config"] = nested

    @property
    def shift(self) -> int:
        """1 if slot k (slot 0 included) predicts the token after its position, 0 if it predicts the one at it."""
        return 0

    @property
    def drafts(self) -> int:
        """T, the number of tokens that a block drafts."""
        return self.block_size - 1 + self.shift

    @property
    def decoder_layers(self) -> list[BlockLayer]:
        """The layers, from the bottom up."""
        return list(self.layers)  # type: ignore[arg-type]

    def rows(self, block: Tensor, depth: Tensor) -> Tensor:
        """Row (0..R-1) of each draft, given its block and its index in the block."""
        return block * self.block_size + depth + 1 - self.shift

    def context(self, aux_hidden_states: Tensor, dtype: torch.dtype) -> Tensor:
        """Fuse captured layers ``[N, A]`` into the context ``[N, H]`` that all layers read."""
        fc = as_matrix(self.fc.weight.to(dtype), self.fp8)
        return self.hidden_norm(linear(aux_hidden_states.to(dtype), fc))  # type: ignore[no-any-return]

    def forward(self, aux_hidden_states: Tensor, embeds: Tensor, plan: BlockPlan, rows: Tensor) -> Tensor:
        """Run all blocks.

        Args:
            aux_hidden_states: ``[N, A]`` captured layers, concatenated; with a share, of this rank's tokens only.
            embeds: ``[n + 1, H]`` the target's embedding of every anchor and, last, of the mask token.
            plan: the blocks, from :func:`~specforge.modeling.draft.dflash.plan.plan_blocks`.
            rows: ``[M]`` rows to return.

        Returns:
            ``[M, H]`` normed states for the target's head, in the compute dtype.
        """
        dtype = compute_dtype(self.fc.weight)
        with torch.autocast(embeds.device.type, enabled=False):
            context = self.context(aux_hidden_states, dtype)
            if not len(plan.anchors):
                return context[:0].clone()  # not a view: sharding hooks into what a module returns
            return self._run(context, embeds.to(dtype), plan, rows)

    def _run(self, context: Tensor, embeds: Tensor, plan: BlockPlan, rows: Tensor) -> Tensor:
        cos, sin = self.rotary(plan.longest + self.block_size, embeds.device)
        slots = torch.arange(self.block_size, device=embeds.device)
        positions = (plan.positions[plan.anchors].unsqueeze(1) + slots).flatten()
        context_positions = own(plan.positions, plan.share)
        context_angles, angles = (cos[context_positions], sin[context_positions]), (cos[positions], sin[positions])
        mixed = self.layer.mixes_slots
        hidden = self._all_slots(embeds) if mixed else embeds
        last = len(self.layers) - 1

        def run(number: int, layer: BlockLayer, hidden: Tensor) -> Tensor:
            w = layer.weights(embeds.dtype)
            if number == 0 and not mixed:  # all mask tokens are alike until they have positions
                heads = layer.attention_heads(layer.project(hidden, w), None, w)
                hidden, query, own_key, own_value = (self._all_slots(x) for x in (hidden, *heads))
                query, own_key = apply_rope(query, *angles), apply_rope(own_key, *angles)
            else:
                query, own_key, own_value = layer.attention_heads(layer.project(hidden, w), angles, w)
            key, value = layer.inject(context, context_angles, w)
            if plan.share is not None:
                key, value = plan.share.gather(key, value)
            attention = block_attention(
                query,
                key,
                value,
                own_key,
                own_value,
                plan.anchors,
                plan.groups,
                layer.window,
                causal=layer.causal,
                flex=self.flex,
            )
            if number == last and not mixed:
                hidden, attention = (x.index_select(0, rows) for x in (hidden, attention))
            return layer.finish(hidden, attention, w)

        for number, layer in enumerate(self.decoder_layers):
            hidden = self.run_layer(run, number, layer, hidden)
        return self.norm(hidden.index_select(0, rows) if mixed else hidden)  # type: ignore[no-any-return]

    def _all_slots(self, x: Tensor) -> Tensor:
        """Rows ``[n b, ...]`` of all blocks, from those of the anchors and of the mask token, ``[n + 1, ...]``."""
        anchors, mask = x[:-1].unsqueeze(1), x[-1:].unsqueeze(1)
        masks = mask.expand(len(anchors), self.block_size - 1, *x.shape[1:])
        return torch.cat([anchors, masks], dim=1).flatten(0, 1)

    def decoder(self, dtype: torch.dtype) -> BlockDecoder:
        """A snapshot of the backbone for decoding in ``dtype``."""
        return BlockDecoder(self, dtype)


def _check(config: Qwen3Config, block_size: int, drafts: int) -> None:
    fields = config.dflash_config
    if drafts < 1:
        raise ValueError(f"block_size is {block_size}, but such a block drafts no token")
    if fields["mask_token_id"] >= config.vocab_size:
        raise ValueError(
            f"mask_token_id is {fields['mask_token_id']}, outside a vocabulary of {config.vocab_size} tokens"
        )
    if len(config.layer_types) != config.num_hidden_layers:
        raise ValueError(f"layer_types has {len(config.layer_types)} entries for {config.num_hidden_layers} layers")
    if config.use_sliding_window and "sliding_attention" not in config.layer_types:
        raise ValueError("use_sliding_window is set, but no entry of layer_types is sliding_attention")
    if "sliding_attention" in config.layer_types:
        window = config.sliding_window
        if window is None or window < block_size:
            raise ValueError(
                f"sliding_window is {window}; a sliding layer needs one of at least the block, {block_size} "
                "(and use_sliding_window)"
            )


class BlockDecoder(CachedDecoder):
    """Drafts one block at a time over a growing context; later changes of the draft's weights do not affect it."""

    def __init__(self, draft: DFlash, dtype: torch.dtype) -> None:
        super().__init__(draft.decoder_layers, draft.rotary, dtype)
        self.draft = draft

    @torch.inference_mode()
    def extend(self, aux_hidden_states: Tensor) -> None:
        """Append the features ``[n, A]`` of tokens that the target has processed."""
        before, self.rows = self.rows, self.rows + len(aux_hidden_states)
        self.reserve(self.rows + self.draft.block_size)
        context = self.draft.context(aux_hidden_states, self.dtype)
        angles = self.angles(before, self.rows)
        for i, (layer, w) in enumerate(zip(self.draft.decoder_layers, self._weights, strict=True)):
            self.write(i, before, *layer.inject(context, angles, w))

    @torch.inference_mode()
    def block(self, embeds: Tensor) -> Tensor:
        """Normed states ``[b, H]`` of a block.

        Args:
            embeds: ``[b, H]`` embeddings of the token after the context and of the mask tokens.
        """
        hidden, end = embeds.to(self.dtype), self.rows + self.draft.block_size
        angles = self.angles(self.rows, end)
        for i, (layer, w) in enumerate(zip(self.draft.decoder_layers, self._weights, strict=True)):
            query, key, value = layer.attention_heads(layer.project(hidden, w), angles, w)
            first = 0 if layer.window is None else max(0, self.rows - layer.window + 1)
            # After the context, where the next committed tokens will overwrite them.
            keys, values = self.write(i, self.rows, key, value)
            mask = self._mask(layer, first)
            hidden = layer.finish(hidden, cached_attention(query, keys[first:], values[first:], mask), w)
        return self.draft.norm(hidden)  # type: ignore[no-any-return]

    def _mask(self, layer: BlockLayer, first: int) -> Tensor | None:
        if layer.window is None:
            return None
        rows = torch.arange(self.rows, self.rows + self.draft.block_size, device=self.device).unsqueeze(1)
        keys = torch.arange(first, self.rows + self.draft.block_size, device=self.device)
        seen = keys > rows - layer.window
        return seen & (keys <= rows) if layer.causal else seen
