"""The fields of a draft's ``config.json``: those that its network reads, and the treatment of all others.

Each class of drafts declares the fields that it reads and the values that they may have
(:attr:`~specforge.modeling.draft.registry.Draft.fields`). Any other field must not change the network: it must be
bookkeeping, null, false, or the default of the transformers class that reads the file. Otherwise it is rejected by
name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from specforge.modeling.layers.decoder_layer import ROPE_TYPES


@dataclass(frozen=True)
class Kind:
    """The values that a field may have."""

    words: str  # description of the values, for error messages
    allows: Callable[[Any], bool]  # whether a value is one of them
    required: bool = False  # whether a config without the field is rejected
    default: Any = None  # the value that the network uses if neither the file nor transformers has one


Fields = Mapping[str, "Kind | Fields"]


def whole(least: int, most: int) -> Kind:
    """A whole number from ``least`` to ``most``."""
    return Kind(f"a whole number from {least} to {most}", lambda x: type(x) is int and least <= x <= most)


def only(*values: Any) -> Kind:
    """One of the given values. A single value is also the default."""
    return Kind(
        " or ".join(map(repr, values)),
        lambda x: any(type(x) is type(v) and x == v for v in values),
        default=values[0] if len(values) == 1 else None,
    )


def required(kind: Kind) -> Kind:
    """The same values, for a field that must be present."""
    return replace(kind, required=True)


def by_default(value: Any, kind: Kind) -> Kind:
    """The same values, for a field that defaults to ``value``."""
    return replace(kind, default=value)


def _positive(x: Any) -> bool:
    return type(x) in (int, float) and 0 < x < 1e300


def _layers(x: Any) -> bool:
    return (
        isinstance(x, list | tuple)
        and 0 < len(x) == len({*map(str, x)})
        and all(type(i) is int and 0 <= i < 4096 for i in x)
    )


ANYTHING = Kind("anything", lambda x: True)
FLAG = Kind("true or false", lambda x: type(x) is bool, default=False)
SIZE = whole(1, 1 << 24)
DEPTH = whole(1, 1024)
TOKEN = whole(0, (1 << 24) - 1)
POSITIVE = Kind("a number above 0", _positive)
NUMBER = Kind("a number of at least 0", lambda x: _positive(x) or (type(x) in (int, float) and x == 0))
SHARE = Kind("a number above 0, at most 1", lambda x: _positive(x) and x <= 1)
LAYER_IDS = Kind("a list of different layers, counted from 0", _layers)
KINDS_OF_LAYERS = Kind(
    "a list of full_attention and sliding_attention",
    lambda x: isinstance(x, list) and all(k in ("full_attention", "sliding_attention") for k in x),
)
FULL_LAYERS = Kind("a list of full_attention", lambda x: isinstance(x, list) and all(k == "full_attention" for k in x))

VOCABULARY: Fields = {"vocab_size": required(SIZE), "draft_vocab_size": SIZE, "hidden_size": required(SIZE)}
# For drafts that use the target's embedding and head and so have no matrices that could be tied.
NO_MATRICES: Fields = {"tie_word_embeddings": FLAG}
# For decoder layers with a gated MLP, under Llama's names.
LAYER: Fields = {
    **VOCABULARY,
    "target_hidden_size": SIZE,
    "intermediate_size": required(SIZE),
    "num_hidden_layers": DEPTH,
    "num_attention_heads": required(SIZE),
    "num_key_value_heads": SIZE,
    "head_dim": SIZE,
    "hidden_act": only("silu", "swish"),
    "rms_norm_eps": POSITIVE,
    "max_position_embeddings": SIZE,
    "rope_parameters": ANYTHING,
    "layer_types": FULL_LAYERS,
    "attn_implementation": ANYTHING,
    **dict.fromkeys(("is_causal", "is_neox_style", "rope_is_neox_style", "use_aux_hidden_state"), only(True)),
}

# For latent attention. There are as many key heads as query heads, and their size is the sum of its two parts.
LATENT: Fields = {
    **{name: required(SIZE) for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    "q_lora_rank": required(SIZE),
    "rope_interleave": only(True),
    "attention_bias": only(False),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "qk_head_dim", "num_nextn_predict_layers"), ANYTHING),
}
# For DeepSeek's mixture of experts.
EXPERTS: Fields = {
    **dict.fromkeys(("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"), SIZE),
    **dict.fromkeys(("n_group", "topk_group"), SIZE),
    "norm_topk_prob": FLAG,
    "routed_scaling_factor": POSITIVE,
    "first_k_dense_replace": ANYTHING,
    "num_local_experts": ANYTHING,
    "output_router_logits": only(False),
}
# How DeepSeek's experts are trained and chosen.
ROUTING = ("aux_loss_alpha", "ep_size", "moe_layer_freq", "scoring_func", "seq_aux", "topk_method")

# Fields that do not change a network, besides those that every transformers config has.
_BOOKKEEPING = frozenset(
    {
        "_name_or_path",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "cls_token_id",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "initializer_range",
        "is_decoder",
        "max_window_layers",
        "model_type",
        "output_attentions",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "pruned_heads",
        "sep_token_id",
        "task_specific_params",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_cache",
    }
)
# Fields that EAGLE drafts ignored when checkpoints had no config_version yet, and implement now.
_IGNORED_BEFORE = ("attention_bias", "norm_before_residual", "qk_norm")
_ROPE: dict[str, dict[str, Kind]] = {
    "default": {},
    "linear": {"factor": required(POSITIVE)},
    "yarn": {
        "factor": required(POSITIVE),
        "original_max_position_embeddings": SIZE,
        "attention_factor": NUMBER,
        "beta_fast": NUMBER,
        "beta_slow": NUMBER,
        "mscale": NUMBER,
        "mscale_all_dim": NUMBER,
        "truncate": FLAG,
    },
    "llama3": {
        "factor": required(POSITIVE),
        "low_freq_factor": required(POSITIVE),
        "high_freq_factor": required(POSITIVE),
        "original_max_position_embeddings": SIZE,
    },
}
ROPE_SPELLINGS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")


@cache
def bookkeeping() -> frozenset[str]:
    """Names of fields that do not change a network; older files also contain the settings of generation."""
    return _BOOKKEEPING | frozenset(PretrainedConfig().to_dict()) | frozenset(GenerationConfig().to_dict())


def check_fields(
    config: Mapping[str, Any], reads: Fields, what: str, defaults: Mapping[str, Any], prefix: str = ""
) -> None:
    """Reject values that a network does not support, and fields that would change it but that it does not read.

    Args:
        config: the fields, without nulls.
        reads: the fields that the network reads.
        what: name of the network, for error messages.
        defaults: default values of fields, by name.
        prefix: path of these fields in the file, for error messages.

    Raises:
        ValueError: names the first such field and its value.
    """
    for name, kind in reads.items():
        if isinstance(kind, Kind) and kind.required and name not in config:
            raise ValueError(f"{prefix}{name} is missing; {what} needs it")
    nested: dict[str, Any] = {name: {} for name, kind in reads.items() if isinstance(kind, Mapping)}
    for name, value in {**nested, **config}.items():
        wanted, found = reads.get(name), f"{prefix}{name} is {quoted(value)}"
        if isinstance(wanted, Mapping):
            if not isinstance(value, Mapping):
                raise ValueError(f"{found}; {what} expects an object")
            inner = {key: x for key, x in value.items() if x is not None}
            check_fields(inner, wanted, what, {}, f"{prefix}{name}.")
        elif wanted is not None and not wanted.allows(value):
            raise ValueError(f"{found}; {what} expects {wanted.words}")
        elif wanted is None and not _is_harmless(name, value, config, defaults):
            raise ValueError(f"{found}, which {what} does not support")


def without_ignored_fields(config: Mapping[str, Any], reads: Fields, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the network that the first revisions of SpecForge actually trained.

    They ignored fields that they did not read, and always rotated whole heads. Their ``dynamic`` positions were plain
    ones for texts of up to ``max_position_embeddings`` tokens.
    """
    found = {}
    for name, value in config.items():
        kind = reads.get(name)
        refused = isinstance(kind, Kind) and not kind.allows(value)
        unread = kind is None and not _is_harmless(name, value, config, defaults)
        if not (refused or unread or (name in _IGNORED_BEFORE and "eagle_config" in reads)):
            found[name] = value
    rope = dict(found.get("rope_parameters", {}))
    if rope.get("rope_type") in ("default", "dynamic"):
        found["rope_parameters"] = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return found


def _is_harmless(name: str, value: Any, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether a field that a network does not read has no effect on it."""
    if name == "sliding_window" and config.get("use_sliding_window") is False:
        return True
    same = name in defaults and value == defaults[name]
    return name in bookkeeping() or value is None or value is False or same


def move_fields(source: Any, to: Any, names: Mapping[str, str], where: str) -> None:
    """Move fields between two objects of a config, in place; nothing happens if either is not an object.

    Args:
        source: object that other projects write them in.
        to: object that SpecForge reads them from.
        names: names in ``to`` by names in ``source``.
        where: place of ``to``, for error messages.

    Raises:
        ValueError: both objects have a field, with different values.
    """
    if not isinstance(source, dict) or not isinstance(to, dict):
        return
    for old, new in names.items():
        value = source.pop(old, None)
        if value is not None and to.setdefault(new, value) != value:
            raise ValueError(f"{old} is {quoted(value)}, but {quoted(to[new])} {where}")


def quoted(value: Any) -> str:
    """A value for error messages, on one line of limited length."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def rope_fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rotary positions of a config in the form of transformers 5, as a new dict; None if it has none.

    Older configs have ``rope_theta`` next to ``rope_scaling``.

    Raises:
        ValueError: two fields contradict each other, or kinds of layers have different positions.
    """
    given = {name: config[name] for name in ROPE_SPELLINGS if config.get(name) is not None}
    if not given:
        return None
    parts = [_standard(given[name], name) for name in ("rope_parameters", "rope_scaling") if name in given]
    parts.append({name: given[name] for name in ("rope_theta", "partial_rotary_factor") if name in given})
    rope: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if rope.setdefault(key, value) != value:
                raise ValueError(f"{key} of the rotary positions is both {quoted(rope[key])} and {quoted(value)}")
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", 10000.0)
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    return rope


def _standard(rope: Any, name: str) -> dict[str, Any]:
    if not isinstance(rope, Mapping):
        raise ValueError(f"{name} is {quoted(rope)}, not an object")
    kinds = [x for x in rope.values() if isinstance(x, Mapping)]
    if kinds:
        if any(x is not None and x != kinds[0] for x in rope.values()):
            raise ValueError(f"{name} is {quoted(rope)}; drafts have the same positions in all layers")
        return _standard(kinds[0], name)
    found = {("rope_type" if key == "type" else key): x for key, x in rope.items() if x is not None}
    if rope.get("type") and rope.get("rope_type"):
        found["rope_type"] = rope["rope_type"]
    return found


def check_rope(rope: Mapping[str, Any]) -> None:
    """Reject rotary positions that drafts do not support.

    Raises:
        ValueError: names the field.
    """
    kind = rope["rope_type"]
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"rope_type is {quoted(kind)}; drafts support {', '.join(ROPE_TYPES)}, whose positions do not depend on "
            "the length of the text"
        )
    common = {"rope_type": ANYTHING, "rope_theta": POSITIVE, "partial_rotary_factor": SHARE}
    check_fields(rope, {**_ROPE[kind], **common}, f"rope_type {kind!r}", {}, "rope_parameters.")


def target_rope(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rotary positions of a target with this config, as :func:`rope_fields` gives them.

    If each kind of layer has its own, as in Gemma 3, they are those of the layers with full attention.
    """
    rope = config.get("rope_parameters")
    own = rope.get("full_attention") if isinstance(rope, Mapping) else None
    return rope_fields({"rope_parameters": own or rope})


def draft_rope(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rotary positions of a draft derived from a target with this config; None if the target has none.

    They are the target's, unless those depend on the length of the text. Then they are plain ones with the same base,
    because a key in the draft's cache must stay valid as the text grows. Whole heads are rotated: servers' block
    drafters support nothing else.
    """
    rope = target_rope(config)
    if rope is None:
        return None
    kind = rope["rope_type"] if rope["rope_type"] in ROPE_TYPES else "default"
    kept = ("rope_theta", *_ROPE[kind])
    return {"rope_type": kind, **{name: rope[name] for name in kept if name in rope}}
