"""One table of all algorithms, trained for the same number of supervised tokens and measured on the same prompts.

    python -m benchmarks.results --tokens 400000

Trains every recipe `*-smollm2.yaml` in configs/ that trains offline, and quickstart.yaml as `eagle3`, on the same
features. The number of optimizer steps follows from the token budget and the recipe's batch size. Each training and
each evaluation runs in a process of its own. You can interrupt the command; finished ones are not repeated. It writes
docs/results.md, and docs/results.json in the format of `specforge evaluate --json`. On a GPU the cost columns are wall
time and GPU memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

ROOT = Path(__file__).parents[1]
SUFFIX = "-smollm2"
NAMED_OTHERWISE = {"quickstart": "eagle3"}
CLOCK = "training.json"


class StepClock(pl.Callback):
    """Writes time, supervised tokens and peak memory of a training into the run's folder.

    Args:
        skip: number of steps at the start of the process that are not timed, because they allocate and compile.
    """

    def __init__(self, skip: int = 3) -> None:
        self.skip = skip
        self._supervised = 0

    def state_dict(self) -> dict[str, Any]:
        """Supervised tokens so far."""
        return {"supervised": self._supervised}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the count."""
        self._supervised = state_dict["supervised"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the clock; it restarts after the skipped steps."""
        self._begin = trainer.global_step
        self._mark(self._begin)

    def _mark(self, step: int) -> None:
        self._since, self._start, self._wall = step, time.process_time(), time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch."""
        self._supervised += int(batch.loss_mask.sum())
        step = trainer.global_step
        if self._since == self._begin < step == self._begin + self.skip < trainer.max_steps:
            self._mark(step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the cost, if the training is complete."""
        steps = trainer.global_step - self._since
        if trainer.global_step < trainer.max_steps or not steps:
            return
        parameters = list(pl_module.draft.parameters())
        content = {
            "steps": trainer.global_step,
            "supervised_tokens": self._supervised,
            "cpu_seconds_per_step": (time.process_time() - self._start) / steps,
            "seconds_per_step": (time.perf_counter() - self._wall) / steps,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        }
        if pl_module.device.type == "cuda":
            content["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
        (Path(trainer.default_root_dir) / CLOCK).write_text(json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class Entry:
    """A row of the table: its name, its recipe, the run's folder, and the number of steps."""

    name: str
    recipe: Path
    folder: Path
    steps: int

    @property
    def checkpoint(self) -> Path:
        """The final checkpoint."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def evaluation(self) -> Path:
        """The evaluation, with its settings."""
        return self.folder / "result.json"


def find_recipes(configs: Path) -> dict[str, Path]:
    """Recipes for the small target that train offline, by row name."""
    paths = [configs / f"{stem}.yaml" for stem in NAMED_OTHERWISE]
    paths = [p for p in paths if p.exists()] + sorted(configs.glob(f"*{SUFFIX}.yaml"))
    paths = [p for p in paths if "features" in yaml.safe_load(p.read_text())["data"]["init_args"]]
    return {NAMED_OTHERWISE.get(p.stem, p.stem.removesuffix(SUFFIX)): p for p in paths}


def steps_for(recipe: Path, features: Path, tokens: int, batch_size: int | None = None) -> int:
    """Number of optimizer steps in which a recipe sees about ``tokens`` supervised tokens, by default at its batch."""
    from specforge.runtime.data_plane.feature_folder import FeatureFolder

    refs = FeatureFolder.open(features / "train").refs
    config = yaml.safe_load(recipe.read_text())
    data = config["data"]["init_args"]
    supervised = sum(r.num_supervised for r in refs) / len(refs)
    documents = (
        batch_size or data.get("batch_size") or data["max_tokens"] / (sum(r.num_tokens for r in refs) / len(refs))
    )
    documents *= config["trainer"].get("accumulate_grad_batches") or 1
    return max(1, round(tokens / (documents * supervised)))


def specforge(*words: object) -> None:
    """Run a SpecForge command in a process of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "specforge.cli.main", *map(str, words)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})


def train(entry: Entry, options: argparse.Namespace) -> dict[str, Any]:
    """Train, or resume, unless it is done; returns the cost."""
    path = entry.folder / CLOCK
    if not path.exists() or json.loads(path.read_text())["steps"] != entry.steps:
        print(f"{entry.name}: {entry.steps} steps of {entry.recipe.name}", flush=True)
        path.unlink(missing_ok=True)
        entry.evaluation.unlink(missing_ok=True)
        # The same data and seed for all; no validation during training.
        replaced = {
            "--seed_everything": options.seed,
            "--model.target": options.target,
            "--data.features": options.features,
            "--trainer.max_steps": entry.steps,
            "--trainer.max_epochs": -1,
            "--trainer.limit_val_batches": 0,
            "--trainer.default_root_dir": entry.folder,
            "--trainer.enable_progress_bar": "false",
        }
        specforge(
            "fit",
            "--config",
            entry.recipe,
            *(word for pair in replaced.items() for word in pair),
            "--trainer.callbacks+=benchmarks.results.StepClock",
            *(("--data.batch_size", options.batch_size) if options.batch_size else ()),
            *(("--ckpt_path", entry.checkpoint) if entry.checkpoint.exists() else ()),
        )
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def evaluate(entry: Entry, options: argparse.Namespace, baselines: bool) -> dict[str, Any]:
    """Evaluate, unless it is done; returns the content of `specforge evaluate --json`."""
    settings = {
        "gamma": options.gamma,
        "seed": options.seed,
        "max_new_tokens": options.max_new_tokens,
        "num_prompts": options.num_prompts,
        "speed_prompts": options.speed_prompts,
    }
    if entry.evaluation.exists():
        found = json.loads(entry.evaluation.read_text())
        if found["settings"] == settings and (len(found["methods"]) > 2) >= baselines:
            return found  # type: ignore[no-any-return]
    written = entry.folder / "evaluation.json"
    given = {f"--{name}": value for name, value in settings.items() if value is not None}
    specforge(
        "evaluate",
        "--draft",
        entry.checkpoint,
        "--prompts",
        options.prompts,
        "--json",
        written,
        "--cache",
        options.runs / "eval-cache",
        *(word for pair in given.items() for word in pair),
        *(() if baselines else ("--baselines", "[none]")),
    )
    content = {**json.loads(written.read_text()), "settings": settings}
    entry.evaluation.write_text(json.dumps(content, indent=2) + "\n")
    return content


def collect(entries: list[Entry], options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Train and evaluate all entries; returns the content of the table and the names of those that failed."""
    methods: list[dict[str, Any]] = []
    training: dict[str, Any] = {}
    run: dict[str, Any] = {}
    failed: list[str] = []
    for entry in entries:
        try:
            cost = train(entry, options)
            content = evaluate(entry, options, baselines=not methods)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            print(f"{entry.name}: failed ({error})", file=sys.stderr, flush=True)
            failed.append(entry.name)
            continue
        *others, draft = content["methods"]
        if not methods:
            methods, run = list(others), content["run"]
        methods.append({**draft, "method": entry.name})
        training[entry.name] = {**cost, "recipe": entry.recipe.name}
    run = {**run, "draft": str(options.runs), "algorithm": ", ".join(training), "tokens": options.tokens}
    return {"run": run, "methods": methods, "training": training}, failed


_HOW = """
All algorithms on {name}. Each draft is trained from its recipe for about {tokens:,} supervised tokens on the same
features, then measured by decoding the same {num_prompts} held-out prompts ({sampling}, γ = {gamma}, at most
{max_new_tokens} new tokens, seed {seed}). τ is the acceptance length, with the bonus token; its interval is clustered
by prompt. Offline τ replays the same rounds over the target's own answers. These are single seeds, and only EAGLE-3's
recipe was tuned: do not read the table as a ranking of the papers.
"""
_SPEED = """
Speed is measured on {speed_prompts} prompts, one at a time, in {speed_dtype} on {device} with {threads} threads; each
speed-up is relative to plain decoding in the same process.
"""


def page(content: dict[str, Any]) -> str:
    """The results as a page in Markdown."""
    run, training = content["run"], content["training"]
    gpu = any("peak_gpu_mib" in cost for cost in training.values())
    costs = ("s per step", "peak GPU, MiB") if gpu else ("CPU-s per step", "peak RSS, MiB")
    head = (
        "method",
        "parameters",
        "trained tokens",
        "steps",
        *costs,
        "τ",
        "95 %",
        "offline τ",
        "acceptance by position",
        "tok/s",
        "speed-up",
        "lossless",
    )
    sampling = "greedy" if run["temperature"] == 0 else f"temperature {run['temperature']}"
    how = _HOW + (_SPEED if run["speed_prompts"] else "")
    paragraphs = [how.format(**run, name=Path(run["target"]).name, sampling=sampling), content["note"]]
    rows = [_row(method, training.get(method["method"])) for method in content["methods"]]
    lines = [
        content["title"],
        "",
        *(
            line
            for text in paragraphs
            if text
            for line in (textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False), "")
        ),
        f"Reproduce with `{content['command']}`.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "Recipes: " + ", ".join(f"`{t['recipe']}` ({name})" for name, t in training.items()) + ".",
        "",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in run["versions"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _row(method: dict[str, Any], cost: dict[str, Any] | None) -> list[str]:
    low, high = method["tau_ci95"]
    spent = (
        ["–"] * 5
        if cost is None
        else [
            f"{cost['parameters'] / 1e6:.1f} M"
            + (
                ""
                if cost["trained_parameters"] == cost["parameters"]
                else f" ({cost['trained_parameters'] / 1e6:.1f} M trained)"
            ),
            f"{cost['supervised_tokens']:,}",
            f"{cost['steps']:,}",
            f"{cost['seconds_per_step' if 'peak_gpu_mib' in cost else 'cpu_seconds_per_step']:.2f}",
            f"{cost.get('peak_gpu_mib', cost['peak_rss_mib']):,.0f}",
        ]
    )
    lossless = method["lossless"]
    ties = f" + {method['ties']} ties" if method["ties"] else ""
    return [
        method["method"],
        *spent,
        f"{method['tau']:.3f}",
        f"{low:.2f} – {high:.2f}",
        f"{method['offline_tau']:.3f}",
        " ".join(f"{a:.2f}" for a in method["acceptance_per_position"]) or "–",
        "–" if method["tokens_per_second"] is None else f"{method['tokens_per_second']:.1f}",
        "–" if method["speedup"] is None else f"{method['speedup']:.2f}x",
        "–" if lossless is None else f"{method['identical']}/{method['prompts']}{ties}{'' if lossless else ' **NO**'}",
    ]


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate, write; returns 1 if an algorithm failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400_000, help="supervised tokens per training")
    parser.add_argument("--target", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--features", type=Path, default=Path("runs/quickstart/features"))
    parser.add_argument("--prompts", type=Path, default=Path("runs/quickstart/prompts"))
    parser.add_argument("--configs", type=Path, default=ROOT / "configs")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"), help="folder for the runs")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder for the page and its JSON")
    parser.add_argument("--name", default="results", help="name of the page, without .md")
    parser.add_argument("--title", default="Results", help="title of the page")
    parser.add_argument("--note", default="", help="paragraph to add to the page")
    parser.add_argument("--batch_size", type=int, help="documents per step, instead of the recipes' own")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows to measure (default: all)")
    parser.add_argument("--gamma", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--num_prompts", type=int)
    parser.add_argument("--speed_prompts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    entries = [
        Entry(
            name, recipe, options.runs / name, steps_for(recipe, options.features, options.tokens, options.batch_size)
        )
        for name, recipe in find_recipes(options.configs).items()
        if options.only is None or name in options.only
    ]
    content, failed = collect(entries, options)
    if not content["methods"]:
        print("nothing was measured", file=sys.stderr)
        return 1
    # Paths do not belong in the page.
    given = {k: v for k, v in vars(options).items() if isinstance(v, int) and v != parser.get_default(k)}
    command = " ".join(["python -m benchmarks.results", *(f"--{k} {v}" for k, v in given.items())])
    content |= {"title": f"# {options.title}", "command": command, "note": options.note}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{options.name}.json").write_text(json.dumps(content, indent=2) + "\n")
    (options.output / f"{options.name}.md").write_text(page(content))
    print(f"wrote {options.output / f'{options.name}.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
