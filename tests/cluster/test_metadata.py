"""The Redis server of a run, without Ray; tests/test_cluster.py has it as an actor."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from specforge.errors import UserError

pytest.importorskip("ray", reason="needs Ray (pip install -e '.[ray]')")
from specforge.cluster.metadata import RedisServer

pytestmark = pytest.mark.redis


def kill(server: RedisServer) -> None:
    os.kill(server._process.pid, signal.SIGKILL)
    server._process.wait()


def test_a_server_that_died_is_started_again_with_its_data(tmp_path):
    import redis

    server = RedisServer(tmp_path / "redis", "127.0.0.1")
    assert not server.keep()
    password = (tmp_path / "redis" / "password").read_text().strip()
    client = redis.Redis.from_url(server.address.partition("?")[0], password=password)
    client.set("a", "b")
    assert not server.keep()
    kill(server)
    assert server.keep()
    assert not server.keep()
    assert client.get("a") == b"b"
    client.close()
    server.end()


def test_a_server_that_does_not_start_again_says_where_the_reason_is(tmp_path):
    server = RedisServer(tmp_path / "redis", "127.0.0.1")
    server.keep()
    (manifest,) = Path(tmp_path / "redis").rglob("*.manifest")
    manifest.write_text("damaged\n")
    kill(server)
    for _ in range(2):
        with pytest.raises(UserError, match=r"redis-server does not start; see .*/redis/log"):
            server.keep()
    server.end()


def test_a_server_that_takes_connections_and_then_dies_has_not_started(tmp_path, monkeypatch):
    """As Redis does if its data are damaged."""
    fake = tmp_path / "bin" / "redis-server"
    fake.parent.mkdir()
    code = (
        "import re, socket, sys\n"
        "server = socket.create_server(('127.0.0.1', int(re.search('port (.*)', sys.stdin.read())[1])))\n"
        "server.accept()\n"
    )
    fake.write_text(f"#!{sys.executable}\n{code}")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    server = RedisServer(tmp_path / "redis", "127.0.0.1")
    with pytest.raises(UserError, match="redis-server does not start"):
        server.keep()
    server.end()
