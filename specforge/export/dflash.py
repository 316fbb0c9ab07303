"""DFlash drafts: the names of the DFlash code, which SGLang loads with or without ``model.`` in front."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from specforge.errors import UserError
from specforge.export.eagle3 import check_captured_layers
from specforge.export.format import DraftFormat
from specforge.target_files import TargetFiles


class DFlashFormat(DraftFormat):
    """DFlash checkpoints, and DFlash-2's: the embedding and the head are the target's."""

    aliases = (("model.", ""), ("encoder.fc.", "fc."), ("encoder.output_norm_enc.", "hidden_norm."))
    not_the_drafts = ("embed_tokens.weight", "lm_head.weight", "rotary_emb.inv_freq")
    server = "DFLASH"

    def check(self, config: dict[str, Any], target: TargetFiles) -> None:
        """See :meth:`DraftFormat.check`."""
        fields = config["dflash_config"]
        check_captured_layers(fields["target_layer_ids"], target)
        if config["draft_vocab_size"] != target.vocab_size:
            raise UserError(
                f"export: draft_vocab_size is {config['draft_vocab_size']}; SGLang drafts from all "
                f"{target.vocab_size} tokens of the target's head"
            )
        if config.get("qk_norm") is False:
            raise UserError(
                "export: qk_norm is off; SGLang's DFlash has the norms of Qwen3, and needs their weights"
            )

    def tensors(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the vocabulary maps where they say nothing."""
        maps = ("d2t", "t2d") if bool(state["t2d"].all()) else ()
        return {name: x for name, x in state.items() if name not in maps}
