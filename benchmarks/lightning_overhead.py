"""Overhead of Lightning and our callbacks per training step: `trainer.fit` against a bare loop over the same batches.

    python -m benchmarks.lightning_overhead

Measures the CPU time of whole runs of the `tiny` step with its optimizer, in turn. The difference between runs of two
lengths excludes start-up and shutdown. Results are medians over the repetitions.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator

import lightning.pytorch as pl
import torch

from benchmarks.train_step import SHAPES, make_batch, make_module
from lightning_modules.base import DraftModule
from lightning_modules.optimizers import build_optimizer
from specforge.callbacks.checkpoint import AtomicCheckpointIO, LastCheckpoint
from specforge.callbacks.metrics import TrainingMetrics
from specforge.callbacks.preemption import Preemption
from specforge.callbacks.resume import ExactResume
from specforge.contracts import Sample, TrainBatch
from specforge.runtime.data_plane.loader import RunLength
from specforge.system import keep_freed_memory


class Replay(pl.LightningDataModule):
    """A loader that repeats one batch, with the interface of a feature loader."""

    def __init__(self, batch: TrainBatch, count: int) -> None:
        super().__init__()
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[TrainBatch]:
        yield from [self.batch] * self.count

    def start(self, step: int, length: RunLength) -> None:
        """Do nothing."""

    def acknowledge(self, batch: TrainBatch, step: int) -> None:
        """Do nothing."""

    def durable(self, step: int) -> None:
        """Do nothing."""

    def check(self) -> None:
        """Do nothing."""

    def flow(self) -> dict[str, float]:
        """Return no figures."""
        return {}

    def train_dataloader(self) -> Replay:
        """Return this loader."""
        return self

    def sample_refs(self) -> list[Sample]:
        """Return None."""
        return []

    def token_counts(self) -> None:
        """Return None."""

    def batches_per_epoch(self) -> int:
        """Number of batches."""
        return self.count


def bare(module: DraftModule, batch: TrainBatch, steps: int) -> None:
    """Train in a minimal loop."""
    head = module.target_head(torch.device("cpu"))
    optimizer, schedule = build_optimizer(module.optimizer_options, module.draft, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        output = module.training_loss(batch, head)
        output.loss.backward()
        grads = [p.grad for p in module.draft.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, 1.0 / output.num_supervised)
        torch.nn.utils.clip_grad_norm_(module.draft.parameters(), 0.5)
        optimizer.step()
        schedule.step()


def fit(module: DraftModule, batch: TrainBatch, steps: int) -> None:
    """Train as `specforge fit` does, without the command line."""
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            gradient_clip_val=0.5,
            log_every_n_steps=10,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            plugins=[AtomicCheckpointIO()],
            callbacks=[ExactResume(), TrainingMetrics(), Preemption(), LastCheckpoint(10**6)],
        ).fit(module, datamodule=Replay(batch, steps))


def cpu_seconds(run, steps: int) -> float:
    """CPU time of one run on a fresh module."""
    module, batch = make_module("eagle3", SHAPES["tiny"]), make_batch(SHAPES["tiny"])
    start = time.process_time()
    run(module, batch, steps)
    return time.process_time() - start


def main() -> None:
    """Measure both sides in turn and print the results."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    keep_freed_memory()
    short, long = 2, 22
    found: dict[str, list[float]] = {"bare": [], "fit": []}
    for _ in range(4):
        for name, run in (("bare", bare), ("fit", fit)):
            found[name].append((cpu_seconds(run, long) - cpu_seconds(run, short)) / (long - short))
    step = {name: statistics.median(values[1:]) for name, values in found.items()}
    print(f"bare {step['bare']:.4f} CPU-s per step, fit {step['fit']:.4f}: {step['fit'] / step['bare'] - 1:+.1%}")


if __name__ == "__main__":
    main()
