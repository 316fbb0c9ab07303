"""The report of a run: PNG plots, and one self-contained HTML page with the plots, the facts and the evaluation."""

from __future__ import annotations

import base64
import io
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from specforge.errors import UserError
from specforge.eval.table import COLUMNS, table_notes, table_rows, table_title
from specforge.files import read_json, write_file

FOLDER = "report"
HISTORY = "metrics.jsonl"
PROVENANCE = "provenance.json"
_TEMPLATE = "report.html.j2"
_MARKERS = "osv^Dx+*"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine the results."""
    from specforge.packages import VERSION

    packages = {name: metadata.version(name) for name in ("torch", "transformers", "lightning")}
    return {"specforge": VERSION, **packages, "python": platform.python_version()}


class Plot(NamedTuple):
    """One figure: its file name, title and caption, a function that draws rows on axes, and the label of x.

    The function returns False if the rows have nothing to draw.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Any, list[Any]], bool]
    x: str = "optimizer step"


def write_report(run: Path) -> Path:
    """Draw the plots of a run's history and write ``report.html``.

    Args:
        run: folder with ``metrics.jsonl`` and, if they exist, ``config.yaml``, ``provenance.json`` and
            ``evaluation.json``.

    Returns:
        Path of the page. The plots are also in ``report/`` next to it.
    """
    rows = list(filter(_can_be_drawn, read_history(run / HISTORY)))
    write_file(run / "report.html", _page(run, draw(PLOTS, rows, run / FOLDER), rows))
    return run / "report.html"


def draw(plots: Sequence[Plot], rows: list[Any], folder: Path) -> list[dict[str, Any]]:
    """Draw plots into a folder, and return those that show something in the form that the page needs."""
    images = [(plot, image) for plot in plots if (image := _png(plot, rows)) is not None]
    for plot, image in images:
        write_file(folder / f"{plot.name}.png", image)
    return [{**plot._asdict(), "data": base64.b64encode(image).decode()} for plot, image in images]


def page(**content: Any) -> str:
    """The HTML page; ``report.html.j2`` names its content."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    return environment.get_template(_TEMPLATE).render(**content)


def _page(run: Path, plots: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    provenance = _json_object(run / PROVENANCE)
    content = _json_object(run / "evaluation.json")
    evaluation = evaluation_text(content)
    return page(
        title=_title(run, provenance),
        summary=_summary(rows),
        facts=list(_facts(provenance, rows)),
        tables=[] if evaluation is None else [evaluation],
        damaged=evaluation is None and (run / "evaluation.json").exists(),
        two_taus=evaluation is not None or any("val/tau" in row for row in rows),
        plots_title="Training",
        plots=plots,
        files=[
            (name, (run / file).read_text(encoding="utf-8", errors="replace"))
            for name, file in (("Configuration", "config.yaml"), ("Provenance", PROVENANCE))
            if (run / file).exists()
        ],
    )


def evaluation_text(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of ``evaluation.json`` as text; None if it is damaged."""
    try:
        run, methods = content["run"], content["methods"]
        return {
            "title": table_title(run),
            "columns": COLUMNS,
            "rows": table_rows(methods),
            "notes": table_notes(run, methods),
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON object in a file; empty if the file is missing or damaged."""
    try:
        found = read_json(path)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _title(run: Path, provenance: Mapping[str, Any]) -> str:
    target, algorithm = provenance.get("target"), _algorithm(provenance).get("algorithm")
    name = run.resolve().name
    return f"{algorithm} draft for {Path(target).name} ({name})" if isinstance(target, str) and algorithm else name


def _algorithm(provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    found = provenance.get("algorithm")
    return found if isinstance(found, dict) else {}


def _facts(provenance: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Name and value of each fact that the run's files contain."""
    algorithm, data, found = _algorithm(provenance), provenance.get("data"), provenance.get("versions")
    capture = algorithm.get("capture")
    facts = {
        "target": provenance.get("target"),
        "algorithm": algorithm.get("algorithm"),
        "captured layers": capture.get("layer_ids") if isinstance(capture, dict) else None,
        "training data": ", ".join(f"{_thousands(n)} {what}" for what, n in data.items())
        if isinstance(data, dict)
        else None,
        "trainable parameters": provenance.get("trainable_parameters"),
        "peak memory": _peak_memory(rows),
        "hardware": _hardware(provenance),
        "started": provenance.get("started"),
        "versions": ", ".join(f"{name} {version}" for name, version in found.items())
        if isinstance(found, dict)
        else None,
    }
    for name, value in facts.items():
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            yield name, _thousands(value)


def _thousands(value: Any) -> str:
    return f"{value:,}" if type(value) is int else str(value)


def _peak_memory(rows: Sequence[dict[str, Any]]) -> str | None:
    peaks = [value for row in rows for key, value in row.items() if "peak_memory" in key or "peak_gb" in key]
    return f"{max(peaks):.2f} GB" if peaks else None


def _hardware(provenance: Mapping[str, Any]) -> str | None:
    """Such as ``2 x cuda (NVIDIA H200)``, or ``cpu, 2 threads``."""
    device, ranks = provenance.get("device"), provenance.get("ranks")
    if not device:
        return None
    if str(device) == "cpu":
        return f"{ranks} x cpu, {provenance.get('threads')} threads per process"
    return f"{ranks} x {str(device).partition(':')[0]} ({provenance.get('accelerator')})"


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "Nothing was logged."
    text = f"{rows[-1]['step']:,} optimizer steps in {rows[-1]['seconds']:,.0f} s of training, validation excluded."
    validated = [row for row in rows if "val/tau" in row]
    if validated:
        best = max(validated, key=lambda row: row["val/tau"])
        text += (
            f" Best held-out τ during training: {best['val/tau']:.3f} "
            f"[{best['val/tau_low']:.2f}, {best['val/tau_high']:.2f}] at step {best['step']:,}."
        )
    return text


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of a history file; lines that are not rows, such as one truncated by a crash, are skipped."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def _can_be_drawn(row: Mapping[str, Any]) -> bool:
    """Whether a row has the values that the report needs; the file may be damaged."""
    interval = "val/tau" not in row or {"val/tau_low", "val/tau_high"} <= row.keys()
    return interval and "seconds" in row and all(map(_is_number, row.values()))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[key]) for row in rows if key in row]
    return [p[0] for p in points], [p[1] for p in points]


def _draw_positions(axes: Any, rows: Sequence[dict[str, Any]], prefix: str) -> None:
    """One line per draft position; markers of their own keep lines apart that coincide."""
    keys = {key for row in rows for key in row if key.startswith(prefix) and key[len(prefix) :].isdigit()}
    for i, key in enumerate(sorted(keys, key=lambda key: int(key[len(prefix) :]))):
        steps, values = _series(rows, key)
        style = {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 7 - 0.5 * (i % 8), "fillstyle": "none"}
        every = (i, max(8, len(steps) // 12)) if len(steps) > 16 else None
        axes.plot(
            steps, values, linewidth=1, alpha=0.8, markevery=every, label=f"position {key[len(prefix) :]}", **style
        )


def _draw_loss(axes: Any, rows: list[dict[str, Any]]) -> bool:
    _draw_positions(axes, rows, "train/loss_")
    steps, values = _series(rows, "val/loss")
    if steps:
        axes.plot(steps, values, "k.-", label="held-out, position 1")
    axes.set_ylabel("loss per supervised token")
    return bool(axes.lines)


def _draw_acceptance(axes: Any, rows: list[dict[str, Any]]) -> bool:
    _draw_positions(axes, rows, "val/acceptance_")
    axes.set_ylabel("P(accepted | all earlier positions accepted)")
    axes.set_ylim(-0.03, 1.03)
    return bool(axes.lines)


def _draw_tau(axes: Any, rows: list[dict[str, Any]]) -> bool:
    steps, tau = _series(rows, "val/tau")
    if not steps:
        return False
    axes.plot(steps, tau, ".-", label="held-out τ")
    low, high = (_series(rows, f"val/tau_{end}")[1] for end in ("low", "high"))
    axes.fill_between(steps, low, high, alpha=0.2, label="95 % interval")
    axes.set_ylabel("tokens per target pass")
    return True


def _draw_speed(axes: Any, rows: list[dict[str, Any]]) -> bool:
    axes.plot(*_series(rows, "train/tokens_per_second"), linewidth=1, label="all tokens")
    axes.plot(*_series(rows, "train/supervised_tokens_per_second"), linewidth=1, label="supervised tokens")
    axes.set_ylabel("tokens / s")
    axes.set_ylim(bottom=0)
    return bool(len(axes.lines[0].get_xdata()))


def _draw_optimizer(axes: Any, rows: list[dict[str, Any]]) -> bool:
    axes.plot(*_series(rows, "train/grad_norm"), linewidth=1, label="gradient norm before clipping (left)")
    axes.plot([], [], "C1", linewidth=1, label="learning rate (right)")
    axes.set_yscale("log")
    axes.set_ylabel("gradient norm")
    right = axes.twinx()
    right.plot(*_series(rows, "train/lr"), "C1", linewidth=1)
    right.set_ylabel("learning rate")
    return bool(len(axes.lines[0].get_xdata()))


PLOTS = (
    Plot(
        "tau",
        "Acceptance length τ during training",
        "Greedy drafting replayed over the held-out answers, bonus token included; interval clustered by prompt.",
        _draw_tau,
    ),
    Plot(
        "acceptance",
        "Acceptance by position",
        "How often the k-th drafted token of a round is accepted if all tokens before it were.",
        _draw_acceptance,
    ),
    Plot("loss", "Loss by position", "Training loss per draft position, and the held-out loss.", _draw_loss),
    Plot(
        "throughput",
        "Throughput",
        "Validation time is excluded. Dips are waits: for samples, for a checkpoint to be written, or for a shared "
        "machine.",
        _draw_speed,
    ),
    Plot("optimizer", "Gradient norm and learning rate", "", _draw_optimizer),
)


def _png(plot: Plot, rows: list[Any]) -> bytes | None:
    """The figure as PNG; None if the rows have nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not plot.draw(axes, rows):
        return None
    axes.set_xlabel(plot.x)
    axes.set_title(plot.title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
