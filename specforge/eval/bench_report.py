"""A benchmark of a server as tables, plots and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from specforge.eval.bench import Case, Level
from specforge.eval.report import Plot, draw, page
from specforge.files import write_file

RESULTS, PAGE = "bench.json", "bench.html"
COLUMNS = ("load", "tok/s", "TTFT", "TPOT", "tau", "speed-up", "same")
_LEGEND = (
    "load: requests in flight; tok/s: output tokens of all requests; TTFT: time to the first token, TPOT: time per "
    "further token, medians in ms; same: greedy answers identical to the baseline's; in parentheses: 95 % interval "
    "over prompts"
)


def tables(levels: Sequence[Level]) -> Iterator[dict[str, Any]]:
    """Title, columns, rows and notes of each table: one per prompt set, length and temperature."""
    for _, part in groupby(levels, lambda level: level.case[:3]):
        group = list(part)
        yield {
            "title": _name(group[0].case),
            "columns": COLUMNS,
            "rows": [_cells(level) for level in group],
            "notes": [*_notes(group)],
        }


def _name(case: Case) -> str:
    length = "" if case.length is None else f", {case.length} tokens long"
    return f"{case.prompts}{length}, temperature {case.temperature:g}"


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


def _notes(group: Sequence[Level]) -> Iterator[str]:
    yield _LEGEND
    found = [level.acceptance for level in group]
    if not any(found):
        yield (
            "no tau: the server drafts nothing or does not count; start vLLM with --per-request-spec-decode-metrics "
            "detailed"
        )
    elif any(acceptance and acceptance.per_prompt is None for acceptance in found):
        yield (
            "tau without interval: from the server's counter over all requests, those of other clients included; for "
            "tau per prompt start vLLM with --per-request-spec-decode-metrics detailed"
        )


def write_bench(folder: Path, run: Mapping[str, Any], levels: Sequence[Level]) -> list[Path]:
    """Write ``bench.json``, ``bench.html`` and the plots; returns the paths of the first two."""
    content = {"run": run, "levels": [level.to_json() for level in levels]}
    write_file(folder / RESULTS, json.dumps(content, indent=2) + "\n")
    facts = [(name, str(value)) for name, value in run.items() if value is not None]
    html = page(
        title=f"{run['model']} on {run['server']}",
        summary=f"{sum(level.speed.requests for level in levels):,} answers in {len(levels)} measurements",
        facts=facts,
        tables=list(tables(levels)),
        plots_title="Plots",
        plots=draw(PLOTS, list(levels), folder / "plots"),
        files=[],
    )
    write_file(folder / PAGE, html)
    return [folder / RESULTS, folder / PAGE]


def _draw(axes: Any, levels: Sequence[Level], value: Any, interval: Any = None) -> bool:
    """One line per table over the load; ``value`` of a level is None if it has none."""
    for _, part in groupby(levels, lambda level: level.case[:3]):
        group = [level for level in part if value(level) is not None]
        if not group:
            continue
        loads, values = [level.case.concurrency for level in group], [value(level) for level in group]
        (line,) = axes.plot(loads, values, ".-", label=_name(group[0].case))
        bounds = [interval(level) for level in group] if interval else [None]
        if None not in bounds:
            axes.fill_between(loads, *zip(*bounds, strict=True), alpha=0.15, color=line.get_color())
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
    """Per table, the distribution at the lowest load that has one."""
    from matplotlib.ticker import AutoLocator

    axes.xaxis.set_major_locator(AutoLocator())
    for _, part in groupby(levels, lambda level: level.case[:3]):
        group = list(part)
        counts = next((x.acceptance.per_prompt for x in group if x.acceptance and x.acceptance.per_prompt), [])
        taus = sorted(p.tokens / p.rounds for p in counts if p.rounds)
        if taus:
            axes.ecdf(taus, label=_name(group[0].case))
    axes.set_ylabel("share of prompts with at most this tau")
    return bool(axes.lines)


_LOAD = "requests in flight"
PLOTS = (
    Plot("throughput", "Throughput", "Output tokens per second of all requests.", _draw_throughput, _LOAD),
    Plot("speedup", "Speed-up", "Interval clustered by prompt.", _draw_speedup, _LOAD),
    Plot("tau", "Acceptance length τ", "Bonus token included; interval clustered by prompt.", _draw_tau, _LOAD),
    Plot("first_token", "Time to the first token", "From the request to its first token.", _draw_first, _LOAD),
    Plot("per_token", "Time per token", "Of the tokens after the first.", _draw_per_token, _LOAD),
    Plot("prompts", "Acceptance length by prompt", "At the lowest load.", _draw_prompts, "tau of a prompt"),
)
