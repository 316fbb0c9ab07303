"""Tokens per second of `specforge regenerate`: transformers in batches, and a server with several requests in flight.

    python -m benchmarks.regenerate --target models/SmolLM2-135M-Instruct \
        --server http://127.0.0.1:8000 --server_pid PID

Each row answers the same conversations with greedy decoding. CPU seconds count what answers: this process for
transformers, and the server with its child processes (`--server_pid`, the server's first process on this machine).
They tell engines apart on a machine with other load. A short run warms each engine up first.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from specforge.data.conversations import DataRecord, parse_record, read_raw
from specforge.data.templates import ChatTemplate
from specforge.inference.openai_server import ServerOptions, TokenServer, connect
from specforge.inference.regenerate import RegenerateOptions, Regeneration, Writer
from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_files import TargetFiles

_TICKS = 100  # of /proc, per second


def process_seconds(pid: int) -> float:
    """CPU seconds of a process and of all that it started and that still run."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = [c for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return (int(stat[11]) + int(stat[12])) / _TICKS + sum(process_seconds(int(child)) for child in children)


def measure(
    records: list[DataRecord],
    template: ChatTemplate,
    options: RegenerateOptions,
    engine: Callable[[], Writer],
    seconds: Callable[[], float],
) -> dict[str, float]:
    """Tokens, wall seconds and CPU seconds of answering some conversations."""
    with tempfile.TemporaryDirectory() as folder:
        work = Regeneration(records, template, Path(folder) / "answers.jsonl", options, "benchmark")
        before, start = seconds(), time.perf_counter()
        tokens = sum(count for _, count in work.run(engine))
        return {"tokens": tokens, "seconds": time.perf_counter() - start, "cpu_seconds": seconds() - before}


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for every engine and number of conversations answered at a time."""
    files = TargetFiles.find(arguments.target)
    template = ChatTemplate.load(files)
    records = [parse_record(*found) for found in islice(read_raw(arguments.data), arguments.limit)]
    options = RegenerateOptions(max_new_tokens=arguments.max_new_tokens)
    found: list[dict[str, Any]] = []

    def add(name: str, at_a_time: int, engine: Callable[[], Writer], seconds: Callable[[], float]) -> None:
        batched = replace(options, batch_size=at_a_time)
        measure(records[:2], template, replace(batched, max_new_tokens=8), engine, seconds)
        row = {"engine": name, "at_a_time": at_a_time, **measure(records, template, batched, engine, seconds)}
        found.append(row)
        print(
            f"{name:13} {at_a_time:3} at a time: {row['tokens']} tokens, {row['tokens'] / row['seconds']:6.1f} tok/s, "
            f"{row['tokens'] / max(row['cpu_seconds'], 1e-9):6.1f} tokens per CPU second",
            flush=True,
        )

    if not arguments.server_only:
        local = HFTargetEngine(files, arguments.dtype)
        for at_a_time in arguments.at_a_time:
            add("transformers", at_a_time, lambda: local, time.process_time)
    if arguments.server:
        for at_a_time in arguments.at_a_time:
            remote = ServerOptions(server=arguments.server, concurrency=at_a_time)

            def server(remote: ServerOptions = remote) -> Writer:
                made, ability = connect(remote, template, options.sampling, options.max_new_tokens)
                assert isinstance(made, TokenServer), ability
                return made

            add("server", at_a_time, server, lambda: process_seconds(arguments.server_pid))
    return found


def main() -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="configs/quickstart/conversations.jsonl")
    parser.add_argument("--limit", type=int, default=48, help="number of conversations (default: 48)")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument(
        "--at_a_time", type=int, nargs="+", default=[1, 8, 32], help="batch sizes, and requests in flight"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of transformers (default: bfloat16)")
    parser.add_argument("--threads", type=int, default=1, help="of transformers (default: 1)")
    parser.add_argument("--server", help="address of a vLLM or SGLang server of the target")
    parser.add_argument("--server_pid", type=int, help="the server's first process")
    parser.add_argument("--server_only", action="store_true", help="leave transformers out")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if arguments.server and not arguments.server_pid:
        parser.error("--server needs --server_pid")
    torch.set_num_threads(arguments.threads)
    found = rows(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
