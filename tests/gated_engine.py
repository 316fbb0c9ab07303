"""An engine that waits, so that a test can starve trainers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_files import TargetFiles


class GatedEngine(HFTargetEngine):
    """Reads prompts once there is the file ``gate``."""

    def __init__(self, target: TargetFiles, dtype: str = "bfloat16", gate: str = "") -> None:
        super().__init__(target, dtype)
        self.gate = Path(gate)

    def capture(self, *args: Any) -> Any:
        while not self.gate.exists():
            time.sleep(0.02)
        return super().capture(*args)
