"""The report of a run: PNG plots, and one self-contained HTML page with them, the configuration and the provenance."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge.files import write_file

FOLDER = "report"
PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Plot:
    """One figure: its file name, title, and what draws it on axes from the history's rows."""

    name: str
    title: str
    draw: Callable[[Any, list[dict[str, Any]]], bool]


def write_report(run: Path) -> Path:
    """Draw the plots of a run's history and write ``report.html``.

    Args:
        run: folder with ``metrics.jsonl`` and, if they exist, ``config.yaml``, ``provenance.json`` and
            ``evaluation.json``.

    Returns:
        The page. The plots lie beside it in ``report/``.
    """
    rows = _history(run / "metrics.jsonl")
    images = [(plot, _png(plot, rows)) for plot in PLOTS]
    for plot, image in images:
        if image is not None:
            write_file(run / FOLDER / f"{plot.name}.png", image)
    page = _page(run, [(plot.title, image) for plot, image in images if image is not None], rows)
    write_file(run / "report.html", page)
    return run / "report.html"


def _history(path: Path) -> list[dict[str, Any]]:
    """The rows of a history that are whole: a crash may have cut one off, and the file may be damaged."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, dict) or not all(map(_is_number, row.values())):
            continue
        if {"step", "seconds"} <= row.keys() and (
            "val/tau" not in row or {"val/tau_low", "val/tau_high"} <= row.keys()
        ):
            rows.append(row)
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[key]) for row in rows if key in row]
    return [p[0] for p in points], [p[1] for p in points]


def _positions(rows: Sequence[dict[str, Any]], prefix: str) -> list[str]:
    keys = {key for row in rows for key in row if key.startswith(prefix) and key[len(prefix) :].isdigit()}
    return sorted(keys, key=lambda key: int(key[len(prefix) :]))


def _draw_loss(axes: Any, rows: list[dict[str, Any]]) -> bool:
    for key in _positions(rows, "train/loss_"):
        axes.plot(*_series(rows, key), linewidth=1, label=f"position {key.rsplit('_', 1)[1]}")
    steps, values = _series(rows, "val/loss")
    if steps:
        axes.plot(steps, values, "k.-", label="held out, position 1")
    axes.set_ylabel("loss per supervised token")
    return bool(axes.lines)


def _draw_acceptance(axes: Any, rows: list[dict[str, Any]]) -> bool:
    for key in _positions(rows, "val/acceptance_"):
        axes.plot(*_series(rows, key), ".-", linewidth=1, label=f"position {key.rsplit('_', 1)[1]}")
    axes.set_ylabel("P(accepted | all before it were)")
    axes.set_ylim(0, 1)
    return bool(axes.lines)


def _draw_tau(axes: Any, rows: list[dict[str, Any]]) -> bool:
    steps, tau = _series(rows, "val/tau")
    if not steps:
        return False
    axes.plot(steps, tau, ".-")
    axes.fill_between(steps, _series(rows, "val/tau_low")[1], _series(rows, "val/tau_high")[1], alpha=0.2)
    axes.set_ylabel("held-out τ, greedy, bonus included (95 %)")
    return True


def _draw_speed(axes: Any, rows: list[dict[str, Any]]) -> bool:
    axes.plot(*_series(rows, "train/tokens_per_second"), linewidth=1, label="all tokens")
    axes.plot(*_series(rows, "train/supervised_tokens_per_second"), linewidth=1, label="supervised")
    axes.set_ylabel("tokens / s")
    axes.set_ylim(bottom=0)
    return bool(len(axes.lines[0].get_xdata()))


def _draw_rate(axes: Any, rows: list[dict[str, Any]]) -> bool:
    axes.plot(*_series(rows, "train/grad_norm"), linewidth=1, label="gradient norm")
    axes.set_yscale("log")
    axes.set_ylabel("gradient norm before clipping")
    right = axes.twinx()
    right.plot(*_series(rows, "train/lr"), "C1", linewidth=1)
    right.set_ylabel("learning rate")
    return bool(len(axes.lines[0].get_xdata()))


PLOTS = (
    Plot("tau", "Acceptance length over steps", _draw_tau),
    Plot("acceptance", "Acceptance by position", _draw_acceptance),
    Plot("loss", "Loss by position", _draw_loss),
    Plot("throughput", "Throughput", _draw_speed),
    Plot("optimizer", "Gradient norm and learning rate", _draw_rate),
)


def _png(plot: Plot, rows: list[dict[str, Any]]) -> bytes | None:
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    if not plot.draw(axes, rows):
        return None
    axes.set_xlabel("optimizer step")
    axes.set_title(plot.title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _page(run: Path, images: Sequence[tuple[str, bytes]], rows: Sequence[dict[str, Any]]) -> str:
    parts = [f"<h1>{html.escape(run.resolve().name)}</h1>", _summary(rows)]
    if (run / "evaluation.json").exists():
        try:
            parts.append(_evaluation(json.loads((run / "evaluation.json").read_text())))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            parts.append("<p>evaluation.json is damaged.</p>")
    for title, image in images:
        data = base64.b64encode(image).decode()
        parts.append(f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></figure>')
    for title, name in (("Configuration", "config.yaml"), ("Provenance", PROVENANCE)):
        if (run / name).exists():
            text = html.escape((run / name).read_text())
            parts.append(f"<details><summary>{title}</summary><pre>{text}</pre></details>")
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ccc}"
        "td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{overflow:auto;background:#f6f6f6;padding:1rem}"
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(run.resolve().name)}</title>"
        f"<style>{style}</style>{''.join(parts)}</html>\n"
    )


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "<p>Nothing was logged.</p>"
    text = f"{rows[-1]['step']} optimizer steps in {rows[-1]['seconds']:.0f} s of training."
    held_out = [row for row in rows if "val/tau" in row]
    if held_out:
        best = max(held_out, key=lambda row: row["val/tau"])
        text += (
            f" Best held-out τ while training: {best['val/tau']:.3f} "
            f"[{best['val/tau_low']:.2f}, {best['val/tau_high']:.2f}] at step {best['step']}."
        )
    return f"<p>{text}</p>"


def _evaluation(content: dict[str, Any]) -> str:
    head = ("method", "τ", "95 % interval", "offline τ", "acceptance by position", "tok/s", "speed-up", "identical")
    body = []
    for row in content["methods"]:
        interval = row["tau_ci95"]
        body.append(
            (
                row["method"],
                f"{row['tau']:.3f}",
                "{:.2f} – {:.2f}".format(*interval) if interval else "–",
                f"{row['offline_tau']:.3f}",
                " ".join(f"{a:.2f}" for a in row["acceptance_per_position"]) or "–",
                _or_dash(row["tokens_per_second"], "{:.1f}"),
                _or_dash(row["speedup"], "{:.2f}x"),
                "–" if row["identical"] is None else f"{row['identical']}/{row['prompts']}",
            )
        )
    run = content["run"]
    title = f"Speculative decoding of {run['num_prompts']} held-out prompts, γ = {run['gamma']}"
    return f"<h2>{html.escape(title)}</h2>" + _table(head, body)


def _or_dash(value: float | None, pattern: str) -> str:
    return "–" if value is None else pattern.format(value)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in body)
    return "<table><tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + f"</tr>{rows}</table>"
