"""A recipe for a large target at its real sizes on accelerators: step time, memory, and the wait for features.

    python -m benchmarks.large eagle3-llama3.1-8b.yaml dflash-qwen3-8b.yaml

The target consists of a config with a random embedding and head, because training reads nothing else of it. The
features are random values of the right widths in an ordinary feature folder. `specforge fit` runs the recipe on
documents that it has not read before. Each step is synchronised; the wait is the time from the end of a step until the
next batch is on the device. Results are medians over the steps after the first ten.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.results import ROOT, specforge
from lightning_modules import algorithms
from specforge.contracts import CapturePolicy, PromptTask, Provenance, TokenCounts
from specforge.inference.rollout_worker import RolloutWorker
from specforge.inference.target_engine.base import TargetEngine, feature_widths
from specforge.inference.target_files import TargetFiles
from specforge.runtime.data_plane.feature_folder import FeatureFolder

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
QWEN3_8B = {
    **LLAMA_8B,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
DEEPSEEK = {
    **LLAMA_8B,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "num_hidden_layers": 61,
    "vocab_size": 129280,
}
TARGETS = {
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
    "Qwen/Qwen3-8B": QWEN3_8B,
    "deepseek-ai/DeepSeek-V3": DEEPSEEK,
    "moonshotai/Kimi-K2-Instruct": {**DEEPSEEK, "num_attention_heads": 64, "vocab_size": 163840},
}
SKIP = 10


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class StepTimes(pl.Callback):
    """Writes step times, waits before a step, and the peak memory of the device.

    Args:
        path: JSON file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._waits: list[float] = []
        self._steps: list[float] = []
        self._tokens: list[int] = []
        self._end = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record that the batch has arrived."""
        synchronize()
        self._waits.append(time.perf_counter() - self._end)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the end of the step."""
        synchronize()
        now = time.perf_counter()
        self._steps.append(now - self._end)
        self._tokens.append(sum(batch.lengths))
        self._end = now

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write."""
        steps, waits, tokens = (x[SKIP:] for x in (self._steps, self._waits, self._tokens))
        low, _, high = statistics.quantiles(steps)
        result = {
            "step_ms": 1000 * statistics.median(steps),
            "mean_step_ms": 1000 * statistics.mean(steps),
            "quartiles_ms": [1000 * low, 1000 * high],
            "wait_ms": 1000 * statistics.median(waits),
            "mean_wait_ms": 1000 * statistics.mean(waits),
            "p99_wait_ms": 1000 * float(torch.tensor(waits).quantile(0.99)),
            "longest_wait_ms": 1000 * max(waits),
            "tokens_per_second": sum(tokens) / sum(steps),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
        self.path.write_text(json.dumps(result))


class RandomEngine(TargetEngine):
    """Engine that returns random features of the right widths."""

    dtype = "bfloat16"

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self._pool = torch.randn(2048, 8 * hidden_size).bfloat16()

    def check(self, policy: CapturePolicy) -> None:
        """Accept every policy."""

    def capture(self, input_ids: Sequence[Sequence[int]], policy: CapturePolicy) -> list[dict[str, Tensor]]:
        """Return slices of one random tensor."""
        widths = feature_widths(policy, self.hidden_size)
        return [
            {name: self._pool[: len(ids), :width].contiguous() for name, width in widths.items()} for ids in input_ids
        ]


def write_target(config: dict[str, Any], folder: Path) -> TargetFiles:
    """Write the config, and an embedding and a head with random weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    size = (config["vocab_size"], config["hidden_size"])
    names = ("model.embed_tokens.weight", "lm_head.weight")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {name: torch.empty(size, dtype=torch.bfloat16, device=device).normal_(std=0.02).cpu() for name in names}
    save_file(tensors, folder / "model.safetensors")
    return TargetFiles.find(str(folder))


def random_tasks(vocab_size: int, tokens: int, shortest: int = 256, longest: int = 2048) -> list[PromptTask]:
    """Documents of random lengths and tokens, the second half of each supervised."""
    rng = random.Random(0)
    tasks: list[PromptTask] = []
    while tokens > 0:
        length = rng.randint(shortest, longest)
        ids = tuple(rng.randrange(vocab_size) for _ in range(length))
        mask = tuple(int(i >= length // 2) for i in range(length))
        tasks.append(PromptTask(f"{len(tasks):032x}", ids, mask))
        tokens -= length
    return tasks


def write_features(files: TargetFiles, policy: CapturePolicy, tasks: Sequence[PromptTask], folder: Path) -> None:
    """Write random features of documents of at most 2,048 tokens."""
    counts = TokenCounts(*(torch.ones(files.vocab_size, dtype=torch.int64) for _ in range(2)))
    provenance = Provenance(files.name, files.fingerprint, "none", policy, "bfloat16")
    features = FeatureFolder.create(folder / "train", provenance, counts)
    worker = RolloutWorker(RandomEngine(files.hidden_size), features.store, features.manifest.append, provenance)
    for _ in worker.produce(tasks, 16384):
        pass


class Bench:
    """Runs recipes; consecutive recipes for one target share its files, and equal features.

    Args:
        folder: for the target, the features and the runs.
        steps: of each recipe.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self._target: str | None = None
        self._features: dict[CapturePolicy, int] = {}

    def measure(self, recipe: Path, options: list[str]) -> dict[str, Any]:
        """Run one recipe."""
        config = yaml.safe_load(recipe.read_text())
        init = config["model"]["init_args"]
        files = self._prepare_target(init["target"])
        module = {cls.__name__: cls for cls in algorithms().values()}[config["model"]["class_path"]]
        policy = module.capture_policy(files, init.get("layer_ids"))
        features = self._prepare_features(files, policy, self.steps * config["data"]["init_args"]["max_tokens"])
        times = self.folder / "times.json"
        specforge(
            "fit",
            "--config",
            recipe,
            "--model.target",
            files.folder,
            "--data.features",
            features,
            "--trainer.fast_dev_run",
            self.steps,
            "--trainer.default_root_dir",
            self.folder / "run",
            "--trainer.devices",
            1,
            "--trainer.strategy",
            "auto",
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.callbacks+=benchmarks.large.StepTimes",
            "--trainer.callbacks.path",
            times,
            *options,
        )
        result: dict[str, Any] = json.loads(times.read_text())
        return result

    def _prepare_target(self, name: str) -> TargetFiles:
        folder = self.folder / "target"
        if self._target == name:
            return TargetFiles.find(str(folder))
        for old in ("target", "features"):
            shutil.rmtree(self.folder / old, ignore_errors=True)
        self._target, self._features = name, {}
        return write_target(TARGETS[name], folder)

    def _prepare_features(self, files: TargetFiles, policy: CapturePolicy, tokens: int) -> Path:
        name = "-".join(map(str, policy.layer_ids)) + f"_{policy.last_hidden_states}"
        folder = self.folder / "features" / name
        if self._features.get(policy, 0) < tokens:
            shutil.rmtree(folder, ignore_errors=True)
            start = time.perf_counter()
            write_features(files, policy, random_tasks(files.vocab_size, tokens), folder)
            size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
            print(f"{size / 1e9:.1f} GB of features at {size / (time.perf_counter() - start) / 1e9:.2f} GB/s")
            self._features[policy] = tokens
        return folder


def main() -> None:
    """Print a line for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--options", default="", help="further options of `specforge fit`")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.steps)
        for name in options.recipes:
            try:
                found[name] = bench.measure(ROOT / "configs" / name, options.options.split())
            except subprocess.CalledProcessError as error:
                found[name] = {"failed": error.returncode}
            print(name, options.options, found[name], flush=True)
    if options.json:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        options.json.write_text(json.dumps({**about, "recipes": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
