"""One long document on one rank, and shared among ranks: loss, gradients, step time, memory.

    torchrun --nproc_per_node 2 -m benchmarks.context_parallel --tokens 131072
    torchrun --nproc_per_node 3 -m benchmarks.context_parallel --shape tiny --tokens 500

An EAGLE-3 draft at the dimensions of Llama 3.1 8B (T = 7, a draft vocabulary of 32,000) trains on random features of
one document, all of whose tokens after the first --prompt are supervised. The first rank does it alone, then all ranks
together. A step is the forward and the backward pass and, on several ranks, the sum of their gradients, which nothing
overlaps; there is no optimizer. Times are medians, memory (GPUs only) that of the rank that needs most. The difference
of a gradient is the largest one of some of its elements, relative to the largest element. On GPUs products are in bf16,
whose rounding bounds the agreement; on CPUs in fp32.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.large import LLAMA_8B, synchronize
from lightning_modules.eagle3 import Eagle3Module
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, TrainBatch
from specforge.inference.target_head import TargetHead

TINY = {
    **LLAMA_8B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
SHAPES = {"llama3.1-8b": LLAMA_8B, "tiny": TINY}
SAMPLED = 1 << 16  # elements of each gradient that are compared


def make_module(config: dict[str, Any], recompute: str, device: torch.device) -> Eagle3Module:
    """A draft with random weights, the same on every rank."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        module = Eagle3Module(folder, checkpoint_activations=recompute)
    module.draft.set_vocabulary(torch.arange(len(module.draft.d2t)))
    return module.to(device)


def make_data(config: dict[str, Any], tokens: int, prompt: int, device: torch.device) -> tuple[TrainBatch, TargetHead]:
    """A document, and the target's embedding and head: random, and the same on every rank."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    hidden, vocab = config["hidden_size"], config["vocab_size"]

    def random(rows: int, width: int, std: float) -> Tensor:
        return torch.empty(rows, width, dtype=dtype, device=device).normal_(std=std, generator=generator)

    ids = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
    features = {AUX_HIDDEN_STATES: random(tokens, 3 * hidden, 1.0), LAST_HIDDEN_STATES: random(tokens, hidden, 1.0)}
    batch = TrainBatch(ids, torch.arange(tokens, device=device) >= prompt, features, (tokens,), ((prompt, tokens),))
    return batch, TargetHead(random(vocab, hidden, 0.02), random(vocab, hidden, 0.02), dtype)


def train_step(module: Eagle3Module, batch: TrainBatch, head: TargetHead) -> Tensor:
    """The loss of the batch, whose gradients are then in the parameters of every rank that shares it."""
    module.zero_grad()
    device = batch.input_ids.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = module.training_loss(batch, head).loss
    loss.backward()
    total = loss.detach()
    if module.context_group is not None:
        for x in (total, *(p.grad for p in module.draft.parameters() if p.grad is not None)):
            dist.all_reduce(x)
    return total


def samples(module: Eagle3Module) -> dict[str, Tensor]:
    """Some elements of every gradient."""
    found = {}
    for name, parameter in module.draft.named_parameters():
        if parameter.grad is not None:
            flat = parameter.grad.flatten()
            found[name] = flat[:: max(1, len(flat) // SAMPLED)].clone()
    return found


def measure(module: Eagle3Module, batch: TrainBatch, head: TargetHead, steps: int) -> dict[str, Any]:
    """Loss, gradients, milliseconds and peak GiB of some steps after one that is not timed."""
    plan = module.training_plan(batch).to(batch.input_ids.device)
    batch, times, loss = dataclasses.replace(batch, plan=plan), [], torch.zeros(())
    for _ in range(steps + 1):
        synchronize()
        start = time.perf_counter()
        loss = train_step(module, batch, head)
        synchronize()
        times.append(1000 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated() / 2**30 if batch.input_ids.is_cuda else 0.0
    return {"loss": float(loss), "ms": statistics.median(times[1:]), "peak_gib": peak, "gradients": samples(module)}


def measure_alone(module: Eagle3Module, *rest: Any) -> dict[str, Any]:
    """As :func:`measure`; ``failed`` if the memory is too small."""
    try:
        found = measure(module, *rest)
    except torch.OutOfMemoryError as error:
        found = {"failed": str(error).splitlines()[0]}
    module.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return found


def compare(alone: dict[str, Any], together: dict[str, Any]) -> dict[str, Any]:
    """Relative differences of the shared step from that of one rank."""
    apart = {
        name: float((together["gradients"][name] - x).abs().max() / x.abs().max().clamp(min=1e-30))
        for name, x in alone["gradients"].items()
    }
    worst = max(apart, key=lambda name: apart[name])
    loss = abs(together["loss"] / alone["loss"] - 1)
    return {"loss": loss, "gradient": apart[worst], "of": worst, "speed_up": alone["ms"] / together["ms"]}


def report(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Print a result on the first rank, and return it, without gradients."""
    shown = {key: x for key, x in result.items() if key != "gradients"}
    if dist.get_rank() == 0:
        print(name, json.dumps(shown), flush=True)
    return shown


def main() -> None:
    """Print the results of one rank, of all ranks, and their difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3.1-8b")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--prompt", type=int, default=2, help="tokens at the start that are not supervised")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--checkpoint_activations", choices=["none", "mlp", "layer"], default="mlp")
    parser.add_argument("--only-shared", action="store_true", help="leave out the run on one rank")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(timeout=timedelta(hours=1))
    config = SHAPES[options.shape]
    module = make_module(config, options.checkpoint_activations, device)
    batch, head = make_data(config, options.tokens, options.prompt, device)
    found: dict[str, Any] = {}
    alone: dict[str, Any] = {}
    if dist.get_rank() == 0 and not options.only_shared:
        alone = measure_alone(module, batch, head, options.steps)
        found["alone"] = report("1 rank:", alone)
    dist.barrier()
    module.context_group = dist.new_group()
    together = measure(module, batch, head, options.steps)
    peak = torch.tensor(together["peak_gib"], device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    found["together"] = report(f"{dist.get_world_size()} ranks:", {**together, "peak_gib": float(peak)})
    if "loss" in alone:
        found["difference"] = report("difference:", compare(alone, together))
    if dist.get_rank() == 0 and options.json:
        options.json.write_text(json.dumps(found) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
