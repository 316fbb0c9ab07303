"""Real Mooncake stores for tests, by `specforge store up`: a master, and an owner of memory, on the loopback."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest

from tests.processes import SPECFORGE, python

absent = pytest.mark.skipif(find_spec("mooncake") is None, reason="pip install -e '.[mooncake-cpu]'")


def needs_mooncake(test):
    return pytest.mark.mooncake(absent(test))


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def store_up(port: int, metrics: int, size: int = 256 << 20) -> subprocess.Popen:
    words = ["store", "up", "--port", port, "--metrics_port", metrics, "--size", size]
    return subprocess.Popen(
        [python(), SPECFORGE, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@contextmanager
def mooncake_store(size: int = 256 << 20) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run a store; gives its address and process."""
    process = store_up(*free_ports(2), size)
    try:
        line = process.stdout.readline()
        assert line.startswith("mooncake://"), process.stderr.read()
        yield line.split(": ")[0], process
    finally:
        process.terminate()
        process.communicate()
