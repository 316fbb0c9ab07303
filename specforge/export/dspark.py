"""DSpark drafts: DFlash's names, and a Markov and a confidence head without ``model.`` in front."""

from __future__ import annotations

from pathlib import Path

from specforge.export.dflash import DFlashFormat


class DSparkFormat(DFlashFormat):
    """DSpark checkpoints; SGLang reads the heads' fields at the top of the config, where SpecForge has them."""

    def serve(self, target: str, folder: Path) -> str:
        """SGLang's DSPARK."""
        return (
            f"python -m sglang.launch_server --model-path {target} --speculative-algorithm DSPARK "
            f"--speculative-draft-model-path {folder}"
        )
