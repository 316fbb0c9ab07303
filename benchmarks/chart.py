"""Draws the README's picture from the measured tables: acceptance length and speed-up by algorithm.

    python -m benchmarks.chart

Reads docs/results.json and docs/results-gpu.json (both written by benchmarks.results) and writes
docs/images/results.svg. The labels in the picture are text, so tests/benchmarks/test_chart.py can compare them with
the tables.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
PICTURE = DOCS / "images" / "results.svg"
CPU, GPU, GREY = "#9db7d5", "#2f6db3", "#8a8a8a"


def measured(name: str) -> dict[str, dict[str, Any]]:
    """The rows of docs/NAME.json by method."""
    content = json.loads((DOCS / f"{name}.json").read_text())
    return {row["method"]: row for row in content["methods"]}


def draw(path: Path = PICTURE) -> None:
    """Write the picture; the same input gives the same file."""
    cpu, gpu = measured("results"), measured("results-gpu")
    names = sorted(cpu.keys() - {"none"}, key=lambda name: gpu[name]["tau"])
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "specforge", "font.size": 9}):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(8.8, 5.2), sharey=True, width_ratios=(3, 2), layout="constrained"
        )
        for y, name in enumerate(names):
            for row, colour, shift in ((gpu[name], GPU, 0.2), (cpu[name], CPU, -0.2)):
                low, high = row["tau_ci95"]
                error = [[row["tau"] - low], [high - row["tau"]]]
                left.barh(y + shift, row["tau"], 0.38, color=colour, xerr=error, ecolor=GREY, error_kw={"lw": 0.8})
                left.text(high + 0.03, y + shift, f"{row['tau']:.2f}", va="center", fontsize=7.5)
            speedup = cpu[name]["speedup"]
            right.barh(y, speedup - 1, 0.5, left=1, color=CPU)
            right.text(max(speedup, 1) + 0.01, y, f"{speedup:.2f}x", va="center", fontsize=7.5)
        left.set_yticks(range(len(names)), names)
        left.set(xlim=(1, 3.4), xlabel="tokens per target forward pass", title="Acceptance length τ (γ = 4)")
        right.set(xlim=(0.85, 1.35), xlabel="relative to plain decoding", title="Speed-up (two CPU cores)")
        right.axvline(1, color=GREY, lw=0.8)
        bars = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (GPU, CPU)]
        left.legend(
            bars,
            ["trained on 3 M tokens (one H100)", "trained on 120,000 tokens (two CPU cores)"],
            loc="lower right",
            frameon=False,
        )
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    draw()
    print(f"wrote {PICTURE}")
