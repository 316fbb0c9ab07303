# ruff: noqa: F811 - fixtures of other modules
"""`specforge launch` on a Ray cluster of several hosts, each a network namespace of its own, with Ray's token."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack

import pytest

from tests.disaggregated import assert_nothing_is_left, disaggregated, places
from tests.test_disaggregated import RANKS
from tests.test_several_hosts import PRODUCER, SERVERS, TRAINER, network  # noqa: F401 - fixture
from tests.test_training import assert_same_weights, losses

pytest.importorskip("ray", reason="needs Ray (pip install -e '.[ray]')")
from specforge.cluster.metadata import RedisServer
from tests.test_cluster import PRODUCERS, environment, on_cluster, undisturbed  # noqa: F401 - fixtures

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.faults, pytest.mark.slow]


@pytest.mark.usefixtures("environment")
def test_hosts_give_the_weights_of_one(target, prompts, tmp_path, undisturbed, network, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")  # these hosts have one name
    where = places(tmp_path) | {"metadata": "auto"}
    path = disaggregated(target, prompts, tmp_path, where, RANKS, batch_size=5, max_samples=40)
    address = f"{network.address(SERVERS)}:6379"
    on_cluster(path, address)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())  # short, for Ray's sockets

        def join(host: str, *words: object) -> None:
            ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--temp-dir", folder]
            process = network.start(host, *ray, "--node-ip-address", network.address(host), *words)
            stack.callback(process.communicate)
            stack.callback(process.terminate)
            found = ""
            while "Ray runtime started" not in found:
                line = process.stdout.readline()
                found += line
                assert line, found

        join(SERVERS, "--head", "--port", 6379, "--num-cpus", 0, "--include-dashboard", "false")
        for host in (TRAINER, PRODUCER):
            join(host, "--address", address, "--num-cpus", PRODUCERS)
        run = network.start(SERVERS, sys.executable, "-m", "specforge.cli.main", "launch", "--config", path)
        output, _ = run.communicate(timeout=600)
        assert run.returncode == 0, output
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert_same_weights(tmp_path / "run", undisturbed)
    server = RedisServer(tmp_path / "run" / "redis", "127.0.0.1")
    assert_nothing_is_left(where | {"metadata": server.address}, trained=2 * 32)
    server.end()
