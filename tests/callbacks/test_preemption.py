"""SIGTERM and Ctrl-C while a run waits, and data that stops coming: saved and said at once, and it goes on from there.

Runs are in this process; another thread sends the signal when the run is where the test wants it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from datamodules import OfflineDataModule
from lightning_modules.eagle3 import Eagle3Module
from specforge import stopping
from specforge.cli.main import main
from specforge.errors import UserError
from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_server import TargetServer, make_token
from specforge.runtime.data_plane.loader import FeatureDataLoader
from specforge.runtime.data_plane.store import SampleStore
from tests.disaggregated import disaggregated, places, producers
from tests.fake_vllm import fake_vllm
from tests.inference.test_target_server import serving
from tests.ranks import train_on_ranks
from tests.test_disaggregated import RANKS, second_rank
from tests.test_training import assert_same_weights, fit, last_step, losses, start, wait_for_steps
from tests.tiny import recipe

SECONDS = 2.0  # from the signal until the run is saved and has ended


class Stop:
    """Sends signals when it is told that the run waits."""

    def __init__(self, *numbers: int) -> None:
        self.numbers, self.waits, self.sent = numbers, threading.Event(), 0.0

    def send(self) -> None:
        self.waits.wait(60)
        self.sent = time.monotonic()
        for number in self.numbers:
            os.kill(os.getpid(), number)
            while not stopping.stop_requested():  # the kernel keeps one signal of a kind
                time.sleep(0.01)


@contextmanager
def stopped(*numbers: int) -> Iterator[Stop]:
    """The block must end within two seconds of the signal."""
    stop = Stop(*numbers or (signal.SIGTERM,))
    thread = threading.Thread(target=stop.send)
    thread.start()
    yield stop
    assert stop.sent
    assert time.monotonic() - stop.sent < SECONDS
    thread.join()


@pytest.fixture
def heard() -> Iterator[Callable[[str, Callable[[], object]], None]]:
    """Do something when a text is logged."""
    handlers = []

    def heard(text: str, do: Callable[[], object]) -> None:
        handlers.append(handler := logging.Handler())
        handler.emit = lambda record: do() if text in record.getMessage() else None
        logging.getLogger("specforge").addHandler(handler)

    yield heard
    for handler in handlers:
        logging.getLogger("specforge").removeHandler(handler)


def blocks(stop: Stop, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Let the n-th call of a method wait for ever."""
    original, calls = getattr(owner, name), []

    def method(*args: object, **options: object) -> object:
        calls.append(name)
        if len(calls) == call:
            stop.waits.set()
            threading.Event().wait()
        return original(*args, **options)

    monkeypatch.setattr(owner, name, method)


@pytest.fixture(scope="module")
def undisturbed(target, features, tmp_path_factory) -> Path:
    return fit(recipe(target, features, tmp_path_factory.mktemp("undisturbed"), **OPTIONS))


OPTIONS = {
    "trainer__max_steps": 8,
    "trainer__check_val_every_n_epoch": None,
    "trainer__val_check_interval": 3,
    "checkpoint": {"every_n_train_steps": 100},
}


def test_while_it_waits_for_its_first_sample(target, prompts, tmp_path, caplog, heard):
    where = places(tmp_path)
    path = disaggregated(target, prompts, tmp_path, where, wait_seconds=3600, stall_seconds=0.1)
    with stopped() as stop:
        heard("training has been waiting for samples", stop.waits.set)
        assert main(["fit", "--config", str(path)]) == 143
    assert "stopped by a signal after step 0" in caplog.text
    with producers(target, where):
        assert main(["fit", "--config", str(path), "--ckpt_path", "last", "--trainer.max_steps", "3"]) == 0


@pytest.mark.parametrize("prefetch", [0, 2])
def test_while_it_waits_for_a_later_sample_of_a_window(target, prompts, tmp_path, caplog, heard, prefetch):
    """Micro-batches of a step that never got all of its samples are trained again."""
    options = {**OPTIONS, "trainer__accumulate_grad_batches": 3}
    data = {"wait_seconds": 3600, "stall_seconds": 0.1, "batch_size": 2, "prefetch": prefetch}
    calm = disaggregated(target, prompts, tmp_path / "calm", places(tmp_path / "calm"), options, **data)
    with producers(target, places(tmp_path / "calm")):
        fit(calm)
    where = places(tmp_path)
    path = disaggregated(target, prompts, tmp_path, where, options, **data)
    with stopped() as stop, producers(target, where, max_prompts=1) as (producer,):
        lease = producer.controller.lease
        producer.controller.lease = lambda name, count: lease(name, count) if producer.produced < 8 + 27 else []
        heard("training has been waiting for samples", lambda: producer.produced < 35 or stop.waits.set())
        assert main(["fit", "--config", str(path)]) == 143
    assert "stopped by a signal after step 4; resume with --ckpt_path last" in caplog.text
    with producers(target, where):
        fit(path, "--ckpt_path", "last")
    assert losses(tmp_path / "run") == losses(tmp_path / "calm" / "run")
    assert_same_weights(tmp_path / "run", tmp_path / "calm" / "run")


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def online(target: Path, prompts: Path, folder: Path, url: str) -> Path:
    make_token(folder / "token")
    data = {
        "prompts": str(prompts),
        "batch_size": 4,
        "dtype": "float32",
        "server": url,
        "token_file": str(folder / "token"),
    }
    return recipe(target, prompts, folder, **OPTIONS, data={"class_path": "OnlineDataModule", "init_args": data})


def test_while_it_waits_for_a_server_in_the_beginning(target, prompts, tmp_path, caplog, silent):
    path = online(target, prompts, tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    with stopped() as stop:
        threading.Thread(target=lambda: (silent.accept()[0].recv(1), stop.waits.set()), daemon=True).start()
        assert main(["fit", "--config", str(path)]) == 143
    assert "stopped by a signal before training began" in caplog.text
    assert not (tmp_path / "run").exists()


def test_while_it_waits_for_a_server_that_is_dead(target, prompts, tmp_path, heard):
    path = online(target, prompts, tmp_path, "http://127.0.0.1:9")
    with stopped() as stop:
        heard("trying for another", stop.waits.set)
        assert main(["fit", "--config", str(path)]) == 143


def test_while_another_thread_waits_for_a_server(target, prompts, tmp_path, caplog, monkeypatch):
    files, answers = TargetFiles.find(str(target)), []
    capture, ends = HFTargetEngine.capture, threading.Event()
    with stopped() as stop:

        def answer(self: HFTargetEngine, *words: object) -> object:
            answers.append(words)
            if len(answers) > 30:
                stop.waits.set()
                ends.wait()
            return capture(self, *words)

        monkeypatch.setattr(HFTargetEngine, "capture", answer)
        server = TargetServer(HFTargetEngine(files, "float32"), files, make_token(tmp_path / "token"))
        with serving(server):
            try:
                assert main(["fit", "--config", str(online(target, prompts, tmp_path, server.url))]) == 143
                ended = time.monotonic()
            finally:
                ends.set()
        stop.sent += time.monotonic() - ended  # the server's own end is not the run's
    assert "resume with --ckpt_path last" in caplog.text
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_while_it_validates(target, features, tmp_path, monkeypatch, caplog, undisturbed):
    """The validation is made up when the run goes on, at the same step, with the same result."""
    path = recipe(target, features, tmp_path, **OPTIONS)
    with stopped() as stop, monkeypatch.context() as patched:
        blocks(stop, patched, Eagle3Module, "validation_step", call=1)
        assert main(["fit", "--config", str(path)]) == 143
    assert "stopped by a signal after step 3; resume with --ckpt_path last" in caplog.text
    run = fit(path, "--ckpt_path", "last")
    assert_same_weights(run, undisturbed)
    assert validations(run) == validations(undisturbed)
    assert os.readlink(run / "checkpoints" / "best.ckpt") == os.readlink(undisturbed / "checkpoints" / "best.ckpt")


def validations(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: x for key, x in row.items() if key not in ("seconds", "peak_memory_gb")}
        for row in rows
        if "val/tau" in row
    ]


def test_a_step_is_finished_and_a_second_ctrl_c_stops_at_once(target, features, tmp_path, monkeypatch):
    path = recipe(target, features, tmp_path, **OPTIONS)
    with stopped(signal.SIGINT, signal.SIGINT) as stop:
        blocks(stop, monkeypatch, Eagle3Module, "training_step", call=3)
        try:
            status = main(["fit", "--config", str(path)])
        except SystemExit as end:
            status = end.code
    assert status == 130
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_signals_are_given_back(target, features, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    fit(recipe(target, features, tmp_path, trainer__max_steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_while_validate_waits(target, features, tmp_path, monkeypatch, undisturbed):
    with stopped() as stop:
        blocks(stop, monkeypatch, Eagle3Module, "validation_step", call=1)
        words = ["--ckpt_path", str(undisturbed / "checkpoints" / "last.ckpt")]
        assert main(["validate", "--config", str(recipe(target, features, tmp_path)), *words]) == 143


def test_while_a_library_waits_for_other_hosts_and_hears_nothing(target, features, tmp_path):
    """The second host never comes, and the rendezvous waits for it in C++."""
    process = start(recipe(target, features, tmp_path, trainer__num_nodes=2))
    for line in process.stdout:
        if "Initializing distributed" in line:
            break
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143, output
    assert "stopped by a signal" in output


@pytest.mark.parametrize("which", ["first", "second"])
def test_while_several_ranks_wait(target, prompts, tmp_path, which):
    """One of them gets the signal alone; none hangs, and all of them save."""
    where = places(tmp_path)
    options = {**RANKS, "checkpoint": {"every_n_train_steps": 100}}
    # Beside the 8 held-out samples each rank has room for two batches, so it waits soon after its producer pauses.
    data = {"batch_size": 5, "max_samples": 28, "retain": "until_trained", "wait_seconds": 3600, "stall_seconds": 0.1}
    path = disaggregated(target, prompts, tmp_path, where, options, **data)
    paused = threading.Event()
    with producers(target, where, max_prompts=1) as (producer,):
        lease = producer.controller.lease
        producer.controller.lease = lambda name, count: [] if paused.is_set() else lease(name, count)
        process = start(path)
        wait_for_steps(process, tmp_path / "run", 2)
        paused.set()
        for line in process.stdout:
            if "training has been waiting for samples" in line and len(losses(tmp_path / "run")) >= 2:
                break
        os.kill(process.pid if which == "first" else second_rank(process.pid), signal.SIGTERM)
        sent = time.monotonic()
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 143, output
        assert "resume with --ckpt_path last" in output
        assert time.monotonic() - sent < 15  # both processes end, on a busy machine
        if which == "first":
            return  # one resume shows that nothing is lost
        paused.clear()
        process = start(path, "--ckpt_path", "last")
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert sorted(losses(tmp_path / "run"))[-1] == 8


# Data that stops coming.


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int, error: Exception) -> None:
    """Let the n-th call of a method fail."""
    original, calls = getattr(owner, name), []

    def method(*args: object, **options: object) -> object:
        calls.append(name)
        if len(calls) == call:
            raise error
        return original(*args, **options)

    monkeypatch.setattr(owner, name, method)


def test_a_server_that_stays_away_costs_no_step(target, prompts, tmp_path, capsys):
    data = {
        "class_path": "OnlineDataModule",
        "init_args": {"prompts": str(prompts), "batch_size": 4, "dtype": "float32"},
    }
    calm, path = (recipe(target, prompts, tmp_path / name, **OPTIONS, data=data) for name in ("calm", "stopped"))
    run = tmp_path / "stopped" / "run"
    with fake_vllm(target, tmp_path / "store") as server:
        words = ["--data.engine", "vllm", "--data.engine.url", server.url, "--data.engine.store"]
        words += [str(tmp_path / "store"), "--data.engine.compare", "false"]
        server.faults = [lambda body: None] * 25 + [hang_up] * 10_000
        assert main(["fit", "--config", str(path), *words, "--data.engine.patience", "0.5"]) == 2
        server.faults = []
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("specforge: ")]
        step = last_step(run)
        assert step >= 3
        assert line.startswith(f"specforge: server {server.url}: no answer")
        assert line.endswith(f"; training stopped after step {step}; resume with --ckpt_path last")
        assert not server.sink._backend.stored()
        fit(path, *words, "--ckpt_path", "last")
    fit(calm)
    assert losses(run) == losses(tmp_path / "calm" / "run")
    assert_same_weights(run, tmp_path / "calm" / "run")


def hang_up(body: object) -> None:
    raise ConnectionAbortedError


GONE, FULL = UserError("the store is gone"), OSError(28, "No space left on device")


@pytest.mark.parametrize(("accumulate", "error", "prefetch"), [(1, GONE, 2), (3, GONE, 0), (3, FULL, 2)])
def test_a_batch_that_cannot_be_fetched_costs_no_step(
    target, features, tmp_path, monkeypatch, capsys, caplog, accumulate, error, prefetch
):
    options = {**OPTIONS, "trainer__accumulate_grad_batches": accumulate}
    calm = fit(recipe(target, features, tmp_path / "calm", **options))
    path = recipe(target, features, tmp_path, **options)
    with monkeypatch.context() as patch:
        fail_once(patch, FeatureDataLoader, "_load", 9, error)
        words = ["fit", "--config", str(path), "--data.prefetch", str(prefetch)]
        if isinstance(error, UserError):
            assert main(words) == 2
            assert "training stopped after step" in capsys.readouterr().err
        else:
            with pytest.raises(OSError, match="No space"):
                main(words)
            assert "resume with --ckpt_path last" in caplog.text
    assert last_step(tmp_path / "run") > 0
    run = fit(path, "--ckpt_path", "last")
    assert losses(run) == losses(calm)
    assert validations(run) == validations(calm)
    assert_same_weights(run, calm)


def test_an_error_of_a_step_saves_nothing(target, features, tmp_path, monkeypatch, capsys):
    """The optimizer may have changed some weights and not others."""
    fail_once(monkeypatch, Eagle3Module, "optimizer_step", 5, UserError("half a step"))
    assert main(["fit", "--config", str(recipe(target, features, tmp_path, **OPTIONS))]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "specforge: half a step"
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_trainer_that_another_one_has_replaced_saves_nothing(target, features, tmp_path, monkeypatch, capsys):
    fail_once(monkeypatch, FeatureDataLoader, "_load", 9, UserError("the store is gone"))
    monkeypatch.setattr(FeatureDataLoader, "replaced", lambda self: True)
    assert main(["fit", "--config", str(recipe(target, features, tmp_path, **OPTIONS))]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("another trainer has replaced this one")
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_store_that_fails_after_the_last_step_is_reported(target, features, tmp_path, monkeypatch, capsys):
    fail_once(monkeypatch, SampleStore, "durable", 1, UserError("the metadata is gone"))
    assert main(["fit", "--config", str(recipe(target, features, tmp_path, **OPTIONS))]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "specforge: the metadata is gone"
    assert last_step(tmp_path / "run") == 8


class HalfGone(OfflineDataModule):
    """Data that one rank cannot fetch from its seventh batch on."""

    def __init__(self, gone_on: int, **options: Any) -> None:
        super().__init__(**options)
        self.gone_on = gone_on

    def train_dataloader(self) -> FeatureDataLoader:
        loader = super().train_dataloader()
        if self.trainer.global_rank == self.gone_on:
            load = loader._load

            def fail(samples: Any, cursor: dict[str, int]) -> Any:
                if cursor["batch"] >= 7:
                    raise UserError("the store is gone")
                return load(samples, cursor)

            loader._load = fail
        return loader


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_alone_cannot_fetch_stops_all_ranks(target, features, tmp_path, which):
    data = {"features": str(features), "batch_size": 2}
    options = {**OPTIONS, "trainer__devices": 2, "trainer__strategy": "ddp"}
    options["data"] = {"class_path": "OfflineDataModule", "init_args": data}
    calm, path = (recipe(target, features, tmp_path / name, **options) for name in ("calm", "stopped"))
    run = tmp_path / "stopped" / "run"
    options["data"] = {"class_path": f"{__name__}.HalfGone", "init_args": {**data, "gone_on": which}}
    process = start(recipe(target, features, tmp_path / "gone", **options, trainer__default_root_dir=str(run)))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("specforge: ")]
    rank = "rank 1: " * which
    assert line == f"specforge: {rank}the store is gone; training stopped after step 6; resume with --ckpt_path last"
    assert last_step(run) == 6
    jobs = {"calm": ["--config", str(calm)], "resumed": ["--config", str(path), "--ckpt_path", "last"]}
    train_on_ranks(jobs, 2)
    assert losses(run) == losses(tmp_path / "calm" / "run")
    assert_same_weights(run, tmp_path / "calm" / "run")
