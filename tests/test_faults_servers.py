# ruff: noqa: F811 - fixtures of other modules
"""Servers that die in the middle of a disaggregated run, Mooncake and Redis: they stay away, or come back."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_modules.eagle3 import Eagle3Module
from specforge.cli.main import main
from specforge.errors import UserError
from specforge.runtime.control_plane import redis as redis_store
from specforge.runtime.control_plane.redis import RedisMetadataStore
from specforge.runtime.data_plane.mooncake import MooncakeBackend
from tests.disaggregated import assert_nothing_is_left, disaggregated, places, producers
from tests.runtime.control_plane.redis_server import RedisServer, redis_server
from tests.runtime.control_plane.test_metadata import needs_redis
from tests.runtime.data_plane.mooncake_store import free_ports, needs_mooncake
from tests.runtime.data_plane.test_mooncake import is_open
from tests.test_equivalence import features_alone, offline_run  # noqa: F401 - fixtures
from tests.test_faults import PRODUCER, TRAINER, World, dying, expected  # noqa: F401 - fixtures
from tests.test_training import assert_same_weights, fit, last_step, losses, start, wait_for_steps

pytestmark = pytest.mark.faults


def train_and_kill(path: Path, run: Path, steps: int) -> None:
    """Train in a process of its own; kill it once it has done so many steps."""
    process = start(path)
    wait_for_steps(process, run, steps)
    process.kill()
    process.wait()


@needs_redis
def test_a_redis_server_that_comes_back_empty_loses_nothing(target, prompts, tmp_path, offline_run):
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


# In the middle of a run.

SEEDS = range(3)


@pytest.fixture
def server(tmp_path) -> Iterator[RedisServer]:
    """Keeps what it was told."""
    (tmp_path / "redis").mkdir()
    server = RedisServer(tmp_path / "redis", "--appendonly", "yes", "--appendfsync", "always")
    yield server
    server.kill()


def redis_world(tmp_path: Path, server: RedisServer, seed: int) -> World:
    return World(tmp_path, seed, metadata=f"redis://127.0.0.1:{server.port}/0")


@needs_redis
@pytest.mark.parametrize("seed", SEEDS)
def test_a_redis_server_that_is_started_again_with_its_data_is_waited_for(tmp_path, expected, dying, server, seed):
    world = redis_world(tmp_path, server, seed)
    dying.append(world)
    points = world.random.sample([*PRODUCER, *TRAINER], 8)
    world.countdown = {point: world.random.randrange(4) for point in points}
    died: list[str] = []

    def strike(point: str) -> None:
        if world.random.random() < 0.3:
            world.die(point)
        server.kill()
        server.start()
        died.append(point)

    world.strike = strike
    world.check(world.train(), expected)
    assert len(died) > 2
    assert not world.ended


@needs_redis
@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_server_did_before_its_answer_was_lost_may_be_done_twice(
    tmp_path, expected, dying, monkeypatch, server, seed
):
    world = redis_world(tmp_path, server, seed)
    dying.append(world)
    world.countdown = {point: world.random.randrange(4) for point in world.random.sample(TRAINER, 2)}
    twice: set[str] = set()
    run = RedisMetadataStore._run

    def run_twice(self, script, *arguments):
        if script not in twice or world.random.random() < 0.3:  # each at least once, whatever the dice say
            twice.add(script)
            run(self, script, *arguments)
        return run(self, script, *arguments)

    monkeypatch.setattr(RedisMetadataStore, "_run", run_twice)
    world.check(world.train(), expected)
    assert {"add", "get", "find", "move"} <= twice


@needs_redis
@pytest.mark.parametrize("seed", SEEDS)
def test_a_redis_server_that_stays_away_is_one_line_and_loses_nothing(
    tmp_path, expected, dying, monkeypatch, server, seed
):
    monkeypatch.setattr(redis_store, "_RETRIES", 0)
    world = redis_world(tmp_path, server, seed)
    dying.append(world)
    world.countdown = {world.random.choice([*PRODUCER, *TRAINER]): world.random.randrange(3)}
    world.strike = lambda point: server.kill()
    with pytest.raises(UserError, match=r"metadata in Redis at 127.*once it works again.*resume"):
        world.train()
    server.start()
    world.check(world.train(), expected)


@needs_redis
def test_a_run_whose_redis_server_dies_ends_in_one_line_and_goes_on(
    target, prompts, tmp_path, offline_run, monkeypatch, capsys, server
):
    monkeypatch.setattr(redis_store, "_RETRIES", 0)
    where = places(tmp_path) | {"metadata": f"redis://127.0.0.1:{server.port}/0"}
    path = disaggregated(target, prompts, tmp_path, where)
    step = Eagle3Module.training_step
    steps: list[int] = []

    def killing(self, batch, index):
        steps.append(index)
        if len(steps) == 7:
            server.kill()
        return step(self, batch, index)

    monkeypatch.setattr(Eagle3Module, "training_step", killing)
    with pytest.raises(AssertionError, match="once it works again"), producers(target, where, 2):
        assert main(["fit", "--config", str(path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("specforge: ")]
    assert "resume with --ckpt_path last" in line
    assert last_step(tmp_path / "run") == 7  # the step that the server did not hear of
    server.start()
    with producers(target, where, 2):
        run = fit(path, "--ckpt_path", "last")
    assert losses(run) == losses(offline_run)
    assert_same_weights(run, offline_run)
    assert_nothing_is_left(where, trained=(18 - 1) * 4)


class MooncakeServer:
    """An owner and its master, in a process that can be killed and started again on its ports."""

    def __init__(self) -> None:
        self.ports, self.starts = free_ports(2), 0
        self.start()

    def start(self) -> None:
        code = "from specforge.cli.serve import store_up; store_up(1 << 24, '127.0.0.1', {}, {})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code.format(*self.ports)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.starts += 1
        line = self.process.stdout.readline()
        assert line.startswith("mooncake://"), self.process.stderr.read()
        self.address = line.split(": ")[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
        for port in self.ports:
            while is_open(port):
                time.sleep(0.01)  # there is nothing to wait on but the port


@pytest.fixture(scope="module")
def mooncake() -> Iterator[MooncakeServer]:
    server = MooncakeServer()
    yield server
    server.kill()


@pytest.fixture
def shared(mooncake, monkeypatch) -> Iterator[MooncakeServer]:
    """One client for all of a world, because leaving takes a second."""
    first = MooncakeBackend(mooncake.address)
    joined = first._join()
    monkeypatch.setattr(MooncakeBackend, "_join", lambda self: joined)
    yield mooncake
    first.close()


@needs_mooncake
def test_kills_upon_kills_over_mooncake_change_nothing(tmp_path, expected, dying, shared):
    for seed in range(8):
        retain = ("until_durable", "until_trained")[seed % 2]
        store = f"{shared.address}#{tmp_path.name}-{seed}"
        world = World(tmp_path / str(seed), seed, (5, 8)[seed // 2 % 2], retain, store=store)
        dying[:] = [world]
        points = world.random.sample([point for point in PRODUCER if point != "mid-put"], 3)
        points += world.random.sample(TRAINER, 3)
        world.countdown = {point: world.random.randrange(6) for point in points}
        world.check(world.train(), expected)
        assert world.deaths


@needs_mooncake
@pytest.mark.parametrize("point", ["delivered", "after commit", "after put"])
def test_a_mooncake_store_that_is_started_again_in_the_middle_only_costs_work(tmp_path, expected, dying, shared, point):
    """Its owner is killed, the master ends with it; what they held is produced again."""
    world = World(tmp_path, store=f"{shared.address}#{tmp_path.name}")
    world.countdown, starts = {point: 5}, shared.starts

    def strike(point: str) -> None:
        shared.kill()
        shared.start()

    world.strike = strike
    world.check(world.train(), expected)
    assert shared.starts == starts + 1


@needs_mooncake
def test_a_mooncake_store_that_stays_away_is_one_line_and_loses_nothing(tmp_path, expected, dying, shared):
    world = World(tmp_path, store=f"{shared.address}#{tmp_path.name}")
    world.countdown, world.strike = {"before put": 5}, lambda point: shared.kill()
    with pytest.raises(UserError, match=r"store mooncake://.*does not answer"):
        world.train()
    shared.start()
    world.check(world.train(), expected)


@needs_mooncake
def test_a_mooncake_store_that_comes_back_empty_loses_nothing(target, prompts, tmp_path, offline_run, mooncake):
    where = places(tmp_path) | {"store": f"{mooncake.address}#{tmp_path.name}"}
    path = disaggregated(target, prompts, tmp_path, where)
    with producers(target, where, 2):
        train_and_kill(path, tmp_path / "run", 6)
    mooncake.kill()
    mooncake.start()
    with producers(target, where, 2):
        run = fit(path, "--ckpt_path", "last")
    assert losses(run) == losses(offline_run)
    assert_same_weights(run, offline_run)
    assert_nothing_is_left(where, trained=18 * 4)
