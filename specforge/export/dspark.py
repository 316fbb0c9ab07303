"""DSpark drafts: DFlash's names, and a Markov and a confidence head without ``model.`` in front."""

from __future__ import annotations

from specforge.export.dflash import DFlashFormat


class DSparkFormat(DFlashFormat):
    """DSpark checkpoints; SGLang reads the heads' fields at the top of the config, where SpecForge has them."""

    server = "DSPARK"
