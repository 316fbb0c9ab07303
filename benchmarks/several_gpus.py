"""Several GPUs of one host: scaling, long documents, checkpoints, and a target on several devices.

    python -m benchmarks.several_gpus train --ranks 1 2 4 --algorithms eagle3
    python -m benchmarks.several_gpus context --ranks 2 4
    python -m benchmarks.several_gpus resume --ranks 2 4
    python -m benchmarks.several_gpus target --sizes 1 2 --engine vllm --python .vllm/bin/python

`train`: `specforge fit` on features in --folder, with the same documents in every optimizer step: --window
micro-batches, by default as many as the largest run has ranks, of which fewer ranks accumulate more. Efficiency is
tokens/s per rank, relative to one rank. The losses of all steps are compared with those of one rank. One step's
collectives are counted.
`context`: `benchmarks.context_parallel`, one long document.
`resume`: a run is resumed from a checkpoint of its middle, by processes that compile anew, and compared with itself bit
for bit (weights, optimizer, losses). One rank must refuse a checkpoint of several, and start from its weights.
`target`: a server of the target whose layers several devices share; its features are compared with those of one device
and with transformers' in fp32.

Each result is a line of JSON, and all are a table at the end. A configuration that fails, or for which no time is left,
says so, and the others go on. `--shape tiny` runs on CPUs, over gloo.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import context_parallel
from benchmarks.attempts import Attempts, Failed
from benchmarks.large import LLAMA_8B, TARGETS, random_tasks, write_features, write_target
from benchmarks.producer import write_model
from benchmarks.results import ROOT
from lightning_modules import algorithms
from specforge.checkpoints import read_checkpoint
from specforge.contracts import CapturePolicy
from specforge.eval.report import read_history
from specforge.inference import target_engine
from specforge.inference.target_engine import HFTargetEngine, TargetEngine
from specforge.inference.target_files import TargetFiles

RECIPES = {"eagle3": "eagle3-llama3.1-8b.yaml", "dflash": "dflash-qwen3-8b.yaml"}
Features = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a run.

    Attributes:
        target: config of the target; None for the recipe's.
        documents: documents of a micro-batch.
        length: their tokens.
        context: tokens of the long document.
        bound: largest relative difference of equal losses.
        words: options of `specforge fit`.
        model: the model's options, by algorithm.
    """

    target: dict[str, Any] | None
    documents: int
    length: int
    context: int
    bound: float
    words: tuple[str, ...] = ()
    model: dict[str, dict[str, Any]] = field(default_factory=dict)


SHAPES = {
    "8b": Shape(None, 4, 2048, 131072, bound=4e-3),  # the rounding of bf16
    "tiny": Shape(
        {**context_parallel.TINY, "num_hidden_layers": 36},
        documents=2,
        length=48,
        context=300,
        bound=1e-5,
        words=("--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
        model={
            "eagle3": {"draft_config": {"draft_vocab_size": 64}, "steps": 3},
            "dflash": {"draft_config": {"draft_vocab_size": 64, "block_size": 4, "num_hidden_layers": 2}},
        },
    ),
}


def prepare(algorithm: str, shape: Shape, documents: int, folder: Path) -> list[object]:
    """Write a target and the features of random documents; returns the words of a run on them."""
    recipe = ROOT / "configs" / RECIPES[algorithm]
    init = yaml.safe_load(recipe.read_text())["model"]["init_args"]
    folder.mkdir()
    files = write_target(shape.target or TARGETS[init["target"]], folder / "target")
    policy = algorithms()[algorithm].capture_policy(files, init.get("layer_ids"))
    tasks = random_tasks(files.vocab_size, documents * shape.length, shape.length, shape.length)
    write_features(files, policy, tasks, folder / "features")
    options = {
        "--model.target": files.folder,
        "--data.features": folder / "features",
        "--data.max_tokens": "null",
        "--data.batch_size": shape.documents,
        "--trainer.logger": "false",
        "--trainer.enable_progress_bar": "false",
        "--trainer.limit_val_batches": 0,
        **{f"--model.{name}": json.dumps(x) for name, x in shape.model.get(algorithm, {}).items()},
    }
    words: list[object] = ["fit", "--config", recipe, *(word for pair in options.items() for word in pair)]
    return [*words, *shape.words]


# Scaling.


def loss_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest relative difference of the losses of two runs."""
    return max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))


def train(options: argparse.Namespace, attempts: Attempts, folder: Path) -> Sequence[str]:
    """Measure every algorithm, strategy and number of ranks."""
    shape, window = SHAPES[options.shape], options.window or max(options.ranks)
    steps = options.warmup + options.steps + 1

    def run(words: list[object], strategy: str, ranks: int, alone: dict[str, Any] | None) -> dict[str, Any]:
        path, accumulate = folder / "steps.json", window // ranks
        if window % ranks:
            raise Failed(f"{ranks} ranks cannot share {window} micro-batches equally")
        given = {
            "--trainer.devices": ranks,
            "--trainer.strategy": strategy,
            "--trainer.accumulate_grad_batches": accumulate,
            "--trainer.fast_dev_run": steps * accumulate,
            "--trainer.default_root_dir": folder / "run",
            "--trainer.callbacks+": "benchmarks.collectives.RankSteps",
            "--trainer.callbacks.path": path,
            "--trainer.callbacks.warmup": options.warmup,
            "--trainer.callbacks.timed": options.steps,
        }
        attempts.specforge(*words, *(word for pair in given.items() for word in pair), *shlex.split(options.options))
        found: dict[str, Any] = json.loads(path.read_text())
        path.unlink()
        if alone is not None and "losses" in alone:
            apart = loss_difference(found["losses"], alone["losses"])
            found["efficiency"] = found["tokens_per_second"] / ranks / alone["tokens_per_second"]
            found |= {"loss_difference": apart, "equal": apart <= shape.bound}
        for kind, row in found["collectives"].items():
            found[kind] = f"{row['count']}: {row['bytes']:,} B" if row["bytes"] is not None else row["count"]
        return found

    for algorithm in options.algorithms:
        documents = shape.documents * window * steps
        words = prepare(algorithm, shape, documents, folder / algorithm)
        alone: dict[str, Any] | None = None
        cases = [("auto", 1), *((s, n) for n in options.ranks if n > 1 for s in options.strategies)]
        for strategy, ranks in cases:
            name = {"algorithm": algorithm, "strategy": strategy, "ranks": ranks}
            row = attempts.attempt(name, partial(run, words, strategy, ranks, alone))
            alone = alone or row
        shutil.rmtree(folder / algorithm)
    measured = ("step_ms", "tokens_per_second", "efficiency", "peak_gib", "loss_difference", "equal")
    return (
        "algorithm",
        "strategy",
        "ranks",
        *measured,
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "broadcast",
        "small",
    )


# Context parallelism.


def context(options: argparse.Namespace, attempts: Attempts, folder: Path) -> Sequence[str]:
    """Compare one long document on one rank with the same on several."""
    tokens = options.tokens or SHAPES[options.shape].context
    shape = "tiny" if options.shape == "tiny" else "llama3.1-8b"

    def run(ranks: int) -> dict[str, Any]:
        path = folder / "context.json"
        words = ["--shape", shape, "--tokens", tokens, "--json", path]
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
        attempts.command(*launcher, "-m", "benchmarks.context_parallel", *words)
        found = json.loads(path.read_text())
        path.unlink()
        difference = found.get("difference", {})
        return {
            **{f"alone_{name}": found["alone"].get(name) for name in ("loss", "ms", "peak_gib")},
            **found["together"],
            **{f"{name}_difference": difference.get(name) for name in ("loss", "gradient")},
            "speed_up": difference.get("speed_up"),
        }

    for ranks in options.ranks:
        if ranks > 1:
            attempts.attempt({"tokens": tokens, "ranks": ranks}, partial(run, ranks))
    measured = ("loss", "ms", "peak_gib")
    compared = ("speed_up", "loss_difference", "gradient_difference")
    return ("tokens", "ranks", *(f"alone_{name}" for name in measured), *measured, *compared)


# Checkpoints.


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors in nested containers, by their path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {path: x for key, part in items for path, x in tensors(part, f"{name}.{key}").items()}


def difference(found: Any, expected: Any) -> float:
    """The largest difference of two containers of tensors; 0 if they are equal bit for bit."""
    a, b = tensors(found), tensors(expected)
    if a.keys() != b.keys():
        raise Failed(f"different tensors: {sorted(a.keys() ^ b.keys())[:3]}")
    apart = [float((a[k].double() - x.double()).abs().max()) for k, x in b.items() if not torch.equal(a[k], x)]
    return max(apart, default=0.0)


@dataclass
class Resuming:
    """Runs of one algorithm, strategy and number of ranks, and their checkpoints.

    Attributes:
        attempts: runs the commands.
        folder: for the runs.
        words: of `specforge fit`.
        strategy: of several ranks.
        ranks: their number.
        half: step of the first checkpoint, the middle of a run.
    """

    attempts: Attempts
    folder: Path
    words: Sequence[object]
    strategy: str
    ranks: int
    half: int

    def fit(self, name: str, ranks: int, steps: int, *more: object, **env: str) -> None:
        """Train, or resume; ``env`` changes the environment."""
        given = {
            "--trainer.devices": ranks,
            "--trainer.strategy": self.strategy if ranks > 1 else "auto",
            "--trainer.max_steps": steps,
            "--trainer.max_epochs": -1,
            "--trainer.log_every_n_steps": 1,
            "--trainer.default_root_dir": self.folder / name,
            "--checkpoint.every_n_train_steps": self.half,
            "--checkpoint.keep": -1,
        }
        self.attempts.specforge(*self.words, *(word for pair in given.items() for word in pair), *more, **env)

    def checkpoint(self, name: str, step: int) -> Path:
        """A checkpoint of a run."""
        return self.folder / name / "checkpoints" / f"step-{step:08d}.ckpt"

    def losses(self, name: str) -> list[float]:
        """The losses of a run's second half."""
        rows = read_history(self.folder / name / "metrics.jsonl")
        return [row["train/loss"] for row in rows if row["step"] > self.half]

    def compare(self) -> dict[str, Any]:
        """Differences of a resumed run from the undisturbed one, and of one rank's weights from the checkpoint's."""
        end, middle = 2 * self.half, self.checkpoint("whole", self.half)
        self.fit("whole", self.ranks, end)
        compiled = str(self.folder / "compiled")
        self.fit("resumed", self.ranks, end, "--ckpt_path", middle, TORCHINDUCTOR_CACHE_DIR=compiled)
        whole, resumed = (read_checkpoint(self.checkpoint(name, end)) for name in ("whole", "resumed"))
        found: dict[str, Any] = {
            "weights": difference(resumed["state_dict"], whole["state_dict"]),
            "optimizer": difference(resumed["optimizer_states"], whole["optimizer_states"]),
            "losses": loss_difference(self.losses("resumed"), self.losses("whole")),
        }
        found["bit_for_bit"] = not any(found.values())
        del whole, resumed
        if self.ranks == 1:
            return found
        found["on_one_rank"] = self._refusal(middle)
        self.fit("one", 1, 1, "--model.init_from", middle, "--model.optimizer.lr", 0.0)
        start, weights = read_checkpoint(self.checkpoint("one", 1)), read_checkpoint(middle)
        return {**found, "weights_on_one_rank": difference(start["state_dict"], weights["state_dict"])}

    def _refusal(self, checkpoint: Path) -> str:
        """What one rank says to a checkpoint of several."""
        try:
            self.fit("refused", 1, 2 * self.half, "--ckpt_path", checkpoint)
        except Failed as error:
            if f"made on {self.ranks} ranks" not in str(error):
                raise
            return str(error).rpartition(" | ")[2]
        raise Failed(f"one rank resumed from a checkpoint of {self.ranks}")


def resume(options: argparse.Namespace, attempts: Attempts, folder: Path) -> Sequence[str]:
    """Resume runs from a checkpoint of their middle, and start a run of one rank from its weights."""
    shape = SHAPES[options.shape]
    for algorithm in options.algorithms:
        documents = shape.documents * max(options.ranks) * 2 * options.half
        words = [*prepare(algorithm, shape, documents, folder / algorithm), *shlex.split(options.options)]
        for ranks in options.ranks:
            for strategy in options.strategies if ranks > 1 else ["auto"]:
                runs = folder / "runs"
                case = Resuming(attempts, runs, words, strategy, ranks, options.half)
                attempts.attempt({"algorithm": algorithm, "strategy": strategy, "ranks": ranks}, case.compare)
                shutil.rmtree(runs, ignore_errors=True)
        shutil.rmtree(folder / algorithm)
    found = ("weights", "optimizer", "losses", "bit_for_bit", "weights_on_one_rank")
    return ("algorithm", "strategy", "ranks", *found)


# The target.


def open_engine(options: argparse.Namespace, files: TargetFiles, size: int, log: Path) -> TargetEngine:
    """A server of the target on ``size`` devices."""
    given = {"python": options.python, "arguments": shlex.split(options.arguments), "log": log, "compare": False}
    cls = getattr(target_engine, target_engine.ENGINES[options.engine])
    engine: TargetEngine = cls(files, options.dtype, tensor_parallel=size, **given)
    return engine


def apart(found: Features, expected: Features) -> dict[str, float]:
    """Relative distance of features, by name: of all prompts together."""
    names = expected[0]
    pairs = {
        name: [(a[name].double(), b[name].double()) for a, b in zip(found, expected, strict=True)] for name in names
    }
    return {
        name: float(sum((a - b).square().sum() for a, b in x) / sum(b.square().sum() for _, b in x)) ** 0.5
        for name, x in pairs.items()
    }


def target(options: argparse.Namespace, attempts: Attempts, folder: Path) -> Sequence[str]:
    """Compare the features of a target on several devices with those of one."""
    shape = SHAPES[options.shape]
    device = "cuda" if torch.cuda.is_available() and options.shape != "tiny" else "cpu"
    if options.target is None:
        write_model(shape.target or LLAMA_8B, folder / "target", device)
    files = TargetFiles.find(str(options.target or folder / "target"))
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(files.vocab_size, (options.tokens // (1 + i % 3),), generator=generator).tolist()
        for i in range(options.prompts)
    ]
    policy = CapturePolicy(tuple(i * files.num_layers // 4 for i in (1, 2, 3)), last_hidden_states=True)

    def captured(open_it: Callable[[], TargetEngine]) -> Features:
        with open_it() as engine:
            engine.check(policy)
            return [engine.capture([ids], policy)[0] for ids in prompts]

    reference = captured(lambda: HFTargetEngine(files, "float32", device))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    one: Features = []

    def run(size: int) -> dict[str, Any]:
        found = captured(lambda: open_engine(options, files, size, folder / "server.log"))
        distances = {f"{name} from fp32": x for name, x in apart(found, reference).items()}
        if one:
            distances |= {f"{name} from one": x for name, x in apart(found, one).items()}
        else:
            one.extend(found)
        return distances

    for size in options.sizes:
        attempts.attempt({"engine": options.engine, "devices": size}, partial(run, size))
    return ("engine", "devices", *(f"{name} from {other}" for other in ("fp32", "one") for name in reference[0]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--shape", choices=SHAPES, default="8b")
    every.add_argument("--limit", type=float, default=520.0, help="seconds that the call may take")
    every.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where features and runs are written")
    every.add_argument("--json", type=Path)
    ranks = argparse.ArgumentParser(add_help=False)
    ranks.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    runs = argparse.ArgumentParser(add_help=False)
    runs.add_argument("--algorithms", nargs="+", choices=RECIPES, default=["eagle3"])
    runs.add_argument("--strategies", nargs="+", default=["ddp", "fsdp2"])
    runs.add_argument("--options", default="", help="further options of `specforge fit`")
    part = parts.add_parser("train", parents=[every, ranks, runs], help="scaling of training")
    part.add_argument("--warmup", type=int, default=8, help="steps that are not timed")
    part.add_argument("--steps", type=int, default=16, help="steps that are timed")
    part.add_argument("--window", type=int, help="micro-batches per optimizer step, of all ranks together")
    part = parts.add_parser("context", parents=[every, ranks], help="one long document")
    part.add_argument("--tokens", type=int)
    part = parts.add_parser("resume", parents=[every, ranks, runs], help="checkpoints")
    part.add_argument("--half", type=int, default=3, help="step of the checkpoint, the middle of the run")
    part = parts.add_parser("target", parents=[every], help="the target on several devices")
    part.add_argument("--target", type=Path, help="a folder, instead of random weights")
    part.add_argument("--engine", default="vllm", choices=["vllm", "sglang"])
    part.add_argument("--python", help="interpreter of the server's environment")
    part.add_argument("--arguments", default="", help="more arguments of the server")
    part.add_argument("--dtype", default="bfloat16")
    part.add_argument("--sizes", type=int, nargs="+", default=[1, 2], help="devices that share each layer")
    part.add_argument("--prompts", type=int, default=12)
    part.add_argument("--tokens", type=int, default=2048, help="tokens of the longest prompts")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a part; returns 1 if a configuration failed."""
    options = parse(argv)
    attempts = Attempts(options.limit)
    part = {"train": train, "context": context, "resume": resume, "target": target}[options.part]
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        columns = part(options, attempts, folder)
    finally:
        shutil.rmtree(folder)
    return attempts.finish(columns, options.json)


if __name__ == "__main__":
    sys.exit(main())
