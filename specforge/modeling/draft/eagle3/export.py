"""The format of EAGLE-3 drafts: SpecForge keeps the names of the EAGLE-3 code (``midlayer.*``), for SGLang and vLLM."""

from __future__ import annotations

from typing import Any

from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft.format import DraftFormat


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
    server, chain = "EAGLE3", 4

    def config(self, config: dict[str, Any], dtype: str) -> dict[str, Any]:
        """As in :class:`DraftFormat`, with the fields of :func:`for_vllm`."""
        return {**super().config(config, dtype), **for_vllm(config)}

    def check(self, config: dict[str, Any], target: TargetFiles) -> None:
        """Reject drafts that SGLang cannot serve, or would serve as a different network."""
        eagle = config.get("eagle_config") or {}
        layers = eagle.get("eagle_aux_hidden_state_layer_ids")
        if not layers:
            raise UserError(
                "export: the draft config has no eagle_config.eagle_aux_hidden_state_layer_ids; "
                "the server would silently capture its default layers"
            )
        check_captured_layers(layers, target)
        for name in ("norm_before_residual", "attention_bias"):
            if config.get(name):
                raise UserError(f"export: {name} is set, which SGLang's draft does not support; use --to hf (vLLM)")
        if config["architectures"][0] == "Eagle3DeepseekV2ForCausalLM" and (
            eagle.get("norm_before_fc") or config.get("norm_before_fc")
        ):
            raise UserError(
                "export: norm_before_fc is set; SGLang's draft with latent attention would skip the norm silently"
            )
        width = config.get("target_hidden_size", config["hidden_size"]) * len(layers)
        if width == config["hidden_size"]:
            raise UserError(
                "export: the captured features are as wide as the draft's states, so SGLang would skip fc; train on "
                "more layers (model.layer_ids)"
            )
        if config.get("draft_vocab_size") is None:
            raise UserError(
                "export: the draft config has no draft_vocab_size; the server would use the target's lm_head"
            )
        if config.get("tie_word_embeddings"):
            raise UserError("export: tie_word_embeddings is set; the server would use the embedding as lm_head")


def for_vllm(config: dict[str, Any]) -> dict[str, Any]:
    """Fields that vLLM reads in the configs of EAGLE drafts.

    It counts captured layers by their inputs, so its ids are one higher than SGLang's. Its top-level field takes
    precedence over ``eagle_config``, so one folder serves both. In some forms, a missing ``norm_before_residual`` means
    true to vLLM.
    """
    layers = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    return {
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in layers],
        "norm_before_residual": bool(config.get("norm_before_residual")),
    }


def check_captured_layers(layers: list[int], target: TargetFiles) -> None:
    """Reject the target's last layer: SGLang captures the *input* of the layer above."""
    if max(layers) >= target.num_layers - 1:
        raise UserError(
            f"export: layer {max(layers)} is the last of {target.name}; SGLang captures the input of the layer "
            "above, so it cannot serve this draft"
        )
