"""Domino drafts: DFlash's names and architecture, a GRU and its projections, told apart by ``projector_type``."""

from __future__ import annotations

from typing import Any

from specforge.errors import UserError
from specforge.export.dflash import DFlashFormat
from specforge.target_files import TargetFiles


class DominoFormat(DFlashFormat):
    """Domino checkpoints, which SGLang serves as DFLASH."""

    def check(self, config: dict[str, Any], target: TargetFiles) -> None:
        """See :meth:`DraftFormat.check`."""
        super().check(config, target)
        prefix = config["dflash_config"].get("pure_draft_prefix_len", 1)
        if prefix != 1:
            raise UserError(f"export: pure_draft_prefix_len is {prefix}; SGLang corrects all drafts but one")

    def config(self, config: dict[str, Any], dtype: str) -> dict[str, Any]:
        """As everywhere, under DFlash's architecture, with every field that SGLang needs."""
        fields = {"shift_label": True, "pure_draft_prefix_len": 1, **config["dflash_config"]}
        return {
            **super().config(config, dtype),
            "architectures": ["DFlashDraftModel"],
            "dflash_config": {**fields, "projector_type": "domino"},
        }
