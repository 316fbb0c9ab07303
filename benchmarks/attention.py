"""Attention of draft layers on an accelerator: PyTorch's fused kernels, one document at a time, against FlexAttention.

    python -m benchmarks.attention --json attention.json

Times the forward and backward pass of one layer's attention in bf16, at the sizes of a draft for an 8B target and over
all steps of an unroll. Results are medians of interleaved repetitions, after a warm-up that compiles; peak memory is
the memory that the pass adds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from specforge.modeling.draft.dflash.attention import block_attention
from specforge.modeling.draft.dflash.plan import plan_blocks, sample_anchors
from specforge.modeling.draft.eagle3.plan import plan_unroll
from specforge.modeling.draft.peagle.attention import deep_attention
from specforge.modeling.draft.peagle.plan import DepthSampling, plan_peagle
from specforge.modeling.layers.attention import ttt_attention

HEADS, KV_HEADS, SIZE = 32, 8, 128
Pass = Callable[[bool], Tensor]


def _tensors(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(*size, SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=True) for size in sizes]


def _spans(lengths: list[int]) -> list[tuple[int, int]]:
    """The second half of every document."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [(end - n // 2, end) for n, end in zip(lengths, ends, strict=True)]


def unroll(lengths: list[int]) -> Pass:
    """EAGLE-3, seven steps."""
    plan = plan_unroll(lengths, _spans(lengths), 7)
    rows, tokens = len(plan.rows), sum(lengths)
    query, key, value = _tensors((rows, HEADS), (tokens, KV_HEADS), (tokens, KV_HEADS))
    own = [tuple(_tensors((rows, KV_HEADS), (rows, KV_HEADS))) for _ in range(6)]

    def run(flex: bool) -> Tensor:
        outs = [ttt_attention(query, key, value, plan.segments, own[:s], flex=flex) for s in range(7)]
        return torch.stack(outs)

    return run


def blocks(lengths: list[int]) -> Pass:
    """DFlash, at most 512 anchors per document, blocks of 16."""
    anchors = sample_anchors(lengths, _spans(lengths), 512, [str(i) for i in range(len(lengths))])
    plan = plan_blocks(lengths, _spans(lengths), anchors, 15).to(torch.device("cuda"))
    rows, tokens = 16 * len(plan.anchors), sum(lengths)
    x = _tensors((rows, HEADS), *[(tokens, KV_HEADS)] * 2, *[(rows, KV_HEADS)] * 2)
    return lambda flex: block_attention(*x, plan.anchors, plan.groups, flex=flex)


def parallel(lengths: list[int]) -> Pass:
    """P-EAGLE, eight depths; each depth keeps four fifths of the rows of the previous one."""
    seeds = range(len(lengths))
    plan = plan_peagle(lengths, _spans(lengths), 8, None, DepthSampling(0.8), seeds).to(torch.device("cuda"))
    rows, tokens = len(plan.anchors), sum(lengths)
    q, k, v, *own = _tensors((rows, HEADS), *[(tokens, KV_HEADS)] * 2, *[(rows, KV_HEADS)] * 2)
    return lambda flex: deep_attention(q, k, v, (own[0], own[1]), plan.anchors, plan.depths, plan.chunks, flex=flex)


def measure(run: Pass, repeats: int) -> dict[str, float]:
    """Milliseconds and MiB of both implementations."""
    times: dict[bool, list[float]] = {False: [], True: []}
    peaks: dict[bool, float] = {}
    for turn in range(repeats + 2):
        for flex in times:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, began = torch.cuda.memory_allocated(), time.perf_counter()
            run(flex).float().square().sum().backward()
            torch.cuda.synchronize()
            if turn > 1:
                times[flex].append(1000 * (time.perf_counter() - began))
                peaks[flex] = (torch.cuda.max_memory_allocated() - before) / 2**20
    fused, flexed = (statistics.median(times[x]) for x in (False, True))
    return {
        "fused_ms": fused,
        "flex_ms": flexed,
        "ratio": fused / flexed,
        "fused_mib": peaks[False],
        "flex_mib": peaks[True],
    }


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    documents = {"4 x 2048": [2048] * 4, "16 x 512": [512] * 16, "1 x 8192": [8192]}
    found = {}
    for case in (unroll, blocks, parallel):
        for name, lengths in documents.items():
            found[f"{case.__name__} {name}"] = result = measure(case(lengths), options.repeats)
            print(f"{case.__name__:9} {name:9}", {k: round(v, 2) for k, v in result.items()}, flush=True)
    if options.json:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        options.json.write_text(json.dumps({**about, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
