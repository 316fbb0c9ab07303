"""Evaluate a trained draft on a folder of prompts: the library side of `specforge evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from specforge.contracts import PromptTask
from specforge.data.conversations import Conversation, DataRecord, RecordError, parse_record, read_raw
from specforge.data.prompts import PromptSet
from specforge.data.templates import ChatTemplate
from specforge.data.turns import Refusal
from specforge.errors import UserError
from specforge.eval.cache import EvalCache
from specforge.eval.evaluate import EvaluateOptions, Evaluation, MethodResult, check_engine
from specforge.eval.report import versions
from specforge.inference.target_files import torch_dtype
from specforge.system import multiplies_in, peak_memory


def evaluate_draft(
    module: Any,
    prompts: Path,
    options: EvaluateOptions,
    cache: EvalCache,
    num_prompts: int | None = None,
    suffix_corpus: Path | None = None,
    log: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[MethodResult], dict[str, Any]]:
    """Decode prompts speculatively with a draft, which is moved to the device, and with the baselines.

    The arguments are those of :func:`specforge.api.evaluate`, but the device must be one that PyTorch knows. Suffix
    decoding may draft from the answers of ``suffix_corpus``, a prompt set. ``log`` is called with a line of text when a
    step begins, ``progress`` with the number of decoded prompts and their total, over all methods.

    Returns:
        One row per method, and the settings of the evaluation.

    Raises:
        UserError: the prompts cannot be used, or are too long for the target.
    """
    check_engine(options.engine)
    dtypes: dict[str, Any] = {
        name: torch_dtype(module.target.compute_dtype(getattr(options, name))) for name in ("dtype", "speed_dtype")
    }
    for name, dtype in dtypes.items():
        dtypes[name] = str(multiplies_in(dtype, options.device)).removeprefix("torch.")
    options = replace(options, **dtypes)
    module.to(options.device).eval()
    folder = prompts / "heldout" if (prompts / "heldout").exists() else prompts
    tasks = with_prompt(PromptSet.load(folder).tasks, folder, log)[:num_prompts]
    template = ChatTemplate.load(module.target)
    corpus = [] if suffix_corpus is None else [_answer(task) for task in PromptSet.load(suffix_corpus).tasks]
    evaluation = Evaluation(
        module.target, module, sorted(template.end_ids), template.fingerprint, cache, options, log, progress, corpus
    )
    results = evaluation.run([_prompt(task) for task in tasks])
    run = _settings(module, folder, len(tasks), options)
    run |= {"suffix_corpus": suffix_corpus and str(suffix_corpus), "versions": versions()}
    return results, run | {"peak_memory": peak_memory(options.device)}


def _settings(module: Any, prompts: Path, count: int, options: EvaluateOptions) -> dict[str, Any]:
    return {
        "target": module.target.name,
        "target_fingerprint": module.target.fingerprint,
        "algorithm": module.algorithm,
        "prompts": str(prompts),
        "num_prompts": count,
        "gamma": options.gamma,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "draft_sampling": options.draft_sampling,
        "dtype": options.dtype,
        "speed_dtype": options.speed_dtype,
        "speed_prompts": min(options.speed_prompts, count),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "seed": options.seed,
        "tau": "bonus token included",
    }


def with_prompt(tasks: Sequence[PromptTask], folder: Path, log: Callable[[str], None]) -> list[PromptTask]:
    """The samples that have a prompt; those that are supervised from their first token have none.

    Raises:
        UserError: no sample has one.
    """
    found = [task for task in tasks if _prompt(task)]
    if not found:
        raise UserError(f"{folder}: every sample is supervised from its first token, so there is no prompt to answer")
    if len(found) < len(tasks):
        log(f"left out: {len(tasks) - len(found):,} samples that are supervised from their first token")
    return found


def read_source(source: Path) -> list[PromptTask] | list[DataRecord]:
    """The samples with a prompt in a folder of prompt sets (the held-out part, if any), or a file's conversations.

    Raises:
        UserError: the source cannot be read, or has no prompts.
    """
    if source.is_dir():
        folder = source / "heldout" if (source / "heldout").exists() else source
        return with_prompt(PromptSet.load(folder).tasks, folder, lambda text: None)
    if not source.exists():
        raise UserError(f"prompts {source}: no such file or folder")
    found = [parse_record(where, row) for where, row in read_raw(str(source))]
    if not found:
        raise UserError(f"{source}: has no prompts")
    return found


def read_prompts(source: Path, template: ChatTemplate) -> list[list[int]]:
    """Token ids of the prompts in a folder of prompt sets (the held-out part, if any), or in a file of conversations.

    A conversation's prompt ends where its first answer begins; it needs no answer. Other records of a file must have
    supervised tokens, and the prompt is what comes before them.

    Args:
        source: a folder from `specforge prepare`, or a ``.jsonl`` or ``.json`` file.
        template: renders and tokenises conversations.

    Raises:
        UserError: the source cannot be read, or has no prompts.
    """
    found = [_prompt(x) if isinstance(x, PromptTask) else _asked(x, template) for x in read_source(source)]
    prompts = [prompt for prompt in found if prompt]
    if not prompts:
        raise UserError(f"{source}: has no prompts")
    return prompts


def _asked(record: DataRecord, template: ChatTemplate) -> list[int]:
    """The prompt of a record; empty if it is supervised from its first token."""
    content = record.content
    if not isinstance(content, Conversation):
        sample = template.encode(record)[0]
        return list(sample.input_ids[: sample.loss_mask.index(1)])
    messages = content.messages[: content.first_answer]
    try:
        return list(template.ask(replace(content, messages=messages, kept={}, tokenizer="")))
    except Refusal as error:
        raise RecordError(record.source, str(error)) from error


def _prompt(task: PromptTask) -> list[int]:
    return list(task.input_ids[: task.loss_mask.index(1)])


def _answer(task: PromptTask) -> list[int]:
    return [token for token, supervised in zip(task.input_ids, task.loss_mask, strict=True) if supervised]
