"""`specforge capture` and `produce`: a target's features, in a folder or for a running trainer."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from specforge.cli.recipes import read_recipe
from specforge.console import say
from specforge.errors import UserError
from specforge.inference.capture import CaptureOptions
from specforge.inference.producer import Producer
from specforge.inference.target_engine import (
    Engine,
    HFTargetEngine,
    TargetEngine,
    engine_class,
    engine_config,
    engine_summary,
    on_device,
)
from specforge.inference.target_files import TargetFiles
from specforge.options import NonNegativeInt, PositiveInt, PositiveSeconds, Seconds
from specforge.runtime.addresses import is_there, open_backend, open_metadata, shown
from specforge.runtime.control_plane.controller import DataFlowController
from specforge.runtime.control_plane.metadata import MetadataStore, State
from specforge.runtime.data_plane.local import MemoryBackend
from specforge.runtime.data_plane.store import FeatureStore
from specforge.system import end_with_parent

_STOPS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class ProduceOptions:
    """How features are produced.

    Args:
        target: folder or hub name of the target; the trainer's.
        store: the trainer's data.store.
        metadata: the trainer's data.metadata.
        device: cpu, cuda, cuda:N or auto, for an engine in this process.
        engine: what runs the target: hf (transformers, in this process), vllm, sglang, http (`specforge target serve`),
            or the class path of your own; its options are --engine.NAME (see --engine.help hf).
        workers: number of processes, each of which opens the engine; 1 if the engine starts a server.
        name: stable name of this producer; after a restart under the same name it releases the prompts it had leased
            (default: generated).
        max_prompts: maximum number of prompts that a process leases at a time (default: 8, or 64 for a server).
        batch_tokens: maximum number of tokens of a forward pass, padding included; 1 takes each prompt by itself, so
            that its features do not depend on other prompts.
        lease_seconds: seconds without a sign of life after which a producer's prompts go to other producers.
        max_tries: number of times that a prompt is tried before it is given up.
        idle_seconds: exit after this many seconds without work (default: never).
    """

    target: str
    store: str
    metadata: str
    device: str = "auto"
    engine: Engine = HFTargetEngine
    workers: PositiveInt = 1
    name: str | None = None
    max_prompts: PositiveInt | None = None
    batch_tokens: PositiveInt = 1
    lease_seconds: PositiveSeconds = 60.0
    max_tries: PositiveInt = 3
    idle_seconds: Seconds | None = None

    @property
    def leases(self) -> int:
        """Maximum number of prompts that a process leases."""
        return self.max_prompts or (64 if engine_class(self.engine).independent else 8)


def capture(
    target: str | None = None,
    *,
    prompts: Path,
    options: CaptureOptions,
    output: Path | None = None,
    algorithm: str | None = None,
    layer_ids: list[NonNegativeInt] | None = None,
    recipe: Path | None = None,
) -> None:
    """Run the target over prepared prompts and keep the hidden states that an algorithm trains on.

    Args:
        target: folder or hub name of the target.
        prompts: folder from `specforge prepare`.
        options: how to capture.
        output: folder for the features; an interrupted capture resumes where it stopped.
        algorithm: capture the features that this algorithm needs (a name, or the class path of your own module;
            default: eagle3).
        layer_ids: decoder layers to keep instead of the algorithm's default.
        recipe: training recipe (file or shipped name) that sets target, output, algorithm and layers unless they are
            given.
    """
    from specforge import api  # imports Lightning, which `produce` does not need

    if recipe is not None:
        from lightning_modules.loading import captured_by

        found = captured_by(read_recipe(recipe), target, algorithm)
        target, algorithm = found.target, found.algorithm
        output, layer_ids = output or found.features, layer_ids or found.layer_ids
    if target is None or output is None:
        name = "target" if target is None else "output"
        raise UserError(f"capture: no {name}; set --{name}, or --recipe with a recipe that names it")
    algorithm = algorithm or "eagle3"
    with stopped_by_signals(_interrupt):
        captured = api.capture(
            target, prompts, output, options, algorithm=algorithm, layer_ids=layer_ids, progress=True
        )
    for split in captured:
        size = f"{split.nbytes / 1e9:.2f} GB" if split.nbytes >= 1e8 else f"{split.nbytes / 1e6:.2f} MB"
        say(f"{split.folder}: {split.samples:,} samples, {size} ({split.tokens:,} tokens captured by this run)")


def produce(options: ProduceOptions, plan: bool = False) -> None:
    """Produce features for a trainer in another process (`specforge fit` with DisaggregatedDataModule).

    The trainer decides which prompts are read and what is captured. SIGTERM or Ctrl-C stops the producer and releases
    its unfinished prompts; if it is killed, other producers take them over.

    Args:
        options: the trainer's addresses, and how to produce.
        plan: print the processes and estimates of memory and bandwidth, and start nothing.
    """
    options = replace(options, engine=on_device(options.engine, options.device), device="auto")
    _check_workers(options)
    if plan:
        say("\n".join(describe_plan(options)))
    else:
        run_producers(options)


def _check_workers(options: ProduceOptions) -> None:
    """Reject several processes that would each start a server, on the same devices and with the same log."""
    starts_server = hasattr(engine_class(options.engine), "server")
    if options.workers > 1 and starts_server and not engine_config(options.engine)["init_args"].get("url"):
        raise UserError(
            f"produce: --workers {options.workers} would start as many servers on the same devices, though one answers "
            "many requests at a time; leave out --workers, or start a server with `specforge target serve` and name it "
            "by --engine.url"
        )


def _interrupt() -> None:
    raise KeyboardInterrupt


@contextmanager
def stopped_by_signals(stop: Callable[[], object]) -> Iterator[None]:
    """Call ``stop`` on SIGTERM and Ctrl-C; a second Ctrl-C interrupts."""
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


def run_producers(options: ProduceOptions, stop: threading.Event | None = None) -> None:
    """Produce until a signal arrives or ``stop`` is set, or for ``idle_seconds`` without work.

    Raises:
        UserError: a store or the target cannot be used, or a process of several failed.
    """
    if options.workers > 1:
        _run_processes(options)
        return
    files = TargetFiles.find(options.target)
    _check_places(options)
    owner = options.name or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    features = FeatureStore(open_backend(options.store, create=True))
    controller = DataFlowController(
        open_metadata(options.metadata, create=True),
        features,
        lease_seconds=options.lease_seconds,
        max_tries=options.max_tries,
    )
    engines: dict[str, TargetEngine] = {}

    def engine(dtype: str) -> TargetEngine:
        if dtype not in engines:
            engines[dtype] = options.engine(files, dtype)
        return engines[dtype]

    producer = Producer(
        controller,
        engine,
        files.fingerprint,
        owner,
        max_prompts=options.leases,
        batch_tokens=options.batch_tokens,
        vocab_size=files.vocab_size,
    )
    stop = stop or threading.Event()
    logging.getLogger("specforge").setLevel(logging.INFO)
    say(f"{owner}: {files.name} by {engine_summary(options.engine)}, waiting for prompts in {shown(options.metadata)}")
    try:
        with stopped_by_signals(stop.set):
            producer.run(stop, options.idle_seconds)
    finally:
        for opened in engines.values():
            opened.close()
    controller.metadata.close()
    say(f"{owner}: {producer.produced:,} samples produced")


def _check_places(options: ProduceOptions) -> None:
    """Check the stores before anything is created; a run creates the store before its metadata file."""
    begun = "://" not in options.metadata and is_there(options.metadata)  # asked first: another producer may begin now
    if is_there(options.store):
        if open_backend(options.store).stored() and not is_there(options.metadata):
            raise UserError(
                f"metadata {options.metadata}: no such file, but store {options.store} holds features; name the "
                "metadata of the run that they belong to; if no run uses the store, a killed command has left them: "
                "empty it"
            )
    elif begun:
        raise UserError(
            f"store {options.store}: no such folder, but metadata {options.metadata} exists; name the trainer's store"
        )


def _run_processes(options: ProduceOptions) -> None:
    processes = []
    for number in range(options.workers):
        name = f"{options.name}-{number}" if options.name else None
        fields = vars(replace(options, workers=1, name=name))
        fields = fields | {"engine": json.dumps(engine_config(options.engine), default=str)}
        words = [word for key, value in fields.items() if value is not None for word in (f"--{key}", str(value))]
        # -P: a file in the current folder must not shadow a module.
        command = [sys.executable, "-P", "-m", "specforge.cli.main", "produce", *words]
        processes.append(subprocess.Popen(command, preexec_fn=end_with_parent(os.getpid())))

    def stop() -> None:
        for process in processes:
            process.send_signal(signal.SIGTERM)

    with stopped_by_signals(stop):
        failed = sum(process.wait() != 0 for process in processes)
    if failed:
        raise UserError(
            f"produce: {failed} of {options.workers} processes failed; other producers take over their prompts"
        )


def describe_plan(options: ProduceOptions) -> list[str]:
    """What `produce` would start, and the memory and bandwidth it would take."""
    files = TargetFiles.find(options.target)
    weights = sum(path.stat().st_size for path in set(files.weight_files.values()))
    lines = [
        f"{options.workers} process{'es' if options.workers > 1 else ''} of {files.name} ({files.fingerprint[:8]}) by "
        f"{engine_summary(options.engine)}, each with up to {options.leases} leased prompts; the target has "
        f"{weights / 1e9:.2f} GB of weights",
        f"metadata: {shown(options.metadata)}",
        f"features: {options.store}{_free_space(options.store)}",
    ]
    sizes = {"three layers and the last hidden states": 4 * files.hidden_size * 2}
    if is_there(options.metadata):
        sizes = _sizes(open_metadata(options.metadata)) or sizes
    for what, size in sizes.items():
        lines.append(
            f"{what}: {size:,} bytes per token; every 1,000 tokens/s write {size / 1e3:.1f} MB/s to the store, and the "
            "trainer reads the same amount"
        )
    return lines


def _sizes(metadata: MetadataStore) -> dict[str, int]:
    """Bytes per token of the samples produced so far, by what is captured."""
    found: dict[str, int] = {}
    controller = DataFlowController(metadata, FeatureStore(MemoryBackend()))
    for ref in controller.references((State.COMMITTED, State.DELIVERED, State.TRAINED, State.DURABLE)):
        capture = ref.provenance.capture
        last = " and the last hidden states" if capture.last_hidden_states else ""
        found.setdefault(f"layers {list(capture.layer_ids)}{last}", ref.nbytes // max(1, ref.num_tokens))
    metadata.close()
    return found


def _free_space(store: str) -> str:
    path = Path(store.removeprefix("file://")).expanduser()
    while not path.exists() and path != path.parent:
        path = path.parent
    return f" ({shutil.disk_usage(path).free / 1e9:,.0f} GB free)" if "://" not in store else ""
