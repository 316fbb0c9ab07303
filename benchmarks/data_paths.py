"""Time of a training step: features from disk, from the target in the same process, or from a producer.

    python -m benchmarks.data_paths

Runs the quickstart's recipe with a longer unroll, so that one producer on one core keeps up with the trainer on
another. Needs the target, prompts and features of the quickstart. Results are median wall times per step of whole runs;
the variants take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks.results import CLOCK, ROOT, specforge
from specforge.data.prompts import PromptSet
from specforge.runtime.data_plane.feature_folder import FeatureFolder


def config(path: str, folder: Path, options: argparse.Namespace) -> Path:
    """The recipe of one variant."""
    content = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    content["trainer"] |= {
        "max_steps": options.steps,
        "limit_val_batches": 0,
        "default_root_dir": str(folder),
        "devices": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
    }
    content["model"]["init_args"] |= {"steps": options.unroll, "target": str(options.target)}
    prompts = write_prompts(options.quickstart, folder / "prompts")
    content["data"] = {
        "offline": {
            "class_path": "OfflineDataModule",
            "init_args": {"batch_size": 4, "features": str(options.quickstart / "features")},
        },
        "online": {"class_path": "OnlineDataModule", "init_args": {"batch_size": 4, "prompts": prompts}},
        "disaggregated": {
            "class_path": "DisaggregatedDataModule",
            "init_args": {"batch_size": 4, "prompts": prompts, **addresses(folder)},
        },
    }[path]
    written = folder / "recipe.yaml"
    written.write_text(yaml.safe_dump(content))
    return written


def write_prompts(quickstart: Path, folder: Path) -> str:
    """Write only the prompts of the captured features, so that all variants train on the same samples."""
    captured = {ref.source for ref in FeatureFolder.open(quickstart / "features" / "train").refs}
    found = PromptSet.load(quickstart / "prompts" / "train")
    tasks = [task for task in found.tasks if task.source in captured]
    PromptSet(tasks, found.tokenizer, found.counts).save(folder / "train")
    return str(folder)


def addresses(folder: Path) -> dict[str, str]:
    """Addresses of the stores of a disaggregated run."""
    return {"store": str(folder / "store"), "metadata": str(folder / "metadata.db")}


def seconds_per_step(path: str, options: argparse.Namespace) -> float:
    """Wall time per step of a separate run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [word for key, value in addresses(folder).items() for word in (f"--{key}", value)]
        producer = None
        if path == "disaggregated":
            command = [sys.executable, "-m", "specforge.cli.main", "produce", "--target", options.target, *words]
            producer = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
        try:
            specforge(
                "fit",
                "--config",
                config(path, folder, options),
                "--trainer.callbacks+=benchmarks.results.StepClock",
                "--trainer.callbacks.skip",
                options.skip,
            )
            return float(json.loads((folder / CLOCK).read_text())["seconds_per_step"])
        finally:
            if producer is not None:
                producer.terminate()
                producer.wait()


def main() -> None:
    """Measure the variants in turn and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--skip", type=int, default=10, help="number of first steps to skip, which fill the prefetch queue"
    )
    parser.add_argument("--unroll", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, list[float]] = {"offline": [], "online": [], "disaggregated": []}
    for _ in range(options.repeats):
        for path, values in found.items():
            values.append(seconds_per_step(path, options))
    base = statistics.median(found["offline"])
    for path, values in found.items():
        step = statistics.median(values)
        runs = ", ".join(f"{x:.3f}" for x in values)
        print(f"{path:14} {step:.3f} s per step ({runs}), {step / base - 1:+.1%} of offline")


if __name__ == "__main__":
    main()
