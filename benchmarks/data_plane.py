"""Throughput of the shared stores, compared with plain loops over the same medium.

    python -m benchmarks.data_plane --json data_plane.json

The shared folder is compared with copying one file per sample of the same size, each synced to disk. Mooncake is
compared with a loop of `put_from` and `get_into` over the same TCP transport, one call per sample, between buffers
registered in advance. The stores also check for NaN and compute and compare checksums. Results are medians over
repetitions in which the two sides take turns, and medians of the ratio in each repetition. Mooncake's repetitions are
spread over rounds with a new `specforge store up` and new connections, because the speed of a connection depends on
where the system places its threads.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.feature_store import PROVENANCE, make_samples
from specforge.contracts import SampleRef
from specforge.runtime.control_plane.streamed import StreamedSamples
from specforge.runtime.data_plane.mooncake import MooncakeAddress, MooncakeBackend, connect
from specforge.runtime.data_plane.safetensors_io import chunks
from specforge.runtime.data_plane.shared_dir import SharedDirBackend
from specforge.runtime.data_plane.store import FeatureStore

Times = dict[str, list[float]]


def put_all(store: FeatureStore, samples: list[dict[str, Tensor]]) -> list[SampleRef]:
    refs = [store.put(f"s{i}", x, num_supervised=1, source="", provenance=PROVENANCE) for i, x in enumerate(samples)]
    store.flush()
    return refs


def get_all(store: FeatureStore, refs: list[SampleRef]) -> None:
    """Read all samples with as many threads as a disaggregated run uses."""

    def get(ref: SampleRef) -> None:
        store.get(ref)

    with ThreadPoolExecutor(StreamedSamples.readers) as threads:
        deque(threads.map(get, refs), 0)


def copy_all(sources: list[Path], folder: Path) -> None:
    folder.mkdir()
    for path in sources:
        shutil.copyfile(path, folder / path.name)
    for path in sources:
        handle = os.open(folder / path.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def record(times: Times, name: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    times.setdefault(name, []).append(time.perf_counter() - start)
    return result


def shared_dir(samples: list[dict[str, Tensor]], times: Times) -> None:
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        sources = [folder / f"source-{i}" for i in range(len(samples))]
        for path, tensors in zip(sources, samples, strict=True):
            path.write_bytes(b"".join(chunks(tensors)))
        os.sync()
        record(times, "copy of files", lambda: copy_all(sources, folder / "copies"))
        store = FeatureStore(SharedDirBackend(folder / "store"))
        refs = record(times, "shared_dir put", lambda: put_all(store, samples))
        record(times, "reads of files", lambda: [path.read_bytes() for path in sources])
        record(times, "shared_dir get", lambda: get_all(store, refs))


def mooncake(
    samples: list[dict[str, Tensor]],
    backend: MooncakeBackend,
    client: Any,
    buffers: list[Tensor],
    times: Times,
    raw_first: bool,
) -> None:
    from mooncake.store import ReplicateConfig

    config = ReplicateConfig()
    config.with_hard_pin = True
    nbytes = len(b"".join(chunks(samples[0])))
    names = [f"raw/{time.monotonic_ns()}-{i}" for i in range(len(samples))]

    def each(call: Callable[[str, int], int], right: int) -> None:
        for i, name in enumerate(names):
            assert call(name, buffers[i].data_ptr()) == right

    def plain() -> None:
        record(times, "raw put_from", lambda: each(lambda k, p: client.put_from(k, p, nbytes, config), 0))
        record(times, "raw get_into", lambda: each(lambda k, p: client.get_into(k, p, nbytes), nbytes))
        for name in names:
            client.remove(name, force=True)

    def ours() -> None:
        store = FeatureStore(backend)
        refs = record(times, "mooncake put", lambda: put_all(store, samples))
        record(times, "mooncake get", lambda: get_all(store, refs))
        for ref in refs:
            store.delete(ref)

    for side in (plain, ours) if raw_first else (ours, plain):
        side()


def start_store(size: int) -> tuple[subprocess.Popen[str], str]:
    """A Mooncake store on this host, and its address."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    port, metrics = (probe.getsockname()[1] for probe in probes)
    for probe in probes:
        probe.close()
    words = ["store", "up", "--size", str(size), "--port", str(port), "--metrics_port", str(metrics)]
    process = subprocess.Popen([sys.executable, "-m", "specforge.cli.main", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split(": ")[0]


@contextmanager
def store_of_owners(size: int, owners: int) -> Iterator[str]:
    """The address of a Mooncake store whose memory several processes lend in equal parts."""
    server, address = start_store(size // owners)
    context = multiprocessing.get_context("spawn")
    barrier, over = context.Barrier(owners), context.Event()
    lenders = [context.Process(target=_lend, args=(address, size // owners, barrier, over)) for _ in range(owners - 1)]
    try:
        for process in lenders:
            process.start()
        barrier.wait(60)
        yield address
    finally:
        over.set()
        for process in lenders:
            process.join()
        server.terminate()
        server.wait()


def _lend(address: str, size: int, barrier: Any, over: Any) -> None:
    client = connect(MooncakeAddress.parse(address), size)
    barrier.wait(60)
    over.wait()
    client.close()


def mooncake_round(samples: list[dict[str, Tensor]], total: int, repeat: int, times: Times) -> None:
    """Repetitions with new clients of a new store, after a warm-up repetition."""
    process, address = start_store(total + (64 << 20))
    client, backend = connect(MooncakeAddress.parse(address)), MooncakeBackend(address)
    nbytes = len(b"".join(chunks(samples[0])))
    buffers = [torch.zeros(nbytes, dtype=torch.uint8) for _ in samples]
    for buffer in buffers:
        assert client.register_buffer(buffer.data_ptr(), nbytes) == 0
    mooncake(samples, backend, client, buffers, {}, raw_first=True)
    for turn in range(repeat):
        mooncake(samples, backend, client, buffers, times, raw_first=turn % 2 == 0)
    backend.close()
    client.close()
    process.terminate()
    process.wait()


def main() -> None:
    """Measure both sides in turn; print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--repeat", type=int, default=21)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of Mooncake, each with new connections")
    parser.add_argument("--only", choices=["shared_dir", "mooncake"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples = make_samples(options.samples, options.tokens, options.hidden)
    total = sum(x.nbytes for tensors in samples for x in tensors.values())
    times: Times = {}
    if options.only != "mooncake":
        shared_dir(samples, {})  # the first writes have to allocate memory
        for _ in range(options.repeat):
            shared_dir(samples, times)
    if options.only != "shared_dir":
        for _ in range(options.rounds):
            mooncake_round(samples, total, -(-options.repeat // options.rounds), times)
    rates = {name: total / statistics.median(found) / 1e9 for name, found in times.items()}
    pairs = [
        ("shared_dir put", "copy of files"),
        ("shared_dir get", "reads of files"),
        ("mooncake put", "raw put_from"),
        ("mooncake get", "raw get_into"),
    ]
    ratios = {
        f"{a} / {b}": statistics.median(y / x for x, y in zip(times[a], times[b], strict=True))
        for a, b in pairs
        if a in times
    }
    result = {"gigabytes": total / 1e9, "gigabytes_per_second": rates, "ratios": ratios}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
