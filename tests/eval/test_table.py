"""The lines below an evaluation's table."""

from __future__ import annotations

from specforge.eval.table import table_notes

RUN = {"temperature": 0, "speed_prompts": 9, "dtype": "float32", "speed_dtype": "bfloat16", "device": "cpu"}


def row(method: str, bounds: list[float] | None) -> dict[str, object]:
    return {"method": method, "acceptance_per_position": [], "speedup_ci95": bounds, "speed_identical": 9}


def test_speed_ups_are_called_faster_or_slower_only_if_the_interval_excludes_1():
    rows = [row("none", None), row("ngram", [0.9, 1.3]), row("suffix", [0.36, 0.87]), row("eagle3", [1.21, 1.74])]
    assert table_notes(RUN, rows)[0] == (
        "against none, 95 % interval over 9 prompts: ngram no clear difference (0.90 - 1.30), "
        "suffix slower (0.36 - 0.87), eagle3 faster (1.21 - 1.74)"
    )
