"""A benchmark of a server as tables, plots and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from specforge.eval.bench import Case, Level
from specforge.eval.report import Plot, draw, page
from specforge.files import write_file

RESULTS, PAGE = "bench.json", "bench.html"
COLUMNS = ("load", "tok/s", "TTFT", "TPOT", "tau", "speed-up", "same")
LEGEND = (
    "load: requests in flight; tok/s: output tokens of all requests; TTFT: time to the first token, TPOT: time per "
    "further token, medians in ms; same: greedy answers identical to the baseline's; in parentheses: 95 % interval "
    "over prompts"
)
_NO_TAU = (
    "no tau: the server drafts nothing or does not count; start vLLM with --per-request-spec-decode-metrics detailed"
)
_NO_INTERVAL = (
    "tau without interval: from the server's counter over all requests, those of other clients included; for tau per "
    "prompt start vLLM with --per-request-spec-decode-metrics detailed"
)


def tables(levels: Sequence[Level]) -> list[dict[str, Any]]:
    """Title, columns, rows and notes of each table: one per prompt set and temperature; the last one has the notes."""
    made: list[dict[str, Any]] = []
    for group in _groups(levels, "length", "concurrency"):
        case, has_lengths = group[0].case, group[0].case.length is not None
        made.append(
            {
                "title": f"{case.prompts}, temperature {case.temperature:g}",
                "columns": ("prompt", *COLUMNS) if has_lengths else COLUMNS,
                "rows": [(*[str(x.case.length)] * has_lengths, *_cells(x)) for x in group],
                "notes": [],
            }
        )
    made[-1]["notes"] = list(_notes(levels))
    return made


def _groups(levels: Sequence[Level], *free: str) -> list[list[Level]]:
    """Levels whose cases differ in nothing but the ``free`` fields, in their order."""
    found: dict[tuple[object, ...], list[Level]] = {}
    for level in levels:
        fixed = tuple(value for name, value in level.case._asdict().items() if name not in free)
        found.setdefault(fixed, []).append(level)
    return list(found.values())


def _cells(level: Level) -> tuple[str, ...]:
    speed, acceptance, against = level.speed, level.acceptance, level.comparison
    same = None if against is None else against.identical
    return (
        str(level.case.concurrency),
        f"{speed.tokens_per_second:.1f}",
        f"{speed.first_token.p50:.0f}",
        f"{speed.per_token.p50:.1f}",
        "-" if acceptance is None else _with_interval(acceptance.tau, acceptance.tau_ci95),
        "-" if against is None else _with_interval(against.speedup, against.speedup_ci95),
        "-" if same is None else f"{same}/{speed.requests}",
    )


def _with_interval(value: float, bounds: Sequence[float] | None) -> str:
    return f"{value:.2f}" + (" ({:.2f}-{:.2f})".format(*bounds) if bounds else "")


def _notes(levels: Sequence[Level]) -> Iterator[str]:
    if any(level.case.length is not None for level in levels):
        yield f"prompt: tokens of a prompt; {LEGEND}"
    else:
        yield LEGEND
    found = [level.acceptance for level in levels]
    if not any(found):
        yield _NO_TAU
    elif any(acceptance and acceptance.per_prompt is None for acceptance in found):
        yield _NO_INTERVAL


def write_results(folder: Path, run: Mapping[str, Any], levels: Sequence[Level]) -> None:
    """Write ``bench.json``."""
    content = {"run": run, "levels": [level.to_json() for level in levels]}
    write_file(folder / RESULTS, json.dumps(content, indent=2) + "\n")


def write_page(folder: Path, run: Mapping[str, Any], levels: Sequence[Level]) -> None:
    """Write ``bench.html`` and the plots."""
    plots = [plot._replace(x=_X[_x(levels)]) if plot.x == _LOAD else plot for plot in PLOTS]
    facts = [(name, str(value)) for name, value in run.items() if value is not None]
    html = page(
        title=f"{run['model']} on {run['server']}",
        summary=f"{sum(level.speed.requests for level in levels):,} answers in {len(levels)} of {run['measurements']} "
        "measurements",
        facts=facts,
        tables=tables(levels),
        plots_title="Plots",
        plots=draw(plots, list(levels), folder / "plots"),
        files=[],
    )
    write_file(folder / PAGE, html)


def _x(levels: Sequence[Level]) -> str:
    """Field of a case that is drawn over: the load, or the length if only that one varies."""
    loads, lengths = {level.case.concurrency for level in levels}, {level.case.length for level in levels}
    return "length" if len(loads) == 1 and len(lengths) > 1 else "concurrency"


def _label(case: Case, levels: Sequence[Level], x: str = "") -> str:
    """What tells a line from the others: the fields that vary, except for the one that is drawn over."""
    parts = {
        "prompts": case.prompts,
        "length": f"{case.length} tokens long",
        "temperature": f"temperature {case.temperature:g}",
    }
    varying = {name for name in parts if len({getattr(level.case, name) for level in levels}) > 1}
    return ", ".join(parts[name] for name in parts if name in (varying - {x} or {"prompts"}))


def _draw(axes: Any, levels: Sequence[Level], value: Any, interval: Any = None) -> bool:
    """One line per series of measurements; ``value`` of a level is None if it has none."""
    x = _x(levels)
    for series in _groups(levels, x):
        group = [level for level in series if value(level) is not None]
        if not group:
            continue
        places, values = [getattr(level.case, x) for level in group], [value(level) for level in group]
        (line,) = axes.plot(places, values, ".-", label=_label(group[0].case, levels, x))
        bounds = [interval(level) for level in group] if interval else [None]
        if None not in bounds:
            axes.fill_between(places, *zip(*bounds, strict=True), alpha=0.15, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    return bool(axes.lines)


def _draw_throughput(axes: Any, levels: list[Level]) -> bool:
    found = _draw(axes, levels, lambda level: level.speed.tokens_per_second)
    count = len(axes.lines)
    _draw(axes, levels, lambda level: level.comparison and level.comparison.baseline.tokens_per_second)
    for line, of in zip(axes.lines[count:], axes.lines, strict=False):
        line.set(color=of.get_color(), linestyle="--", label=f"{of.get_label()}: baseline")
    axes.set_ylabel("output tokens / s")
    axes.set_ylim(bottom=0)
    return found


def _draw_speedup(axes: Any, levels: list[Level]) -> bool:
    axes.set_ylabel("tokens / s of a request, relative to the baseline")
    found = _draw(
        axes,
        levels,
        lambda level: level.comparison and level.comparison.speedup,
        lambda level: level.comparison and level.comparison.speedup_ci95,
    )
    axes.axhline(1, color="0.5", linewidth=1)
    return found


def _draw_tau(axes: Any, levels: list[Level]) -> bool:
    axes.set_ylabel("tokens per target pass")
    return _draw(
        axes,
        levels,
        lambda level: level.acceptance and level.acceptance.tau,
        lambda level: level.acceptance and level.acceptance.tau_ci95,
    )


def _draw_first(axes: Any, levels: list[Level]) -> bool:
    axes.set_ylabel("ms, median")
    return _draw(axes, levels, lambda level: level.speed.first_token.p50)


def _draw_per_token(axes: Any, levels: list[Level]) -> bool:
    axes.set_ylabel("ms, median")
    return _draw(axes, levels, lambda level: level.speed.per_token.p50)


def _draw_prompts(axes: Any, levels: list[Level]) -> bool:
    """Per prompt set, length and temperature, the distribution at the lowest load that has one."""
    from matplotlib.ticker import AutoLocator

    axes.xaxis.set_major_locator(AutoLocator())
    for group in _groups(levels, "concurrency"):
        counts = next((x.acceptance.per_prompt for x in group if x.acceptance and x.acceptance.per_prompt), [])
        taus = sorted(p.tokens / p.rounds for p in counts if p.rounds)
        if taus:
            axes.ecdf(taus, label=_label(group[0].case, levels))
    axes.set_ylabel("share of prompts with at most this tau")
    return bool(axes.lines)


_LOAD = "requests in flight"
_X = {"concurrency": _LOAD, "length": "tokens of a prompt"}
PLOTS = (
    Plot("throughput", "Throughput", "Output tokens per second of all requests.", _draw_throughput, _LOAD),
    Plot("speedup", "Speed-up", "Interval clustered by prompt.", _draw_speedup, _LOAD),
    Plot("tau", "Acceptance length τ", "Bonus token included; interval clustered by prompt.", _draw_tau, _LOAD),
    Plot("first_token", "Time to the first token", "From the request to its first token.", _draw_first, _LOAD),
    Plot("per_token", "Time per token", "Of the tokens after the first.", _draw_per_token, _LOAD),
    Plot("prompts", "Acceptance length by prompt", "At the lowest load.", _draw_prompts, "tau of a prompt"),
)
