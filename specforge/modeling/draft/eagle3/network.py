"""The EAGLE-3 draft: one decoder layer over [token embedding, fused target features] (arXiv 2503.01840).

``fc`` fuses the captured layers to draft states, the attention of ``midlayer`` reads an input twice as wide, and
``norm`` and ``lm_head`` give logits over the draft vocabulary. EAGLE-3.1 adds one norm per captured layer before ``fc``
(``fc_norm``) and feeds the normed state to the next step (``norm_output``). The attention is grouped-query (Llama) or
latent (DeepSeek, Kimi); the unroll and the decoder are the same for both.

The attention's input is ``[RMSNorm(embedding); RMSNorm(hidden)]``. A matrix product splits over such a concatenation,
and the embedding's product at step s is that of step 0 shifted by s tokens, so it is computed once for all T steps.

Shape legend: N tokens, R query rows, T steps, H hidden size, A captured layers x target hidden size, D draft
vocabulary, h / k query / key heads, d / v size of a query and key head / of a value head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DeepseekV3Config, LlamaConfig

from specforge.inference.target_files import TargetFiles
from specforge.inference.target_layers import LastLayer
from specforge.modeling.draft.eagle3.plan import UnrollPlan
from specforge.modeling.draft.fields import (
    ANYTHING,
    EXPERTS,
    FLAG,
    LATENT,
    LAYER,
    LAYER_IDS,
    ROUTING,
    SIZE,
    Fields,
    move_fields,
    only,
    quoted,
    required,
)
from specforge.modeling.draft.registry import Draft, register_draft
from specforge.modeling.draft.speculators import outputs_of
from specforge.modeling.draft.starting import copy_into, rotary_of_target
from specforge.modeling.layers.attention import ttt_attention
from specforge.modeling.layers.decode_cache import CachedDecoder, cached_attention
from specforge.modeling.layers.decoder_layer import (
    Attention,
    DecoderLayer,
    GroupedAttention,
    RMSNorm,
    RotaryTable,
    compute_dtype,
    take_rows,
)
from specforge.modeling.layers.fp8 import as_matrix, linear
from specforge.modeling.layers.latent_attention import LatentAttention

_CAPTURED = "eagle_aux_hidden_state_layer_ids"
_OF_ANGELSLIM = "aux_hidden_states_layer_ids"
# VLLM's class of drafts with Qwen3's attention, and its names for the mask token that makes a draft a P-EAGLE one.
QWEN3 = "Eagle3Qwen3ForCausalLM"
MASKS = ("ptd_token_id", "pard_token")


class EagleDraft(Draft):
    """Base of the drafts that read captured layers of the target through ``fc`` and have a head of their own.

    Args:
        config: a transformers config with ``draft_vocab_size`` and ``eagle_config``; optional
            ``target_hidden_size`` (default ``hidden_size``), ``fc_norm`` (a norm per captured layer, EAGLE-3.1),
            ``norm_before_fc`` (one norm over all of them), ``norm_before_residual`` and ``attention_bias``.

    Attributes:
        layer_ids: the captured layers.
        fc: from A to H.
        norm: norm of the states that ``lm_head`` reads.
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
            # ModelOpt: one chain of tokens, so no further heads
            "next_layer_regular": only(True),
            "parallel_draft_step": only(1),
            "parallel_draft_heads_num_layers": ANYTHING,
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
        features = width * len(self.layer_ids)
        before = config.eagle_config.get("norm_before_fc", getattr(config, "norm_before_fc", False))
        self.input_norm = RMSNorm(features, eps) if before else None
        per_layer = getattr(config, "fc_norm", False)
        self.fc_norm = nn.ModuleList(RMSNorm(width, eps) for _ in self.layer_ids) if per_layer else None
        self.fc = nn.Linear(features, config.hidden_size, bias=False)
        self.build_layers(config)
        self.norm = RMSNorm(config.hidden_size, eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary = RotaryTable(config)

    @staticmethod
    def translate(config: dict[str, Any]) -> None:
        """Move captured layers and ``norm_before_fc`` to ``eagle_config``, and rename SGLang's ``use_aux_norm``.

        Layer ids in ``eagle_config`` and in AngelSlim's field refer to the outputs of layers. VLLM's top-level field
        refers to inputs, so its ids are one higher.
        """
        eagle = config.get("eagle_config", {})
        above, theirs = config.pop(_CAPTURED, None), config.pop(_OF_ANGELSLIM, None)
        if not isinstance(eagle, Mapping):
            return
        own = {key: x for key, x in eagle.items() if key != _CAPTURED or x not in ([], ())}
        if theirs is not None and own.setdefault(_CAPTURED, theirs) != theirs:
            raise ValueError(f"{_OF_ANGELSLIM} is {quoted(theirs)}, but {quoted(own[_CAPTURED])} in eagle_config")
        if above is not None:
            below = outputs_of(above, _CAPTURED)
            if list(own.setdefault(_CAPTURED, below)) != below:
                raise ValueError(
                    f"{_CAPTURED} is {quoted(above)}, but {quoted(own[_CAPTURED])} in eagle_config; the top-level ids "
                    "must be one higher, because vLLM counts layers by their inputs"
                )
        move_fields(config, own, {"norm_before_fc": "norm_before_fc"}, "in eagle_config")
        if own or "eagle_config" in config:
            config["eagle_config"] = own
        if config.pop("use_aux_norm", False):
            config["fc_norm"] = True
        if QWEN3 in config.get("architectures", ()):
            config["qk_norm"] = True

    @abstractmethod
    def build_layers(self, config: Any) -> None:
        """Build the layers between ``fc`` and ``norm``."""

    @property
    @abstractmethod
    def first_layer(self) -> DecoderLayer:
        """The layer that reads the token embedding in addition to the fused features."""

    @torch.no_grad()
    def start_from_target(self, target: TargetFiles) -> None:
        """Initialise from the target: its last layer, reading the last captured one, and its head.

        Parameters without a counterpart keep their values: the embedding's columns of the attention's input
        projections, and the columns of ``fc`` that read the other captured layers.

        Raises:
            UserError: the target's last layer is not of the draft's kind and dimensions.
        """
        last, layer, width = LastLayer(target), self.first_layer, self.fc.out_features
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
        last.check(lambda states: layer.run(states, rotary), [name for _, name in pairs], self.architecture)

    def fuse(self, aux_hidden_states: Tensor, dtype: torch.dtype) -> Tensor:
        """Fuse captured layers ``[N, A]`` into draft states ``[N, H]``."""
        features = aux_hidden_states.to(dtype)
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = features.chunk(len(self.layer_ids), dim=-1)
            features = torch.cat([norm(x) for norm, x in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return linear(features, as_matrix(self.fc.weight.to(dtype), self.fp8))


class Eagle3Draft(EagleDraft):
    """Base of EAGLE-3 drafts: one layer, unrolled in training, run row by row in decoding.

    Args:
        config: see :class:`EagleDraft`; optional ``norm_output`` (EAGLE-3.1).
    """

    fields: ClassVar[Fields] = {**EagleDraft.fields, "norm_output": FLAG}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm_output = bool(getattr(config, "norm_output", False))

    @staticmethod
    @abstractmethod
    def build_attention(config: Any) -> Attention:
        """Build the attention, whose input is 2H wide."""

    def build_layers(self, config: Any) -> None:
        """Build the one layer."""
        if config.num_hidden_layers != 1:
            raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}: an EAGLE-3 draft has one layer")
        self.midlayer = DecoderLayer(config, self.build_attention(config))

    @property
    def first_layer(self) -> DecoderLayer:
        """The one layer."""
        return self.midlayer

    def forward(self, aux_hidden_states: Tensor, embeds: Tensor, plan: UnrollPlan) -> Tensor:
        """Run the training-time test.

        Args:
            aux_hidden_states: ``[K, A]`` captured layers, concatenated, of the plan's own tokens.
            embeds: ``[E, H]`` the target's embedding of every token that the plan reads.
            plan: the rows to compute, from :func:`~specforge.modeling.draft.eagle3.plan.plan_unroll`.

        Returns:
            ``[T, R, H]`` normed states for ``lm_head``, in the compute dtype.
        """
        dtype = compute_dtype(self.fc.weight)
        # Every product below names its dtype; autocast would also narrow the reductions.
        with torch.autocast(embeds.device.type, enabled=False):
            return self._unroll(aux_hidden_states, embeds, plan, dtype)

    def _unroll(self, aux_hidden_states: Tensor, embeds: Tensor, plan: UnrollPlan, dtype: torch.dtype) -> Tensor:
        layer, attn, w = self.midlayer, self.midlayer.self_attn, self.midlayer.weights(dtype)
        width = attn.query_width
        embed = layer.project_embedding(embeds.to(dtype), w)
        cos, sin = self.rotary(plan.longest + plan.steps, embeds.device)
        row_positions = plan.positions[plan.rows]

        # Step 0: keys and values of every (own) token, queries of the needed rows only.
        fused = self.fuse(aux_hidden_states, dtype)
        hidden = fused[plan.rows]
        product = layer.hidden_norm.linear(fused, w.hidden[width:]) + take_rows(embed[:, width:], plan.next_tokens)
        key, value = attn.keys_values(product, (cos[plan.positions], sin[plan.positions]), w.more)
        if plan.share is not None:
            key, value = plan.share.gather(key, value)
        product = layer.hidden_norm.linear(hidden, w.hidden[:width]) + take_rows(embed[:, :width], plan.row_tokens[0])

        def run(step: int, hidden: Tensor, product: Tensor | None, *own: Tensor) -> tuple[Tensor, ...]:
            """Fed-back state and normed state of a step, and from step 1 on its rows' own key and value."""
            angles = cos[row_positions + step], sin[row_positions + step]
            more: tuple[Tensor, ...] = ()
            if product is None:
                product = layer.hidden_norm.linear(hidden, w.hidden) + take_rows(embed, plan.row_tokens[step])
                more = attn.keys_values(product[:, width:], angles, w.more)
            query = attn.queries(product[:, :width], angles, w.more)
            own = (*own, *more)
            pairs = list(zip(own[0::2], own[1::2], strict=True))
            attention = ttt_attention(query, key, value, plan.segments, pairs, packing=plan.packing, flex=self.flex)
            hidden = layer.finish(hidden, attention, w)
            normed = self.norm(hidden)
            return normed if self.norm_output else hidden, normed, *more

        states: list[Tensor] = []
        own: list[Tensor] = []
        for step in range(plan.steps):
            hidden, normed, *more = self.run_layer(run, step, hidden, None if step else product, *own)
            states.append(normed)
            own += more
        return torch.stack(states)

    def decoder(self, dtype: torch.dtype) -> Eagle3Decoder:
        """A snapshot of the draft for decoding in ``dtype``."""
        return Eagle3Decoder(self, dtype)


@register_draft("LlamaForCausalLMEagle3", LlamaConfig, other_names=("Eagle3LlamaForCausalLM", QWEN3))
class LlamaEagle3(Eagle3Draft):
    """EAGLE-3 draft with a Llama layer.

    ``attention_bias`` gives all four projections a bias; ``qk_norm`` norms the heads of queries and keys, as in Qwen3.
    """

    fields: ClassVar[Fields] = {**Eagle3Draft.fields, "attention_bias": FLAG, "qk_norm": FLAG}

    @classmethod
    def is_described_by(cls, config: Mapping[str, Any]) -> bool:
        """As in :class:`Draft`, unless there is a mask token."""
        return super().is_described_by(config) and all(config.get(name) is None for name in MASKS)

    @staticmethod
    def build_attention(config: LlamaConfig) -> Attention:
        """Grouped-query attention."""
        return GroupedAttention(config, 2 * config.hidden_size, out_bias=True)


@register_draft("Eagle3DeepseekV2ForCausalLM", DeepseekV3Config, other_names=("DeepseekV3ForCausalLMEagle3",))
class DeepseekEagle3(Eagle3Draft):
    """EAGLE-3 draft with multi-head latent attention and a dense MLP, as SGLang loads it for DeepSeek and Kimi targets.

    Both ``a`` projections read the doubled input. Fields of the target's experts are accepted and not read: configs
    copied from a target have them, and servers ignore them in a draft, too.
    """

    fields: ClassVar[Fields] = {**Eagle3Draft.fields, **LATENT, **dict.fromkeys((*EXPERTS, *ROUTING), ANYTHING)}

    def __init__(self, config: DeepseekV3Config) -> None:
        # The size of the rotary table, which a config of another attention may have set otherwise.
        config.head_dim = config.qk_rope_head_dim
        super().__init__(config)

    @staticmethod
    def build_attention(config: DeepseekV3Config) -> Attention:
        """Latent attention."""
        return LatentAttention(config, 2 * config.hidden_size)


class Eagle3Decoder(CachedDecoder):
    """Runs the draft row by row with a key/value cache; later changes of the draft's weights do not affect it.

    Rows are consecutive: the row of position p is the p-th that :meth:`extend` received. A chain step is one more
    row, because the training-time test also places row p at position p+s at step s.
    """

    def __init__(self, draft: Eagle3Draft, dtype: torch.dtype) -> None:
        super().__init__([draft.midlayer], draft.rotary, dtype)
        self.draft = draft
        self._lm_head = draft.lm_head.weight.to(dtype)

    @torch.inference_mode()
    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """Fuse captured layers ``[n, A]`` of committed tokens into draft states ``[n, H]``."""
        return self.draft.fuse(aux_hidden_states, self.dtype)

    @torch.inference_mode()
    def extend(self, hidden: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Append rows.

        Args:
            hidden: ``[n, H]`` fused features of committed tokens, or the feedback of the last call.
            embeds: ``[n, H]`` embedding of the token that follows each row's.

        Returns:
            ``(logits [D], feedback [H])`` of the last row: the next token's distribution over the draft
            vocabulary, and the state to pass to the next chain step.
        """
        layer, attn, w = self.draft.midlayer, self.draft.midlayer.self_attn, self._weights[0]
        before, after = self.rows, self.rows + hidden.shape[0]
        self.reserve(after)
        product = layer.project_embedding(embeds.to(self.dtype), w)
        product = product + layer.hidden_norm.linear(hidden, w.hidden)
        key, value = attn.keys_values(product[:, attn.query_width :], self.angles(before, after), w.more)
        keys, values = self.write(0, before, key, value)
        self.rows = after
        # Of the last row the output is needed, of the others only keys and values.
        query = attn.queries(product[-1:, : attn.query_width], self.angles(after - 1, after), w.more)
        hidden = layer.finish(hidden[-1:], cached_attention(query, keys, values), w)
        normed = self.draft.norm(hidden)
        logits = F.linear(normed, self._lm_head)
        return logits[0], (normed if self.draft.norm_output else hidden)[0]
