"""Runs on a Ray cluster: samples delivered by several producers, and what Ray costs per step.

    python -m benchmarks.cluster scaling
    python -m benchmarks.cluster overhead

`scaling` runs `specforge launch` with 1, 2 and 4 producers that only sleep for each prompt, with real stores (Redis
and a shared folder), and counts the samples that arrive in the trainer per second. The trainer's model is tiny, and it
trains 32 samples per step.

`overhead` trains a small EAGLE-3 draft on a small random target twice, started by hand (`specforge produce` and
`specforge fit`) and by `specforge launch`, with the same recipe, ranks and kind of stores. Both runs are started, then
one of them is stopped (SIGSTOP, with all processes of Ray) while the other trains, in turns of a few seconds, so a
machine whose speed changes is equally fast for both. Steps that a stop interrupts are not counted, and neither is the
beginning of a turn, in which the processes do what their timers ask for after a stop: Ray has many of these.

Both start a cluster of their own on this machine, with as many CPUs as the run asks for; with fewer real cores the
figures say little.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
import yaml

from benchmarks.results import specforge
from specforge.contracts import CapturePolicy, PromptTask, TokenCounts
from specforge.data.prompts import PromptSet
from specforge.inference.target_engine.base import TargetEngine, feature_widths
from tests.tiny import write_target

CLOCK = "clock.jsonl"


class Clock(pl.Callback):
    """Writes the time of each step's end on the first rank, and the number of its samples, into the run's folder."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note a step."""
        if trainer.is_global_zero:
            with (Path(trainer.default_root_dir) / CLOCK).open("a") as file:
                print(json.dumps([time.perf_counter(), len(batch.sample_ids)]), file=file)


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
            "max_steps": options.steps if options.what == "scaling" else 10**9,
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
    """End (of the clock that all processes share) and samples of each step but the first ones, of the first rank."""
    path = run / CLOCK
    lines = path.read_text().splitlines() if path.exists() else []
    return [(end, samples) for end, samples in map(json.loads, lines)][skip:]


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


class Run:
    """A training that can be stopped for a while.

    Args:
        folder: the run's.
        starts: processes whose descendants belong to it, too.
    """

    def __init__(self, folder: Path, starts: Sequence[subprocess.Popen[bytes]]) -> None:
        self.folder, self.starts = folder, starts
        self.turns: list[tuple[float, float]] = []

    def signal(self, number: int, *more: psutil.Process) -> None:
        """Send a signal to all processes, and to those in `more`."""
        roots = [psutil.Process(start.pid) for start in self.starts if start.poll() is None] + list(more)
        for process in [process for root in roots for process in (root, *root.children(recursive=True))]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def steps_ms(self, skip: int) -> list[list[float]]:
        """Milliseconds of the steps that lie within each turn."""
        ends = [end for end, _ in steps_of(self.folder, skip)]
        return [[1000 * (b - a) for a, b in pairwise(ends) if begin <= a and b <= end] for begin, end in self.turns]

    def end(self) -> None:
        """End all of it."""
        for start in self.starts:
            start.terminate()
        for start in self.starts:
            start.wait()


def start(folder: Path, kind: str, options: argparse.Namespace, address: str) -> Run:
    """Start a training by hand, or by `specforge launch` on the cluster at `address`."""
    recipe = write_recipe(folder, kind, options, options.batch, options.ranks)
    stores = {"store": folder / kind / "store", "metadata": folder / kind / "metadata.db"}
    words = [word for name, path in stores.items() for word in (f"--data.{name}", path)]
    if kind == "ray":
        cluster = ("--cluster.address", address, "--cluster.trainers.count", options.ranks)
        commands = [["launch", "--config", recipe, *words, *cluster]]
    else:
        produce = [word for name, path in stores.items() for word in (f"--{name}", path)]
        commands = [["produce", "--target", folder / "target", *produce], ["fit", "--config", recipe, *words]]
    start = [sys.executable, "-m", "specforge.cli.main"]
    return Run(folder / kind, [subprocess.Popen([*start, *map(str, words)]) for words in commands])


def overhead(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per step of both, and their ratio, turn by turn."""
    write_inputs(folder, options, options.batch * options.ranks * 8)
    own = psutil.Process()
    with ray_cluster(options.ranks + 1) as address:
        servers = own.children()  # of Ray; the processes that it starts are theirs
        runs = {kind: start(folder, kind, options, address) for kind in ("hand", "ray")}
        more = {"hand": [], "ray": servers}
        try:
            while any(len(steps_of(run.folder, options.skip)) < 1 for run in runs.values()):
                if any(process.poll() is not None for run in runs.values() for process in run.starts):
                    raise SystemExit("a run has ended; its output says why")
                time.sleep(0.2)
            for run, others in zip(runs.values(), more.values(), strict=True):
                run.signal(signal.SIGSTOP, *others)
            for turn in range(options.turns):
                for kind in sorted(runs, reverse=bool(turn % 2)):
                    runs[kind].signal(signal.SIGCONT, *more[kind])
                    time.sleep(options.settle_seconds)
                    begin = time.perf_counter()
                    time.sleep(options.turn_seconds)
                    runs[kind].turns.append((begin, time.perf_counter()))
                    runs[kind].signal(signal.SIGSTOP, *more[kind])
        finally:
            for kind, run in runs.items():
                run.signal(signal.SIGCONT, *more[kind])
            for run in runs.values():
                run.end()
    found = {kind: run.steps_ms(options.skip) for kind, run in runs.items()}
    turns = [(hand, ray) for hand, ray in zip(found["hand"], found["ray"], strict=True) if hand and ray]
    ratios = [statistics.mean(ray) / statistics.mean(hand) for hand, ray in turns]
    return {
        "ms per step": {kind: statistics.median(ms for turn in each for ms in turn) for kind, each in found.items()},
        "steps": {kind: sum(map(len, each)) for kind, each in found.items()},
        "turns": len(ratios),
        "ratio, median": statistics.median(ratios),
        "ratio, mean": statistics.mean(ratios),
        "its standard error": statistics.stdev(ratios) / math.sqrt(len(ratios)),
    }


def main() -> None:
    """Measure, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scaling", "overhead"])
    parser.add_argument("--producers", type=int, nargs="+", default=[1, 2, 4], help="numbers of producers (scaling)")
    parser.add_argument("--seconds", type=float, default=0.05, help="seconds that a prompt takes (scaling)")
    parser.add_argument("--ranks", type=int, default=1, help="number of trainers (overhead)")
    parser.add_argument("--batch", type=int, default=4, help="samples of a rank's step (overhead)")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run (scaling)")
    parser.add_argument("--turns", type=int, default=40, help="turns of each run (overhead)")
    parser.add_argument("--turn_seconds", type=float, default=4.0, help="what is counted of a turn (overhead)")
    parser.add_argument("--settle_seconds", type=float, default=2.0, help="what is not counted of a turn (overhead)")
    parser.add_argument("--skip", type=int, default=10, help="first steps, which are not counted")
    parser.add_argument("--tokens", type=int, help="tokens of a prompt")
    parser.add_argument("--hidden", type=int, help="hidden size of target and draft")
    parser.add_argument("--vocabulary", type=int, help="vocabulary of the target")
    parser.add_argument("--unroll", type=int, help="drafted positions that a step trains")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each number of producers (scaling)")
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
