"""The control plane under load: 100,000 queued prompts, 64 producers and 16 ranks on a real Redis, without models.

    python -m benchmarks.control_plane_load --json load.json

Each producer and each rank is a process with a connection of its own. A producer leases prompts, waits ``--pause``
seconds for each lease, as if it computed, and commits. A rank asks for its batches in their order, records them as
trained, and queues as many new prompts; the first rank records a checkpoint every ``--checkpoint`` steps. Prompts have
512 tokens. First, one client alone leases prompts at growing lengths of the queue: the times should be equal. Then
everything runs twice: without pauses, which gives the throughput, and with them, which gives the latencies at a steady
rate. Redis is a server on the loopback, started here, without a disk.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import redis

from benchmarks.control_plane import Tensorless, make_ref
from specforge.contracts import PromptTask, content_id
from specforge.runtime.control_plane.controller import DataFlowController, sample_key
from specforge.runtime.control_plane.metadata import State, StateError
from specforge.runtime.control_plane.redis import RedisMetadataStore
from specforge.runtime.data_plane.store import FeatureStore
from tests.runtime.control_plane.redis_server import redis_server

TASK = PromptTask("t" * 32, tuple(range(512)), (1,) * 512, "data.jsonl, line 1")
BATCH = 8  # samples of a step of a rank
POLL = 0.01  # seconds between two questions for a batch, as in a trainer
Times = dict[str, list[float]]
T = TypeVar("T")


def connect(port: int) -> DataFlowController:
    return DataFlowController(RedisMetadataStore(f"redis://127.0.0.1:{port}/0"), FeatureStore(Tensorless()))


def timed(times: Times, what: str, work: Callable[[], T]) -> T:
    start = time.perf_counter()
    result = work()
    times.setdefault(what, []).append(time.perf_counter() - start)
    return result


def batches(rank: int, ranks: int) -> Iterator[list[str]]:
    """Sample ids of a rank's batches; those of all ranks together are the numbers in order."""
    number = rank
    while True:
        yield [content_id(i) for i in range(number * BATCH, (number + 1) * BATCH)]
        number += ranks


def produce(port: int, owner: str, leases: int, pause: float, end: Any, answer: Any) -> None:
    """What a producer does until the end."""
    control, times = connect(port), dict[str, list[float]]()
    while not end.is_set():
        leased = timed(times, "lease", lambda: control.lease(owner, leases))
        time.sleep(pause if leased else POLL)
        timed(times, "commit", lambda leased=leased: control.commit((x.key, make_ref(x.sample_id)) for x in leased))
    control.release(owner)
    answer.put((times, private_bytes()))


def train(port: int, rank: int, options: argparse.Namespace, end: Any, answer: Any) -> None:
    """What a rank does until the end."""
    control, times = connect(port), dict[str, list[float]]()
    queued = math.ceil(options.queued / BATCH / options.ranks)  # batches of this rank
    new = islice(batches(rank, options.ranks), queued, None)
    for step, names in enumerate(batches(rank, options.ranks), 1):
        keys = [sample_key(name, 0) for name in names]
        while not end.is_set():
            with suppress(StateError):
                timed(times, "deliver", lambda keys=keys: control.deliver(keys))
                break
            time.sleep(POLL)
        if end.is_set():
            break
        timed(times, "trained", lambda keys=keys, step=step: control.trained(keys, step))
        timed(times, "ingest", lambda: control.ingest(dict.fromkeys(next(new), TASK)))
        if rank == 0 and step % options.checkpoint == 0:
            timed(times, "durable", lambda step=step: control.durable(step - 1))
    answer.put((times, private_bytes()))


def private_bytes() -> int:
    """Memory of this process that it does not share with the one that started it."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def fill(control: DataFlowController, upto: int, alone: dict[int, float]) -> None:
    """Queue prompts; at 1,000, 10,000, ..., time the leases of one client that is alone."""
    done = 0
    for size in sorted({10**power for power in range(3, 9) if 10**power < upto} | {upto}):
        for i in range(done, size, 1000):
            control.ingest(dict.fromkeys(map(content_id, range(i, min(i + 1000, size))), TASK))
        done, times = size, dict[str, list[float]]()
        for _ in range(min(100, size // BATCH)):
            timed(times, "lease", lambda: control.lease("alone", BATCH))
        control.release("alone")
        alone[size] = 1000 * statistics.median(times["lease"])


def under_load(port: int, pause: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run all processes for some seconds over a queue that is filled."""
    fork = multiprocessing.get_context("fork")  # they share what is imported
    end, answer, control = fork.Event(), fork.Queue(), connect(port)
    processes = [
        fork.Process(target=produce, args=(port, f"producer-{i}", options.leases, pause, end, answer))
        for i in range(options.producers)
    ] + [fork.Process(target=train, args=(port, rank, options, end, answer)) for rank in range(options.ranks)]
    for process in processes:
        process.start()
    time.sleep(2 * pause + 2)  # until all of them work
    trained, cpu, since = count_trained(control), redis_info(port)["cpu"], time.perf_counter()
    time.sleep(options.seconds)
    elapsed = time.perf_counter() - since
    result = {
        "samples a second": (count_trained(control) - trained) / elapsed,
        "CPU share of Redis": (redis_info(port)["cpu"] - cpu) / elapsed,
    }
    result["queued at the end"] = control.counts()[State.QUEUED]
    end.set()
    answers = [answer.get() for _ in processes]
    for process in processes:
        process.join()
    times: Times = {}
    for found, _ in answers:
        for what, values in found.items():
            times.setdefault(what, []).extend(values)
    result["ms"] = {what: quantiles(values) for what, values in sorted(times.items())}
    result["private MiB of a process"] = statistics.median(size for _, size in answers) / 2**20
    return result


def count_trained(control: DataFlowController) -> int:
    counts = control.counts()
    return counts[State.TRAINED] + counts[State.DURABLE]


def redis_info(port: int) -> dict[str, float]:
    """CPU seconds and MiB of the server."""
    info: Any = redis.Redis(port=port).info()
    return {
        "cpu": info["used_cpu_user"] + info["used_cpu_sys"],
        "memory": info["used_memory"] / 2**20,
        "peak": info["used_memory_peak"] / 2**20,
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Calls, and their p50, p99 and largest in milliseconds."""
    ordered = sorted(seconds)
    found = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    values = {name: 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in found.items()}
    return {"calls": len(ordered), **values}


def measure(pause: float, options: argparse.Namespace) -> dict[str, Any]:
    """Fill a new server, and put it under load."""
    with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as port:
        control, alone = connect(port), dict[int, float]()
        start = time.perf_counter()
        fill(control, options.queued, alone)
        filled = {"seconds": time.perf_counter() - start, "Redis, MiB": redis_info(port)["memory"]}
        control.metadata.close()
        loaded = under_load(port, pause, options)
        peak = redis_info(port)["peak"]
        return {"alone, ms a lease": alone, "filled": filled, **loaded, "Redis, at most, MiB": peak}


def main() -> None:
    """Print one table for each load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queued", type=int, default=100_000)
    parser.add_argument("--producers", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--leases", type=int, default=8, help="prompts that a producer leases at a time")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds that a producer takes for them")
    parser.add_argument("--checkpoint", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "cores": os.cpu_count(),
    }
    for name, pause in (("saturated", 0.0), ("paced", options.pause)):
        result[name] = found = measure(pause, options)
        print(f"{name}: {found['samples a second']:,.0f} samples/s", flush=True)
        for what, values in found["ms"].items():
            line = ", ".join(f"{key} {value:,.2f}" for key, value in values.items() if key != "calls")
            print(f"  {what:8} {line} ms ({values['calls']:,} calls)")
        print(f"  {json.dumps({key: value for key, value in found.items() if key not in ('ms', 'samples a second')})}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
