"""The config of a draft in the form of the speculators project, which vLLM serves.

The fields of the draft's layers are nested in ``transformer_layer_config``, and ``speculators_model_type`` names the
kind of draft. Captured layers are counted by their inputs, so their ids are one higher than SpecForge's. Where
speculators 0.9.0 and vLLM 0.32 take a missing field for different networks, the field is required.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft.fields import bookkeeping, quoted

VERSION = "0.9.0"


class _Kind(NamedTuple):
    """A kind of draft: its architecture here, and its class in speculators."""

    architecture: str
    speculators_class: str
    reads_eagle: bool = False  # the fields of EAGLE-3 drafts; the others have those of block drafters
    drafts_in_parallel: bool = False
    may_sample_from_anchor: bool = False


_KINDS = {
    "eagle3": _Kind("LlamaForCausalLMEagle3", "Eagle3DraftModel", reads_eagle=True),
    "peagle": _Kind("PEagleDraftModel", "PEagleDraftModel", reads_eagle=True, drafts_in_parallel=True),
    "dflash": _Kind("DFlashDraftModel", "DFlashDraftModel"),
    "dflash2": _Kind("DFlash2DraftModel", "DFlash2DraftModel"),
    "dspark": _Kind("Qwen3DSparkModel", "DSparkDraftModel", may_sample_from_anchor=True),
}
_LAYERS = "transformer_layer_config"
# Fields of the form itself. The names of architectures are those of its training code, and a tied head inside
# _LAYERS is the target's: drafts of this form have a head of their own, or none.
_OF_THE_FORM = ("speculators_model_type", "speculators_version", "speculators_config", _LAYERS, "architectures")
# Fields inside dflash_config in SpecForge's own form.
_IN_BLOCKS = ("mask_token_id", "conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")


def is_speculators(config: Mapping[str, Any]) -> bool:
    """Whether a config has this form."""
    return "speculators_model_type" in config


def from_speculators(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a draft in this form, under the usual names of published drafts.

    Raises:
        ValueError: a field is missing whose meaning is not certain, or describes a draft that SpecForge does not have.
    """
    kind, layers = config["speculators_model_type"], config.get(_LAYERS)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"speculators_model_type is {quoted(kind)}; SpecForge has {', '.join(_KINDS)}")
    if not isinstance(layers, Mapping):
        raise ValueError(f"{_LAYERS} is {quoted(layers)}, not an object with the fields of the draft's layers")
    model_type = layers.get("model_type")
    if model_type not in ("llama", "qwen3"):
        raise ValueError(f"{_LAYERS}.model_type is {quoted(model_type)}; SpecForge has llama and qwen3")
    outer = {key: x for key, x in config.items() if key not in _OF_THE_FORM}
    inner = {
        key: x for key, x in layers.items() if x is not None and key not in ("architectures", "tie_word_embeddings")
    }
    fields = {**inner, **outer, "model_type": model_type, "architectures": [_KINDS[kind].architecture]}
    if _KINDS[kind].reads_eagle:
        return _eagle(fields, kind, model_type)
    return _blocks(fields, kind)


def _eagle(fields: dict[str, Any], kind: str, model_type: str) -> dict[str, Any]:
    if not _KINDS[kind].drafts_in_parallel:
        _required(fields, "norm_before_residual", "speculators takes that as false, vLLM as true")
    else:
        fields.setdefault("embed_requires_grad", True)
    return {**fields, "qk_norm": model_type == "qwen3"}


def _blocks(fields: dict[str, Any], kind: str) -> dict[str, Any]:
    _required(fields, "aux_hidden_state_layer_ids", "it names the layers of the target that the draft reads")
    _required(fields, "block_size", "speculators takes that as 8, servers as 16")
    kinds = fields.get("layer_types")
    sliding = isinstance(kinds, list) and "sliding_attention" in kinds
    whole = fields.pop("sliding_window_non_causal", None)
    if sliding and whole is None:
        raise ValueError("sliding_window_non_causal is missing: speculators takes that as false, vLLM as true")
    if _KINDS[kind].may_sample_from_anchor:
        _required(fields, "sample_from_anchor", "speculators takes that as true, vLLM as false")
    elif fields.pop("sample_from_anchor", False):
        raise ValueError(f"sample_from_anchor is True, which {_KINDS[kind].architecture} does not support")
    rope = fields.get("rope_parameters")
    if isinstance(rope, Mapping) and "sliding_attention" in rope:  # speculators has these in all layers of a draft
        fields["rope_parameters"] = rope["sliding_attention"]
    nested = {name: fields.pop(name) for name in _IN_BLOCKS if name in fields}
    nested["target_layer_ids"] = outputs_of(fields.pop("aux_hidden_state_layer_ids"), "aux_hidden_state_layer_ids")
    if sliding and whole:
        fields["is_causal"] = False
    return {**fields, "dflash_config": nested}


def _required(fields: Mapping[str, Any], name: str, why: str) -> None:
    if name not in fields:
        raise ValueError(f"{name} is missing: {why}")


def verifier_of(config: Mapping[str, Any]) -> str | None:
    """The target that a config in this form names; None if it names none."""
    for field in ("speculators_config", "verifier"):
        inner = config.get(field)
        config = inner if isinstance(inner, Mapping) else {}
    name = config.get("name_or_path")
    return name if isinstance(name, str) and name else None


def outputs_of(inputs: Any, name: str) -> list[int]:
    """Layers by their outputs, as SpecForge counts them, from layers by their inputs.

    Args:
        inputs: ids of layers; the input of layer i is the output of layer i - 1.
        name: of their field, for error messages.

    Raises:
        ValueError: they are not ids of layers above the first, whose input is the embedding.
    """
    if not isinstance(inputs, list) or not all(type(layer) is int for layer in inputs):
        raise ValueError(f"{name} is {quoted(inputs)}, not a list of layers")
    if inputs and min(inputs) < 1:
        raise ValueError(f"{name} is {quoted(inputs)}; drafts read outputs of layers, the inputs of layers from 1 on")
    return [layer - 1 for layer in inputs]


def as_speculators(config: Mapping[str, Any], target: TargetFiles, tokens: int) -> dict[str, Any]:
    """A draft's config in this form.

    Args:
        config: the config in SpecForge's own form.
        target: the draft's target, which the form names.
        tokens: drafted tokens per round when nothing else is asked for.

    Raises:
        UserError: the form has no such draft.
    """
    architecture = config["architectures"][0]
    kind = next((kind for kind, known in _KINDS.items() if known.architecture == architecture), None)
    if kind is None:
        raise UserError(f"export: the speculators form has no {architecture}; it has {', '.join(_KINDS)}")
    outer = _eagle_form(config, kind) if _KINDS[kind].reads_eagle else _block_form(config, kind)
    names = ("draft_vocab_size", "target_hidden_size")
    outer |= {name: config[name] for name in names if name in config}
    inside = {key: x for key, x in config.items() if key not in {*outer, *_NOT_INSIDE, *bookkeeping()}}
    qwen3 = not _KINDS[kind].reads_eagle or config.get("qk_norm")
    inside["model_type"] = "qwen3" if qwen3 else "llama"
    verifier = {"name_or_path": target.name, "architectures": target.config.get("architectures") or []}
    method = {"proposal_type": "greedy", "speculative_tokens": tokens}
    return {
        **outer,
        "architectures": [_KINDS[kind].speculators_class],
        "tie_word_embeddings": False,
        "speculators_model_type": kind,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": verifier,
        },
        _LAYERS: inside,
    }


def speculators_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A draft's tensors under the form's names; the whole vocabulary has no maps."""
    whole = "t2d" in tensors and bool(tensors["t2d"].all())
    return {
        name.replace("midlayer.", "layers.0."): x
        for name, x in tensors.items()
        if not (whole and name in ("d2t", "t2d"))
    }


# Fields of SpecForge's own form that the form has elsewhere, or not at all.
_NOT_INSIDE = ("architectures", "eagle_config", "dflash_config", "qk_norm", "is_causal", "num_target_layers")
_FLAGS = ("norm_before_residual", "fc_norm", "norm_output")


def _eagle_form(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    eagle = config["eagle_config"]
    outer: dict[str, Any] = {name: bool(config.get(name)) for name in _FLAGS}
    outer["norm_before_fc"] = bool(eagle.get("norm_before_fc") or config.get("norm_before_fc"))
    outer["eagle_aux_hidden_state_layer_ids"] = [i + 1 for i in eagle["eagle_aux_hidden_state_layer_ids"]]
    outer["embed_requires_grad"] = bool(config.get("embed_requires_grad"))
    if outer["fc_norm"] and (outer["norm_before_fc"] or _KINDS[kind].drafts_in_parallel):
        reason = "with norm_before_fc" if outer["norm_before_fc"] else "for P-EAGLE in vLLM"
        raise UserError(f"export: fc_norm is set, which the speculators form does not have {reason}; use --to vllm")
    if _KINDS[kind].drafts_in_parallel:
        outer["mask_token_id"] = config["mask_token_id"]
    return outer


def _block_form(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    nested, kinds = config["dflash_config"], set(config["layer_types"])
    outer = {name: nested[name] for name in _IN_BLOCKS if name in nested}
    outer["aux_hidden_state_layer_ids"] = [i + 1 for i in nested["target_layer_ids"]]
    outer["block_size"] = nested.get("block_size", config["block_size"])
    outer["sample_from_anchor"] = _KINDS[kind].may_sample_from_anchor
    # VLLM applies the negation of this field to all layers of DFlash and DFlash-2, full ones included.
    causal = "sliding_attention" in kinds and config.get("is_causal") is not False
    outer["sliding_window_non_causal"] = not causal
    if _KINDS[kind].may_sample_from_anchor:
        names = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
        outer |= {name: config[name] for name in names if name in config}
        if "sliding_attention" in kinds and not causal:
            raise UserError(
                "export: is_causal is false, which vLLM does not read in the speculators form of DSpark; use --to vllm"
            )
    elif causal and len(kinds) > 1:
        raise UserError(
            "export: layer_types has sliding and full layers; vLLM would make both causal in the speculators form; "
            "use --to vllm"
        )
    return outer
