"""Formats of Medusa drafts (vLLM's names or SpecForge's) and Hydra drafts (SpecForge's); SGLang has neither."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft import Draft
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.heads.network import VLLM_NAMES, HeadsDraft, HydraDraft, MedusaDraft
from specforge.modeling.draft.servers import VLLM, Proof, SGLang

_MEDUSA, _HYDRA = MedusaDraft.architecture, HydraDraft.architecture

_FROM_VLLM = ((r"blocks\.(\d+)\.layers\.", r"heads.\1.blocks."), (r"lm_heads\.(\d+)\.", r"heads.\1.lm_head."))
_TO_VLLM = ((r"heads\.(\d+)\.blocks\.", r"blocks.\1.layers."), (r"heads\.(\d+)\.lm_head\.", r"lm_heads.\1."))


class HeadsFormat(DraftFormat):
    """``heads.{k}.blocks.{j}.weight`` and ``heads.{k}.lm_head.weight``; no server has Hydra."""

    vllm: ClassVar[VLLM | None] = VLLM(
        "", {_HYDRA: "has no Hydra, and a proposer of one's own does not see the hidden states there; use --to hf"}
    )
    sglang: ClassVar[SGLang | None] = SGLang("", {_HYDRA: "has no Hydra; use --to hf"})

    def tokens(self, draft: Draft) -> int:
        """One per head."""
        assert isinstance(draft, HeadsDraft)
        return len(draft.heads)


def _check_vocabulary(config: Mapping[str, Any], target: TargetFiles, server: str) -> None:
    if config["draft_vocab_size"] != config["vocab_size"]:
        raise UserError(
            f"export: draft_vocab_size is {config['draft_vocab_size']}; {server} serves Medusa over the whole "
            f"vocabulary only: train with model.draft_config.draft_vocab_size {config['vocab_size']}"
        )


class MedusaFormat(HeadsFormat):
    """VLLM's names, or SpecForge's with a draft vocabulary: vLLM serves Medusa over the whole vocabulary only."""

    vllm = VLLM("medusa", {_MEDUSA: Proof.SERVED}, _check_vocabulary)
    sglang = SGLang("", {_MEDUSA: "has no Medusa; use --to vllm"})

    def config(self, config: dict[str, Any], dtype: str) -> dict[str, Any]:
        """As in :class:`DraftFormat`, with vLLM's names of the fields where it can serve the draft."""
        written = super().config(config, dtype)
        if config["draft_vocab_size"] != config["vocab_size"]:
            return written
        numbers = {theirs: written.pop(mine, 1) for theirs, mine in VLLM_NAMES.items()}
        del written["draft_vocab_size"]
        return {**written, **numbers, "architectures": ["MedusaModel"], "model_type": "medusa", "medusa_fc_bias": False}

    def tensors(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The draft's tensors, under vLLM's names where it can serve the draft."""
        written = super().tensors(state)
        return written if "d2t" in written else {_renamed(name, _TO_VLLM): x for name, x in written.items()}

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """As in :class:`DraftFormat`, from either set of names."""
        return super().read(config, {_renamed(name, _FROM_VLLM): x for name, x in tensors.items()}, where)


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        name = re.sub(rf"^{old}", new, name)
    return name
