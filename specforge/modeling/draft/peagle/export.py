"""P-EAGLE drafts: EAGLE-3 checkpoints with more layers and ``mask_hidden``, for vLLM; SGLang has no P-EAGLE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft import Draft
from specforge.modeling.draft.eagle3.export import for_vllm
from specforge.modeling.draft.eagle3.network import LlamaEagle3
from specforge.modeling.draft.format import DTYPES, DraftFormat

_EMBEDDING = "embed_tokens.weight"


class PEagleFormat(DraftFormat):
    """P-EAGLE checkpoints; they contain the draft's own embedding if it was trained, else the target's."""

    aliases = (("model.", ""), ("midlayer.", "layers.0."))
    not_the_drafts = ("rotary_emb.inv_freq",)
    refusal = "SGLang does not serve P-EAGLE; use --to hf, which vLLM loads"

    def config(self, config: dict[str, Any], dtype: str) -> dict[str, Any]:
        """VLLM reads EAGLE-3's architecture with a mask token, under its own field names."""
        return {
            **super().config(config, dtype),
            **for_vllm(config),
            "architectures": [LlamaEagle3.architecture],
            "ptd_token_id": config["mask_token_id"],
        }

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """As in :class:`DraftFormat`, without an embedding that the draft does not train."""
        found = super().read(config, tensors, where)
        if not config.get("embed_requires_grad"):
            found.pop(_EMBEDDING, None)
        return found

    def to_hf(self, draft: Draft, target: TargetFiles, folder: Path, dtype: str = "bfloat16") -> None:
        """As in :class:`DraftFormat`, with the draft's own embedding if it has one."""
        own = _EMBEDDING in draft.state_dict()
        self._write(draft, folder, dtype, {} if own else {_EMBEDDING: target.embedding().to(DTYPES[dtype])})
