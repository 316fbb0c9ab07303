"""Overhead of a producer: tokens per second of forward passes, of captures, and of producing into each store.

    python -m benchmarks.producer --device cuda

The target has an 8B model's sizes and random weights, or is `--target FOLDER`. Documents have 256 to 2,048 tokens and
are batched as in a producer. A capture is a forward pass and the transfer of its features to the host. Producing is
what `specforge produce` does: lease, capture, check for NaN, checksum, put, flush, commit; `shards` is what `specforge
capture` does. Results are medians over repetitions in which the variants take turns, after a warm-up repetition.
Features are in `--folder`, by default in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.data_plane import start_store
from benchmarks.large import LLAMA_8B, random_tasks
from specforge.contracts import CapturePolicy, PromptTask, Provenance, SampleRef
from specforge.inference.producer import Producer
from specforge.inference.rollout_worker import RolloutWorker, plan_batches, sample_id
from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_files import TargetFiles
from specforge.runtime.addresses import open_backend
from specforge.runtime.control_plane.controller import DataFlowController
from specforge.runtime.control_plane.metadata import State
from specforge.runtime.control_plane.sqlite import SQLiteMetadataStore
from specforge.runtime.data_plane.local import ShardBackend
from specforge.runtime.data_plane.store import FeatureBackend, FeatureStore

HELD = 64  # prompts leased at a time


def write_model(config: dict[str, Any], folder: Path, device: str) -> None:
    """Write a target with random weights, one file per layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, x in shapes.items():
        part = "-".join(word for word in name.split(".") if word.isdigit()) or "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = (
            torch.ones(x.shape, dtype=torch.bfloat16)
            if x.ndim == 1
            else torch.empty(x.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02).cpu()
        )
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, tensors in files.items() for key in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def batches(tasks: Sequence[PromptTask], batch_tokens: int) -> Iterator[list[list[int]]]:
    """Token ids of these prompts, batched as in a producer."""
    for start in range(0, len(tasks), HELD):
        for batch in plan_batches(tasks[start : start + HELD], batch_tokens):
            yield [list(task.input_ids) for task in batch]


@torch.inference_mode()
def passes(engine: HFTargetEngine, work: Sequence[list[list[int]]]) -> None:
    """Run the target alone, over the same tokens: other tokens would give a GPU another clock rate."""
    for ids in work:
        padded = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.int64)
        for row, tokens in zip(padded, ids, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        engine.model.base_model(input_ids=padded.to(engine.device), use_cache=False)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()


def captures(engine: HFTargetEngine, work: Sequence[list[list[int]]], policy: CapturePolicy) -> None:
    """Run the target and transfer its features to the host."""
    for ids in work:
        engine.capture(ids, policy)


def produce(
    engine: HFTargetEngine,
    tasks: Sequence[PromptTask],
    provenance: Provenance,
    backend: FeatureBackend,
    batch_tokens: int,
) -> float:
    """Seconds that a producer takes to produce and commit all samples; they are deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        metadata = SQLiteMetadataStore(Path(folder) / "metadata.db")
        controller = DataFlowController(metadata, FeatureStore(backend))
        controller.ingest({sample_id(task, provenance): task for task in tasks}, 0, provenance)
        producer = Producer(
            controller,
            lambda _: engine,
            provenance.target_fingerprint,
            "producer",
            max_prompts=HELD,
            batch_tokens=batch_tokens,
        )
        commit, ends = controller.commit, [0.0]

        def timed_commit(refs: Iterable[tuple[str, SampleRef]]) -> list[bool]:
            new = commit(refs)
            ends.append(time.perf_counter())
            return new

        controller.commit = timed_commit  # type: ignore[method-assign]
        start = time.perf_counter()
        producer.run(threading.Event(), idle_seconds=0.1)
        seconds = ends[-1] - start
        assert controller.counts()[State.COMMITTED] == len(tasks)
        for key, uri in backend.stored():
            backend.remove(key, uri)
        metadata.close()
    return seconds


def capture_to_disk(
    engine: HFTargetEngine, tasks: Sequence[PromptTask], provenance: Provenance, folder: Path, batch_tokens: int
) -> float:
    """Seconds of `specforge capture` over all prompts; its output is deleted afterwards."""
    store = FeatureStore(ShardBackend(folder))
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as background:
        worker = RolloutWorker(engine, store, lambda refs: None, provenance, background=background)
        for _ in worker.produce(tasks, batch_tokens):
            pass
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(sides: dict[str, Callable[[], float]], repeat: int) -> dict[str, float]:
    """Median seconds of each variant, in turn, after a warm-up repetition."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeat + 1):
        for name, side in sides.items():
            seconds[name].append(side())
    return {name: statistics.median(x[1:]) for name, x in seconds.items()}


def main() -> None:
    """Measure; print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, help="a folder, instead of random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--batch_tokens", type=int, nargs="+", default=[1, 16384])
    parser.add_argument("--layer_ids", type=int, nargs="+", default=[2, 16, 29])
    parser.add_argument("--stores", nargs="+", default=["shared_dir", "mooncake"])
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    server = None
    try:
        if options.target is None:
            write_model(LLAMA_8B, folder / "target", options.device)
        files = TargetFiles.find(str(options.target or folder / "target"))
        policy = CapturePolicy(tuple(options.layer_ids), last_hidden_states=True)
        engine = HFTargetEngine(files, "bfloat16", options.device)
        tasks = random_tasks(files.vocab_size, options.tokens)
        tokens = sum(len(task.input_ids) for task in tasks)
        provenance = Provenance(files.name, files.fingerprint, "none", policy, "bfloat16")
        nbytes = tokens * (2 * (len(policy.layer_ids) + 1) * files.hidden_size + 5)
        backends: dict[str, FeatureBackend] = {}
        if "shared_dir" in options.stores:
            backends["shared_dir"] = open_backend(str(folder / "store"), create=True)
        if "mooncake" in options.stores:
            server, address = start_store(nbytes + (1 << 28))
            backends["mooncake"] = open_backend(address)
        found: dict[str, dict[str, float]] = {}
        for size in options.batch_tokens:
            work = list(batches(tasks, size))
            sides: dict[str, Callable[[], float]] = {
                "pass": lambda work=work: timed(lambda: passes(engine, work)),
                "capture": lambda work=work: timed(lambda: captures(engine, work, policy)),
                "shards": lambda size=size: capture_to_disk(engine, tasks, provenance, folder / "shards", size),
                **{
                    name: lambda b=backend, size=size: produce(engine, tasks, provenance, b, size)
                    for name, backend in backends.items()
                },
            }
            seconds = measure(sides, options.repeat)
            found[str(size)] = {name: tokens / x for name, x in seconds.items()}
            rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in found[str(size)].items())
            print(f"{size} tokens per pass at most: tokens/s: {rates}", flush=True)
    finally:
        if server is not None:
            server.terminate()
            server.wait()
        shutil.rmtree(folder)
    if options.json:
        result = {"tokens": tokens, "gigabytes": nbytes / 1e9, "tokens_per_second": found}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
