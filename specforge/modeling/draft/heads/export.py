"""Formats of Medusa drafts (vLLM's names or SpecForge's) and Hydra drafts (SpecForge's). SGLang serves neither."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.heads.network import VLLM_NAMES

_FROM_VLLM = ((r"blocks\.(\d+)\.layers\.", r"heads.\1.blocks."), (r"lm_heads\.(\d+)\.", r"heads.\1.lm_head."))
_TO_VLLM = ((r"heads\.(\d+)\.blocks\.", r"blocks.\1.layers."), (r"heads\.(\d+)\.lm_head\.", r"lm_heads.\1."))


class HeadsFormat(DraftFormat):
    """``heads.{k}.blocks.{j}.weight`` and ``heads.{k}.lm_head.weight``."""

    refusal = "SGLang does not serve Medusa or Hydra heads; use --to hf"


class MedusaFormat(HeadsFormat):
    """VLLM's names, or SpecForge's with a draft vocabulary: vLLM serves Medusa over the whole vocabulary only."""

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
        if not bool(state["t2d"].all()):
            return state
        return {_renamed(name, _TO_VLLM): x for name, x in state.items() if name not in ("d2t", "t2d")}

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """As in :class:`DraftFormat`, from either set of names."""
        return super().read(config, {_renamed(name, _FROM_VLLM): x for name, x in tensors.items()}, where)


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        name = re.sub(rf"^{old}", new, name)
    return name
