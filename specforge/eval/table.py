"""An evaluation as text: the title, the table and the lines below it, for the console and the HTML report alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("method", "tau", "95 % interval", "offline tau", "tok/s", "speed-up", "lossless")


def table_title(run: Mapping[str, Any]) -> str:
    """The heading of the table."""
    name = Path(run["target"]).name
    return f"{name}: {run['num_prompts']} held-out prompts, gamma {run['gamma']}, temperature {run['temperature']:g}"


def table_rows(methods: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The cells under :data:`COLUMNS`, one row per method."""
    return [
        (
            row["method"],
            f"{row['tau']:.3f}",
            _interval(row["tau_ci95"]),
            f"{row['offline_tau']:.3f}",
            "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.1f}",
            "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
            "-" if row["lossless"] is None else f"{row['identical']}/{row['prompts']}" + _ties(row["ties"]),
        )
        for row in methods
    ]


def table_notes(run: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table leaves out: acceptance by position, intervals of the speed-ups, and what `lossless` means."""
    notes = []
    for row in methods:
        if row["acceptance_per_position"]:
            rates = " ".join(f"{rate:.2f}" for rate in row["acceptance_per_position"])
            notes.append(f"{row['method']}: acceptance by position {rates}")
    drafted = [row for row in methods if row["method"] != "none"]
    speeds = [f"{row['method']} {_interval(row['speedup_ci95'])}" for row in drafted if row.get("speedup_ci95")]
    if speeds:
        notes.append(f"speed-up, 95 % interval over {run['speed_prompts']} prompts: {', '.join(speeds)}")
    if run["temperature"]:
        notes.append(
            "lossless is not measured when sampling, because two sampled answers differ anyway; rejection sampling "
            "keeps the target's distribution"
        )
    elif timed := [row for row in drafted if row["speed_identical"] is not None]:
        same = ", ".join(f"{row['method']} {row['speed_identical']}/{run['speed_prompts']}" for row in timed)
        notes.append(
            f"lossless: answers identical to the target's in {run['dtype']}. In {run['speed_dtype']}, the dtype of the "
            f"timed runs, near-ties depend on the batch shape; identical there: {same}"
        )
    if run.get("peak_memory"):
        notes.append(f"peak memory of the evaluation: {run['peak_memory'] / 1e9:.2f} GB ({run['device']})")
    return notes


def _interval(bounds: Sequence[float] | None) -> str:
    return "{:.2f} - {:.2f}".format(*bounds) if bounds else "-"


def _ties(count: int | None) -> str:
    return f" +{count} ties" if count else ""
