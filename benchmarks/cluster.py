"""Runs on a Ray cluster: samples delivered by several producers, and what Ray costs per step.

    python -m benchmarks.cluster scaling
    python -m benchmarks.cluster overhead

`scaling` runs `specforge launch` with 1, 2 and 4 producers that only sleep for each prompt, with real stores (Redis
and a shared folder), and counts the samples that arrive in the trainer per second. The trainer's model is tiny, and it
trains 32 samples per step. `overhead` trains a small EAGLE-3 draft on a small random target, in turn started by hand
(`specforge produce` and `specforge fit`) and by `specforge launch`, with the same recipe, stores and ranks, and
compares the median step times. Both start a cluster of their own on this machine, with as many CPUs as the run asks
for; with fewer real cores the figures say little.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

from benchmarks.results import specforge
from specforge.contracts import CapturePolicy, PromptTask, TokenCounts
from specforge.data.prompts import PromptSet
from specforge.inference.target_engine.base import TargetEngine, feature_widths
from tests.tiny import write_target

CLOCK = "clock.json"


class Clock(pl.Callback):
    """Writes the time of each step's end on the first rank, and the number of its samples, into the run's folder."""

    def __init__(self) -> None:
        self._steps: list[tuple[float, int]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note a step."""
        self._steps.append((time.perf_counter(), len(batch.sample_ids)))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write."""
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / CLOCK).write_text(json.dumps(self._steps))


class SleepingEngine(TargetEngine):
    """An engine that sleeps instead of computing; its features are zeros.

    Args:
        target: files of the target.
        dtype: dtype of the features.
        seconds: how long a prompt takes.
    """

    def __init__(self, target: Any, dtype: str, seconds: float = 0.05) -> None:
        super().__init__(target, dtype)
        self.seconds = seconds

    def check(self, policy: CapturePolicy) -> None:
        """Accept every policy."""

    def capture(self, input_ids: Sequence[Sequence[int]], policy: CapturePolicy) -> list[dict[str, torch.Tensor]]:
        """Sleep for each prompt."""
        time.sleep(self.seconds * len(input_ids))
        widths = feature_widths(policy, self.target.hidden_size)
        dtype = getattr(torch, self.dtype)
        return [
            {name: torch.zeros(len(ids), width, dtype=dtype) for name, width in widths.items()} for ids in input_ids
        ]


@contextmanager
def ray_cluster(cpus: int) -> Iterator[str]:
    """A Ray cluster of one node on this machine; yields its address."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    try:
        yield str(cluster.address)
    finally:
        cluster.shutdown()


def write_inputs(folder: Path, options: argparse.Namespace, samples: int) -> None:
    """A random target, and random prompts, the second half of each supervised."""
    write_target(folder / "target", layers=8, hidden=options.hidden, vocab_size=options.vocabulary)
    rng = random.Random(0)
    mask = tuple(int(i >= options.tokens // 2) for i in range(options.tokens))
    tasks = [
        PromptTask(f"{i:032x}", tuple(rng.randrange(256) for _ in range(options.tokens)), mask) for i in range(samples)
    ]
    counts = TokenCounts(*(torch.ones(options.vocabulary, dtype=torch.int64) for _ in range(2)))
    PromptSet(tasks, "none", counts).save(folder / "prompts" / "train")


def write_recipe(folder: Path, run: str, options: argparse.Namespace, batch: int, ranks: int) -> Path:
    """A recipe of a disaggregated run; the metadata are in a file unless ``launch`` is to start Redis."""
    recipe = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "devices": ranks,
            "strategy": "ddp" if ranks > 1 else "auto",
            "max_steps": options.steps,
            "default_root_dir": str(folder / run),
            "enable_progress_bar": False,
            "log_every_n_steps": 10,
            "limit_val_batches": 0,
            "precision": "32-true",
            "callbacks": [{"class_path": "benchmarks.cluster.Clock"}],
        },
        "model": {
            "class_path": "Eagle3Module",
            "init_args": {
                "target": str(folder / "target"),
                "steps": options.unroll,
                "draft_config": {"draft_vocab_size": min(options.vocabulary, 4096)},
            },
        },
        "data": {
            "class_path": "DisaggregatedDataModule",
            "init_args": {
                "prompts": str(folder / "prompts"),
                "dtype": "float32",
                "batch_size": batch,
                "max_samples": 6 * batch * ranks,
                "retain": "until_trained",
            },
        },
    }
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def steps_of(run: Path, skip: int) -> list[tuple[float, int]]:
    """End and samples of each step but the first ones, of the first rank."""
    return [(end, samples) for end, samples in json.loads((run / CLOCK).read_text())][skip:]


def delivered(folder: Path, producers: int, options: argparse.Namespace) -> float:
    """Samples per second that arrive from so many producers."""
    run = f"run-{producers}-{time.monotonic_ns()}"
    engine = {"class_path": "benchmarks.cluster.SleepingEngine", "init_args": {"seconds": options.seconds}}
    with ray_cluster(producers + 1) as address:
        specforge(
            "launch",
            "--config",
            write_recipe(folder, run, options, 32, 1),
            "--cluster.address",
            address,
            "--cluster.producers.count",
            producers,
            "--cluster.producers.engine",
            json.dumps(engine),
        )
    steps = steps_of(folder / run, options.skip)
    return sum(samples for _, samples in steps[1:]) / (steps[-1][0] - steps[0][0])


def scaling(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Samples per second by number of producers; the counts take turns."""
    write_inputs(folder, options, 32 * (options.steps + 1))
    found: dict[int, list[float]] = {count: [] for count in options.producers}
    for _ in range(options.repeats):
        for count, rates in found.items():
            rates.append(delivered(folder, count, options))
            print(f"{count} producers: {rates[-1]:.1f} samples/s", flush=True)
    medians = {count: statistics.median(rates) for count, rates in found.items()}
    first = min(medians)
    return {
        str(count): {
            "samples a second": rate,
            "speed-up per producer": rate / medians[first] * first / count,
            "of what they can produce": rate * options.seconds / count,
        }
        for count, rate in medians.items()
    }


def step_ms(folder: Path, kind: str, options: argparse.Namespace) -> float:
    """Median step time of a run that is started by hand or by Ray."""
    run = f"{kind}-{time.monotonic_ns()}"
    recipe = write_recipe(folder, run, options, options.batch, options.ranks)
    stores = {"store": folder / run / "store", "metadata": folder / run / "metadata.db"}
    words = [word for name, path in stores.items() for word in (f"--data.{name}", path)]
    if kind == "ray":
        with ray_cluster(options.ranks + 1) as address:
            specforge(
                "launch",
                "--config",
                recipe,
                *words,
                "--cluster.address",
                address,
                "--cluster.trainers.count",
                options.ranks,
            )
    else:
        command = [sys.executable, "-m", "specforge.cli.main", "produce", "--target", folder / "target"]
        command += [word for name, path in stores.items() for word in (f"--{name}", path)]
        producer = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
        try:
            specforge("fit", "--config", recipe, *words)
        finally:
            producer.terminate()
            producer.wait()
    ends = [end for end, _ in steps_of(folder / run, options.skip)]
    return 1000 * statistics.median(b - a for a, b in pairwise(ends))


def overhead(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per step of both, in turn, and the median of their ratios."""
    write_inputs(folder, options, options.batch * options.ranks * (options.steps + 1))
    found: dict[str, list[float]] = {"by hand": [], "ray": []}
    for turn in range(options.repeats):
        for kind in sorted(found, reverse=bool(turn % 2)):
            found[kind].append(step_ms(folder, kind.replace(" ", "-"), options))
            print(f"{kind}: {found[kind][-1]:.1f} ms per step", flush=True)
    ratios = [ray / hand for hand, ray in zip(found["by hand"], found["ray"], strict=True)]
    return {
        "ms per step": {kind: statistics.median(values) for kind, values in found.items()},
        "ratios": ratios,
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    """Measure, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scaling", "overhead"])
    parser.add_argument("--producers", type=int, nargs="+", default=[1, 2, 4], help="numbers of producers (scaling)")
    parser.add_argument("--seconds", type=float, default=0.05, help="seconds that a prompt takes (scaling)")
    parser.add_argument("--ranks", type=int, default=1, help="number of trainers (overhead)")
    parser.add_argument("--batch", type=int, default=4, help="samples of a rank's step (overhead)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--skip", type=int, default=10, help="first steps, which are not counted")
    parser.add_argument("--tokens", type=int, help="tokens of a prompt")
    parser.add_argument("--hidden", type=int, help="hidden size of target and draft")
    parser.add_argument("--vocabulary", type=int, help="vocabulary of the target")
    parser.add_argument("--unroll", type=int, help="drafted positions that a step trains")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    shapes = {
        "scaling": {"tokens": 32, "hidden": 32, "vocabulary": 264, "unroll": 1},
        "overhead": {"tokens": 256, "hidden": 256, "vocabulary": 4096, "unroll": 7},
    }
    parser.set_defaults(**shapes[parser.parse_known_args()[0].what])
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # Ray sets it for workers, so runs by hand get it too
    with tempfile.TemporaryDirectory() as folder:
        result = {"scaling": scaling, "overhead": overhead}[options.what](Path(folder), options)
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
