"""Formats of block drafters: the names of the DFlash code, which SGLang loads with or without the prefix ``model.``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft import Draft
from specforge.modeling.draft.eagle3.export import check_captured_layers
from specforge.modeling.draft.format import DTYPES, DraftFormat


class DFlashFormat(DraftFormat):
    """DFlash and DFlash-2 checkpoints; embedding and head are the target's."""

    aliases: ClassVar[tuple[tuple[str, str], ...]] = (
        ("model.", ""),
        ("encoder.fc.", "fc."),
        ("encoder.output_norm_enc.", "hidden_norm."),
        ("candidate_selector.predecessor_codebook.weight", "candidate_selector.predecessor_codebook"),
        ("candidate_selector.successor_codebook.weight", "candidate_selector.successor_codebook"),
    )
    not_the_drafts = ("embed_tokens.weight", "lm_head.weight", "rotary_emb.inv_freq")
    server = "DFLASH"

    def check(self, config: dict[str, Any], target: TargetFiles) -> None:
        """Reject drafts that SGLang cannot serve, or would serve as a different network."""
        fields = config["dflash_config"]
        check_captured_layers(fields["target_layer_ids"], target)
        if config["draft_vocab_size"] != target.vocab_size:
            raise UserError(
                f"export: draft_vocab_size is {config['draft_vocab_size']}; SGLang drafts from all "
                f"{target.vocab_size} tokens of the target's head"
            )
        if target.lm_head_bias() is not None:
            raise UserError(
                f"export: the head of {target.name} has a bias, which SGLang omits when drafting; use --to hf"
            )
        if "partial_rotary_factor" in config["rope_parameters"]:
            raise UserError("export: partial_rotary_factor is set; SGLang's DFlash rotates whole heads")
        if config.get("qk_norm") is False:
            raise UserError("export: qk_norm is off, but SGLang's DFlash requires the norms of Qwen3; use --to hf")

    def to_hf(self, draft: Draft, target: TargetFiles, folder: Path, dtype: str = "bfloat16") -> None:
        """As in :class:`DraftFormat`; with a draft vocabulary, add the target's head for its tokens.

        Without it, vLLM would leave the head at random values.

        Raises:
            UserError: as in :class:`DraftFormat`; or the head of a draft vocabulary would need a bias.
        """
        extra: dict[str, Tensor] = {}
        if not bool(draft.t2d.all()):
            if target.lm_head_bias() is not None:
                raise UserError(
                    f"export: the head of {target.name} has a bias, which is not supported with a draft vocabulary"
                )
            extra["lm_head.weight"] = target.lm_head()[draft.target_ids.cpu()].to(DTYPES[dtype])
        self._write(draft, folder, dtype, extra)

    def tensors(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, without the vocabulary maps if the draft predicts the whole vocabulary."""
        maps = ("d2t", "t2d") if bool(state["t2d"].all()) else ()
        return {name: x for name, x in state.items() if name not in maps}


class DSparkFormat(DFlashFormat):
    """DSpark checkpoints; SGLang and SpecForge both have the heads' fields at the top level of the config.

    ModelOpt writes the heads' tensors without the names of the heads.
    """

    aliases = (
        *DFlashFormat.aliases,
        *((f"{name}.", f"markov_head.{name}.") for name in ("markov_w1", "markov_w2", "gate_proj", "joint_proj")),
        ("confidence_proj.", "confidence_head.proj."),
    )
    server = "DSPARK"


class DominoFormat(DFlashFormat):
    """Domino checkpoints, which SGLang serves as DFLASH and recognises by ``projector_type``."""

    def check(self, config: dict[str, Any], target: TargetFiles) -> None:
        """As in :class:`DFlashFormat`; SGLang keeps the base logits of exactly one draft."""
        super().check(config, target)
        prefix = config["dflash_config"].get("pure_draft_prefix_len", 1)
        if prefix != 1:
            raise UserError(f"export: pure_draft_prefix_len is {prefix}, but SGLang supports only 1")

    def config(self, config: dict[str, Any], dtype: str) -> dict[str, Any]:
        """As in :class:`DraftFormat`, under DFlash's architecture, with every field that SGLang needs."""
        fields = {"shift_label": True, "pure_draft_prefix_len": 1, **config["dflash_config"]}
        return {
            **super().config(config, dtype),
            "architectures": ["DFlashDraftModel"],
            "dflash_config": {**fields, "projector_type": "domino"},
        }
