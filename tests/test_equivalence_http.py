"""Features inside HTTP answers train the same draft as features on disk, bit for bit, whatever dies."""

# ruff: noqa: F811 - fixtures that are imported
from __future__ import annotations

import pytest

from specforge.cli.main import main
from tests.inference.test_target_server import free_port
from tests.inference.test_target_server import start as serve
from tests.test_equivalence import RUN, features_alone, features_in_8_bits, offline_run, online, seen, validations  # noqa: F401
from tests.test_training import assert_same_weights, fit, losses, start, wait_for_steps
from tests.tiny import recipe

pytestmark = pytest.mark.equivalence


@pytest.fixture
def server(target, tmp_path):
    """Starts the server on one port, again at each call, as `specforge target serve` in a process of its own."""
    port, running = free_port(), []

    def run():
        running.append(serve(target, tmp_path / "token", port))
        assert running[-1].stdout.readline().startswith(f"http://127.0.0.1:{port}:")
        return running[-1]

    run.options = {"server": f"http://127.0.0.1:{port}", "token_file": str(tmp_path / "token")}
    yield run
    for process in running:
        process.kill()
        process.communicate()


def test_batches_losses_and_weights_are_those_of_disk(
    target, prompts, features_alone, tmp_path, offline_run, seen, server
):
    fit(recipe(target, features_alone, tmp_path / "offline", **RUN))
    offline, seen[:] = [row[0] for row in seen], []
    server()
    run = fit(online(target, prompts, tmp_path / "http", **server.options))
    assert [row[0] for row in seen] == offline
    assert not any(files for *_, files in seen)
    assert losses(run) == losses(offline_run)
    assert validations(run) == validations(offline_run)
    assert_same_weights(run, offline_run)


def test_8_bits_from_a_server_are_those_of_disk(target, prompts, features_in_8_bits, tmp_path, seen, server):
    disk = fit(recipe(target, features_in_8_bits, tmp_path / "offline", **RUN))
    offline, seen[:] = [row[0] for row in seen], []
    server()
    run = fit(online(target, prompts, tmp_path / "http", encoding="float8_e4m3fn", **server.options))
    assert [row[0] for row in seen] == offline
    assert losses(run) == losses(disk)
    assert_same_weights(run, disk)


def test_a_run_of_8_bits_goes_on_from_disk_and_not_with_other_features(
    target, prompts, features_in_8_bits, features_alone, tmp_path, server, capsys
):
    disk = fit(recipe(target, features_in_8_bits, tmp_path / "offline", **RUN))
    server()
    path = online(target, prompts, tmp_path / "http", encoding="float8_e4m3fn", **server.options)
    fit(path, "--trainer.max_steps", 5)
    words = ["fit", "--config", str(path), "--ckpt_path", "last"]
    assert main([*words, "--data.encoding", "raw"]) == 2
    assert "encoding (float8_e4m3fn, now raw) changed since the checkpoint" in capsys.readouterr().err
    run = fit(recipe(target, features_in_8_bits, tmp_path / "http", **RUN), "--ckpt_path", "last")
    assert losses(run) == losses(disk)
    assert_same_weights(run, disk)


def test_a_server_killed_and_started_again_loses_nothing(target, prompts, tmp_path, offline_run, server):
    first = server()
    process = start(online(target, prompts, tmp_path, **server.options))
    wait_for_steps(process, tmp_path / "run", 5)
    first.kill()
    first.wait()
    server()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert losses(tmp_path / "run") == losses(offline_run)
    assert_same_weights(tmp_path / "run", offline_run)


def test_a_trainer_killed_goes_on_with_the_same_server(target, prompts, tmp_path, offline_run, server):
    server()
    path = online(target, prompts, tmp_path, **server.options)
    process = start(path)
    wait_for_steps(process, tmp_path / "run", 10)
    process.kill()
    process.wait()
    run = fit(path, "--ckpt_path", "last")
    assert losses(run) == losses(offline_run)
    assert_same_weights(run, offline_run)
