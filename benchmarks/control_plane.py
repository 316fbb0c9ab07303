"""The control plane: samples a second committed and delivered, and what it costs a training step.

    python -m benchmarks.control_plane --json control.json

Throughput: prompts of 512 tokens are ingested beforehand; timed is lease, commit, deliver, trained and durable
of batches, references encoded and decoded, over an in-memory feature store that is told of every one. Redis is a
server on the loopback, started here. Overhead: what deliver and trained of one batch of 8 samples take, relative to a
step of 50 ms. Medians of the repetitions, the stores in turn. ``--clock cpu`` counts this process's CPU time (so not
the Redis server's) instead of the wall's, for machines that others use.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from specforge.contracts import CapturePolicy, FeatureSpec, PromptTask, Provenance, SampleRef, content_id
from specforge.runtime.control_plane.controller import DataFlowController
from specforge.runtime.control_plane.metadata import MetadataStore
from specforge.runtime.control_plane.redis import RedisMetadataStore
from specforge.runtime.control_plane.sqlite import SQLiteMetadataStore
from specforge.runtime.data_plane.local import MemoryBackend
from specforge.runtime.data_plane.store import FeatureStore
from tests.runtime.control_plane.memory import MemoryMetadataStore
from tests.runtime.control_plane.redis_server import redis_server

PROVENANCE = Provenance("random", "f" * 32, "t" * 32, CapturePolicy((2, 16, 29)), "bfloat16")
SPECS = tuple(
    FeatureSpec(name, dtype, (512, *rest))
    for name, dtype, rest in (
        ("aux_hidden_states", "bfloat16", (12288,)),
        ("input_ids", "int32", ()),
        ("last_hidden_states", "bfloat16", (4096,)),
        ("loss_mask", "uint8", ()),
    )
)


class Tensorless(MemoryBackend):
    """Says that it holds whatever is asked for, so that only the control plane is timed."""

    def holds(self, key: str, uri: str) -> bool:
        """Yes."""
        return True


def make_ref(sample_id: str) -> SampleRef:
    """What a worker would have put."""
    size = 512 * (2 * 16384 + 5)
    uri = f"{sample_id[:2]}/{sample_id}.1-0123456789abcdef.safetensors"
    return SampleRef(sample_id, 1, SPECS, 512, 400, size, "0" * 16, uri, "data.jsonl, line 1", PROVENANCE)


def throughput(
    metadata: MetadataStore, samples: int, batch: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, float], dict[str, float]]:
    """Samples a second of each stage, and milliseconds of deliver and trained at a step of 8 samples."""
    control = DataFlowController(metadata, FeatureStore(Tensorless()))
    names = [content_id(i) for i in range(samples)]
    task = PromptTask("t" * 32, tuple(range(512)), (1,) * 512, "data.jsonl, line 1")
    spent: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], object]) -> object:
        start = clock()
        result = work()
        spent[stage] = spent.get(stage, 0.0) + clock() - start
        return result

    for i in range(0, samples, batch):
        part = {name: task for name in names[i : i + batch]}
        timed("ingest", lambda part=part: control.ingest(part))
    keys: list[str] = []
    while leased := timed("lease", lambda: control.lease("worker", batch)):
        refs = [(x.key, make_ref(x.sample_id)) for x in leased]
        timed("commit", lambda refs=refs: control.commit(refs))
        keys += [x.key for x in leased]
    steps: list[float] = []
    for step, i in enumerate(range(0, 800, 8)):
        start = clock()
        control.deliver(keys[i : i + 8])
        control.trained(keys[i : i + 8], step)
        steps.append(1e3 * (clock() - start))
    for step, i in enumerate(range(800, len(keys), batch), 1000):
        part = keys[i : i + batch]
        timed("deliver", lambda part=part: control.deliver(part))
        timed("trained", lambda part=part, step=step: control.trained(part, step))
        timed("durable", lambda step=step: control.durable(step))
    rates = {stage: samples / seconds for stage, seconds in spent.items()}
    rest = (samples - 800) / samples
    for stage in ("deliver", "trained", "durable"):
        rates[stage] = rates.get(stage, 0.0) * rest
    rates["commit and deliver"] = 1 / (1 / rates["commit"] + 1 / rates["deliver"]) if keys else 0.0
    return rates, {"median": statistics.median(steps), "largest": max(steps)} if keys else {}


@contextmanager
def opened(kind: str, folder: Path) -> Iterator[MetadataStore]:
    """An empty store."""
    if kind == "redis":
        with redis_server(folder) as port:
            yield RedisMetadataStore(f"redis://127.0.0.1:{port}/0")
    elif kind == "sqlite":
        yield SQLiteMetadataStore(folder / "metadata.db")
    else:
        yield MemoryMetadataStore()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    runs: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {}
    for _ in range(options.repeats):
        for kind in ("memory", "sqlite", "redis"):
            with tempfile.TemporaryDirectory() as folder, opened(kind, Path(folder)) as store:
                runs.setdefault(kind, []).append(throughput(store, options.samples, options.batch, clock))
    result: dict[str, object] = {"samples": options.samples, "batch": options.batch}
    for kind, found in runs.items():
        rates = {stage: statistics.median(r[stage] for r, _ in found) for stage in found[0][0]}
        step = {name: statistics.median(s[name] for _, s in found) for name in found[0][1]}
        result[kind] = {"samples a second": rates, "step, ms": step}
        line = ", ".join(f"{stage} {rate:,.0f}" for stage, rate in rates.items())
        share = step["median"] / 50
        print(f"{kind}: samples/s: {line}; step of 8: {step['median']:.2f} ms, {share:.2%} of 50 ms", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
