"""The end of a server that was started here."""

from __future__ import annotations

import subprocess

import pytest

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
