"""A draft for an 8B target, trained on one GPU while producers on other GPUs compute its features.

    python -m benchmarks.pools --devices cuda:1

Runs one `specforge produce` per device in `--devices`, a store and SQLite on this host, and `specforge fit` with a
recipe's model at its real size; the target has random weights. Each step is synchronised; the wait is the time from the
end of a step until the next batch is on the device. Results are medians over the steps after the first ten. If the wait
is close to zero, the trainer is the bottleneck.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.data_plane import start_store
from benchmarks.large import LLAMA_8B, random_tasks
from benchmarks.producer import write_model
from benchmarks.results import ROOT, specforge
from specforge.contracts import TokenCounts
from specforge.data.prompts import PromptSet
from specforge.inference.target_files import TargetFiles


def write_recipe(options: argparse.Namespace, folder: Path, target: Path, store: str) -> Path:
    """Write the recipe with a data section for producers."""
    recipe = yaml.safe_load((ROOT / "configs" / options.recipe).read_text())
    recipe["model"]["init_args"]["target"] = str(target)
    recipe["data"] = {
        "class_path": "DisaggregatedDataModule",
        "init_args": {
            "prompts": str(folder / "prompts"),
            "store": store,
            "metadata": str(folder / "metadata.db"),
            "max_tokens": options.max_tokens,
            "max_bytes": options.max_bytes,
            "retain": "until_trained",
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def measure(options: argparse.Namespace, folder: Path, kind: str, target: Path) -> dict[str, Any]:
    """Train with features through one kind of store."""
    with ExitStack() as stack:
        if kind == "mooncake":
            server, store = start_store(options.max_bytes + (2 << 30))
            stack.callback(server.wait)
            stack.callback(server.terminate)
        else:
            store = str(folder / "store")
        words = ["--target", target, "--store", store, "--metadata", folder / "metadata.db"]
        words += ["--batch_tokens", options.batch_tokens, "--max_prompts", options.max_prompts]
        for device in options.devices:
            command = [sys.executable, "-m", "specforge.cli.main", "produce", *map(str, words), "--device", device]
            producer = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            stack.callback(producer.wait)
            stack.callback(producer.terminate)
        specforge(
            "fit",
            "--config",
            write_recipe(options, folder, target, store),
            "--trainer.fast_dev_run",
            options.steps,
            "--trainer.default_root_dir",
            folder / "run",
            "--trainer.devices",
            1,
            "--trainer.strategy",
            "auto",
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.callbacks+=benchmarks.large.StepTimes",
            "--trainer.callbacks.path",
            folder / "times.json",
        )
    (folder / "metadata.db").unlink()
    result: dict[str, Any] = json.loads((folder / "times.json").read_text())
    return result


def main() -> None:
    """Print one line per store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="eagle3-llama3.1-8b.yaml")
    parser.add_argument("--target", type=Path, help="a folder, instead of random weights")
    parser.add_argument(
        "--intermediate_size", type=int, default=14336, help="intermediate size of the random target; smaller is faster"
    )
    parser.add_argument("--devices", nargs="+", default=["cuda:1"], help="devices of the producers")
    parser.add_argument("--stores", nargs="+", default=["mooncake", "shared_dir"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--max_tokens", type=int, default=16384, help="tokens per training batch")
    parser.add_argument("--batch_tokens", type=int, default=16384, help="tokens per forward pass of a producer")
    parser.add_argument("--max_prompts", type=int, default=32, help="prompts that a producer leases at a time")
    parser.add_argument("--max_bytes", type=int, default=8 << 30)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    found: dict[str, dict[str, Any]] = {}
    try:
        target = options.target or folder / "target"
        if options.target is None:
            config = {**LLAMA_8B, "intermediate_size": options.intermediate_size}
            write_model(config, target, options.devices[0])
            torch.cuda.empty_cache()
        files = TargetFiles.find(str(target))
        tasks = random_tasks(files.vocab_size, int(1.2 * options.steps * options.max_tokens))
        counts = TokenCounts(*(torch.ones(files.vocab_size, dtype=torch.int64) for _ in range(2)))
        PromptSet(tasks, "none", counts).save(folder / "prompts" / "train")
        for kind in options.stores:
            found[kind] = measure(options, folder, kind, target)
            print(kind, found[kind], flush=True)
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps({"producers": options.devices, "stores": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
