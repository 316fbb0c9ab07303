"""Capture the features of a folder of prompts: the library side of `specforge capture`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from specforge.contracts import CapturePolicy, PromptTask, Provenance
from specforge.data.prompts import PromptSet, identity, load_splits
from specforge.errors import UserError
from specforge.inference.rollout_worker import RolloutWorker
from specforge.inference.target_engine import HFTargetEngine, TargetEngine
from specforge.inference.target_files import TargetFiles
from specforge.options import Dtype, NonNegativeInt, PositiveInt
from specforge.runtime.data_plane.feature_folder import FeatureFolder
from specforge.system import pick_device


@dataclass(frozen=True)
class CaptureOptions:
    """How features are captured.

    Args:
        dtype: compute dtype, and dtype of the features.
        device: cpu, cuda, cuda:N or auto.
        batch_tokens: maximum number of tokens of a forward pass, padding included (default: depends on the device).
        encoding: store features as computed (raw), or in 8 bits.
        limit_samples: capture only the first N training samples.
    """

    dtype: Dtype = "bfloat16"
    device: str = "auto"
    batch_tokens: PositiveInt | None = None
    encoding: Literal["raw", "float8_e4m3fn"] = "raw"
    limit_samples: NonNegativeInt | None = None


class CaptureProgress(NamedTuple):
    """How far one split is: samples finished out of ``total``, and tokens that the target has read."""

    split: str
    finished: int
    total: int
    tokens: int


class CapturedSplit(NamedTuple):
    """A folder of features: its samples and bytes, and the tokens that the target read in this call."""

    folder: Path
    samples: int
    nbytes: int
    tokens: int


def capture(
    target: TargetFiles,
    prompts: Path,
    output: Path,
    policy: CapturePolicy,
    options: CaptureOptions | None = None,
    progress: Callable[[CaptureProgress], object] = lambda progress: None,
) -> list[CapturedSplit]:
    """Run the target over prepared prompts and keep the hidden states that a draft trains on.

    An interrupted capture resumes where it stopped.

    Args:
        target: the target's files.
        prompts: folder from `specforge prepare`.
        output: folder for the features, with one subfolder per split.
        policy: what to keep, such as ``Eagle3Module.capture_policy(target)``.
        options: dtype, device, batches and encoding.
        progress: called after every batch.

    Raises:
        UserError: the prompts do not fit the target, the folder holds other features, or the disk is full.
    """
    options = options or CaptureOptions()
    device, sets = pick_device(options.device), load_splits(prompts)
    _check_lengths(target, sets)
    provenance = {
        name: Provenance(target.name, target.fingerprint, x.tokenizer, policy, options.dtype, encoding=options.encoding)
        for name, x in sets.items()
    }
    for name, x in sets.items():
        FeatureFolder.check(output / name, provenance[name], x.counts, identity(sets))
    FeatureFolder.check_splits(output, sets)
    engine = HFTargetEngine(target, options.dtype, device)
    engine.check(policy)
    batch_tokens = options.batch_tokens or (2048 if device == "cpu" else 65536)
    captured = []
    for name, x in sets.items():
        folder = FeatureFolder.create(output / name, provenance[name], x.counts, identity(sets))
        tasks = x.tasks[: options.limit_samples if name == "train" else None]
        tokens = _capture_split(name, tasks, engine, folder, provenance[name], batch_tokens, progress)
        held = folder.store.stat()
        captured.append(CapturedSplit(output / name, held.samples, held.nbytes, tokens))
    return captured


def _capture_split(
    name: str,
    tasks: Sequence[PromptTask],
    engine: TargetEngine,
    folder: FeatureFolder,
    provenance: Provenance,
    batch_tokens: int,
    progress: Callable[[CaptureProgress], object],
) -> int:
    """Capture the prompts that a folder lacks; returns the number of tokens that the target has read."""
    finished = tokens = 0
    with ThreadPoolExecutor(1, "store") as background:
        worker = RolloutWorker(engine, folder.store, folder.manifest.append, provenance, background=background)
        for step in worker.produce(tasks, batch_tokens):
            finished, tokens = finished + step.samples + step.resumed, tokens + step.tokens
            progress(CaptureProgress(name, finished, len(tasks), tokens))
    return tokens


def _check_lengths(target: TargetFiles, sets: dict[str, PromptSet]) -> None:
    """Reject prompts that are longer than the target's positions reach, before any of them is captured."""
    longest = max((task for x in sets.values() for task in x.tasks), key=lambda task: len(task.input_ids))
    limit = target.learned_positions
    if limit is not None and len(longest.input_ids) > limit:
        raise UserError(
            f"{longest.source}: {len(longest.input_ids)} tokens, but {target.name} has {limit} positions; prepare the "
            f"prompts with --max_length {limit}"
        )
