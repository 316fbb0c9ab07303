"""The README's picture shows what was measured."""

from __future__ import annotations

import re

from benchmarks import chart


def labels(text: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", text)


def test_the_picture_is_drawn_from_the_measured_tables(tmp_path):
    shown = labels(chart.PICTURE.read_text())
    for name in ("results", "results-gpu"):
        for method, row in chart.measured(name).items():
            if method == "none":
                continue
            assert method in shown
            assert f"{row['tau']:.2f}" in shown, (name, method)
            if row["speedup"] is not None:
                assert f"{row['speedup']:.2f}x" in shown, (name, method)
    chart.draw(tmp_path / "again.svg")
    assert labels((tmp_path / "again.svg").read_text()) == shown
