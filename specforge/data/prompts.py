"""Prompt sets: tokenised documents, written by `specforge prepare` and read by `specforge capture`.

A prompt set is a folder. ``prompts.safetensors`` contains the concatenated token ids and loss masks, and the count of
each token; ``prompts.json`` names the tokenizer and the source of each document.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from specforge.contracts import PromptTask, TokenCounts, content_id
from specforge.data.conversations import DataRecord, RecordError, parse_record, read_raw
from specforge.data.splits import Member, assign
from specforge.data.templates import ChatTemplate
from specforge.data.turns import TokenSample
from specforge.errors import UserError
from specforge.files import check_folder, first_line, holds_only, read_json, write_folder
from specforge.options import NonNegativeInt, PositiveInt, Seed

FORMAT = 1
SPLITS = ("train", "heldout")
_META, _TENSORS = "prompts.json", "prompts.safetensors"
_NAMES = ("input_ids", "loss_mask", "offsets", "supervised_counts", "context_counts")


@dataclass
class PromptSet:
    """Tokenised documents."""

    tasks: list[PromptTask]
    tokenizer: str  # fingerprint of the tokenizer
    counts: TokenCounts  # token counts over all documents

    def save(self, folder: Path) -> None:
        """Write the folder atomically."""
        write_folder(folder, self.files())

    def files(self) -> dict[str, bytes]:
        """The contents of the files, by name."""
        ids = np.concatenate([np.asarray(t.input_ids, dtype=np.int32) for t in self.tasks] or [np.empty(0, np.int32)])
        mask = np.concatenate([np.asarray(t.loss_mask, dtype=np.uint8) for t in self.tasks] or [np.empty(0, np.uint8)])
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
        return {_META: json.dumps(meta).encode(), _TENSORS: save(tensors)}

    @classmethod
    def load(cls, folder: Path) -> PromptSet:
        """Read a folder.

        Raises:
            UserError: the folder is not a prompt set, or is damaged.
        """
        if not (folder / _META).exists():
            raise UserError(f"{folder}: not a prompt set; create one with `specforge prepare`")
        meta = read_json(folder / _META)
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            found = meta.get("format") if isinstance(meta, dict) else "unknown"
            raise UserError(f"{folder / _META}: format {str(found)[:20]}, this version reads {FORMAT}")
        try:
            return cls._read(folder, meta)
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{folder}: is damaged ({first_line(error)}); create it again with `specforge prepare`"
            ) from error

    @classmethod
    def _read(cls, folder: Path, meta: dict[str, Any]) -> PromptSet:
        from specforge.files import open_safetensors

        with open_safetensors(folder / _TENSORS) as file:
            tensors = {name: file.get_tensor(name) for name in _NAMES}
        ids, mask, offsets = (tensors[name] for name in _NAMES[:3])
        counts = TokenCounts(*(tensors[name] for name in _NAMES[3:]))
        names, sources = meta["task_ids"], meta["sources"]
        _check_form(ids, mask, offsets, counts, [*names, *sources, meta["tokenizer"]])
        tokens, masked = ids.tolist(), mask.tolist()
        tasks = [
            PromptTask(name, tuple(tokens[a:b]), tuple(masked[a:b]), source)
            for name, source, (a, b) in zip(names, sources, pairwise(offsets.tolist()), strict=True)
        ]
        if not all(any(task.loss_mask) for task in tasks):
            raise ValueError("a sample without supervised tokens")
        return cls(tasks, meta["tokenizer"], counts)


def _check_form(ids: Tensor, mask: Tensor, offsets: Tensor, counts: TokenCounts, texts: list[Any]) -> None:
    """Raise ValueError if the tensors are not those of a prompt set."""
    size = len(counts.supervised)
    right = (
        ids.dtype == torch.int32
        and mask.dtype == torch.uint8
        and offsets.dtype == torch.int64
        and ids.ndim == offsets.ndim == 1
        and ids.shape == mask.shape
        and counts.supervised.shape == counts.context.shape == (size,)
        and counts.supervised.dtype == counts.context.dtype == torch.int64
    )
    if not right:
        raise ValueError("tensors have the wrong dtype or shape")
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(ids) or bool((offsets.diff() < 1).any()):
        raise ValueError("offsets do not match the samples")
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= size or int(mask.max()) > 1):
        raise ValueError("token ids or masks out of range")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("names are not text")


def load_splits(folder: Path) -> dict[str, PromptSet]:
    """Load the prompt sets that `specforge prepare` wrote, by split.

    Raises:
        UserError: the folder has none, or one is damaged.
    """
    sets = {name: PromptSet.load(folder / name) for name in SPLITS if (folder / name).exists()}
    if not sets:
        raise UserError(f"{folder}: no prompt set `train` or `heldout`; create them with `specforge prepare`")
    return sets


def identity(sets: Mapping[str, PromptSet]) -> str:
    """Hash of the assignment of samples to splits."""
    return content_id(*([name, *sorted(t.task_id for t in sets[name].tasks)] for name in sorted(sets)))


def check_output(folder: Path) -> None:
    """Check before the work starts that prompt sets can be written to a folder.

    Raises:
        UserError: the folder contains something else.
    """
    check_folder(folder, holds_only(_META, _TENSORS))


def save_splits(folder: Path, sets: Mapping[str, PromptSet]) -> None:
    """Write all prompt sets atomically, replacing earlier ones.

    Raises:
        UserError: the disk is full or not writable, or the folder contains something else.
    """
    files = {f"{name}/{file}": data for name, prompts in sets.items() for file, data in prompts.files().items()}
    write_folder(folder, files)


@dataclass
class PrepareReport:
    """Counts of dropped and truncated records by reason, and further notes for the user."""

    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class PrepareOptions:
    """How records become samples.

    Args:
        max_length: maximum number of tokens of a sample; lowered to the longest context the target was trained for.
        min_supervised: minimum number of supervised tokens of a sample.
        bad_samples: stop at a record that cannot be used (error), or drop and count it.
        long_samples: stop at a sample over max_length (error), drop and count it, or cut its end off (truncate).
        holdout: number of conversations to hold out, drawn from those whose record does not name its split.
        seed: random seed for choosing held-out conversations.
    """

    max_length: PositiveInt = 4096
    min_supervised: NonNegativeInt = 1
    bad_samples: Literal["error", "drop"] = "error"
    long_samples: Literal["error", "drop", "truncate"] = "error"
    holdout: NonNegativeInt = 0
    seed: Seed = 0


def prepare(
    data: Sequence[str],
    template: ChatTemplate,
    vocab_size: int,
    options: PrepareOptions,
    split: str = "train",
    subset: str | None = None,
    progress: Any = None,
) -> tuple[dict[str, PromptSet], PrepareReport]:
    """Read, render and tokenise records of files and hub datasets; ``split`` and ``subset`` apply to the latter.

    ``vocab_size`` is the number of rows of the target's embedding; ``progress`` is called after every record.

    Returns:
        The non-empty splits, and a report of dropped records.

    Raises:
        UserError: a record cannot be used and ``bad_samples`` is ``error``.
    """
    report = PrepareReport(notes=template.notes)
    tasks: dict[str, PromptTask] = {}
    members: list[Member] = []
    special = frozenset(template.tokenizer.all_special_ids)
    for source, row in (item for name in data for item in read_raw(name, split, subset)):
        if progress is not None:
            progress()
        record, found = _encoded(source, row, template, options, report)
        if record and found:
            members.append(Member.of(record, found, special))
            report.dropped["duplicate"] += sum(task.task_id in tasks for task in found)
            tasks |= {task.task_id: task for task in found if task.task_id not in tasks}
    if not tasks:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
        raise UserError(f"{', '.join(data)}: no usable record" + (f" ({reasons})" if reasons else ""))
    splits = assign(members, options.holdout, options.seed)
    report.dropped["conversations that share a prompt with a held-out one"] += splits.count(None)
    report.dropped = +report.dropped
    sets: dict[str, PromptSet] = {}
    for name in SPLITS:
        ids = {i for member, its in zip(members, splits, strict=True) if its == name for i in member.samples}
        chosen = [task for task_id, task in tasks.items() if task_id in ids]
        if chosen:
            sets[name] = PromptSet(chosen, template.fingerprint, count_tokens(chosen, vocab_size))
    return sets, report


def _encoded(
    source: str, row: Any, template: ChatTemplate, options: PrepareOptions, report: PrepareReport
) -> tuple[DataRecord | None, list[PromptTask]]:
    """A record and its samples; None and no samples if it cannot be used."""
    try:
        record = parse_record(source, row)
        samples = [_limited(source, sample, options, report) for sample in template.encode(record)]
    except RecordError as error:
        if options.bad_samples == "error":
            raise UserError(f"{error} (fix it, or skip such records with --bad_samples drop)") from error
        report.dropped["unusable"] += 1
        return None, []
    return record, [
        PromptTask(content_id(list(s.input_ids), list(s.loss_mask)), s.input_ids, s.loss_mask, source)
        for s in samples
        if s is not None
    ]


def _limited(source: str, sample: TokenSample, options: PrepareOptions, report: PrepareReport) -> TokenSample | None:
    """The sample, truncated to ``max_length``; None if it is dropped."""
    fewest, most = max(options.min_supervised, 1), options.max_length
    if len(sample.input_ids) > most and options.long_samples == "error":
        raise UserError(
            f"{source}: {len(sample.input_ids)} tokens, more than max_length {most}; "
            "raise it, or use --long_samples drop or truncate"
        )
    if sum(sample.loss_mask) < fewest:
        raise RecordError(source, f"the loss mask has {sum(sample.loss_mask)} tokens, fewer than {fewest}")
    if len(sample.input_ids) > most:
        sample = TokenSample(sample.input_ids[:most], sample.loss_mask[:most])
        if options.long_samples == "drop" or sum(sample.loss_mask) < fewest:
            report.dropped["too long"] += 1
            return None
        report.dropped["truncated, kept"] += 1
    return sample


def describe(prompts: PromptSet) -> str:
    """One line of statistics: samples, tokens, supervised share, and lengths."""
    lengths = np.array([len(task.input_ids) for task in prompts.tasks])
    median, high = np.percentile(lengths, [50, 95], method="nearest")
    tokens, supervised = int(lengths.sum()), int(prompts.counts.supervised.sum())
    return (
        f"{len(lengths):,} samples, {tokens:,} tokens, {supervised:,} of them supervised ({supervised / tokens:.0%}); "
        f"lengths: median {median:,}, 95th percentile {high:,}, longest {lengths.max():,}"
    )


def preview(task: PromptTask, template: ChatTemplate, width: int = 240) -> str:
    """The text of a sample with its supervised parts between « and »; long parts are shortened in the middle."""
    pieces = []
    for supervised, group in groupby(zip(task.loss_mask, task.input_ids, strict=True), key=itemgetter(0)):
        text = template.decode([token for _, token in group])
        text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
        if len(text) > width:
            text = f"{text[: width // 2]} ... {text[-width // 2 :]}"
        pieces.append(f"«{text}»" if supervised else text)
    if len(pieces) > 6:
        pieces = [*pieces[:3], "\n...\n", *pieces[-3:]]
    return "".join(pieces)


def count_tokens(tasks: Sequence[PromptTask], vocab_size: int) -> TokenCounts:
    """Count token ids inside and outside the loss mask."""
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
