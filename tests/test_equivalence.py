"""One data path: the same batches, losses and weights wherever features come from, bit for bit; and exact resumes."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import xxhash

from lightning_modules.eagle3 import Eagle3Module
from specforge.cli.main import main
from specforge.contracts import TrainBatch
from specforge.runtime.data_plane.feature_folder import FeatureFolder
from tests.disaggregated import STEPS, assert_nothing_is_left, disaggregated, places, producers
from tests.ranks import train_on_ranks
from tests.runtime.control_plane.redis_server import PASSWORD, redis_server
from tests.runtime.data_plane.mooncake_store import mooncake_store, needs_mooncake
from tests.test_training import assert_same_weights, fit, losses, start, wait_for_steps
from tests.tiny import recipe

pytestmark = pytest.mark.equivalence
needs_redis = [
    pytest.mark.redis,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="apt-get install redis-server"),
]

RUN = STEPS


@pytest.fixture(scope="module")
def features_alone(target, prompts, tmp_path_factory) -> Path:
    """Features of W1, captured one prompt at a time, as the online target reads them."""
    folder = tmp_path_factory.mktemp("alone")
    command = [
        "capture",
        "--target",
        target,
        "--prompts",
        prompts,
        "--output",
        folder,
        "--dtype",
        "float32",
        "--batch_tokens",
        1,
    ]
    assert main([str(word) for word in command]) == 0
    return folder


@pytest.fixture(scope="module")
def features_in_8_bits(target, prompts, tmp_path_factory) -> Path:
    """The same, stored in 8 bits."""
    folder = tmp_path_factory.mktemp("encoded")
    command = [
        "capture",
        "--target",
        target,
        "--prompts",
        prompts,
        "--output",
        folder,
        "--dtype",
        "float32",
        "--batch_tokens",
        1,
        "--encoding",
        "float8_e4m3fn",
    ]
    assert main([str(word) for word in command]) == 0
    return folder


def online(target: Path, prompts: Path, folder: Path, **options: object) -> Path:
    """A recipe of W2; ``options`` are the datamodule's."""
    data = {"prompts": str(prompts), "batch_size": 4, "dtype": "float32", **options}
    return recipe(target, prompts, folder, **RUN, data={"class_path": "OnlineDataModule", "init_args": data})


def digest(batch: TrainBatch) -> str:
    """Of everything in a batch."""
    hashed = xxhash.xxh3_64(repr((batch.lengths, batch.spans, batch.sample_ids, batch.cursor)).encode())
    for tensor in (batch.input_ids, batch.loss_mask, *(batch.features[name] for name in sorted(batch.features))):
        hashed.update(str((tensor.dtype, tensor.shape)).encode())
        hashed.update(tensor.contiguous().view(torch.uint8).numpy())
    return hashed.hexdigest()


def open_files() -> list[str]:
    """What this process has open."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # another thread may close it meanwhile
            found.append(os.readlink(path))
    return found


@pytest.fixture
def seen(monkeypatch) -> list[object]:
    """What training steps see: batches; and at each, this process's threads, sockets, and files opened since."""
    found: list[object] = []
    before = open_files()
    original = Eagle3Module.training_step

    def step(self, batch, index):
        threads = Counter(thread.name.rpartition("_")[0] for thread in threading.enumerate())
        descriptors = open_files()
        sockets = sum(name.startswith("socket:") for name in descriptors)
        files = {name for name in descriptors if name.endswith((".safetensors", ".db"))} - set(before)
        found.append((digest(batch), threads, sockets, files))
        return original(self, batch, index)

    monkeypatch.setattr(Eagle3Module, "training_step", step)
    return found


def validations(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.startswith("val/")} for row in rows if "val/tau" in row]


@pytest.fixture(scope="module")
def offline_run(target, features_alone, tmp_path_factory):
    return fit(recipe(target, features_alone, tmp_path_factory.mktemp("offline"), **RUN))


@pytest.mark.parametrize(
    "options",
    [{}, {"keep_bytes": 200_000}, {"max_bytes": 330_000}, {"prefetch": 0}],
    ids=["freed", "kept", "little room", "no prefetch"],
)
def test_online_is_offline_bit_for_bit(target, prompts, features_alone, tmp_path, offline_run, seen, options):
    fit(recipe(target, features_alone, tmp_path / "offline", **RUN))
    offline, seen[:] = list(seen), []
    run = fit(online(target, prompts, tmp_path / "online", **options))
    assert len(seen) == len(offline) == 18
    assert [x[0] for x in seen] == [x[0] for x in offline]
    for (_, threads, sockets, files), (_, threads_offline, sockets_offline, _) in zip(seen, offline, strict=True):
        assert threads <= threads_offline
        assert sockets <= sockets_offline
        assert not files
    assert losses(run) == losses(offline_run)
    assert len(validations(run)) == 3
    assert validations(run) == validations(offline_run)
    assert_same_weights(run, offline_run)


@pytest.mark.parametrize("step", [3, 10, 16])
def test_online_killed_and_resumed_is_offline_undisturbed(target, prompts, tmp_path, offline_run, step):
    path = online(target, prompts, tmp_path, keep_bytes=200_000)
    process = start(path)
    wait_for_steps(process, tmp_path / "run", step)
    process.kill()
    process.wait()
    run = fit(path, "--ckpt_path", "last")
    assert losses(run) == losses(offline_run)
    assert_same_weights(run, offline_run)


def test_a_run_may_move_from_disk_to_the_target_itself(target, prompts, features_alone, tmp_path, offline_run):
    path = recipe(target, features_alone, tmp_path, **RUN)
    fit(path, "--trainer.max_steps", 7)
    run = fit(online(target, prompts, tmp_path), "--ckpt_path", "last")
    assert losses(run) == losses(offline_run)
    assert_same_weights(run, offline_run)


def test_two_online_ranks_are_one(target, prompts, tmp_path):
    one = fit(online(target, prompts, tmp_path / "one", batch_size=8), "--trainer.max_steps", 6)
    words = ["--trainer.max_steps", "6", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    path = online(target, prompts, tmp_path / "two")
    train_on_ranks({"two": ["--config", str(path), *words]}, 2)
    assert_same_weights(one, tmp_path / "two" / "run", rtol=1e-3, atol=1e-4)


def test_too_little_memory_for_a_batch_is_said_before_training(target, prompts, tmp_path, capsys):
    path = online(target, prompts, tmp_path, max_bytes=50_000)
    assert main(["fit", "--config", str(path)]) == 2
    assert "max_bytes must be at least" in capsys.readouterr().err


def test_validation_alone_needs_no_training_prompts(target, prompts, tmp_path, offline_run, capsys):
    path = online(target, prompts, tmp_path)
    assert main(["validate", "--config", str(path), "--ckpt_path", str(offline_run / "checkpoints" / "last.ckpt")]) == 0
    assert "val/tau" in capsys.readouterr().out


# W3: producers elsewhere, over every metadata store.


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=needs_redis)])
def where(request, tmp_path) -> Iterator[dict[str, str]]:
    """A store, and states."""
    if request.param == "sqlite":
        yield places(tmp_path)
        return
    (tmp_path / "password").write_text(PASSWORD)
    with redis_server(tmp_path, "--requirepass", PASSWORD) as port:
        url = f"redis://127.0.0.1:{port}/0?password_file={tmp_path / 'password'}#{tmp_path.name}"
        yield {"store": str(tmp_path / "store"), "metadata": url}


def compare_8_bits(target, prompts, features: Path, tmp_path, seen, where) -> None:
    """Training on producers' features in 8 bits is training on those of disk."""
    offline_run = fit(recipe(target, features, tmp_path / "offline", **RUN))
    offline, seen[:] = [x[0] for x in seen], []
    with producers(target, where):
        run = fit(disaggregated(target, prompts, tmp_path / "run", where, encoding="float8_e4m3fn"))
    assert [x[0] for x in seen] == offline
    assert losses(run) == losses(offline_run)
    assert_same_weights(run, offline_run)
    assert_nothing_is_left(where, trained=18 * 4)


def test_8_bits_from_producers_are_those_of_disk(target, prompts, features_alone, features_in_8_bits, tmp_path, seen):
    whole, encoded = (
        sum(ref.nbytes for ref in FeatureFolder.open(folder / "train").refs)
        for folder in (features_alone, features_in_8_bits)
    )
    assert encoded < 0.4 * whole  # of fp32
    compare_8_bits(target, prompts, features_in_8_bits, tmp_path, seen, places(tmp_path))


@needs_mooncake
def test_8_bits_over_mooncake_are_those_of_disk(target, prompts, features_in_8_bits, tmp_path, seen):
    with mooncake_store() as (address, _):
        compare_8_bits(target, prompts, features_in_8_bits, tmp_path, seen, places(tmp_path) | {"store": address})


def test_8_bits_without_a_store_are_refused(target, prompts, tmp_path, capsys):
    assert main(["fit", "--config", str(online(target, prompts, tmp_path, encoding="float8_e4m3fn"))]) == 2
    assert "features are neither sent nor stored here" in capsys.readouterr().err


@needs_mooncake
def test_disaggregated_over_mooncake_is_offline_bit_for_bit(target, prompts, tmp_path, offline_run, where):
    with mooncake_store() as (address, _):
        where = where | {"store": address}
        with producers(target, where, 2):
            run = fit(disaggregated(target, prompts, tmp_path / "run", where))
        assert losses(run) == losses(offline_run)
        assert validations(run) == validations(offline_run)
        assert_same_weights(run, offline_run)
        assert_nothing_is_left(where, trained=18 * 4)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_samples": 24, "low_water": 1.0}, {"retain": "until_trained"}, {"prefetch": 0}],
    ids=["two producers", "little room", "until trained", "no prefetch"],
)
def test_disaggregated_is_offline_bit_for_bit(
    target, prompts, features_alone, tmp_path, offline_run, seen, where, options
):
    fit(recipe(target, features_alone, tmp_path / "offline", **RUN))
    offline, seen[:] = [x[0] for x in seen], []
    with producers(target, where, 2):
        run = fit(disaggregated(target, prompts, tmp_path / "run", where, **options))
    assert [x[0] for x in seen] == offline
    assert losses(run) == losses(offline_run)
    assert validations(run) == validations(offline_run)
    assert_same_weights(run, offline_run)
    assert_nothing_is_left(where, trained=18 * 4)
