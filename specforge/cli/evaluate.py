"""`specforge evaluate` and `export`: what a trained draft achieves, and its form for servers."""

from __future__ import annotations

import json as json_format
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from lightning_modules.loading import load_module
from specforge.console import console, evaluation_bar, say
from specforge.eval.cache import EvalCache
from specforge.eval.evaluate import EvaluateOptions, MethodResult, as_json
from specforge.eval.held_out import evaluate_draft
from specforge.eval.report import write_report
from specforge.eval.table import COLUMNS, table_notes, table_rows, table_title
from specforge.files import check_json, write_file
from specforge.options import PositiveInt
from specforge.system import pick_device


def evaluate(
    draft: Path,
    prompts: Path,
    options: EvaluateOptions,
    target: str | None = None,
    num_prompts: PositiveInt | None = None,
    cache: Path = Path("runs/eval-cache"),
    suffix_corpus: Path | None = None,
    json: Path | None = None,
    algorithm: str | None = None,
) -> None:
    """Decode held-out prompts speculatively: acceptance length (tau), speed, and whether the output is lossless.

    Args:
        draft: SpecForge checkpoint, or a draft's folder.
        prompts: folder from `specforge prepare`; its held-out part is used if it has one.
        options: how to evaluate.
        target: folder or hub name; by default the target that the draft was trained on.
        num_prompts: evaluate only the first N prompts (default: all).
        cache: folder for the target's own answers.
        suffix_corpus: prompt set (such as .../prompts/train) whose answers suffix decoding may draft from too.
        json: also write the results to this file.
        algorithm: name of the draft's algorithm, or class path of your own module (default: the built-in one).
    """
    if json is not None:
        check_json(json, "run", "methods")
    options = replace(options, device=pick_device(options.device))
    module = load_module(draft, target, algorithm)
    with evaluation_bar() as show:
        results, run = evaluate_draft(module, prompts, options, EvalCache(cache), num_prompts, suffix_corpus, say, show)
    run["draft"] = str(draft)
    print_table(results, run)
    if json is not None:
        write_json(json, as_json(results, run))
        say(f"wrote {json}")
        if (json.parent / "metrics.jsonl").exists():
            say(f"wrote {write_report(json.parent)}")


def export(
    draft: Path,
    output: Path,
    to: Literal["sglang", "vllm", "speculators", "hf"] = "sglang",
    target: str | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    algorithm: str | None = None,
) -> None:
    """Write a trained draft for a server to load, and show the commands that serve it.

    sglang and vllm write the same files where both servers can serve the draft, and refuse a draft that the
    server would run as a different network.

    Args:
        draft: SpecForge checkpoint, or a draft's folder.
        output: folder to write; must be new, empty or an earlier export, which is replaced.
        to: the server that must be able to serve the draft; speculators, the form of that project, which vLLM
            serves given the folder alone; or hf, the usual form of published drafts, for no server in particular.
        target: folder or hub name; by default the target that the draft was trained on.
        dtype: dtype of the written tensors.
        algorithm: name of the draft's algorithm, or class path of your own module (default: the built-in one).
    """
    module = load_module(draft, target, algorithm)
    form = module.export_format
    getattr(form, f"to_{to}")(module.draft, module.target, output, dtype)
    size = sum(p.stat().st_size for p in output.iterdir())
    say(f"{output}: {module.algorithm} draft of {module.target.name} for {to}, {size / 1e6:.1f} MB {dtype}")
    if to == "speculators":
        say(f"serve it and its target: vllm serve {shlex.quote(str(output))}")
    elif to != "hf":
        for line in form.served(module.draft, module.target, output):
            say(line)


def print_table(results: Sequence[MethodResult], run: dict[str, Any]) -> None:
    """Print an evaluation as a table of 80 columns, with notes below it."""
    methods = [asdict(result) for result in results]
    table = Table(title=table_title(run))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in table_rows(methods):
        table.add_row(*row)
    console.print(table)
    for note in table_notes(run, methods):
        say(note)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_file(path, json_format.dumps(content, indent=2) + "\n")
