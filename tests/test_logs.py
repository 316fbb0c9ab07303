"""JSON lines: what a command prints, logs and raises; those of a cluster are in tests/test_cluster_store.py."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from datetime import datetime

import pytest

from specforge import logs
from specforge.cli.main import main


def printed(capsys) -> list[dict]:
    out, err = capsys.readouterr()
    assert not err
    lines = [json.loads(line) for line in out.splitlines()]
    assert all(datetime.fromisoformat(line.pop("time")).tzinfo for line in lines)
    return lines


def say_and_fail() -> None:
    print("a\nb \x1b[31m", end="")
    print()
    logs.identify("draft")
    logging.getLogger("specforge.tests").warning("two\nlines")
    print("from the side", file=sys.stderr)
    warnings.warn("careful", stacklevel=1)
    raise ValueError("wrong")


def test_prints_log_messages_and_errors_are_json_lines(monkeypatch, capsys):
    monkeypatch.setenv("SPECFORGE_LOG", "json")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(SystemExit) as ended, logs.structured("fit"):
        say_and_fail()
    assert ended.value.code == 1
    lines = printed(capsys)
    assert [(line["level"], line["run"]) for line in lines] == [
        ("info", None),
        ("info", None),
        ("warning", "draft"),
        ("error", "draft"),
        ("warning", "draft"),
        ("error", "draft"),
    ]
    assert {(line["role"], line["rank"]) for line in lines} == {("trainer", 3)}
    messages = [line["message"] for line in lines]
    assert messages[:4] == ["a", "b \x1b[31m", "two\nlines", "from the side"]
    assert "UserWarning: careful" in messages[4]
    assert messages[5].startswith("Traceback")
    assert messages[5].endswith("ValueError: wrong")
    print("plain again")
    assert capsys.readouterr().out == "plain again\n"


def test_a_command_and_its_mistakes(monkeypatch, capsys):
    monkeypatch.setenv("SPECFORGE_LOG", "json")
    assert main(["recipes"]) == 0
    assert any("quickstart" in line["message"] for line in printed(capsys))
    assert main(["recipe"]) == 2
    (line,) = printed(capsys)
    assert (line["level"], line["role"], line["rank"]) == ("error", "recipe", None)
    assert "no command 'recipe'" in line["message"]


def test_another_form_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("SPECFORGE_LOG", "xml")
    assert main(["recipes"]) == 2
    assert capsys.readouterr().err == "specforge: SPECFORGE_LOG: must be plain or json, not 'xml'\n"


def test_the_last_line_of_a_process_that_a_signal_ends_is_json_too(monkeypatch, capfd):
    logs.write_last("stopped by a signal")
    assert capfd.readouterr() == ("", "specforge: stopped by a signal\n")
    monkeypatch.setenv("SPECFORGE_LOG", "json")
    with logs.structured("regenerate"):
        logs.write_last("stopped by a signal")
    (line,) = printed(capfd)
    assert (line["level"], line["role"]) == ("error", "regenerate")
    assert line["message"] == "specforge: stopped by a signal"
