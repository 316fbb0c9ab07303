"""A draft for an 8B target, trained on one GPU while producers on other GPUs compute its features.

    python -m benchmarks.pools --devices cuda:1 --producers 1 2 3 --stores disk mooncake
    python -m benchmarks.pools --stores disk mooncake --engine vllm --engine_options "--engine.python .vllm/bin/python"

Runs `specforge fit` with a recipe's model at its real size: on features from `specforge capture`, in a folder of
--folder (`disk`), and on those of one or more `specforge produce`, over a store and SQLite on this host. Producers take
turns on the devices. Each runs the target, which has random weights, or starts a server of its own (`--engine`). With
`--owners`, several processes lend Mooncake's memory.

Each step is synchronised; the wait is the time from the end of a step until the next batch is on the device. Figures
are of the steps after the first ten; `vs_disk` compares the mean step with that from disk. If the wait is close to
zero, the trainer is the bottleneck. Each result is a line of JSON, and all are a table at the end. A configuration that
fails, or for which no time is left, says so, and the others go on. `--shape tiny` runs on CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.attempts import Attempts, Failed
from benchmarks.data_plane import store_of_owners
from benchmarks.large import LLAMA_8B, random_tasks
from benchmarks.producer import write_model
from benchmarks.results import ROOT
from benchmarks.several_gpus import SHAPES
from specforge.contracts import TokenCounts
from specforge.data.prompts import PromptSet
from specforge.inference.target_files import TargetFiles

WAITS = ("mean_wait_ms", "wait_ms", "p99_wait_ms", "longest_wait_ms")
COLUMNS = ("store", "producers", "owners", "mean_step_ms", "step_ms", *WAITS, "tokens_per_second", "vs_disk")


class Pools:
    """Runs with one target and one set of prompts.

    Args:
        options: of the command.
        attempts: runs the commands.
        folder: for the target, the prompts, the features and the runs.
    """

    def __init__(self, options: argparse.Namespace, attempts: Attempts, folder: Path) -> None:
        self.options, self.attempts, self.folder = options, attempts, folder
        self.recipe = folder / "recipe.yaml"
        self.target = options.target or folder / "target"
        if options.target is None:
            config = SHAPES[options.shape].target or {**LLAMA_8B, "intermediate_size": options.intermediate_size}
            write_model(config, self.target, options.devices[0])
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        files = TargetFiles.find(str(self.target))
        lengths = (16, 64) if options.shape == "tiny" else (256, 2048)
        tasks = random_tasks(files.vocab_size, int(1.2 * options.steps * options.max_tokens), *lengths)
        counts = TokenCounts(*(torch.ones(files.vocab_size, dtype=torch.int64) for _ in range(2)))
        PromptSet(tasks, "none", counts).save(folder / "prompts" / "train")

    def from_disk(self) -> dict[str, Any]:
        """Train on captured features."""
        features, options = self.folder / "features", self.options
        self._write_recipe("OfflineDataModule", {"features": str(features)})
        words = ["--recipe", self.recipe, "--target", self.target, "--prompts", self.folder / "prompts"]
        words += ["--dtype", options.dtype]
        words += ["--device", options.devices[0], "--batch_tokens", options.batch_tokens, "--output", features]
        self.attempts.specforge("capture", *words)
        try:
            return self._fit()
        finally:
            shutil.rmtree(features)

    def from_producers(self, kind: str, producers: int) -> dict[str, Any]:
        """Train with features through one kind of store."""
        options, metadata = self.options, self.folder / "metadata.db"
        data: dict[str, Any] = {
            "prompts": str(self.folder / "prompts"),
            "metadata": str(metadata),
            "max_bytes": options.max_bytes,
            "dtype": options.dtype,
            "retain": "until_trained",
            "wait_seconds": options.limit,  # a server may take minutes to start
        }
        size = options.max_bytes + max(options.max_bytes // 4, 64 << 20)
        folder = str(self.folder / "store")
        stores = nullcontext(folder) if kind == "shared_dir" else store_of_owners(size, options.owners)
        try:
            with stores as store, self._producers(store, producers):
                self._write_recipe("DisaggregatedDataModule", {**data, "store": store})
                return self._fit()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            for path in self.folder.glob("metadata.db*"):
                path.unlink()

    @contextmanager
    def _producers(self, store: str, count: int) -> Iterator[None]:
        options, logs = self.options, [self.folder / f"producer-{i}.log" for i in range(count)]
        words = ["produce", "--target", self.target, "--store", store, "--metadata", self.folder / "metadata.db"]
        words += ["--batch_tokens", options.batch_tokens, "--max_prompts", options.max_prompts]
        processes = []
        try:
            for i, log in enumerate(logs):
                device, environment = options.devices[i % len(options.devices)], dict(os.environ)
                if options.engine == "hf":
                    where = ["--device", device]
                else:  # a server of its own takes the first device that it sees
                    where = ["--engine", options.engine, "--engine.store", store, *shlex.split(options.engine_options)]
                    where += ["--engine.log", self.folder / f"server-{i}.log"]
                    environment |= {"CUDA_VISIBLE_DEVICES": device.split(":")[1]} if ":" in device else {}
                command = [sys.executable, "-m", "specforge.cli.main", *map(str, [*words, *where])]
                with log.open("w") as file:
                    process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
                processes.append(process)
            yield
            for number, process in enumerate(processes):
                if process.poll() is not None:
                    raise Failed(f"producer {number} ended: {logs[number].read_text()[-500:].strip()}")
        except Failed as error:
            tails = (log.read_text()[-300:].strip() for log in logs)
            raise Failed(" | ".join([str(error), *tails])) from error
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()

    def _write_recipe(self, datamodule: str, data: dict[str, Any]) -> None:
        """Write the recipe with this target and these data."""
        options = self.options
        recipe = yaml.safe_load((ROOT / "configs" / options.recipe).read_text())
        sizes = SHAPES[options.shape].model.get(options.recipe.split("-")[0], {})
        recipe["model"]["init_args"] |= {"target": str(self.target), **sizes}
        recipe["data"] = {"class_path": datamodule, "init_args": {**data, "max_tokens": options.max_tokens}}
        self.recipe.write_text(yaml.safe_dump(recipe))

    def _fit(self) -> dict[str, Any]:
        """Train, and return the times of the steps."""
        times = self.folder / "times.json"
        given = {
            "--config": self.recipe,
            "--trainer.fast_dev_run": self.options.steps,
            "--trainer.default_root_dir": self.folder / "run",
            "--trainer.devices": 1,
            "--trainer.strategy": "auto",
            "--trainer.enable_progress_bar": "false",
            "--trainer.callbacks+": "benchmarks.large.StepTimes",
            "--trainer.callbacks.path": times,
        }
        words = (word for pair in given.items() for word in pair)
        self.attempts.specforge("fit", *words, *SHAPES[self.options.shape].words)
        found: dict[str, Any] = json.loads(times.read_text())
        times.unlink()
        return found


def measure(options: argparse.Namespace, attempts: Attempts, folder: Path) -> None:
    """Measure every store with every number of producers."""
    pools, disk = Pools(options, attempts, folder), 0.0

    def from_producers(kind: str, producers: int) -> dict[str, Any]:
        found = pools.from_producers(kind, producers)
        return {**found, "vs_disk": found["mean_step_ms"] / disk - 1} if disk else found

    for kind in options.stores:
        if kind == "disk":
            disk = attempts.attempt({"store": kind}, pools.from_disk).get("mean_step_ms", 0.0)
            continue
        for producers in options.producers:
            name = {"store": kind, "producers": producers, "engine": options.engine, "owners": options.owners}
            attempts.attempt(name, partial(from_producers, kind, producers))


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per store and number of producers, and a table; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--recipe", default="eagle3-llama3.1-8b.yaml")
    parser.add_argument("--target", type=Path, help="a folder, instead of random weights")
    parser.add_argument(
        "--intermediate_size", type=int, default=14336, help="intermediate size of the random target; smaller is faster"
    )
    parser.add_argument("--devices", nargs="+", default=["cuda:1"], help="devices of the producers; the trainer's is 0")
    parser.add_argument("--producers", nargs="+", type=int, help="numbers of producers (default: one per device)")
    parser.add_argument("--stores", nargs="+", default=["disk", "mooncake", "shared_dir"])
    parser.add_argument("--owners", type=int, default=1, help="processes that lend Mooncake's memory")
    parser.add_argument("--engine", default="hf", choices=["hf", "vllm", "sglang"], help="what runs the target")
    parser.add_argument("--engine_options", default="", help="options of the engine, such as --engine.python PATH")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--max_tokens", type=int, help="tokens per training batch (default: 16,384; tiny: 128)")
    parser.add_argument("--batch_tokens", type=int, default=16384, help="tokens per forward pass of a producer")
    parser.add_argument("--max_prompts", type=int, default=32, help="prompts that a producer leases at a time")
    parser.add_argument("--max_bytes", type=int, help="bytes of features at a time (default: 8 GiB; tiny: 64 MiB)")
    parser.add_argument("--limit", type=float, default=520.0, help="seconds that the call may take")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    tiny = options.shape == "tiny"
    options.dtype = "float32" if tiny else "bfloat16"
    options.max_tokens = options.max_tokens or (128 if tiny else 16384)
    options.max_bytes = options.max_bytes or (64 << 20 if tiny else 8 << 30)
    options.producers = options.producers or [len(options.devices)]
    attempts = Attempts(options.limit)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        measure(options, attempts, folder)
    finally:
        shutil.rmtree(folder)
    return attempts.finish(COLUMNS, options.json)


if __name__ == "__main__":
    sys.exit(main())
