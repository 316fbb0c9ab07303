"""`specforge produce` and `specforge status`: processes that produce, their plan, and how the whole is doing."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from specforge.errors import UserError
from specforge.inference.producer import Producer
from specforge.inference.target_engine import HFTargetEngine, TargetEngine
from specforge.inference.target_engine.http import printable
from specforge.inference.target_files import TargetFiles
from specforge.runtime.addresses import is_there, open_backend, open_metadata, shown
from specforge.runtime.control_plane.controller import DataFlowController
from specforge.runtime.control_plane.metadata import STATES, MetadataStore, State
from specforge.runtime.control_plane.streamed import bottleneck
from specforge.runtime.data_plane.local import MemoryBackend
from specforge.runtime.data_plane.store import FeatureStore
from specforge.system import end_with_parent

_STOPS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class ProduceOptions:
    """The options of `specforge produce`; see there."""

    target: str
    store: str
    metadata: str
    device: str
    workers: int
    name: str | None
    max_prompts: int
    batch_tokens: int
    lease_seconds: float
    max_tries: int
    idle_seconds: float | None


@contextmanager
def _stopped_by_signals(stop: Callable[[], object]) -> Iterator[None]:
    """Call ``stop`` at SIGTERM and Ctrl-C; a second Ctrl-C interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    old = {number: signal.signal(number, handle) for number in _STOPS}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run_producers(options: ProduceOptions, say: Callable[[str], object]) -> None:
    """Produce until a signal comes.

    Raises:
        UserError: a store or the target cannot be used, or a process of several failed.
    """
    if options.workers > 1:
        _run_processes(options)
        return
    files = TargetFiles.find(options.target)
    owner = options.name or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    controller = DataFlowController(
        open_metadata(options.metadata),
        FeatureStore(open_backend(options.store)),
        lease_seconds=options.lease_seconds,
        max_tries=options.max_tries,
    )
    engines: dict[str, TargetEngine] = {}

    def engine(dtype: str) -> TargetEngine:
        if dtype not in engines:
            engines[dtype] = HFTargetEngine(files, dtype, options.device)
        return engines[dtype]

    producer = Producer(
        controller,
        engine,
        files.fingerprint,
        owner,
        max_prompts=options.max_prompts,
        batch_tokens=options.batch_tokens,
        vocab_size=files.vocab_size,
    )
    stop = threading.Event()
    logging.getLogger("specforge").setLevel(logging.INFO)
    say(f"{owner}: {files.name} on {options.device} waits for prompts of {shown(options.metadata)}")
    with _stopped_by_signals(stop.set):
        producer.run(stop, options.idle_seconds)
    controller.metadata.close()
    say(f"{owner}: {producer.produced:,} samples produced")


def _run_processes(options: ProduceOptions) -> None:
    processes = []
    for number in range(options.workers):
        name = f"{options.name}-{number}" if options.name else None
        fields = asdict(replace(options, workers=1, name=name))
        words = [word for key, value in fields.items() if value is not None for word in (f"--{key}", str(value))]
        # -P: a file of the current folder must not pass for a module.
        command = [sys.executable, "-P", "-m", "specforge.cli.main", "produce", *words]
        processes.append(subprocess.Popen(command, preexec_fn=end_with_parent(os.getpid())))

    def stop() -> None:
        for process in processes:
            process.send_signal(signal.SIGTERM)

    with _stopped_by_signals(stop):
        failed = sum(process.wait() != 0 for process in processes)
    if failed:
        raise UserError(f"produce: {failed} of {options.workers} processes failed; what they held goes to others")


def describe_plan(options: ProduceOptions) -> list[str]:
    """What would start, and what it would take."""
    files = TargetFiles.find(options.target)
    weights = sum(path.stat().st_size for path in set(files.weight_files.values()))
    lines = [
        f"{options.workers} process{'es' if options.workers > 1 else ''} of {files.name} ({files.fingerprint[:8]}) on "
        f"{options.device}, each with {weights / 1e9:.2f} GB of weights and {options.max_prompts} prompts in hand",
        f"metadata: {shown(options.metadata)}",
        f"features: {options.store}{_free_space(options.store)}",
    ]
    sizes = {"three layers and the last states": 4 * files.hidden_size * 2}
    if is_there(options.metadata):
        sizes = _sizes(open_metadata(options.metadata, create=False)) or sizes
    for what, size in sizes.items():
        lines.append(
            f"{what}: {size:,} bytes a token; every 1,000 tokens/s write {size / 1e3:.1f} MB/s to the store, and the "
            "trainer reads as much"
        )
    return lines


def _sizes(metadata: MetadataStore) -> dict[str, int]:
    """Bytes a token of what has been produced, by what is captured."""
    found: dict[str, int] = {}
    controller = DataFlowController(metadata, FeatureStore(MemoryBackend()))
    for ref in controller.references((State.COMMITTED, State.DELIVERED, State.TRAINED, State.DURABLE)):
        capture = ref.provenance.capture
        last = " and the last states" if capture.last_hidden_states else ""
        found.setdefault(f"layers {list(capture.layer_ids)}{last}", ref.nbytes // max(1, ref.num_tokens))
    metadata.close()
    return found


def _free_space(store: str) -> str:
    path = Path(store.removeprefix("file://")).expanduser()
    while not path.exists() and path != path.parent:
        path = path.parent
    return f" ({shutil.disk_usage(path).free / 1e9:,.0f} GB free)" if "://" not in store else ""


def describe_status(store: str, metadata: str, seconds: float, revive: bool) -> list[str]:
    """States, rates, bytes and dead letters of a run.

    Args:
        store: address of the features.
        metadata: address of the states.
        seconds: how long to watch.
        revive: queue the dead letters again.
    """
    controller = DataFlowController(
        open_metadata(metadata, create=False), FeatureStore(open_backend(store, create=False))
    )
    before, since = controller.counts(), time.monotonic()
    time.sleep(seconds)  # the rates are what happens meanwhile
    counts, elapsed = controller.counts(), time.monotonic() - since
    produced, trained = (
        (sum(counts[s] for s in states) - sum(before[s] for s in states)) / max(elapsed, 1e-9)
        for states in ((State.COMMITTED, State.DELIVERED, State.TRAINED, State.DURABLE), (State.TRAINED, State.DURABLE))
    )
    held = controller.references((State.COMMITTED, State.DELIVERED, State.TRAINED))
    held = [ref for ref in held if controller.features.holds(ref)]
    dead = controller.dead_letters()
    lines = [
        "samples: " + ", ".join(f"{counts[state]:,} {state}" for state in STATES),
        f"features: {sum(ref.nbytes for ref in held) / 1e6:,.1f} MB of {len(held):,} samples in the store",
        f"rates: {produced:.1f} samples/s produced, {trained:.1f} trained",
        bottleneck(counts, produced, controller.unfinished(), controller.silent()),
        *(printable(f"dead: {x.key} after {x.tries} tries: {x.reason}", 2000) for x in dead),
    ]
    if dead and revive:
        controller.revive([letter.key for letter in dead])
        lines.append(f"{len(dead)} queued again")
    controller.metadata.close()
    return lines
