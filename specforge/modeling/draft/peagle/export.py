"""P-EAGLE drafts: EAGLE-3 checkpoints with more layers and ``mask_hidden``, for vLLM; SGLang has no P-EAGLE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specforge.modeling.draft.eagle3.export import check_fields, for_vllm
from specforge.modeling.draft.eagle3.network import LlamaEagle3
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.peagle.network import PEagleDraft
from specforge.modeling.draft.servers import VLLM, Proof, SGLang

_EMBEDDING = "embed_tokens.weight"


class PEagleFormat(DraftFormat):
    """P-EAGLE checkpoints; they contain the draft's own embedding if it was trained."""

    aliases = (("model.", ""), ("midlayer.", "layers.0."))
    not_the_drafts = ("rotary_emb.inv_freq",)
    hf_embedding = True
    vllm = VLLM("eagle3", {PEagleDraft.architecture: Proof.SERVED}, check_fields, options={"parallel_drafting": True})
    sglang = SGLang("", {PEagleDraft.architecture: "has no P-EAGLE; use --to vllm"})

    def config(self, config: dict[str, Any], dtype: str) -> dict[str, Any]:
        """VLLM reads EAGLE-3's architecture with a mask token, under its own field names."""
        return {
            **super().config(config, dtype),
            "architectures": [LlamaEagle3.architecture],
            **for_vllm(config),
            "ptd_token_id": config["mask_token_id"],
        }

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """As in :class:`DraftFormat`, without an embedding that the draft does not train."""
        found = super().read(config, tensors, where)
        if not config.get("embed_requires_grad"):
            found.pop(_EMBEDDING, None)
        return found
