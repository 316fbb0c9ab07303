"""The port and the end of a server that was started here."""

from __future__ import annotations

import socket
import subprocess

import pytest

from specforge.errors import UserError
from specforge.inference.engine_server import server_port
from specforge.inference.vllm_server import VLLMServer


def test_another_interrupt_leaves_nothing_running(tmp_path, monkeypatch):
    server = object.__new__(VLLMServer)
    server._folder = tmp_path / "made"
    server._folder.mkdir()
    server.process = subprocess.Popen(
        ["bash", "-c", "trap '' TERM; echo ready; sleep 60 & wait; wait"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert server.process.stdout is not None
    assert server.process.stdout.readline() == b"ready\n"
    wait = server.process.wait

    def interrupted(seconds: float | None = None) -> int:
        if seconds is not None:
            raise KeyboardInterrupt
        return wait(timeout=20)

    monkeypatch.setattr(server.process, "wait", interrupted)
    with server.process, pytest.raises(KeyboardInterrupt):
        server.close()
    assert server.process.returncode == -9
    assert not server._folder.exists()


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_another_process_has_is_refused(address):
    with socket.create_server((address, 0)) as taken:
        port = taken.getsockname()[1]
        for words in (["--port", str(port)], ["--max-num-seqs", "4", f"--port={port}"]):
            reason = (
                rf"127.0.0.1:{port}: cannot listen there .*in use.; choose another port with --port in --engine.arg"
            )
            with pytest.raises(UserError, match=reason):
                server_port(words)
    assert server_port(["--port", str(port)]) == port


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_what_is_no_port_is_refused(port):
    with pytest.raises(UserError, match=f"--engine.arguments: --port must be a port from 1 to 65535, not {port}"):
        server_port(["--port", port])


def test_without_a_port_there_is_a_free_one():
    assert server_port(["--enforce-eager"]) > 0
    assert server_port(["--port"]) > 0  # the server reports it
