"""`specforge bench` and `parity`: what a server achieves with a draft, and whether it runs the trained draft."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from lightning_modules.loading import load_module
from specforge.checkpoints import read_checkpoint
from specforge.console import console, progress_bar, say
from specforge.data.templates import ChatTemplate
from specforge.errors import UserError
from specforge.eval.bench import Bench, BenchOptions, Level
from specforge.eval.bench_report import PAGE, RESULTS, tables, write_page, write_results
from specforge.eval.held_out import read_prompts, read_source
from specforge.eval.parity import Parity, describe
from specforge.eval.served import Server, find_server
from specforge.files import check_json, write_file
from specforge.inference.server_client import ServerClient
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft import read_draft
from specforge.options import Dtype, PositiveInt
from specforge.system import interrupt_on_sigterm, pick_device

_PATIENCE = 30.0  # seconds until a server that does not answer is reported


@dataclass(frozen=True)
class ServerOptions:
    """How servers are reached.

    Args:
        target: folder or hub name of the target; by default the folder that the server loaded.
        num_prompts: use only the first N prompts of each set (default: all).
        api_key_file: file with the servers' API key.
    """

    target: str | None = None
    num_prompts: PositiveInt | None = None
    api_key_file: Path | None = None


class _Asked(NamedTuple):
    """The target, its chat template, and the prompts of each set."""

    target: TargetFiles
    template: ChatTemplate
    sets: dict[str, list[list[int]]]


def bench(
    server: str,
    prompts: list[str],
    connection: ServerOptions,
    options: BenchOptions,
    baseline: str | None = None,
    output: Path = Path("runs/bench"),
) -> None:
    """Measure a vLLM or SGLang server: speed, acceptance length (tau) and speed-up, by load.

    bench.json is written after each measurement, so an interrupted bench keeps what it has measured. Another one with
    the same output measures everything again.

    Args:
        server: address of the server, such as http://127.0.0.1:8000.
        prompts: folders from `specforge prepare` (their held-out parts), or files of conversations.
        connection: how servers are reached.
        options: what is measured.
        baseline: address of a server without a draft, to compare with.
        output: folder for bench.json, bench.html and plots.
    """
    check_json(output / RESULTS, "run", "levels")
    if (output / RESULTS).exists():
        say(f"{output / RESULTS}: is of an earlier bench; the first measurement replaces it")
    known = _known(prompts, connection)
    interrupt_on_sigterm()
    connections = max(options.concurrency)
    with ExitStack() as stack:
        served, plain = (
            None if url is None else _connect(stack, url, connection, connections) for url in (server, baseline)
        )
        assert served is not None
        _, template, sets = known or _read(prompts, _target(served))
        bar = stack.enter_context(progress_bar("measurements"))
        task = bar.add_task("bench", total=None, rate="")
        run = Bench(served, plain, sorted(template.end_ids), options, str(time.time_ns()), connection.num_prompts)
        settings = {
            "server": str(served),
            "baseline": plain and str(plain),
            "model": served.model,
            "prompts": {name: len(found[: connection.num_prompts]) for name, found in sets.items()},
            "measurements": len(run.cases(sets)),
            **asdict(options),
            "tau": "(tokens - 1) / rounds, bonus token included",
        }
        levels: list[Level] = []
        try:
            for level in run.run(sets, lambda done, total: bar.update(task, completed=done, total=total)):
                levels.append(level)
                write_results(output, settings, levels)
        finally:
            if levels:
                _report(output, settings, levels)


def parity(
    server: str,
    draft: Path,
    prompts: list[str],
    connection: ServerOptions,
    max_new_tokens: PositiveInt = 80,
    gamma: PositiveInt | None = None,
    dtype: Dtype = "float32",
    device: str = "auto",
    json: Path | None = None,
    algorithm: str | None = None,
) -> int:
    """Compare a server with the trained draft, round by round, and name the likely cause of a difference.

    Exits with status 1 if they differ.

    Args:
        server: address of a vLLM or SGLang server with the draft, such as http://127.0.0.1:8000.
        draft: the draft, as a SpecForge checkpoint or a draft's folder; weights of the precision that the server loads.
        prompts: folders from `specforge prepare` (their held-out parts), or files of conversations.
        connection: how the server is reached.
        max_new_tokens: maximum number of tokens of an answer.
        gamma: tokens drafted per round (default: as the server says).
        dtype: compute dtype, that of the server.
        device: cpu, cuda, cuda:N or auto.
        json: also write the result to this file.
        algorithm: name of the draft's algorithm, or class path of your own module (default: the built-in one).
    """
    if json is not None:
        check_json(json, "prompts", "trials")
    device = pick_device(device)
    known = _known(prompts, connection)
    module = None if known is None else load_module(draft, str(known.target.folder), algorithm)
    if module is None:
        (read_draft if draft.is_dir() else read_checkpoint)(draft)  # is it one?
    with ExitStack() as stack:
        served = _connect(stack, server, connection)
        target, template, sets = known or _read(prompts, _target(served))
        module = (module or load_module(draft, str(target.folder), algorithm)).to(device).eval()
        texts = [p for found in sets.values() for p in found[: connection.num_prompts]]
        check = Parity(served, module, sorted(template.end_ids), max_new_tokens, dtype, device, gamma, say)
        result = check.run(texts)
    for line in describe(result, str(served), module.algorithm):
        say(line)
    if json is not None:
        write_file(json, dumps(result.to_json(), indent=2) + "\n")
        say(f"wrote {json}")
    return not result.agrees


def _connect(stack: ExitStack, url: str, options: ServerOptions, connections: int = 1) -> Server:
    client = ServerClient(url, options.api_key_file, patience=_PATIENCE, connections=connections)
    return find_server(stack.enter_context(client))


def _known(prompts: Sequence[str], options: ServerOptions) -> _Asked | None:
    """The files, checked before a server is asked, which may not answer; None if only the server names the target."""
    if options.target is not None:
        return _read(prompts, TargetFiles.find(options.target))
    for name in prompts:
        read_source(Path(name))
    return None


def _read(prompts: Sequence[str], target: TargetFiles) -> _Asked:
    template = ChatTemplate.load(target)
    return _Asked(target, template, {name: read_prompts(Path(name), template) for name in prompts})


def _target(server: Server) -> TargetFiles:
    """The files of the target that a server loaded, which have its tokenizer and end tokens."""
    if not Path(server.folder).is_dir():
        raise UserError(f"{server}: its model {server.folder} is not a folder here; name the target with --target")
    return TargetFiles.find(server.folder)


def _report(output: Path, settings: dict[str, Any], levels: Sequence[Level]) -> None:
    for content in tables(levels):
        table = Table(title=content["title"], box=box.SIMPLE, pad_edge=False, collapse_padding=True)
        for column in content["columns"]:
            table.add_column(column, justify="right", no_wrap=True)
        for row in content["rows"]:
            table.add_row(*row)
        console.print(table)
        for note in content["notes"]:
            say(note)
    write_page(output, settings, levels)
    for name in (RESULTS, PAGE):
        say(f"wrote {output / name}: {len(levels)} of {settings['measurements']} measurements")
