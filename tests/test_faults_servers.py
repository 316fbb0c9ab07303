"""Servers that come back with nothing in the middle of a disaggregated run: Mooncake, Redis."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.disaggregated import assert_nothing_is_left, disaggregated, places, producers
from tests.runtime.control_plane.redis_server import redis_server
from tests.runtime.data_plane.mooncake_store import mooncake_store, needs_mooncake
from tests.test_equivalence import features_alone, offline_run  # noqa: F401 - fixtures
from tests.test_training import assert_same_weights, fit, losses, start, wait_for_steps

pytestmark = pytest.mark.faults


def train_and_kill(path: Path, run: Path, steps: int) -> None:
    """Train in a process of its own; kill it once it has done so many steps."""
    process = start(path)
    wait_for_steps(process, run, steps)
    process.kill()
    process.wait()


@needs_mooncake
@pytest.mark.parametrize("step", [2, 6])
def test_a_mooncake_store_that_comes_back_empty_loses_nothing(target, prompts, tmp_path, offline_run, step):  # noqa: F811
    with mooncake_store() as (address, _):
        where = places(tmp_path) | {"store": address}
        with producers(target, where, 2):
            train_and_kill(disaggregated(target, prompts, tmp_path, where), tmp_path / "run", step)
    with mooncake_store() as (address, _):
        where["store"] = address
        resume = ("--ckpt_path", "last") if step >= 4 else ()
        with producers(target, where, 2):
            run = fit(disaggregated(target, prompts, tmp_path, where), *resume)
        assert losses(run) == losses(offline_run)
        assert_same_weights(run, offline_run)
        assert_nothing_is_left(where, trained=18 * 4)


@pytest.mark.redis
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="apt-get install redis-server")
def test_a_redis_server_that_comes_back_empty_loses_nothing(target, prompts, tmp_path, offline_run):  # noqa: F811
    where = places(tmp_path)
    for number, folder in enumerate(("first", "second")):
        (tmp_path / folder).mkdir()
        with redis_server(tmp_path / folder) as port:
            where["metadata"] = f"redis://127.0.0.1:{port}/0"
            path = disaggregated(target, prompts, tmp_path, where)
            with producers(target, where, 2):
                if number == 0:
                    train_and_kill(path, tmp_path / "run", 6)
                else:
                    run = fit(path, "--ckpt_path", "last")
            if number:
                assert_nothing_is_left(where, trained=(18 - 4) * 4)
    assert losses(run) == losses(offline_run)
    assert_same_weights(run, offline_run)
