# ruff: noqa: F811 - fixtures of other modules
"""`specforge launch` on a Ray cluster of several hosts, each a network namespace of its own, with Ray's token."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import pytest

from tests import ray_workers
from tests.disaggregated import assert_nothing_is_left, disaggregated, places
from tests.processes import SPECFORGE, python
from tests.test_disaggregated import RANKS
from tests.test_several_hosts import PRODUCER, SERVERS, TRAINER, network  # noqa: F401 - fixture
from tests.test_training import assert_same_weights, losses

pytest.importorskip("ray", reason="needs Ray (pip install -e '.[ray]')")
from tests.test_cluster import PRODUCERS, environment, on_cluster, redis_of, undisturbed  # noqa: F401 - fixtures

# `ray start`, which has no option for the file that its workers run (tests/ray_workers.py).
START = f"""
from functools import partialmethod
from ray._private.parameter import RayParams
from ray.scripts.scripts import main

RayParams.__init__ = partialmethod(RayParams.__init__, worker_path={ray_workers.__file__!r})
main()
"""

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.faults, pytest.mark.slow]


@pytest.mark.usefixtures("environment")
def test_hosts_give_the_weights_of_one(target, prompts, tmp_path, undisturbed, network, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")  # these hosts have one name
    where = places(tmp_path) | {"metadata": "auto"}
    path = disaggregated(target, prompts, tmp_path, where, RANKS, batch_size=5, max_samples=40)
    address = f"{network.address(SERVERS)}:6379"
    on_cluster(path, address, producers={"count": 2})
    nodes: list[subprocess.Popen[str]] = []

    def join(host: str, folder: str, *words: object) -> None:
        """One at a time: these hosts share a disk, and nodes that start together may choose the same socket file."""
        ray = [sys.executable, "-c", START, "start", "--block", "--temp-dir", folder]
        nodes.append(network.start(host, *ray, "--node-ip-address", network.address(host), *words))
        found = ""
        while "Ray runtime started" not in found:
            line = nodes[-1].stdout.readline()
            found += line
            assert line, found

    with tempfile.TemporaryDirectory() as folder:  # short, for Ray's sockets
        try:
            join(SERVERS, folder, "--head", "--port", 6379, "--num-cpus", 0, "--include-dashboard", "false")
            for host in (TRAINER, PRODUCER):
                join(host, folder, "--address", address, "--num-cpus", PRODUCERS)
            run = network.start(SERVERS, python(), SPECFORGE, "launch", "--config", path)
            output, _ = run.communicate(timeout=600)
            assert run.returncode == 0, output
        finally:
            for node in nodes:
                node.terminate()
            for node in nodes:
                node.communicate()
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert_same_weights(tmp_path / "run", undisturbed)
    with redis_of(tmp_path / "run") as address:
        assert_nothing_is_left(where | {"metadata": address}, trained=2 * 32)
