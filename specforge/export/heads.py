"""Medusa and Hydra drafts: read and written under SpecForge's own names; SGLang has neither."""

from __future__ import annotations

from typing import Any

from specforge.errors import UserError
from specforge.export.format import DraftFormat
from specforge.target_files import TargetFiles


class HeadsFormat(DraftFormat):
    """``heads.{k}.blocks.{j}.weight`` and ``heads.{k}.lm_head.weight``."""

    def check(self, config: dict[str, Any], target: TargetFiles) -> None:
        """See :meth:`DraftFormat.check`."""
        raise UserError(
            f"export: SGLang has no heads on the last hidden state, so it cannot serve {config['architectures'][0]}; "
            "use --to hf"
        )
