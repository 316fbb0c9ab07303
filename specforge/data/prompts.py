"""Tokenised prompts on disk, and making them: what `specforge prepare` writes and `specforge capture` reads.

A prompt set is a folder: ``prompts.safetensors`` holds all token ids and masks end to end, and the counts of
each token; ``prompts.json`` says which tokenizer made them and where each came from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from specforge.contracts import PromptTask, TokenCounts, content_id
from specforge.data.conversations import RecordError, parse_record, read_raw
from specforge.data.templates import ChatTemplate, TokenSample
from specforge.errors import UserError
from specforge.files import read_json, write_folder

FORMAT = 1
SPLITS = ("train", "heldout")


@dataclass
class PromptSet:
    """Tokenised documents.

    Attributes:
        tasks: the documents.
        tokenizer: fingerprint of the tokenizer that made them.
        counts: token counts over all of them.
    """

    tasks: list[PromptTask]
    tokenizer: str
    counts: TokenCounts

    def save(self, folder: Path) -> None:
        """Write the folder; it appears whole or not at all."""
        ids = np.concatenate(
            [np.asarray(t.input_ids, dtype=np.int32) for t in self.tasks] or [np.empty(0, np.int32)]
        )
        mask = np.concatenate(
            [np.asarray(t.loss_mask, dtype=np.uint8) for t in self.tasks] or [np.empty(0, np.uint8)]
        )
        lengths = [len(t.input_ids) for t in self.tasks]
        tensors = {
            "input_ids": torch.from_numpy(ids),
            "loss_mask": torch.from_numpy(mask),
            "offsets": torch.tensor([0, *np.cumsum(lengths, dtype=np.int64)], dtype=torch.int64),
            "supervised_counts": self.counts.supervised,
            "context_counts": self.counts.context,
        }
        meta = {
            "format": FORMAT,
            "tokenizer": self.tokenizer,
            "task_ids": [t.task_id for t in self.tasks],
            "sources": [t.source for t in self.tasks],
        }
        write_folder(
            folder, {"prompts.json": json.dumps(meta).encode(), "prompts.safetensors": save(tensors)}
        )

    @classmethod
    def load(cls, folder: Path) -> PromptSet:
        """Read a folder.

        Raises:
            UserError: it is not a prompt set, or damaged.
        """
        from specforge.target_files import open_safetensors

        if not (folder / "prompts.json").exists():
            raise UserError(f"{folder}: not a prompt set; make one with `specforge prepare`")
        meta = read_json(folder / "prompts.json")
        if meta.get("format") != FORMAT:
            raise UserError(
                f"{folder / 'prompts.json'}: format {meta.get('format')}, this version reads {FORMAT}"
            )
        with open_safetensors(folder / "prompts.safetensors") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        ids, mask = tensors["input_ids"].tolist(), tensors["loss_mask"].tolist()
        offsets = tensors["offsets"].tolist()
        spans = pairwise(offsets)
        tasks = [
            PromptTask(name, tuple(ids[a:b]), tuple(mask[a:b]), source)
            for name, source, (a, b) in zip(meta["task_ids"], meta["sources"], spans, strict=True)
        ]
        counts = TokenCounts(tensors["supervised_counts"], tensors["context_counts"])
        return cls(tasks, meta["tokenizer"], counts)


@dataclass
class PrepareReport:
    """What became of the records: ``kept`` samples, and ``dropped`` by reason."""

    kept: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    supervised: dict[str, int] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class PrepareOptions:
    """How records become samples.

    Args:
        max_length: most tokens of a sample.
        min_supervised: fewest tokens under the loss mask.
        bad_samples: what to do with a record that cannot be used: ``error`` stops, ``drop`` counts it.
        long_samples: the same for a sample over ``max_length``; ``truncate`` cuts its end off.
        holdout: records to hold out, drawn at random, where none of them names its split.
        seed: of that draw.
    """

    max_length: int = 4096
    min_supervised: int = 1
    bad_samples: str = "error"
    long_samples: str = "error"
    holdout: int = 0
    seed: int = 0


def prepare(
    data: Sequence[str], template: ChatTemplate, vocab_size: int, options: PrepareOptions,
    split: str = "train", subset: str | None = None, progress: Any = None,
) -> tuple[dict[str, PromptSet], PrepareReport]:  # fmt: skip
    """Read, render and tokenise records.

    Args:
        data: files or hub datasets.
        template: the target's tokenizer and chat template.
        vocab_size: rows of the target's embedding.
        options: limits and policies.
        split: split of a hub dataset.
        subset: configuration of a hub dataset.
        progress: called after every record.

    Returns:
        The non-empty splits, and what was dropped.

    Raises:
        UserError: a record cannot be used and the policy is ``error``.
    """
    report = PrepareReport()
    tasks: dict[str, PromptTask] = {}
    splits: dict[str, str | None] = {}
    for source, row in (item for name in data for item in read_raw(name, split, subset)):
        if progress is not None:
            progress()
        try:
            record = parse_record(source, row)
            samples = [_limited(record.source, s, options, report) for s in template.encode(record)]
        except RecordError as error:
            if options.bad_samples == "error":
                raise UserError(f"{error} (fix it, or skip such records with --bad_samples drop)") from error
            report.dropped["unusable"] += 1
            continue
        for sample in (s for s in samples if s is not None):
            task_id = content_id(list(sample.input_ids), list(sample.loss_mask))
            if task_id in tasks:
                report.dropped["duplicate"] += 1
                continue
            tasks[task_id] = PromptTask(task_id, sample.input_ids, sample.loss_mask, record.source)
            splits[task_id] = record.split
    if not tasks:
        raise UserError(f"{', '.join(data)}: no usable record")
    sets: dict[str, PromptSet] = {}
    for name, ids in _split(splits, options).items():
        chosen = [tasks[i] for i in ids]
        sets[name] = PromptSet(chosen, template.fingerprint, count_tokens(chosen, vocab_size))
        report.kept[name] = len(chosen)
        report.tokens[name] = sum(len(t.input_ids) for t in chosen)
        report.supervised[name] = sum(sum(t.loss_mask) for t in chosen)
    return sets, report


def _limited(
    source: str, sample: TokenSample, options: PrepareOptions, report: PrepareReport
) -> TokenSample | None:
    if len(sample.input_ids) > options.max_length:
        if options.long_samples == "drop":
            report.dropped["too long"] += 1
            return None
        if options.long_samples != "truncate":
            raise UserError(
                f"{source}: {len(sample.input_ids)} tokens, more than max_length {options.max_length}; "
                "raise it, or use --long_samples drop or truncate"
            )
        report.dropped["truncated, kept"] += 1
        sample = TokenSample(sample.input_ids[: options.max_length], sample.loss_mask[: options.max_length])
    if sum(sample.loss_mask) < options.min_supervised:
        raise RecordError(
            source, f"the loss mask has {sum(sample.loss_mask)} tokens, fewer than {options.min_supervised}"
        )
    return sample


def _split(splits: dict[str, str | None], options: PrepareOptions) -> dict[str, list[str]]:
    names = list(splits)
    if any(splits.values()):
        chosen = {i for i in names if splits[i] == "heldout"}
    else:
        if options.holdout >= len(names) and options.holdout:
            raise UserError(f"holdout is {options.holdout}, but there are only {len(names)} samples")
        order = np.random.default_rng(options.seed).permutation(len(names))[: options.holdout]
        chosen = {names[int(i)] for i in order}
    parts = {"train": [i for i in names if i not in chosen], "heldout": [i for i in names if i in chosen]}
    return {name: ids for name, ids in parts.items() if ids}


def count_tokens(tasks: Sequence[PromptTask], vocab_size: int) -> TokenCounts:
    """Count token ids under the mask and outside it."""
    counts = torch.zeros(2, vocab_size, dtype=torch.int64)
    for ids, mask in _blocks(tasks):
        for row, chosen in ((0, ids[mask]), (1, ids[~mask])):
            counts[row] += torch.bincount(chosen, minlength=vocab_size)
    return TokenCounts(counts[0].contiguous(), counts[1].contiguous())


def _blocks(tasks: Sequence[PromptTask], size: int = 1024) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(tasks), size):
        part = tasks[start : start + size]
        ids = torch.tensor([i for t in part for i in t.input_ids], dtype=torch.int64)
        yield ids, torch.tensor([m for t in part for m in t.loss_mask], dtype=torch.bool)
