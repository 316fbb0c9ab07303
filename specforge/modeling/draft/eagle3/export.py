"""The format of EAGLE-3 drafts: SpecForge keeps the names of the EAGLE-3 code (``midlayer.*``), for SGLang and vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft.eagle3.network import QWEN3, DeepseekEagle3, LlamaEagle3
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.servers import VLLM, Proof, SGLang, check_captured_layers

_LLAMA, _LATENT = LlamaEagle3.architecture, DeepseekEagle3.architecture


def check_fields(config: Mapping[str, Any], target: TargetFiles, server: str) -> None:
    """Reject layers that the server cannot capture, and norms that its drafts lack.

    Raises:
        UserError: names the field.
    """
    eagle = config.get("eagle_config") or {}
    check_captured_layers(captured_layers(config), target, server)
    if config["architectures"][0] == _LATENT and (eagle.get("norm_before_fc") or config.get("norm_before_fc")):
        raise UserError(
            f"export: norm_before_fc is set; {server}'s draft with latent attention would skip the norm silently"
        )


def _check_for_sglang(config: Mapping[str, Any], target: TargetFiles, server: str) -> None:
    check_fields(config, target, server)
    for name in ("norm_before_residual", "attention_bias", "qk_norm"):
        if config.get(name):
            raise UserError(f"export: {name} is set, which {server}'s draft does not support; use --to vllm")
    width = config.get("target_hidden_size", config["hidden_size"]) * len(captured_layers(config))
    if width == config["hidden_size"]:
        raise UserError(
            f"export: the captured features are as wide as the draft's states, so {server} would skip fc; train on "
            "more layers (model.layer_ids)"
        )
    if config.get("draft_vocab_size") is None:
        raise UserError("export: the draft config has no draft_vocab_size; the server would use the target's lm_head")
    if config.get("tie_word_embeddings"):
        raise UserError("export: tie_word_embeddings is set; the server would use the embedding as lm_head")


class Eagle3Format(DraftFormat):
    """EAGLE-3 checkpoints; others write ``layers.0.*``, a ``model.`` prefix, or SGLang's older ``aux_norm_*``."""

    aliases = (
        ("model.", ""),
        ("layers.0.", "midlayer."),
        ("aux_norm_low.", "fc_norm.0."),
        ("aux_norm_mid.", "fc_norm.1."),
        ("aux_norm_high.", "fc_norm.2."),
    )
    not_the_drafts = ("embed_tokens.weight", "rotary_emb.inv_freq", "midlayer.self_attn.rotary_emb.inv_freq")
    hf_embedding = True
    vllm = VLLM("eagle3", {_LLAMA: Proof.SERVED, _LATENT: Proof.SERVED}, check_fields)
    sglang = SGLang("EAGLE3", {_LLAMA: Proof.SERVED, _LATENT: Proof.SERVED}, _check_for_sglang, chain=True)

    def config(self, config: dict[str, Any], dtype: str) -> dict[str, Any]:
        """As in :class:`DraftFormat`, with the fields of :func:`for_vllm`.

        VLLM takes every draft of the type ``deepseek_v3`` for an MTP module; ``deepseek_v2`` has the same fields.
        """
        kind = {"model_type": "deepseek_v2"} if config["architectures"][0] == _LATENT else {}
        return {**super().config(config, dtype), **for_vllm(config), **kind}


def captured_layers(config: Mapping[str, Any]) -> list[int]:
    """The layers of the target that an EAGLE draft reads.

    Raises:
        UserError: the config does not name them.
    """
    layers = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if not layers:
        raise UserError(
            "export: the draft config has no eagle_config.eagle_aux_hidden_state_layer_ids; "
            "the server would silently capture its default layers"
        )
    return list(layers)


def for_vllm(config: dict[str, Any]) -> dict[str, Any]:
    """Fields that vLLM reads in the configs of EAGLE drafts.

    It counts captured layers by their inputs, so its ids are one higher than SGLang's. Its top-level field takes
    precedence over ``eagle_config``, so one folder serves both. In some forms, a missing ``norm_before_residual`` means
    true to vLLM. Drafts with Qwen3's attention have a class of their own there.
    """
    qwen3 = {"architectures": [QWEN3], "model_type": "qwen3"} if config.get("qk_norm") else {}
    return {
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in captured_layers(config)],
        "norm_before_residual": bool(config.get("norm_before_residual")),
        **qwen3,
    }
