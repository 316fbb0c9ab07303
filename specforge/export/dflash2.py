"""DFlash-2 drafts: DFlash's names, with the convolutions and the selector of the published checkpoints."""

from __future__ import annotations

from specforge.export.dflash import DFlashFormat


class DFlash2Format(DFlashFormat):
    """DFlash-2 checkpoints, which SGLang serves as DFLASH; their fields are in ``dflash_config``."""
