"""One training step of a recipe for a large target on one GPU: time, memory, and the share of the card's peak.

    python -m benchmarks.gpu eagle3-llama3.1-8b.yaml dflash-qwen3-8b.yaml --documents 4x2048 --supervised 1 0.5

A step is forward, backward, clipping and optimizer, in bf16 with fp32 weights, on random features that are already on
the card. Times are medians over the timed steps; the first step includes compilation. `--supervised` is the share of
every document's tokens, from its end, that is trained on. FLOPs are those of the algorithm's definition, which leaves
out what an implementation computes twice or not at all (see `flops`); the share is of 989 TFLOP/s, the dense bf16 peak
of an H100 or H200.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.large import TARGETS, synchronize, write_target
from benchmarks.results import ROOT
from lightning_modules import algorithms
from lightning_modules.base import normalise_and_clip
from lightning_modules.optimizers import OptimizerOptions, build_optimizer
from specforge.contracts import TrainBatch, mask_spans
from specforge.inference.target_engine.base import feature_widths
from specforge.inference.target_head import TargetHead
from specforge.modeling.draft.dflash.plan import BlockPlan

PEAK = 989.4e12


def make_batch(module: Any, lengths: tuple[int, ...], supervised: float, device: str) -> TrainBatch:
    """Documents of random tokens and features, with the algorithm's plan."""
    g = torch.Generator(device).manual_seed(0)
    tokens = sum(lengths)
    mask = torch.cat([torch.arange(n) >= round((1 - supervised) * n) for n in lengths])
    features = {
        name: torch.empty(tokens, width, dtype=torch.bfloat16, device=device).normal_(generator=g)
        for name, width in feature_widths(module.spec.capture, module.target.hidden_size).items()
        if name in module.spec.features
    }
    ids = torch.randint(0, module.target.vocab_size, (tokens,), generator=g, device=device)
    names = tuple(f"{number:032x}" for number in range(len(lengths)))
    batch = TrainBatch(ids, mask.to(device), features, lengths, mask_spans(mask, lengths), names)
    return batch


def flops(module: Any, plan: Any, batch: TrainBatch) -> float:
    """Floating-point operations of a step: 2 per multiplication, a backward pass being twice a forward pass.

    EAGLE-3: 6 T R (P + H D) + 4 N A H + 12 h d keys + 2 R H V, for R rows, T steps, P weights of the layer with its
    doubled input, A captured width, and the teacher's logits over the whole vocabulary. Block drafters, L layers:
    n b (6 P L) + 4 M H D + 12 h d keys + N (4 A H + 12 H k d L) for M supervised drafts through a frozen head. Keys is
    the number of pairs of a query and a key that it sees. Heads of Domino and DSpark: 6 M r D more; DSpark's teacher:
    2 H D per token. P-EAGLE: as EAGLE-3, with N + E elements in place of T R, all of them in every layer.
    """
    draft, c = module.draft, module.draft.config
    hidden, heads, kv = c.hidden_size, c.num_attention_heads, c.num_key_value_heads
    tokens, features = batch.num_tokens, len(draft.layer_ids) * module.target.hidden_size
    width, kv_width = heads * c.head_dim, kv * c.head_dim
    mlp = 3 * hidden * c.intermediate_size + width * hidden
    if module.algorithm == "eagle3":
        rows, steps = plan.count, plan.steps
        layer = 2 * hidden * (width + 2 * kv_width) + mlp
        depth = plan.positions[plan.rows[:rows]].double() + 1
        keys = float(steps * depth.sum() + len(depth) * steps * (steps - 1) / 2)
        whole = 2 * rows * hidden * module.target.vocab_size
        return (
            6 * steps * rows * (layer + hidden * c.draft_vocab_size)
            + 4 * tokens * features * hidden
            + (12 * width * keys + whole)
        )
    layers = c.num_hidden_layers
    if module.algorithm == "peagle":
        deep = plan.num_elements - plan.count
        elements, layer = tokens + deep, hidden * (width + 2 * kv_width) + mlp
        keys = float((plan.positions + 1).sum() + (plan.positions[plan.anchors] + 1 + plan.depths)[:deep].sum())
        total = 6 * elements * (layer * layers + hidden * (width + 2 * kv_width)) + 12 * width * keys * layers
        total += 6 * plan.num_elements * hidden * c.draft_vocab_size + 4 * tokens * features * hidden
        return float(total + 2 * plan.count * hidden * module.target.vocab_size)
    rows = len(plan.anchors) * draft.block_size
    layer = hidden * (width + 2 * kv_width) + mlp
    seen = plan.positions[plan.anchors].double() + draft.block_size
    total = rows * 6 * layer * layers + 4 * plan.count * hidden * c.draft_vocab_size
    total += 12 * width * float(seen.sum()) * draft.block_size * layers
    total += tokens * (4 * features * hidden + 12 * hidden * kv_width * layers)
    rank = {"domino": "emb_dim", "dspark": "markov_rank"}.get(module.algorithm)
    if rank:
        size = getattr(c, rank, None) or c.dflash_config[rank]
        total += 6 * plan.count * size * c.draft_vocab_size
    if module.algorithm == "dspark":
        total += 2 * tokens * hidden * c.draft_vocab_size
    return float(total)


def make_module(recipe: Path, target: Path, device: str, options: dict[str, Any]) -> Any:
    """The module of a recipe, on a target of random weights."""
    init = yaml.safe_load(recipe.read_text())["model"]
    kinds = {cls.__name__: cls for cls in algorithms().values()}
    given = {**init["init_args"], "target": str(target), **options}
    given["optimizer"] = OptimizerOptions(**given.get("optimizer", {}))
    if isinstance(given.get("draft_config"), str):
        given["draft_config"] = str(ROOT / "configs" / "draft" / given["draft_config"])
    torch.manual_seed(0)
    module = kinds[init["class_path"]](**given)
    if module.draft.d2t.shape != module.draft.t2d.shape:
        module.draft.set_vocabulary(torch.arange(len(module.draft.d2t)))
    module._head = TargetHead.load(module.target, torch.bfloat16).to(torch.device(device))
    return module.to(device)


class Step:
    """A module with its optimizer and a batch; calling it trains one step and returns the loss."""

    def __init__(self, module: Any, batch: TrainBatch, device: str) -> None:
        self.module, self.batch, self.device = module, batch, torch.device(device)
        self.optimizer, _ = build_optimizer(module.optimizer_options, module.draft, 1000)
        self.parameters = [p for p in module.draft.parameters() if p.requires_grad]
        self.head = module.target_head(self.device)

    def gradients(self) -> Tensor:
        """Forward and backward."""
        with torch.autocast(self.device.type, torch.bfloat16):
            output = self.module.training_loss(self.batch, self.head)
        output.loss.backward()
        self.count = output.num_supervised
        return output.loss.detach()

    def __call__(self) -> Tensor:
        """Forward, backward, clipping and update."""
        loss = self.gradients()
        scale = torch.full((), 1.0 / max(1, self.count), device=self.device)
        normalise_and_clip([p for p in self.parameters if p.grad is not None], scale, 0.5, None)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss * scale


def timed(step: Callable[[], Tensor], count: int) -> tuple[float, float, list[float]]:
    """Seconds of the first step, median milliseconds of the timed ones after three more, and all losses."""
    start = time.perf_counter()
    losses = [step()]
    synchronize()
    first = time.perf_counter() - start
    losses += [step() for _ in range(3)]
    if not torch.cuda.is_available():  # to try this file; a GPU is timed by events, which do not make the host wait
        start = time.perf_counter()
        losses += [step() for _ in range(count)]
        return first, 1000 * (time.perf_counter() - start) / count, [float(x) for x in losses]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.reset_peak_memory_stats()
    marks[0].record()
    for mark in marks[1:]:
        losses.append(step())
        mark.record()
    synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(marks)]
    return first, statistics.median(times), [float(x) for x in losses]


def waits(step: Callable[[], Tensor]) -> list[str]:
    """Places at which a step makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return sorted(f"{Path(x.filename).name}:{x.lineno}" for x in found if "called a synchronizing" in str(x.message))


def measure(
    module: Any, lengths: tuple[int, ...], supervised: float, count: int, profile: Path | None
) -> dict[str, Any]:
    """Measure one case."""
    device = module.draft.d2t.device.type
    batch = make_batch(module, lengths, supervised, device)
    plan = module.training_plan(batch)
    work = flops(module, plan, batch)
    batch.plan = plan.to(torch.device(device))
    step = Step(module, batch, device)
    first, ms, losses = timed(step, count)
    result = {
        "ms": round(ms, 1),
        "tokens_per_second": round(sum(lengths) / ms * 1000),
        "tflop": round(work / 1e12, 1),
        "mfu": round(work / ms * 1000 / PEAK, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "first_step_s": round(first, 1),
        "losses": [losses[0], losses[-1]],
    }
    if isinstance(plan, BlockPlan):
        result["anchors_per_second"] = round(len(plan.anchors) / ms * 1000)
    if device == "cuda":
        result["waits"] = waits(step)
    if profile:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as record

        with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            step()
            torch.cuda.synchronize()
        profile.write_text(
            found.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90)
        )
    return result


def documents(words: str) -> tuple[int, ...]:
    """``4x2048`` or ``100,2000,7``."""
    if "x" in words:
        number, length = map(int, words.split("x"))
        return (length,) * number
    return tuple(map(int, words.split(",")))


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--documents", nargs="+", type=documents, default=[(2048,) * 4])
    parser.add_argument("--supervised", nargs="+", type=float, default=[1.0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--options", type=json.loads, default={}, help="options of the module, as JSON")
    parser.add_argument("--profile", type=Path, help="folder for a table of kernels per case")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.recipes:
            recipe = ROOT / "configs" / name
            target_name = yaml.safe_load(recipe.read_text())["model"]["init_args"]["target"]
            target = Path(folder) / target_name.replace("/", "-")
            if not target.exists():
                write_target(TARGETS[target_name], target)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            module = make_module(recipe, target, device, options.options)
            for lengths in options.documents:
                for share in options.supervised:
                    case = f"{name} {len(lengths)}x{max(lengths)} {share:g}"
                    path = options.profile / f"{case.replace(' ', '_')}.txt" if options.profile else None
                    try:
                        row = measure(module, lengths, share, options.steps, path)
                    except torch.OutOfMemoryError:
                        row = {"failed": "out of memory"}
                    print(case, row, flush=True)
                    found.append({"recipe": name, "documents": lengths, "supervised": share, **row})
                    torch.cuda.empty_cache()
            del module
            torch.cuda.empty_cache()
    if options.json:
        about = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
        }
        options.json.write_text(json.dumps({**about, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
