"""Producers, trainers and their control plane in processes of their own; flow control; the commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from datamodules import DisaggregatedDataModule
from lightning_modules.eagle3 import Eagle3Module
from specforge.cli.main import main
from specforge.contracts import CapturePolicy, PromptTask, Provenance
from specforge.errors import UserError
from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_files import TargetFiles
from specforge.runtime.control_plane.controller import DataFlowController
from specforge.runtime.control_plane.metadata import STATES, Move, Row, State
from specforge.runtime.control_plane.streamed import StreamedSamples, bottleneck
from specforge.runtime.data_plane import loader as loader_module
from specforge.runtime.data_plane.loader import FeatureDataLoader
from tests.disaggregated import STEPS, assert_nothing_is_left, control, disaggregated, places, producers, stored_bytes
from tests.processes import SPECFORGE, Command
from tests.ranks import train_on_ranks
from tests.test_training import assert_same_weights, fit, losses, start, wait_for_steps
from tests.tiny import recipe, write_target


def start_producer(target: Path, where: dict[str, str], *options: object) -> Command:
    words = ["--target", target, "--store", where["store"], "--metadata", where["metadata"], *options]
    return Command("produce", *words)


@pytest.fixture(scope="module")
def features_alone(target, prompts, tmp_path_factory) -> Path:
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
def undisturbed(target, features_alone, tmp_path_factory) -> Path:
    return fit(recipe(target, features_alone, tmp_path_factory.mktemp("offline"), **STEPS))


@pytest.mark.faults
def test_a_killed_trainer_goes_on_bit_for_bit(target, prompts, tmp_path, undisturbed):
    where = places(tmp_path)
    path = disaggregated(target, prompts, tmp_path, where)
    with producers(target, where, 1):
        process = start(path)
        wait_for_steps(process, tmp_path / "run", 9)
        process.kill()
        process.wait()
        run = fit(path, "--ckpt_path", "last")
    assert losses(run) == losses(undisturbed)
    assert_same_weights(run, undisturbed)
    assert_nothing_is_left(where, trained=18 * 4)


@pytest.mark.faults
def test_a_killed_producer_is_taken_over(target, prompts, tmp_path, undisturbed, monkeypatch):
    """It dies with prompts in hand; another, which is there only then, does them when the lease is over."""
    where = places(tmp_path)
    path = disaggregated(target, prompts, tmp_path, where, lease_seconds=2, max_samples=20)
    victim = start_producer(target, where, "--lease_seconds", 2, "--name", "victim")
    rescue: list[Command] = []
    original = Eagle3Module.training_step

    def step(self, batch, index):
        if not rescue:
            victim.kill()
            rescue.append(start_producer(target, where, "--lease_seconds", 2))
        return original(self, batch, index)

    monkeypatch.setattr(Eagle3Module, "training_step", step)
    try:
        run = fit(path)
    finally:
        victim.kill()
        victim.communicate()
        rescue[0].send_signal(signal.SIGTERM)
        output, _ = rescue[0].communicate(timeout=60)
    assert rescue[0].returncode == 0, output
    assert "samples produced" in output
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])  # before the validation
    flow = ("wait", "ready", "queued", "bytes", "read_per_second", "produced_per_second")
    assert {f"data/{name}" for name in flow} <= last.keys()
    assert losses(run) == losses(undisturbed)
    assert_same_weights(run, undisturbed)
    controller = control(where)
    assert controller.counts() == {**dict.fromkeys(STATES, 0), State.DURABLE: 18 * 4}


def test_several_processes_produce_and_end_when_nothing_comes(target, tmp_path):
    where = places(tmp_path)
    words = ["--target", target, "--store", where["store"], "--metadata", where["metadata"]]
    process = Command("produce", *words, "--workers", 2, "--idle_seconds", 0.2, "--name", "p")
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 0, out
    assert "p-0: 0 samples produced" in out
    assert "p-1: 0 samples produced" in out


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_several_processes_do_not_start_a_server_each(target, tmp_path, capsys, engine):
    where = places(tmp_path)
    words = ["--target", str(target), "--store", where["store"], "--metadata", where["metadata"], "--workers", "2"]
    assert main(["produce", *words, "--engine", engine, "--idle_seconds", "0.2"]) == 2
    assert "--workers 2 would start as many servers on the same devices" in capsys.readouterr().err
    assert not any(Path(where[name]).exists() for name in ("store", "metadata"))


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells children when their parent dies")
def test_workers_end_with_a_parent_that_was_killed_and_run_no_file_of_the_current_folder(target, tmp_path):
    for name in ("yaml", "torch", "specforge", "json"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w').close()")
    where = places(tmp_path / "stores")
    words = ["--target", target, "--store", where["store"], "--metadata", where["metadata"], "--workers", 2]
    process = subprocess.Popen(
        [SPECFORGE, "produce", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "500"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
    )
    waiting = 0
    while waiting < 2:  # after the lines about the new stores
        line = process.stdout.readline()
        assert line, "both workers wait before they end"
        waiting += "waiting for prompts" in line
    workers = children(process)
    assert len(workers) == 2
    process.kill()
    output, _ = process.communicate(timeout=60)  # the workers hold its end too, so this waits for them
    assert output.count("samples produced") == 2
    assert not (tmp_path / "executed").exists()


def test_the_plan_starts_nothing(target, tmp_path, capsys):
    where = places(tmp_path)
    words = ["--target", str(target), "--store", where["store"], "--metadata", where["metadata"]]
    assert main(["produce", *words, "--workers", "3", "--plan", "true"]) == 0
    text = capsys.readouterr().out
    assert "3 processes of" in text
    assert "bytes per token" in text
    assert not Path(where["store"]).exists()
    assert not Path(where["metadata"]).exists()


def test_status_names_states_given_up_prompts_and_the_bottleneck(target, prompts, tmp_path, capsys):
    where = places(tmp_path)
    words = ["--store", where["store"], "--metadata", where["metadata"], "--seconds", "0"]
    assert main(["status", *words]) == 2
    assert "a run creates it when it starts" in capsys.readouterr().err
    controller = control(where, max_tries=1)
    controller.ingest({f"s{i}": PromptTask(f"t{i}", (1, 2), (0, 1)) for i in range(3)})
    assert main(["status", *words]) == 0
    assert "no producer takes the 3 queued prompts" in capsys.readouterr().out
    (leased,) = controller.lease("w", 1)
    controller.fail("w", leased, "s0: holds NaN")
    assert main(["status", *words, "--revive", "true"]) == 0
    text = capsys.readouterr().out
    assert "2 queued" in text
    assert "given up: s0@0 after 1 tries: s0: holds NaN" in text
    assert controller.counts()[State.QUEUED] == 3


def test_status_makes_nothing(target, tmp_path, capsys):
    """Where an address is mistyped, in any of its forms."""
    where = places(tmp_path)
    control(where).metadata.close()
    store, metadata = where["store"], where["metadata"]
    for addresses in (
        (tmp_path / "x", metadata),
        (store, tmp_path / "x.db"),
        (f"file://{tmp_path}/x", metadata),
        (store, f"file://{tmp_path}/x.db"),
        (metadata, metadata),
        ("", metadata),
        (store, ""),
        (store, store),
    ):
        words = ["--store", str(addresses[0]), "--metadata", str(addresses[1])]
        capsys.readouterr()
        assert main(["status", *words, "--seconds", "0"]) == 2, words
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert main(["produce", "--target", str(target), *words, "--plan", "true"]) in (0, 2), words
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"store", "metadata.db"}


def test_status_reads_over_damaged_records(tmp_path, capsys, caplog):
    where = places(tmp_path)
    controller = control(where, max_tries=1)
    controller.ingest({f"s{i}": PromptTask(f"t{i}", (1, 2), (0, 1)) for i in range(3)})
    for key, text in {"s0@0": "damaged", "s1@0": "[]\n[]\n[]"}.items():
        controller.metadata.move([Move([key], (State.QUEUED,), State.COMMITTED, {"ref": text})])
    (leased,) = controller.lease("w", 1)
    controller.fail("w", leased, "reason")
    words = ["--store", where["store"], "--metadata", where["metadata"], "--seconds", "0"]
    assert main(["status", *words]) == 0
    assert "2 committed" in capsys.readouterr().out
    assert "'s0@0' in the metadata store is damaged (it is not three lines)" in caplog.text
    assert "'s1@0' in the metadata store is damaged (its first line is not a list of 8)" in caplog.text


def test_the_bottleneck_is_named():
    empty = dict.fromkeys(STATES, 0)
    assert "no producer takes" in bottleneck({**empty, State.QUEUED: 3}, 0.0)
    begun = {**empty, State.LEASED: 2, State.DURABLE: 1}
    assert "producers are the bottleneck: 2 prompts leased" in bottleneck(begun, 1.0)
    assert "writes to it, is the bottleneck, with 1 of 2 leased samples unfinished" in bottleneck(begun, 1.0, 1)
    for counts in ({State.LEASED: 2}, {State.LEASED: 2, State.COMMITTED: 1}):
        for unfinished in (0, 1):
            found = bottleneck({**empty, **counts}, 1.0, unfinished)
            words = f"nothing is trained yet: 2 prompts leased, {unfinished} of them partly written, 0 queued"
            assert found.startswith(words)
            assert "bottleneck" not in found
    assert "a producer has stopped responding (2 prompts leased)" in bottleneck({**empty, State.LEASED: 2}, 1.0, 0, 2)
    assert "the trainer is the bottleneck" in bottleneck({**empty, State.COMMITTED: 3}, 0.0)
    assert "no trainer is running, or it has finished" in bottleneck({**empty, State.DURABLE: 3}, 0.0)
    assert "the store is full" in bottleneck({**empty, State.TRAINED: 3}, 0.0)


def test_a_trainer_without_producers_says_so_and_ends(target, prompts, tmp_path, capsys, caplog):
    where = places(tmp_path)
    path = disaggregated(target, prompts, tmp_path, where, wait_seconds=1.0, stall_seconds=0.2)
    assert main(["fit", "--config", str(path)]) == 2
    assert "no producer takes the" in capsys.readouterr().err
    assert "training has been waiting for samples" in caplog.text
    assert f"new feature store: {where['store']}" in caplog.text
    assert f"new metadata store: {where['metadata']}" in caplog.text


def test_another_target_is_refused_by_the_producer(target, tmp_path, capsys):
    where = places(tmp_path)
    other = write_target(tmp_path / "other", seed=1)
    controller = control(where)
    provenance = Provenance("tiny", TargetFiles.find(str(target)).fingerprint, "t", CapturePolicy((1,)), "float32")
    controller.ingest({"s0": PromptTask("t0", (1, 2), (0, 1))}, provenance=provenance)
    words = ["--target", str(other), "--store", where["store"], "--metadata", where["metadata"]]
    assert main(["produce", *words, "--idle_seconds", "0.1"]) == 2
    assert "start it with the same target" in capsys.readouterr().err
    assert controller.counts()[State.QUEUED] == 1


@pytest.mark.parametrize("wrong", ["store", "metadata", "a file"])
def test_a_producer_with_another_address_creates_nothing(target, tmp_path, capsys, wrong):
    where = places(tmp_path)
    if wrong == "a file":
        (tmp_path / "store").write_text("x")
    else:
        controller = control(where)
        controller.features.backend.write("abc.1", {"x": torch.ones(1)})
        controller.metadata.close()
    misspelt = where if wrong == "a file" else where | {wrong: str(tmp_path / "stor")}
    before = sorted(tmp_path.iterdir())
    words = ["--target", str(target), "--store", misspelt["store"], "--metadata", misspelt["metadata"]]
    assert main(["produce", *words, "--idle_seconds", "0.1"]) == 2
    kind = "metadata" if wrong == "metadata" else "store"
    line = capsys.readouterr().err
    assert line.startswith(f"specforge: {kind} {misspelt[kind]}: ")
    assert (wrong == "metadata") == line.endswith(
        "; if no run uses the store, a killed command has left them: empty it\n"
    )
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bytes": 50_000}, "max_bytes must be at least"),
        ({"store": "s3://bucket"}, "unknown kind of store s3"),
        ({"metadata": "postgres://host"}, "give a file"),
        ({"metadata": "redis://127.0.0.1:1/0?password_file=nowhere"}, "cannot be read"),
        ({"low_water": 0.0}, "low_water"),
    ],
)
def test_bad_options_are_refused_in_one_line(target, prompts, tmp_path, capsys, options, message):
    path = disaggregated(target, prompts, tmp_path, places(tmp_path) | options)
    assert main(["fit", "--config", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_new_run_over_the_stores_of_an_old_one_begins_anew(target, prompts, tmp_path, undisturbed):
    """The old one had another order of the samples, and was left in the middle."""
    where = places(tmp_path)
    with producers(target, where, 1):
        fit(disaggregated(target, prompts, tmp_path / "old", where, seed=7), "--trainer.max_steps", 11)
        run = fit(disaggregated(target, prompts, tmp_path / "new", where))
    assert losses(run) == losses(undisturbed)
    assert_same_weights(run, undisturbed)
    assert_nothing_is_left(where, trained=18 * 4)


def stopped_run(target: Path, prompts: Path, folder: Path, where: dict[str, str]) -> DataFlowController:
    """The control plane of a run that had queued what there was room for, and nobody produced any of it."""
    path = disaggregated(target, prompts, folder, where, wait_seconds=0.1)
    assert main(["fit", "--config", str(path)]) == 2
    return control(where)


@pytest.mark.parametrize("lost", [False, True])
def test_held_out_samples_come_before_what_a_stopped_run_had_queued(target, prompts, tmp_path, monkeypatch, lost):
    """Else the first validation after a resume waits for all of that, and for what the store had and lost."""
    where = places(tmp_path)
    controller = stopped_run(target, prompts, tmp_path, where)
    left = [row.key for row in controller.metadata.find((State.QUEUED,))]
    controller.forget([key for key in left if key.endswith("@-1")])  # as the end of a run does
    if lost:
        words = ["--target", str(target), "--store", where["store"], "--metadata", where["metadata"]]
        assert main(["produce", *words, "--idle_seconds", "0.1"]) == 0
        shutil.rmtree(where["store"])
    assert controller.counts()[State.COMMITTED if lost else State.QUEUED] > 40
    leased: list[str] = []
    started = threading.Event()
    lease, begin = DataFlowController.lease, StreamedSamples.start

    def lease_once_started(self, owner, count):
        found = lease(self, owner, count) if started.is_set() else []
        leased.extend(prompt.key for prompt in found)
        return found

    def note_start(self, step, ahead):
        begin(self, step, ahead)
        started.set()

    monkeypatch.setattr(DataFlowController, "lease", lease_once_started)
    monkeypatch.setattr(StreamedSamples, "start", note_start)
    path = disaggregated(target, prompts, tmp_path, where)
    with producers(target, where, 1):
        fit(path, "--trainer.max_steps", 6)
    held_out = [key.endswith("@-1") for key in leased]
    assert any(held_out)
    assert held_out == sorted(held_out, reverse=True)


def test_what_a_dead_producer_had_written_beyond_the_room_is_deleted_at_a_start(target, prompts, tmp_path):
    where = places(tmp_path)
    controller = stopped_run(target, prompts, tmp_path, where)
    leased = controller.lease("dead", controller.counts()[State.QUEUED])
    *_, last = (prompt for prompt in leased if prompt.key.endswith("@0"))
    controller.features.backend.write(f"{last.sample_id}.1", {"x": torch.ones(4)})
    path = disaggregated(target, prompts, tmp_path, where, max_samples=20, wait_seconds=0.1)
    assert main(["fit", "--config", str(path)]) == 2
    assert last.key not in {row.key for row in controller.metadata.find(STATES)}
    assert controller.features.backend.stored() == []


def records(where: dict[str, str]) -> list[Row]:
    controller = control(where)
    found = controller.metadata.find(STATES, text="ref")
    controller.metadata.close()
    return found


WRONG = {
    "dtype": (["--data.dtype", "bfloat16"], "dtype (float32, now bfloat16)"),
    "encoding": (["--data.encoding", "float8_e4m3fn"], "encoding (raw, now float8_e4m3fn)"),
    "fewer samples": (["--data.limit_samples", "20"], "the training samples changed"),
    "another order": (["--data.seed", "3"], "seed (0, now 3)"),
    "other batches": (["--data.batch_size", "3"], "batch_size (4, now 3)"),
    "layers": (["--model.layer_ids", "[0, 3, 5]"], "layer_ids"),
    "another target": (["--model.target", "OTHER"], "target"),
}


@pytest.mark.faults
def test_a_resume_with_a_wrong_option_changes_nothing(target, prompts, tmp_path, undisturbed, capsys):
    """Whatever the option; the right resume afterwards is the run that was never disturbed."""
    where = places(tmp_path)
    path = disaggregated(target, prompts, tmp_path, where)
    other = write_target(tmp_path / "other", seed=1)
    with producers(target, where, 1):
        fit(path, "--trainer.max_steps", 9)
        for name, (words, reason) in WRONG.items():
            before = records(where)
            capsys.readouterr()
            words = [str(other) if word == "OTHER" else word for word in words]
            assert main(["fit", "--config", str(path), "--ckpt_path", "last", *words]) == 2, name
            assert reason in capsys.readouterr().err, name
            assert records(where) == before, name
        run = fit(path, "--ckpt_path", "last")
    assert losses(run) == losses(undisturbed)
    assert_same_weights(run, undisturbed)
    assert_nothing_is_left(where, trained=18 * 4)


@pytest.mark.faults
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"seed": 7, "batch_size": 3}, {"limit_samples": 9}])
def test_two_runs_take_turns_in_one_store(target, prompts, tmp_path, undisturbed, monkeypatch, options):
    """Another one, with other features or another order, is begun over the stores of a stopped one, and ends midway."""
    where = places(tmp_path)
    path = disaggregated(target, prompts, tmp_path, where)
    other = disaggregated(target, prompts, tmp_path / "other", where, **options)
    engines = {name: HFTargetEngine(TargetFiles.find(str(target)), name) for name in ("float32", "bfloat16")}
    step = Eagle3Module.training_step

    def break_off(self, batch, index):
        if self.trainer.global_step == 7:
            raise UserError("broken off")
        return step(self, batch, index)

    with producers(target, where, 1) as (producer,):
        producer.engine = engines.__getitem__
        fit(path, "--trainer.max_steps", 5)
        with monkeypatch.context() as patch:
            patch.setattr(Eagle3Module, "training_step", break_off)
            assert main(["fit", "--config", str(other)]) == 2
        run = fit(path, "--ckpt_path", "last")
    assert losses(run) == losses(undisturbed)
    assert_same_weights(run, undisturbed)
    assert control(where).features.backend.stored() == []


@pytest.mark.faults
def test_what_the_first_version_left_is_gone_on_with(target, prompts, tmp_path, undisturbed, monkeypatch):
    """Its records had no stamp, and its checkpoints do not say which features were trained on."""
    where = places(tmp_path)
    path = disaggregated(target, prompts, tmp_path, where)
    with producers(target, where, 1):
        with monkeypatch.context() as patch:
            patch.setattr(DisaggregatedDataModule, "_stamp", lambda self, planned: "")
            patch.setattr(loader_module, "_LATER", ())
            state = FeatureDataLoader.state_dict
            patch.setattr(
                FeatureDataLoader,
                "state_dict",
                lambda self: {k: v for k, v in state(self).items() if k not in ("dtype", "encoding")},
            )
            fit(path, "--trainer.max_steps", 9)
        with sqlite3.connect(where["metadata"]) as db:
            db.execute("DELETE FROM samples WHERE state = 'claimed'")
        db.close()
        run = fit(path, "--ckpt_path", "last")
    assert losses(run) == losses(undisturbed)
    assert_same_weights(run, undisturbed)
    assert_nothing_is_left(where, trained=18 * 4)


# One trainer at a time.


def test_a_second_trainer_is_refused_before_it_queues_anything(target, prompts, tmp_path, capsys):
    """It names the first; when that was killed, its place is free at once on the same host."""
    where = places(tmp_path)
    process = start(disaggregated(target, prompts, tmp_path / "a", where, wait_seconds=600))
    second = disaggregated(target, prompts, tmp_path / "b", where, seed=3, wait_seconds=0.1)
    try:
        while not Path(where["metadata"]).exists() or len(records(where)) < 18 * 4 + 8:
            assert process.poll() is None
        before = records(where)
        for command in ("fit", "validate"):
            capsys.readouterr()
            assert main([command, "--config", str(second)]) == 2
            (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("specforge:")]
            assert f"the trainer of {tmp_path / 'a' / 'run'} (process {process.pid} on " in line
            assert "is using it; stop that trainer first" in line
            assert records(where) == before
    finally:
        process.kill()
        process.communicate()
    assert main(["fit", "--config", str(second)]) == 2
    assert "no producer takes" in capsys.readouterr().err


RANKS = {
    "trainer__devices": 2,
    "trainer__strategy": "ddp",
    "trainer__max_steps": -1,
    "trainer__max_epochs": 2,
    "trainer__check_val_every_n_epoch": 1,
    "trainer__val_check_interval": 1.0,
    "checkpoint": {"every_n_train_steps": 2},
}


@pytest.fixture(scope="module")
def two_ranks_offline(target, prompts, features_alone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    data = {"features": str(features_alone), "batch_size": 5}
    path = recipe(target, prompts, folder, **STEPS | RANKS, data__init_args=data)
    train_on_ranks({"offline": ["--config", str(path)]}, 2)
    return folder / "run"


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_two_ranks_and_two_producers(target, prompts, tmp_path, two_ranks_offline, killed):
    """Ragged: 32 samples in batches of 5 are 7, so the second rank's last one is empty; the ranks share no sample."""
    where = places(tmp_path)
    path = disaggregated(target, prompts, tmp_path, where, RANKS, batch_size=5, max_samples=40)
    with producers(target, where, 2) as made:
        process = start(path)
        if killed:
            wait_for_steps(process, tmp_path / "run", 5)
            os.kill(second_rank(process.pid), signal.SIGKILL)
            output, _ = process.communicate(timeout=180)
            assert process.returncode != 0, output
            process = start(path, "--ckpt_path", "last")
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 0, output
    assert sorted(losses(tmp_path / "run"))[-1] == 8
    assert losses(tmp_path / "run") == losses(two_ranks_offline)
    assert_same_weights(tmp_path / "run", two_ranks_offline)
    assert all(producer.produced for producer in made)
    assert_nothing_is_left(where, trained=2 * 32)


def second_rank(first: int) -> int:
    """The process that the first rank started."""
    (pid,) = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    return int(pid)


def test_a_run_without_checkpoints_leaves_no_features(target, prompts, tmp_path):
    where = places(tmp_path)
    with producers(target, where):
        fit(disaggregated(target, prompts, tmp_path, where, retain="until_trained"), "--trainer.fast_dev_run", 3)
    controller = control(where)
    assert controller.counts()[State.TRAINED] > 0
    assert controller.features.backend.stored() == []


@pytest.mark.parametrize("retain", ["until_durable", "until_trained"])
def test_a_slow_trainer_never_fills_the_store(target, prompts, tmp_path, monkeypatch, undisturbed, retain):
    """The producers are faster than training: at every step, and after every put, the store is under its limit."""
    where, limit = places(tmp_path), 700_000
    peaks: list[int] = []
    original = Eagle3Module.training_step

    def step(self, batch, index):
        if len(peaks) > 1:
            settled.wait(0.3)  # time enough for the producers to fill whatever they may fill
        peaks.append(stored_bytes(Path(where["store"])))
        return original(self, batch, index)

    settled = threading.Event()
    monkeypatch.setattr(Eagle3Module, "training_step", step)
    with producers(target, where, 2) as made:
        for producer in made:
            write = producer.controller.features.backend.write

            def watched(key, tensors, write=write):
                uri = write(key, tensors)
                peaks.append(stored_bytes(Path(where["store"])))
                return uri

            producer.controller.features.backend.write = watched
        run = fit(disaggregated(target, prompts, tmp_path, where, max_bytes=limit, retain=retain, low_water=1.0))
    assert max(peaks) <= limit
    assert max(peaks) > 0.6 * limit
    assert_same_weights(run, undisturbed)
