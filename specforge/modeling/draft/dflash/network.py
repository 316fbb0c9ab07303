"""The block backbone: a few decoder layers that draft a whole block at once from the target's features.

DFlash (arXiv 2602.06036, section 4): the captured layers are fused to a context, which every draft layer reads
through its own key and value projections, as keys and values only. A block is the embedding of a known token,
the anchor, and then mask tokens; it sees the context strictly before the anchor (the anchor's own features are
not there when drafting) and itself, in both directions. Embedding and head are the target's, frozen.

Other block drafters add heads to this backbone and keep its names (``DFlashDraftModel``).

Shape legend: N tokens, n blocks, b slots of a block, R = n b rows, M wanted rows, H hidden size, A captured layers
x target hidden size, h / k query / key heads, d head size.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config

from specforge.modeling.draft.dflash.attention import block_attention
from specforge.modeling.draft.dflash.plan import BlockPlan
from specforge.modeling.draft.eagle3.family import GroupedAttention, SwiGLUMLP
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
    only,
    quoted,
    required,
    whole,
)
from specforge.modeling.draft.registry import Draft, register_draft
from specforge.modeling.layers.decode_cache import DecodeCache, attend
from specforge.modeling.layers.functional import RMSNorm, compute_dtype, norm_heads
from specforge.modeling.layers.rope import RotaryTable, apply_rope


class _Weights(NamedTuple):
    """A layer's matrices in the compute dtype, fused."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


class _Heads(NamedTuple):
    """Queries ``[R, h, d]``, keys and values ``[R, k, d]``, without positions."""

    query: Tensor
    key: Tensor
    value: Tensor


class BlockLayer(nn.Module):
    """A Qwen3 or Llama decoder layer whose keys and values come from the context too.

    Attributes:
        mixes_slots: whether slots read one another outside the attention, so that all of a block's are needed always.
    """

    mixes_slots: ClassVar[bool] = False

    def __init__(self, config: Qwen3Config, kind: str) -> None:
        super().__init__()
        self.window: int | None = config.sliding_window if kind == "sliding_attention" else None
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GroupedAttention(config, qk_norm=True)
        self.mlp = SwiGLUMLP(config)

    def weights(self, dtype: torch.dtype) -> _Weights:
        """Cast and fuse the layer's matrices."""
        attn = self.self_attn
        gate_up, down = self.mlp.weights(dtype)
        return _Weights(
            qkv=torch.cat([p.weight.to(dtype) for p in (attn.q_proj, attn.k_proj, attn.v_proj)]),
            out=attn.o_proj.weight.to(dtype),
            gate_up=gate_up,
            down=down,
        )

    def project(self, hidden: Tensor, w: _Weights) -> _Heads:
        """Heads of a block's rows ``[R, H]``."""
        return self._heads(self.input_layernorm.linear(hidden, w.qkv))

    def _heads(self, product: Tensor) -> _Heads:
        return _Heads(*self.self_attn.split(product))

    def inject(self, context: Tensor, w: _Weights) -> tuple[Tensor, Tensor]:
        """Keys and values ``[N, k, d]`` of the context ``[N, H]``, which is not normed again."""
        attn = self.self_attn
        kv = F.linear(context, w.qkv[attn.heads * attn.head_dim :])
        key, value = kv.unflatten(1, (-1, attn.head_dim)).chunk(2, dim=1)
        return norm_heads(attn.k_norm, key), value

    def finish(self, hidden: Tensor, attention: Tensor, w: _Weights) -> Tensor:
        """Output projection, residual and MLP: ``hidden [R, H]``, ``attention [R, h, d]`` to ``[R, H]``."""
        hidden = hidden + F.linear(attention.flatten(1), w.out)
        return self.post_attention_layernorm.mlp(hidden, w.gate_up, w.down)


def block_size(config: Qwen3Config) -> int:
    """Slots of a block: the field of ``dflash_config``, else of the config, else 16."""
    return int(config.dflash_config.get("block_size", getattr(config, "block_size", 16)))


@register_draft("DFlashDraftModel", config_class=Qwen3Config)
class DFlash(Draft):
    """The block backbone.

    Args:
        config: a ``Qwen3Config`` with ``block_size`` and ``dflash_config`` (``mask_token_id``,
            ``target_layer_ids``; a ``block_size`` there wins). ``layer_types`` with ``sliding_window`` makes
            sliding layers, which are causal in the block; ``qk_norm: false`` makes Llama layers; optional
            ``target_hidden_size`` and ``draft_vocab_size``.

    Raises:
        ValueError: a field is missing or asks for a network that this class is not.

    Attributes:
        nested: the fields that are read from ``dflash_config``.
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
        "causal": only(False),
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
        "is_causal": only(False),
        "dflash_config": nested,
    }
    layer: ClassVar[type[BlockLayer]] = BlockLayer

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        fields = config.dflash_config
        self.block_size = block_size(config)
        self.mask_token_id, self.layer_ids = fields["mask_token_id"], tuple(fields["target_layer_ids"])
        kinds = config.layer_types
        _check(config, self.block_size, self.drafts)
        width, eps = getattr(config, "target_hidden_size", None) or config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(width * len(self.layer_ids), config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, eps)
        self.layers = nn.ModuleList(self.layer(config, kind) for kind in kinds)
        self.norm = RMSNorm(config.hidden_size, eps)
        self.rotary = RotaryTable(config)

    @staticmethod
    def spell(config: dict[str, Any]) -> None:
        """Move top-level fields of other projects into ``dflash_config``; a window that is named is used."""
        if config.get("sliding_window") is not None and "use_sliding_window" not in config:
            if "sliding_attention" not in (config.get("layer_types") or ()):
                raise ValueError("sliding_window is set, but no entry of layer_types is sliding_attention")
            config["use_sliding_window"] = True
        nested = config.get("dflash_config", {})
        if not isinstance(nested, dict):
            return
        for name in ("mask_token_id", "target_layer_ids"):
            value = config.pop(name, None)
            if value is not None and nested.setdefault(name, value) != value:
                raise ValueError(f"{name} is {quoted(value)}, but {quoted(nested[name])} in dflash_config")
        if nested:
            config["dflash_config"] = nested

    @property
    def shift(self) -> int:
        """1 where slot k predicts the token after its own position (slot 0 too), 0 where it predicts its own."""
        return 0

    @property
    def drafts(self) -> int:
        """Tokens that a block drafts: T."""
        return self.block_size - 1 + self.shift

    @property
    def decoder_layers(self) -> list[BlockLayer]:
        """The layers, by their type."""
        return list(self.layers)  # type: ignore[arg-type]

    def rows(self, block: Tensor, depth: Tensor) -> Tensor:
        """Row among the R of each draft, given its block and which of the block's drafts it is."""
        return block * self.block_size + depth + 1 - self.shift

    def context(self, aux_hidden_states: Tensor, dtype: torch.dtype) -> Tensor:
        """Fuse captured layers ``[N, A]`` into the context ``[N, H]`` that all layers read."""
        return self.hidden_norm(F.linear(aux_hidden_states.to(dtype), self.fc.weight.to(dtype)))  # type: ignore[no-any-return]

    def forward(self, aux_hidden_states: Tensor, embeds: Tensor, plan: BlockPlan, rows: Tensor) -> Tensor:
        """Run all blocks.

        Args:
            aux_hidden_states: ``[N, A]`` captured layers, concatenated.
            embeds: ``[n + 1, H]`` the target's embedding of every anchor and, last, of the mask token.
            plan: the blocks, from :func:`plan_blocks`.
            rows: ``[M]`` rows that are wanted.

        Returns:
            ``[M, H]`` normed states, what the target's head reads, in the compute dtype.
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
        places = (plan.positions[plan.anchors].unsqueeze(1) + slots).flatten()
        at, angles = (cos[plan.positions], sin[plan.positions]), (cos[places], sin[places])
        mixed = self.layer.mixes_slots
        hidden = self._spread(embeds) if mixed else embeds
        for number, layer in enumerate(self.decoder_layers):
            w = layer.weights(embeds.dtype)
            heads = layer.project(hidden, w)
            if number == 0 and not mixed:  # where every mask token is the same, until it has a position
                hidden, *parts = (self._spread(x) for x in (hidden, *heads))
                heads = _Heads(*parts)
            key, value = layer.inject(context, w)
            attention = block_attention(
                apply_rope(heads.query, *angles),
                apply_rope(key, *at),
                value,
                apply_rope(heads.key, *angles),
                heads.value.contiguous(),
                plan.anchors,
                plan.groups,
                layer.window,
                flex=self.flex,
            )
            if number == len(self.layers) - 1 and not mixed:
                hidden, attention = (x.index_select(0, rows) for x in (hidden, attention))
            hidden = layer.finish(hidden, attention, w)
        return self.norm(hidden.index_select(0, rows) if mixed else hidden)  # type: ignore[no-any-return]

    def _spread(self, x: Tensor) -> Tensor:
        """Rows of every block, ``[n b, ...]``, from those of the anchors and the mask token, ``[n + 1, ...]``."""
        anchors, mask = x[:-1].unsqueeze(1), x[-1:].unsqueeze(1)
        masks = mask.expand(len(anchors), self.block_size - 1, *x.shape[1:])
        return torch.cat([anchors, masks], dim=1).flatten(0, 1)

    def decoder(self, dtype: torch.dtype) -> BlockDecoder:
        """A snapshot of the backbone for decoding in ``dtype``."""
        return BlockDecoder(self, dtype)


def _check(config: Qwen3Config, block_size: int, drafts: int) -> None:
    fields = config.dflash_config
    if drafts < 1:
        raise ValueError(f"block_size is {block_size}: such a block drafts nothing")
    if fields["mask_token_id"] >= config.vocab_size:
        raise ValueError(
            f"mask_token_id is {fields['mask_token_id']}, outside a vocabulary of {config.vocab_size} tokens"
        )
    if len(config.layer_types) != config.num_hidden_layers:
        raise ValueError(f"layer_types has {len(config.layer_types)} entries for {config.num_hidden_layers} layers")
    if config.use_sliding_window and "sliding_attention" not in config.layer_types:
        raise ValueError("use_sliding_window is set, but no entry of layer_types is sliding_attention")
    if "sliding_attention" in config.layer_types:
        if "causal" in fields or getattr(config, "is_causal", None) is False:
            raise ValueError("causal is False, but sliding-window layers are causal within the block")
        window = config.sliding_window
        if window is None or window < block_size:
            raise ValueError(
                f"sliding_window is {window}; a sliding layer needs one of at least the block, {block_size} "
                "(and use_sliding_window)"
            )


class BlockDecoder:
    """Drafts one block at a time over a growing context; later changes of the draft's weights do not reach it.

    Args:
        draft: the network.
        dtype: compute dtype.
    """

    def __init__(self, draft: DFlash, dtype: torch.dtype) -> None:
        self.draft, self.dtype = draft, dtype
        self.device = draft.fc.weight.device
        self._weights = [layer.weights(dtype) for layer in draft.decoder_layers]
        self.reset()

    def reset(self) -> None:
        """Forget the context."""
        self.length = 0
        attentions = [layer.self_attn for layer in self.draft.decoder_layers]
        self._cache = DecodeCache(self.draft.rotary, attentions, self.dtype, self.device)

    @torch.inference_mode()
    def extend(self, aux_hidden_states: Tensor) -> None:
        """Append the features ``[n, A]`` of tokens that the target has processed."""
        before, self.length = self.length, self.length + len(aux_hidden_states)
        self._cache.reserve(self.length + self.draft.block_size)
        context = self.draft.context(aux_hidden_states, self.dtype)
        angles = self._cache.angles(before, self.length)
        for i, (layer, w) in enumerate(zip(self.draft.decoder_layers, self._weights, strict=True)):
            key, value = layer.inject(context, w)
            self._cache.write(i, before, apply_rope(key, *angles), value)

    @torch.inference_mode()
    def block(self, embeds: Tensor) -> Tensor:
        """Normed states ``[b, H]`` of a block.

        Args:
            embeds: ``[b, H]`` embeddings of the token behind the context and of the mask tokens.
        """
        hidden, size = embeds.to(self.dtype), self.draft.block_size
        angles = self._cache.angles(self.length, self.length + size)
        for i, (layer, w) in enumerate(zip(self.draft.decoder_layers, self._weights, strict=True)):
            query, key, value = layer.project(hidden, w)
            first = 0 if layer.window is None else max(0, self.length - layer.window + 1)
            # Behind the context, where the next committed tokens take their place.
            keys, values = self._cache.write(i, self.length, apply_rope(key, *angles), value)
            mask = self._mask(layer.window, first)
            hidden = layer.finish(hidden, attend(apply_rope(query, *angles), keys[first:], values[first:], mask), w)
        return self.draft.norm(hidden)  # type: ignore[no-any-return]

    def _mask(self, window: int | None, first: int) -> Tensor | None:
        if window is None:
            return None
        rows = torch.arange(self.length, self.length + self.draft.block_size, device=self.device).unsqueeze(1)
        keys = torch.arange(first, self.length + self.draft.block_size, device=self.device)
        return (keys <= rows) & (keys > rows - window)
