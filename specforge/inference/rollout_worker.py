"""Capture: prompts to committed features, for every kind of run.

Prompts are planned into batches of similar length before the first forward pass. The plan depends only on the prompts,
so a run that was killed repeats exactly the batches that it had not finished, and its features equal those of an
undisturbed run. Features are flushed to the store before their references are committed; whatever is committed is
complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.contracts import (
    INPUT_IDS,
    LOSS_MASK,
    ExpectedSample,
    FeatureSpec,
    PromptTask,
    Provenance,
    SampleRef,
    content_id,
)
from specforge.errors import UserError
from specforge.inference.target_engine import TargetEngine
from specforge.inference.target_engine.base import feature_widths
from specforge.inference.target_files import torch_dtype
from specforge.runtime.data_plane.encoding import stored_width
from specforge.runtime.data_plane.store import BadSampleError, FeatureStore, StoreFullError


def sample_id(task: PromptTask, provenance: Provenance) -> str:
    """Id of a sample: a hash of its tokens and mask, the target, and the capture policy."""
    return content_id(task.task_id, provenance.target_fingerprint, provenance.capture.to_json())


def capture_order(task: PromptTask) -> tuple[int, str]:
    """Sort key of prompts: their length."""
    return len(task.input_ids), task.task_id


def plan_batches(tasks: Sequence[PromptTask], batch_tokens: int) -> list[list[PromptTask]]:
    """Sort by length and cut into batches of at most ``batch_tokens`` tokens with padding (at least one sample)."""
    return [[task for _, task in batch] for batch in plan_named((("", task) for task in tasks), batch_tokens)]


def plan_named(tasks: Iterable[tuple[str, PromptTask]], batch_tokens: int) -> list[list[tuple[str, PromptTask]]]:
    """:func:`plan_batches` for pairs of a sample's name and its prompt."""
    batches: list[list[tuple[str, PromptTask]]] = []
    for name, task in sorted(tasks, key=lambda x: capture_order(x[1])):
        if not batches or (len(batches[-1]) + 1) * len(task.input_ids) > batch_tokens:
            batches.append([])
        batches[-1].append((name, task))
    return batches


def expect(tasks: Sequence[PromptTask], provenance: Provenance, hidden_size: int) -> list[ExpectedSample]:
    """Samples that capturing prompts will give, in the order in which prompts are captured one by one.

    :meth:`TargetEngine.check` proves that a target gives such features; the target itself is not needed here.
    """
    widths = feature_widths(provenance.capture, hidden_size)
    states = [(name, provenance.dtype, (width,)) for name, width in widths.items()]
    kinds = sorted([*states, (INPUT_IDS, "int32", ()), (LOSS_MASK, "uint8", ())])
    size = torch_dtype(provenance.dtype).itemsize
    token = 4 + 1 + sum(stored_width(width, size, provenance.encoding) for width in widths.values())
    return [
        ExpectedSample(
            sample_id(task, provenance),
            task,
            tuple(FeatureSpec(name, dtype, (len(task.input_ids), *rest)) for name, dtype, rest in kinds),
            len(task.input_ids) * token,
            provenance,
        )
        for task in sorted(tasks, key=capture_order)
    ]


@dataclass(frozen=True)
class Progress:
    """Samples and tokens that one batch added, and the number of its samples that were ``resumed``."""

    samples: int
    tokens: int
    resumed: int


@dataclass(frozen=True)
class Captured:
    """A sample's features from one forward pass."""

    sample_id: str
    task: PromptTask
    tensors: dict[str, Tensor]


def put(store: FeatureStore, captured: Captured, provenance: Provenance) -> SampleRef:
    """Put a captured sample into a store, with its tokens and mask.

    Raises:
        BadSampleError: its features must not be stored.
        StoreFullError: they do not fit.
    """
    task, tensors = captured.task, captured.tensors
    tensors[INPUT_IDS] = torch.tensor(task.input_ids, dtype=torch.int32)
    tensors[LOSS_MASK] = torch.tensor(task.loss_mask, dtype=torch.uint8)
    return store.put(
        captured.sample_id, tensors, num_supervised=sum(task.loss_mask), source=task.source, provenance=provenance
    )


def capture_one(engine: TargetEngine, store: FeatureStore, task: PromptTask, provenance: Provenance) -> SampleRef:
    """Run the target over one prompt and put its features into a store that needs no flush.

    Raises:
        BadSampleError: the features must not be stored, for example because they contain NaN.
        StoreFullError: they do not fit.
        UserError: the engine's server has no space for them.
    """
    try:
        (tensors,) = engine.capture([task.input_ids], provenance.capture)
    except StoreFullError as error:  # of the engine's server
        raise UserError(str(error)) from error
    return put(store, Captured(sample_id(task, provenance), task, tensors), provenance)


def _raise(error: BadSampleError) -> None:
    raise error


@dataclass(eq=False)
class RolloutWorker:
    """Runs the target over prompts, stores the features, and commits their references."""

    engine: TargetEngine  # the frozen target
    store: FeatureStore  # receives the tensors
    commit: Callable[[Sequence[SampleRef]], object]  # called with the references of flushed samples
    provenance: Provenance  # written into every reference
    flush_bytes: int = 128 << 20  # flush and commit once this many bytes are waiting
    # Runs puts, flushes and commits while the target processes the next batch; by default they run in turn.
    background: Executor | None = None
    # Called for a sample that must not be stored, such as one with NaN; by default the error is raised.
    reject: Callable[[BadSampleError], object] = _raise

    def __post_init__(self) -> None:
        self._refs: list[SampleRef] = []
        self._storing: Future[None] | None = None
        self.delivers = self.engine.delivers_to(self.store.backend)

    def produce(self, tasks: Sequence[PromptTask], batch_tokens: int) -> Iterator[Progress]:
        """Capture every prompt that the store does not hold yet.

        Raises:
            UserError: the store cannot be written.
        """
        for batch in plan_batches(tasks, batch_tokens):
            try:
                captured = self.capture(batch)
            except UserError as error:
                self.flush()  # what was captured is kept
                if not isinstance(error, StoreFullError) or len(batch) == 1:
                    raise
                yield from self.produce(batch, 1)  # what fits is kept, up to the first prompt that does not
                continue
            self.put(captured)
            tokens = sum(len(sample.task.input_ids) for sample in captured)
            yield Progress(len(captured), tokens, len(batch) - len(captured))
        self.flush()

    def capture(self, batch: Sequence[PromptTask], names: Sequence[str] | None = None) -> list[Captured]:
        """Run the target once over prompts; returns the samples that the store lacks and the engine has not delivered.

        Args:
            batch: prompts.
            names: names of their samples in the store, by default their ids.
        """
        ids = names or [sample_id(task, self.provenance) for task in batch]
        missing = [name not in self.store for name in ids]
        if not any(missing):
            return []
        if self.delivers:
            self._deliver([(name, task) for name, task, new in zip(ids, batch, missing, strict=True) if new])
            return []
        # The whole batch runs again, so that features do not depend on where an earlier run stopped.
        features = self.engine.capture([t.input_ids for t in batch], self.provenance.capture)
        found = zip(ids, batch, features, missing, strict=True)
        return [Captured(name, task, tensors) for name, task, tensors, new in found if new]

    def _deliver(self, samples: Sequence[tuple[str, PromptTask]]) -> None:
        """Have the engine store samples, and commit them."""
        names, tasks = [name for name, _ in samples], [task for _, task in samples]
        full: StoreFullError | None = None
        for found in self.engine.deliver(tasks, names, self.provenance):
            if isinstance(found, BadSampleError):
                self.reject(found)
            elif isinstance(found, StoreFullError):
                full = found
            else:
                self._refs.append(found)
        self.store.adopt(self._refs)
        self._flush()
        if full is not None:
            raise full

    def put(self, captured: Sequence[Captured]) -> None:
        """Store the samples of one pass; raises what storing those of the previous pass has raised."""
        self._finish_storing()
        if self.background is None:
            self._put(captured)
        else:
            self._storing = self.background.submit(self._put, captured)

    def flush(self) -> None:
        """Make the captured samples durable, then commit them."""
        self._finish_storing()
        self._flush()

    def drop(self) -> None:
        """Delete samples that were captured but not committed."""
        if self._storing is not None:
            wait([self._storing])
            self._storing = None
        for ref in self._refs:
            self.store.discard(ref)
        self._refs = []

    def _finish_storing(self) -> None:
        storing, self._storing = self._storing, None
        if storing is not None:
            storing.result()

    def _put(self, captured: Sequence[Captured]) -> None:
        for sample in captured:
            try:
                self._refs.append(put(self.store, sample, self.provenance))
            except BadSampleError as error:
                self.reject(error)
        if self.store.pending() >= self.flush_bytes:
            self._flush()

    def _flush(self) -> None:
        self.store.flush()
        if self._refs:
            self.commit(self._refs)
            self._refs = []
