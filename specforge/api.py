"""The Python API, re-exported by ``specforge``: what the commands do, for scripts and notebooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from lightning_modules import DraftModule
from lightning_modules.loading import algorithms, find_algorithm, load_module
from specforge.console import evaluation_bar, progress_bar, say
from specforge.eval.cache import EvalCache
from specforge.eval.evaluate import EvaluateOptions, MethodResult
from specforge.eval.held_out import evaluate_draft
from specforge.inference.capture import CapturedSplit, CaptureOptions, CaptureProgress
from specforge.inference.capture import capture as capture_features
from specforge.inference.target_engine import on_device
from specforge.inference.target_files import TargetFiles
from specforge.system import pick_device

__all__ = ["CaptureOptions", "EvaluateOptions", "algorithms", "capture", "evaluate", "load_draft"]


def load_draft(path: str | Path, target: str | Path | None = None, algorithm: str | None = None) -> DraftModule:
    """Load a trained draft.

    Args:
        path: SpecForge checkpoint, or a draft's folder. Neither can run code.
        target: folder or hub name of the target; by default the one that the checkpoint was trained on.
        algorithm: name of the draft's algorithm, or class path of your own module; by default the built-in one.

    Returns:
        The module, in eval mode on the CPU: ``draft`` is the network, ``target`` the target's files.

    Raises:
        UserError: the draft cannot be read, or its target or algorithm is unknown or not the one it was trained with.

    Example::

        draft = specforge.load_draft("runs/quickstart/checkpoints/last.ckpt")
        print(draft.algorithm, sum(p.numel() for p in draft.draft.parameters()))
    """
    module: DraftModule = load_module(Path(path), None if target is None else str(target), algorithm)
    return module.eval()


def evaluate(
    draft: DraftModule | str | Path,
    prompts: str | Path,
    options: EvaluateOptions | None = None,
    *,
    num_prompts: int | None = None,
    cache: str | Path = "runs/eval-cache",
    progress: bool = False,
) -> dict[str, MethodResult]:
    """Decode held-out prompts speculatively and measure the acceptance length (tau) and the speed.

    Args:
        draft: a draft from `load_draft`, or the path of one.
        prompts: folder from `specforge prepare`; its held-out part is used if it has one.
        options: how to evaluate; the defaults are those of `specforge evaluate`.
        num_prompts: evaluate only the first N prompts; by default all.
        cache: folder for the target's own answers.
        progress: show a progress bar, and print a line when a step begins.

    Returns:
        Results by method: the draft's algorithm and the baselines.

    Raises:
        UserError: the draft or the prompts cannot be used, or the device does not exist.

    Example::

        options = specforge.EvaluateOptions(gamma=4, max_new_tokens=32, speed_prompts=0)
        results = specforge.evaluate("runs/quickstart/checkpoints/last.ckpt", "runs/quickstart/prompts", options)
        print(results["eagle3"].tau, results["eagle3"].lossless)
    """
    module = draft if isinstance(draft, DraftModule) else load_draft(draft)
    options = options or EvaluateOptions()
    options = replace(options, device=pick_device(options.device))
    answers = EvalCache(Path(cache))
    if not progress:
        rows, _ = evaluate_draft(module, Path(prompts), options, answers, num_prompts)
    else:
        with evaluation_bar() as show:
            rows, _ = evaluate_draft(module, Path(prompts), options, answers, num_prompts, log=say, progress=show)
    return {row.method: row for row in rows}


def capture(
    target: str | Path,
    prompts: str | Path,
    output: str | Path,
    options: CaptureOptions | None = None,
    *,
    algorithm: str = "eagle3",
    layer_ids: Sequence[int] | None = None,
    progress: bool = False,
) -> list[CapturedSplit]:
    """Run the target over prepared prompts and keep the hidden states that an algorithm trains on.

    An interrupted capture resumes where it stopped.

    Args:
        target: folder or hub name of the target.
        prompts: folder from `specforge prepare`.
        output: folder for the features, with one subfolder per split.
        options: how to capture; the defaults are those of `specforge capture`.
        algorithm: capture the features that this algorithm needs (a name, or the class path of your own module).
        layer_ids: decoder layers to keep instead of the algorithm's default.
        progress: show a progress bar.

    Returns:
        Folder, samples and bytes of each split.

    Raises:
        UserError: the prompts do not fit the target, the folder contains other features, or the disk is full.

    Example::

        splits = specforge.capture("models/SmolLM2-135M-Instruct", "runs/quickstart/prompts", "runs/features")
        print([(split.folder, split.samples) for split in splits])
    """
    options = options or CaptureOptions()
    on_device(options.engine, options.device)  # what does not exist is reported before anything is read
    files = TargetFiles.find(str(target))
    policy = find_algorithm(algorithm).capture_policy(files, None if layer_ids is None else list(layer_ids))
    with _capture_bar() if progress else nullcontext(lambda step: None) as show:
        return capture_features(files, Path(prompts), Path(output), policy, options, show)


@contextmanager
def _capture_bar() -> Iterator[Callable[[CaptureProgress], None]]:
    """A progress bar with one line per split."""
    start, lines = time.perf_counter(), {}
    with progress_bar("samples") as bar:

        def show(step: CaptureProgress) -> None:
            if step.split not in lines:
                lines[step.split] = bar.add_task(f"capture {step.split}", total=step.total, rate="")
            rate = f"{step.tokens / (time.perf_counter() - start):,.0f} tok/s"
            bar.update(lines[step.split], completed=step.finished, rate=rate)

        yield show
