"""A Lightning callback at which all ranks of a run wait, so that a test can do something at a known step."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Gate(pl.Callback):
    """Before a step, each rank writes who it is into ``folder`` and waits for the file ``open`` there."""

    def __init__(self, folder: str, step: int) -> None:
        self.folder, self.step = Path(folder), step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step != self.step or (self.folder / "open").exists():
            return
        import ray

        me = {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}
        part = self.folder / f".{trainer.global_rank}"
        part.write_text(json.dumps(me))
        part.rename(self.folder / f"rank-{trainer.global_rank}")
        while not (self.folder / "open").exists():
            time.sleep(0.02)


def wait_at_gate(folder: Path, ranks: int, alive: Any) -> list[dict[str, Any]]:
    """Wait until all ranks are at the gate; who they are, by rank.

    Raises:
        AssertionError: ``alive`` returned False before.
    """
    paths = [folder / f"rank-{rank}" for rank in range(ranks)]
    while not all(path.exists() for path in paths):
        assert alive()
        time.sleep(0.02)
    return [json.loads(path.read_text()) for path in paths]
