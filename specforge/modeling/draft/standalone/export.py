"""The format of stand-alone drafts: the folder of a transformers causal LM, which every server loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft import Draft
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.servers import VLLM, Proof, SGLang
from specforge.modeling.draft.standalone.network import StandaloneDraft

_FORM = "any causal language model"


def _check_vocabulary(config: Mapping[str, Any], target: TargetFiles, server: str) -> None:
    if config["vocab_size"] != target.vocab_size:
        raise UserError(f"export: the draft has {config['vocab_size']} tokens, {target.name} has {target.vocab_size}")


class StandaloneFormat(DraftFormat):
    """Names without the prefix ``model.``, without a tied head and vocabulary maps."""

    vllm = VLLM("draft_model", {_FORM: Proof.SERVED}, _check_vocabulary)
    sglang = SGLang("STANDALONE", {_FORM: Proof.SERVED}, _check_vocabulary, chain=True)

    def form(self, config: Mapping[str, Any], target: TargetFiles) -> str:
        """Every model has the same."""
        return _FORM

    def build(self, config: Mapping[str, Any], where: str = "draft config") -> Draft:
        """The randomly initialised model of a ``config.json``."""
        return StandaloneDraft(config, where)

    def config(self, config: dict[str, Any], dtype: str) -> dict[str, Any]:
        """As in :class:`DraftFormat`."""
        size = config.get("draft_vocab_size") or config["vocab_size"]
        if size != config["vocab_size"]:
            raise UserError(
                f"export: draft_vocab_size is {size} of {config['vocab_size']} tokens; a stand-alone draft is "
                "served with the whole vocabulary, so train it without draft_vocab_size"
            )
        return super().config({k: v for k, v in config.items() if k != "draft_vocab_size"}, dtype)

    def tensors(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors under its own names."""
        return {n.removeprefix("model."): x for n, x in state.items() if n not in ("d2t", "t2d")}

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """As in :class:`DraftFormat`, without tensors that the model derives from others."""
        tied = config.get("tie_word_embeddings")
        named = {
            f"model.{name}": x
            for name, x in tensors.items()
            if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
        }
        return super().read(config, named, where)
