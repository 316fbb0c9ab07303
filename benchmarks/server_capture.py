"""Tokens per second of a capturing vLLM or SGLang server: bare prefill, and with the features stored.

    specforge target serve --target T --engine vllm --engine.store S
    python -m benchmarks.server_capture --target T --engine vllm --url URL --store S [--plain URL]

Both kinds of requests take turns, on prompts that no earlier request has had, so the prefix cache helps neither. With
``--plain``, the address of a server of the same engine and target that does not capture, its bare prefill takes turns
too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from specforge.contracts import CapturePolicy, PromptTask, Provenance
from specforge.inference.server_client import ServerClient
from specforge.inference.target_engine.served import ServedTargetEngine
from specforge.inference.target_engine.sglang import SGLangTargetEngine
from specforge.inference.target_engine.vllm import VLLMTargetEngine
from specforge.inference.target_files import TargetFiles

Prompts = list[list[int]]
ENGINES: dict[str, type[ServedTargetEngine]] = {"vllm": VLLMTargetEngine, "sglang": SGLangTargetEngine}


def bare(engine: str, url: str, concurrency: int) -> Callable[[Prompts], list[Any]]:
    """Prefill prompts and ask for nothing; nothing is stored."""
    client = ServerClient(url, connections=concurrency)
    model = client.get("/v1/models")["data"][0]["id"]
    pool = ThreadPoolExecutor(concurrency)

    def one(ids: list[int]) -> None:
        if engine == "vllm":
            client.post("/v1/completions", {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0})
        else:
            client.post("/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": 1, "temperature": 0}})

    def run(prompts: Prompts) -> list[Any]:
        list(pool.map(one, prompts))
        return []

    return run


def capture(engine: ServedTargetEngine, policy: CapturePolicy) -> Callable[[Prompts], list[Any]]:
    """Prefill prompts and wait until their features are stored; returns what is to be deleted."""
    target = engine.target
    provenance = Provenance(target.name, target.fingerprint, "", policy, engine.dtype)
    count = iter(range(10**9))

    def run(prompts: Prompts) -> list[Any]:
        tasks = [PromptTask("", tuple(ids), (1,) * len(ids)) for ids in prompts]
        names = [f"bench-{next(count)}" for _ in prompts]
        return engine.deliver(tasks, names, provenance)

    return run


def main() -> None:
    """Run in turns, print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--plain")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layer_ids", type=int, nargs="+", default=[14, 22, 28])
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    files, policy = TargetFiles.find(args.target), CapturePolicy(tuple(args.layer_ids))
    options = {"url": args.url, "store": args.store, "concurrency": args.concurrency, "compare": False}
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {}
    with ENGINES[args.engine](files, args.dtype, **options) as engine:
        engine.check(policy)
        kinds = {"bare": bare(args.engine, args.url, args.concurrency), "capture": capture(engine, policy)}
        if args.plain:
            kinds["bare, plain server"] = bare(args.engine, args.plain, args.concurrency)
        for number in range(args.rounds + 1):  # the first round warms up
            names = list(kinds)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                prompts = torch.randint(files.vocab_size, (args.documents, args.tokens), generator=generator).tolist()
                started = time.perf_counter()
                stored = kinds[name](prompts)
                if number:
                    seconds.setdefault(name, []).append(time.perf_counter() - started)
                for found in stored:  # not timed, because it is the trainer that deletes
                    if isinstance(found, Exception):
                        raise found
                    engine._discard(found)
    tokens = args.documents * args.tokens
    rates = {name: [tokens / s for s in found] for name, found in seconds.items()}
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, rate in medians.items():
        low, high = min(rates[name]), max(rates[name])
        print(f"{name:20} {rate:9,.0f} tokens/s ({low:,.0f} to {high:,.0f}), {rate / medians['bare']:.1%} of bare")
    if args.json:
        args.json.write_text(json.dumps(rates, indent=2) + "\n")


if __name__ == "__main__":
    main()
