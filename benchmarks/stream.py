"""Overhead per step of a disaggregated run: recording the trained samples, and waiting for the next batch.

    python -m benchmarks.stream

A producer in another process stores random features of an 8B target's widths (33 kB per token) as fast as it can. The
metadata (SQLite) and the store are in memory. The trainer only sleeps and makes both calls where a run makes them, so
their time would be added to its steps. Results are medians over the steps after the first ones.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from itertools import takewhile
from pathlib import Path
from typing import Literal

import torch

from benchmarks.data_plane import start_store
from benchmarks.large import RandomEngine, random_tasks
from specforge.contracts import CapturePolicy, Provenance, StrategySpec
from specforge.inference.producer import Producer
from specforge.inference.rollout_worker import expect
from specforge.runtime.addresses import open_backend
from specforge.runtime.control_plane.controller import DataFlowController
from specforge.runtime.control_plane.sqlite import SQLiteMetadataStore
from specforge.runtime.control_plane.streamed import Budget, StreamedSamples
from specforge.runtime.data_plane.loader import FeatureDataLoader
from specforge.runtime.data_plane.store import FeatureStore

Retain = Literal["until_durable", "until_trained"]
HIDDEN, SKIP = 4096, 6
MADE = Provenance("random", "f" * 8, "t" * 8, CapturePolicy((2, 16, 29)), "bfloat16")
SPEC = StrategySpec("any", MADE.capture, ("aux_hidden_states", "last_hidden_states"), 1, 1)


def open_control(folder: Path, store: str, retain: Retain = "until_durable") -> DataFlowController:
    return DataFlowController(
        SQLiteMetadataStore(folder / "metadata.db"), FeatureStore(open_backend(store, create=True)), retain=retain
    )


def produce(folder: Path, store: str) -> None:
    """Produce until the process is killed."""
    torch.set_num_threads(1)
    engine = RandomEngine(HIDDEN)
    Producer(open_control(folder, store), lambda _: engine, "f" * 8, "producer").run(threading.Event())


def waits(folder: Path, store: str, retain: Retain, options: argparse.Namespace) -> tuple[float, float]:
    """Median milliseconds to record a step, and until the next batch."""
    tasks = random_tasks(1000, options.steps * options.max_tokens)
    refs = expect(tasks, MADE, HIDDEN)
    control = open_control(folder, store, retain)
    stream = StreamedSamples(control, MADE, Budget(options.max_bytes, len(refs)))
    loader = FeatureDataLoader(refs, stream, SPEC, max_tokens=options.max_tokens)
    upcoming = takewhile(lambda batch: batch[0] == 0, loader.upcoming(0))
    stream.queue((epoch, batch) for epoch, _, batch in upcoming)
    producer = multiprocessing.get_context("spawn").Process(target=produce, args=(folder, store), daemon=True)
    producer.start()
    recording, waiting = [], []
    try:
        batches = iter(loader)
        for step in range(1, len(loader) + 1):
            start = time.perf_counter()
            batch = next(batches)
            waiting.append(time.perf_counter() - start)
            names = batch.sample_ids
            del batch
            time.sleep(options.step_seconds)
            start = time.perf_counter()
            stream.trained(names, 0, step)
            recording.append(time.perf_counter() - start)
    finally:
        producer.kill()
        producer.join()
    stream.close()
    return 1000 * statistics.median(recording[SKIP:]), 1000 * statistics.median(waiting[SKIP:])


def main() -> None:
    """Print one line per store and retention policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", nargs="+", default=["shared_dir", "mooncake"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--step_seconds", type=float, default=0.8)
    parser.add_argument("--max_tokens", type=int, default=8192)
    parser.add_argument("--max_bytes", type=int, default=2 << 30)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in options.stores:
        for retain in ("until_durable", "until_trained"):
            folder = Path(tempfile.mkdtemp(dir=options.folder))
            server = None
            try:
                store = str(folder / "store")
                if kind == "mooncake":
                    server, store = start_store(options.max_bytes + (1 << 30))
                recording, waiting = waits(folder, store, retain, options)
                print(f"{kind}, {retain}: recorded in {recording:.1f} ms, waited {waiting:.1f} ms", flush=True)
            finally:
                if server is not None:
                    server.terminate()
                    server.wait()
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
