"""Producers in threads, and recipes of W3, for tests."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from specforge.inference.producer import Producer
from specforge.inference.target_engine import Engine, HFTargetEngine
from specforge.inference.target_files import TargetFiles
from specforge.runtime.addresses import open_backend, open_metadata
from specforge.runtime.control_plane.controller import DataFlowController
from specforge.runtime.control_plane.metadata import STATES, State
from specforge.runtime.data_plane.store import FeatureStore
from tests.tiny import recipe

STEPS = {
    "trainer__max_steps": 18,
    "checkpoint": {"every_n_train_steps": 4},
    "trainer__check_val_every_n_epoch": None,
    "trainer__val_check_interval": 6,
    "model__init_args__optimizer": {"lr": 1e-3, "schedule": "constant"},
}


def places(folder: Path) -> dict[str, str]:
    """A store and a metadata file in a folder."""
    return {"store": str(folder / "store"), "metadata": str(folder / "metadata.db")}


def disaggregated(
    target: Path, prompts: Path, folder: Path, where: dict[str, str], changes: dict | None = None, **options: object
) -> Path:
    """A recipe of W3; ``options`` are the datamodule's."""
    data = {"prompts": str(prompts), "batch_size": 4, "dtype": "float32", "wait_seconds": 60, **where, **options}
    return recipe(
        target,
        prompts,
        folder,
        **STEPS | (changes or {}),
        data={"class_path": "DisaggregatedDataModule", "init_args": data},
    )


def control(where: dict[str, str], **options: object) -> DataFlowController:
    """A controller of its own, as another process has."""
    store = FeatureStore(open_backend(where["store"], create=True))
    return DataFlowController(open_metadata(where["metadata"], create=True), store, **options)


@contextmanager
def producers(
    target: Path,
    where: dict[str, str],
    count: int = 1,
    dtype: str = "float32",
    engine: Engine = HFTargetEngine,
    **options: object,
) -> Iterator[list[Producer]]:
    """Run producers in threads; what they raise is raised here."""
    files = TargetFiles.find(str(target))
    stop, errors = threading.Event(), []
    engines = [engine(files, dtype) for _ in range(count)]  # transformers loads in one thread at a time
    made = [
        Producer(
            control(where),
            lambda _, i=i: engines[i],
            files.fingerprint,
            f"producer-{i}",
            **{"max_prompts": 4, **options},
        )
        for i in range(count)
    ]

    def work(producer: Producer) -> None:
        torch.set_num_threads(1)
        try:
            producer.run(stop)
        except BaseException as error:
            errors.append(error)
            if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # a run that waits for samples would never end
                os.kill(os.getpid(), signal.SIGTERM)

    threads = [threading.Thread(target=work, args=[producer]) for producer in made]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        for producer in made:
            producer.controller.metadata.close()
        assert not errors, errors


def stored_bytes(folder: Path) -> int:
    """Of all tensors in a store, finished or not."""
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                size = path.stat().st_size
                header = int.from_bytes(path.open("rb").read(8), "little") if size >= 8 else 0
                total += max(0, size - 8 - header)
        except FileNotFoundError:
            continue
    return total


def assert_nothing_is_left(where: dict[str, str], trained: int) -> None:
    """So many samples are durable, and there is no other sample, lease or byte."""
    controller = control(where)
    assert controller.counts() == {**dict.fromkeys(STATES, 0), State.DURABLE: trained}
    assert controller.features.backend.stored() == []
    controller.metadata.close()
