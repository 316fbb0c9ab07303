# ruff: noqa: F811 - fixtures of other modules
"""Trainer, producer and servers as hosts of their own, on a network that fails: Linux network namespaces, as root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.disaggregated import assert_nothing_is_left, disaggregated
from tests.processes import SPECFORGE, python
from tests.runtime.control_plane.test_metadata import needs_redis
from tests.runtime.data_plane.mooncake_store import needs_mooncake
from tests.test_equivalence import features_alone, offline_run  # noqa: F401 - fixtures
from tests.test_training import assert_same_weights, losses, wait_for_steps

pytestmark = pytest.mark.faults

SERVERS, TRAINER, PRODUCER = "servers", "trainer", "producer"


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


class Network:
    """Hosts behind one switch.

    Args:
        name: tells networks on one machine apart; at most five characters.
        subnet: the first three numbers of its addresses.
    """

    def __init__(self, name: str, subnet: str) -> None:
        self.name, self.subnet, self.hosts = name, subnet, [SERVERS, TRAINER, PRODUCER]

    def build(self) -> None:
        name, subnet = self.name, self.subnet
        ip(f"link add {name} type bridge")
        ip(f"addr add {subnet}.1/24 dev {name}")  # this process is on the network too
        ip(f"link set {name} up")
        for number, host in enumerate(self.hosts):
            space = self.space(host)
            ip(f"netns add {space}")
            ip(f"link add {name}{number} type veth peer name eth0 netns {space}")
            ip(f"link set {name}{number} master {name} up")
            ip(f"-n {space} addr add {self.address(host)}/24 dev eth0")
            ip(f"-n {space} link set eth0 up")
            ip(f"-n {space} link set lo up")

    def space(self, host: str) -> str:
        return f"{self.name}-{host}"

    def address(self, host: str) -> str:
        return f"{self.subnet}.{self.hosts.index(host) + 2}"

    def start(self, host: str, *words: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", self.space(host), *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )

    @contextmanager
    def cut(self, host: str) -> Iterator[None]:
        """What is sent to and from this host is lost."""
        link = f"{self.name}{self.hosts.index(host)}"
        assert self.reaches_servers(TRAINER if host == SERVERS else host)
        ip(f"link set {link} down")
        try:
            assert not self.reaches_servers(TRAINER if host == SERVERS else host)
            yield
        finally:
            ip(f"link set {link} up")

    def reaches_servers(self, host: str) -> bool:
        connect = f"import socket; socket.create_connection(('{self.address(SERVERS)}', 6379), 1)"
        command = ["ip", "netns", "exec", self.space(host), sys.executable, "-c", connect]
        return subprocess.run(command, capture_output=True).returncode == 0

    def close(self) -> None:
        for host in self.hosts:
            subprocess.run(["ip", "netns", "del", self.space(host)], capture_output=True)
        subprocess.run(["ip", "link", "del", self.name], capture_output=True)


def may_make_namespaces() -> bool:
    """Root on Linux may, in most containers it may not."""
    name = f"sf-probe-{os.getpid()}"
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    ip(f"netns del {name}")
    return True


@pytest.fixture
def network() -> Iterator[Network]:
    if not may_make_namespaces():
        pytest.skip("network namespaces cannot be made here")
    number = os.getpid() % 200
    found = Network(f"sf{number}", f"10.231.{number}")
    try:
        found.build()
        yield found
    finally:
        found.close()


@needs_redis
@needs_mooncake
def test_a_host_that_is_cut_off_only_costs_time(target, prompts, tmp_path, offline_run, network):
    """Each in turn while training runs: the producer for longer than its leases, the trainer, and the servers."""
    where = {
        "store": f"mooncake://{network.address(SERVERS)}:50051?metrics=9003",
        "metadata": f"redis://{network.address(SERVERS)}:6379/0",
    }
    (tmp_path / "redis").mkdir()
    redis = f"redis-server --bind {network.address(SERVERS)} --protected-mode no --appendonly no --dir".split()
    specforge = [python(), SPECFORGE]
    with ExitStack() as stack:

        def start(host: str, *words: object) -> subprocess.Popen[str]:
            process = network.start(host, *words)
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        start(SERVERS, *redis, tmp_path / "redis")
        store = start(SERVERS, *specforge, "store", "up", "--size", 1 << 24, "--host", network.address(SERVERS))
        while not store.stdout.readline().startswith("mooncake://"):
            assert store.poll() is None
        places = [word for name, place in where.items() for word in (f"--{name}", place)]
        producer = start(PRODUCER, *specforge, "produce", "--target", target, *places, "--lease_seconds", 2)
        path = disaggregated(target, prompts, tmp_path, where, lease_seconds=2, max_samples=24)
        trainer = start(TRAINER, *specforge, "fit", "--config", path)
        run = tmp_path / "run"
        for steps, host, seconds in ((3, PRODUCER, 4.0), (7, TRAINER, 2.0), (11, SERVERS, 3.0)):
            wait_for_steps(trainer, run, steps)
            with network.cut(host):
                time.sleep(seconds)  # how long it is away is what is tested
        output, _ = trainer.communicate(timeout=120)
        assert trainer.returncode == 0, output
        producer.terminate()
        words, _ = producer.communicate(timeout=60)
        assert producer.returncode == 0, words
        assert losses(run) == losses(offline_run)
        assert_same_weights(run, offline_run)
        assert_nothing_is_left(where, trained=18 * 4)
