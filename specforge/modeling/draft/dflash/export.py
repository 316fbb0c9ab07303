"""Formats of block drafters: the names of the DFlash code, which SGLang loads with or without the prefix ``model.``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft import Draft
from specforge.modeling.draft.dflash.dflash2 import DFlash2
from specforge.modeling.draft.dflash.domino import Domino
from specforge.modeling.draft.dflash.dspark import DSpark
from specforge.modeling.draft.dflash.network import DFlash
from specforge.modeling.draft.format import DTYPES, DraftFormat
from specforge.modeling.draft.servers import VLLM, Proof, SGLang, check_captured_layers


def _check_fields(config: Mapping[str, Any], target: TargetFiles, server: str) -> None:
    check_captured_layers(list(config["dflash_config"]["target_layer_ids"]), target, server)
    if target.lm_head_bias() is not None:
        raise UserError(
            f"export: the head of {target.name} has a bias, which {server} omits when drafting; use --to hf"
        )
    if "partial_rotary_factor" in config["rope_parameters"]:
        raise UserError(f"export: partial_rotary_factor is set; {server}'s DFlash rotates whole heads")
    if config.get("qk_norm") is False:
        raise UserError(f"export: qk_norm is off, but {server}'s DFlash requires the norms of Qwen3; use --to hf")


def _check_for_vllm(config: Mapping[str, Any], target: TargetFiles, server: str) -> None:
    _check_fields(config, target, server)
    kind = config.get("markov_head_type", "vanilla")
    if kind != "vanilla":
        raise UserError(f"export: markov_head_type is {kind}, but {server} has only vanilla; use --to sglang")


def _check_for_sglang(config: Mapping[str, Any], target: TargetFiles, server: str) -> None:
    _check_fields(config, target, server)
    if config["draft_vocab_size"] != target.vocab_size:
        raise UserError(
            f"export: draft_vocab_size is {config['draft_vocab_size']}; {server} drafts from all {target.vocab_size} "
            "tokens of the target's head"
        )
    prefix = config["dflash_config"].get("pure_draft_prefix_len", 1)
    if prefix != 1:
        raise UserError(f"export: pure_draft_prefix_len is {prefix}, but {server} supports only 1")


class DFlashFormat(DraftFormat):
    """DFlash checkpoints; embedding and head are the target's."""

    aliases: ClassVar[tuple[tuple[str, str], ...]] = (
        ("model.", ""),
        ("encoder.fc.", "fc."),
        ("encoder.output_norm_enc.", "hidden_norm."),
        ("candidate_selector.predecessor_codebook.weight", "candidate_selector.predecessor_codebook"),
        ("candidate_selector.successor_codebook.weight", "candidate_selector.successor_codebook"),
    )
    not_the_drafts = ("embed_tokens.weight", "lm_head.weight", "rotary_emb.inv_freq")
    vllm = VLLM("dflash", {DFlash.architecture: Proof.SERVED}, _check_for_vllm)
    sglang = SGLang("DFLASH", {DFlash.architecture: Proof.SERVED}, _check_for_sglang)

    def tokens(self, draft: Draft) -> int:
        """As many as a block drafts."""
        assert isinstance(draft, DFlash)
        return draft.drafts

    def borrowed(self, draft: Draft, target: TargetFiles, dtype: str) -> dict[str, Tensor]:
        """The target's head for a draft vocabulary; without it, vLLM would leave the head at random values.

        Raises:
            UserError: the head of a draft vocabulary would need a bias.
        """
        if bool(draft.t2d.all()):
            return {}
        if target.lm_head_bias() is not None:
            raise UserError(
                f"export: the head of {target.name} has a bias, which is not supported with a draft vocabulary"
            )
        return {"lm_head.weight": target.lm_head()[draft.target_ids.cpu()].to(DTYPES[dtype])}


class DFlash2Format(DFlashFormat):
    """DFlash-2 checkpoints, which servers recognise by their architecture."""

    vllm = VLLM("dflash", {DFlash2.architecture: Proof.SERVED}, _check_for_vllm)
    sglang = SGLang("DFLASH", {DFlash2.architecture: Proof.SERVED}, _check_for_sglang)


class DSparkFormat(DFlashFormat):
    """DSpark checkpoints; SGLang and SpecForge both have the heads' fields at the top level of the config.

    ModelOpt writes the heads' tensors without the names of the heads.
    """

    aliases = (
        *DFlashFormat.aliases,
        *((f"{name}.", f"markov_head.{name}.") for name in ("markov_w1", "markov_w2", "gate_proj", "joint_proj")),
        ("confidence_proj.", "confidence_head.proj."),
    )
    vllm = VLLM("dspark", {DSpark.architecture: Proof.SERVED}, _check_for_vllm)
    sglang = SGLang("DSPARK", {DSpark.architecture: Proof.SERVED}, _check_for_sglang)


class DominoFormat(DFlashFormat):
    """Domino checkpoints, which SGLang serves as DFLASH and recognises by ``projector_type``."""

    vllm = VLLM("", {Domino.architecture: "has no Domino; it would refuse the tensors of the GRU; use --to sglang"})
    sglang = SGLang("DFLASH", {Domino.architecture: Proof.SERVED}, _check_for_sglang)

    def config(self, config: dict[str, Any], dtype: str) -> dict[str, Any]:
        """As in :class:`DraftFormat`, under DFlash's architecture, with every field that SGLang needs."""
        fields = {"shift_label": True, "pure_draft_prefix_len": 1, **config["dflash_config"]}
        return {
            **super().config(config, dtype),
            "architectures": ["DFlashDraftModel"],
            "dflash_config": {**fields, "projector_type": "domino"},
        }
