"""Throughput of writing and reading the feature store, compared with plain files.

    python -m benchmarks.feature_store --json store.json

Writing ends with fsync on both sides; the store also checks values and writes checksums and an index. Reading touches
every byte on both sides (a sum over the memory map); in the first epoch the store also compares checksums. Files come
from the page cache. Results are medians over repetitions in which the two sides take turns. `--clock cpu` counts CPU
time, for shared machines; writing then does not include the time of the disk.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specforge.contracts import CapturePolicy, Provenance, SampleRef
from specforge.runtime.data_plane.local import ShardBackend
from specforge.runtime.data_plane.store import FeatureStore

PROVENANCE = Provenance("random", "f", "t", CapturePolicy((1, 2, 3)), "bfloat16")


def make_samples(count: int, tokens: int, hidden: int) -> list[dict[str, Tensor]]:
    """Features of EAGLE-3 in bf16: three layers and the last hidden state."""
    g = torch.Generator().manual_seed(0)
    draw = lambda width: torch.randn(tokens, width, generator=g).bfloat16()  # noqa: E731
    return [{"aux_hidden_states": draw(3 * hidden), "last_hidden_states": draw(hidden)} for _ in range(count)]


def write_store(samples: list[dict[str, Tensor]], folder: Path) -> list[SampleRef]:
    """Store all samples, flushing every 128 MB as the rollout worker does."""
    store, refs = FeatureStore(ShardBackend(folder)), []
    for i, tensors in enumerate(samples):
        refs.append(store.put(f"s{i}", tensors, num_supervised=1, source="", provenance=PROVENANCE))
        if store.pending() >= 128 << 20:
            store.flush()
    store.flush()
    return refs


def write_plain(samples: list[dict[str, Tensor]], path: Path) -> None:
    """Write the same bytes to one file."""
    with path.open("wb") as file:
        for tensors in samples:
            for x in tensors.values():
                file.write(memoryview(x.view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())


def read_store(store: FeatureStore, refs: list[SampleRef]) -> int:
    """Touch every byte of every sample."""
    total = 0
    for ref in refs:
        tensors = store.get(ref)
        total += sum(touch(x.view(torch.uint8).numpy()) for x in tensors.values())
    return total


def read_plain(path: Path, sizes: list[int]) -> int:
    """Touch every byte of the plain file, one sample at a time."""
    total = offset = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        data = np.frombuffer(view, dtype=np.uint8)
        for size in sizes:
            total += touch(data[offset : offset + size])
            offset += size
        del data
    return total


def touch(data: np.ndarray) -> int:
    """Sum of the bytes as 64-bit words."""
    flat = data.reshape(-1)
    return int(flat[: flat.size // 8 * 8].view(np.uint64).sum())


def measure(
    samples: list[dict[str, Tensor]], sizes: list[int], folder: Path, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds of each side in one repetition."""

    def seconds(work: Callable[[], object]) -> float:
        start = clock()
        work()
        return clock() - start

    plain, shards = folder / "plain", folder / "shards"
    refs: list[SampleRef] = []
    row = {
        "write plain": seconds(lambda: write_plain(samples, plain)),
        "write store": seconds(lambda: refs.extend(write_store(samples, shards))),
    }
    store = FeatureStore(ShardBackend(shards))
    store.adopt(refs)
    read_plain(plain, sizes)
    row["read store, first epoch"] = seconds(lambda: read_store(store, refs))
    row["read plain"] = seconds(lambda: read_plain(plain, sizes))
    row["read store"] = seconds(lambda: read_store(store, refs))
    return row


def main() -> None:
    """Measure both sides in turn; print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples = make_samples(options.samples, options.tokens, options.hidden)
    sizes = [x.nbytes for tensors in samples for x in tensors.values()]
    times: dict[str, list[float]] = {}
    for number in range(options.repeat + 1):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            clock = time.process_time if options.clock == "cpu" else time.perf_counter
            row = measure(samples, sizes, Path(folder), clock)
        for name, value in row.items() if number else ():  # the first repetition warms up
            times.setdefault(name, []).append(value)
    rates = {name: sum(sizes) / statistics.median(values) / 1e9 for name, values in times.items()}
    result = {
        "gigabytes": sum(sizes) / 1e9,
        "gigabytes_per_second": rates,
        "write_ratio": rates["write store"] / rates["write plain"],
        "read_ratio": rates["read store"] / rates["read plain"],
        "read_ratio_first_epoch": rates["read store, first epoch"] / rates["read plain"],
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
