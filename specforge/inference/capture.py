"""Capture the features of a folder of prompts: the library side of `specforge capture`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from specforge.contracts import CapturePolicy, PromptTask, Provenance
from specforge.data.prompts import PromptSet, identity, load_splits
from specforge.errors import UserError
from specforge.inference.rollout_worker import RolloutWorker
from specforge.inference.target_engine import Engine, HFTargetEngine, TargetEngine, on_device
from specforge.inference.target_files import TargetFiles
from specforge.options import Dtype, NonNegativeInt, PositiveInt
from specforge.runtime.data_plane.feature_folder import FeatureFolder


@dataclass(frozen=True)
class CaptureOptions:
    """How features are captured.

    Args:
        dtype: compute dtype, and dtype of the features; auto for that of the target's files.
        device: cpu, cuda, cuda:N or auto, for an engine in this process.
        engine: what runs the target: hf (transformers, in this process), vllm, sglang, http (`specforge target serve`),
            or the class path of your own; its options are --engine.NAME (see --engine.help hf).
        mix_engines: add to features that another engine has computed; they differ in their last bits.
        batch_tokens: maximum number of tokens of a forward pass, padding included (default: depends on the engine).
        encoding: store features as computed (raw), or in 8 bits.
        limit_samples: capture only the first N training samples; held-out ones are always captured in full.
    """

    dtype: Dtype = "bfloat16"
    device: str = "auto"
    engine: Engine = HFTargetEngine
    mix_engines: bool = False
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
    open_engine, sets = on_device(options.engine, options.device), load_splits(prompts)
    _check_lengths(target, sets)
    dtype = target.compute_dtype(options.dtype)
    provenance = {
        name: Provenance(target.name, target.fingerprint, x.tokenizer, policy, dtype, encoding=options.encoding)
        for name, x in sets.items()
    }

    def check(mix_engines: bool) -> None:
        for name, x in sets.items():
            FeatureFolder.check(output / name, provenance[name], x.counts, identity(sets), mix_engines)

    check(mix_engines=True)  # what can be known before the engine is there
    FeatureFolder.check_splits(output, sets)
    captured = []
    with open_engine(target, dtype) as engine:
        engine.check(policy)
        provenance = {name: replace(x, engine=engine.description) for name, x in provenance.items()}
        check(options.mix_engines)
        batch_tokens = options.batch_tokens or engine.batch_tokens
        for name, x in sets.items():
            folder = FeatureFolder.create(
                output / name, provenance[name], x.counts, identity(sets), options.mix_engines
            )
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
