"""The progress line: what it says, when, and that a run always ends with a validation and a best draft."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

import specforge.cli.fit
from specforge.callbacks.progress import RunProgress, duration, three_digits
from specforge.cli.main import main
from tests.tiny import recipe


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (864.4, "864"), (999.6, "1k"), (12345.0, "12.3k"), (1_234_567.0, "1.23M")]
)
def test_numbers_have_three_digits(value, text):
    assert three_digits(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (42.4, "0:42"), (61, "1:01"), (3 * 3600 + 300, "3:05:00")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_plain_line_for_each_row_where_there_is_no_terminal(target, features, tmp_path, capsys):
    path = recipe(
        target,
        features,
        tmp_path,
        trainer__max_steps=5,
        trainer__log_every_n_steps=2,
        trainer__enable_progress_bar=True,
    )
    assert main(["fit", "--config", str(path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ") and "/5" in line]
    assert [line.split(",")[0] for line in lines] == ["step 1/5", "step 2/5", "step 4/5"]
    for line in lines:
        assert all(word in line for word in (" left", "loss ", "tok/s", "peak ", " GB"))
        assert len(line) <= 80
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["peak_memory_gb"] > 0 for row in rows)


def test_one_line_on_a_terminal(target, features, tmp_path, monkeypatch, capsys):
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr(specforge.cli.fit, "RunProgress", lambda: RunProgress(console))
    monkeypatch.setattr("specforge.callbacks.progress._REFRESH", 0.0)
    path = recipe(
        target,
        features,
        tmp_path,
        trainer__max_steps=3,
        trainer__log_every_n_steps=10,
        trainer__enable_progress_bar=True,
    )
    assert main(["fit", "--config", str(path)]) == 0
    shown = terminal.getvalue()
    for words in ("step 0/3", "step 1/3, 0:0", "loss ", "step 3: validation, batch 1/", "step 3/3, 0:00 left", "tau "):
        assert words in shown, words
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/3")]


@pytest.mark.parametrize("interval", [2, 100])
def test_a_run_ends_with_a_validation_and_a_best_draft(interval, target, features, tmp_path, caplog):
    settings = {"trainer__val_check_interval": interval, "trainer__check_val_every_n_epoch": None}
    path = recipe(target, features, tmp_path, trainer__max_steps=3, **settings)
    assert main(["fit", "--config", str(path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val/tau" in row] == ([2, 3] if interval == 2 else [3])
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()
    assert ("the run is shorter than the validation interval" in caplog.text) == (interval == 100)
