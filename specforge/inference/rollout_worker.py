"""Prompts to committed features: the producer of every workload.

Prompts are planned into batches of similar length before the first forward pass. The plan depends only on
the prompts, so a run that was killed repeats exactly the batches that it had not finished and its features
are the ones of a run that was never killed. Features are flushed to the store first and committed
second; what is committed is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.contracts import (
    AUX_HIDDEN_STATES,
    INPUT_IDS,
    LAST_HIDDEN_STATES,
    LOSS_MASK,
    FeatureSpec,
    PromptTask,
    Provenance,
    SampleRef,
    content_id,
)
from specforge.inference.target_engine import TargetEngine
from specforge.inference.target_files import torch_dtype
from specforge.runtime.data_plane.encoding import stored_width
from specforge.runtime.data_plane.store import BadSampleError, FeatureStore


def sample_id(task: PromptTask, provenance: Provenance) -> str:
    """Identity of a sample: its tokens and mask, the target, and what is captured of it."""
    return content_id(task.task_id, provenance.target_fingerprint, provenance.capture.to_json())


def plan_batches(tasks: Sequence[PromptTask], batch_tokens: int) -> list[list[PromptTask]]:
    """Sort by length and cut into batches of at most ``batch_tokens`` tokens with padding (at least one sample)."""
    return [[task for _, task in batch] for batch in plan_named((("", task) for task in tasks), batch_tokens)]


def plan_named(tasks: Iterable[tuple[str, PromptTask]], batch_tokens: int) -> list[list[tuple[str, PromptTask]]]:
    """As :func:`plan_batches`, of prompts whose samples have names already."""
    batches: list[list[tuple[str, PromptTask]]] = []
    for name, task in sorted(tasks, key=lambda x: (len(x[1].input_ids), x[1].task_id)):
        if not batches or (len(batches[-1]) + 1) * len(task.input_ids) > batch_tokens:
            batches.append([])
        batches[-1].append((name, task))
    return batches


def expect(tasks: Sequence[PromptTask], provenance: Provenance, hidden_size: int) -> list[SampleRef]:
    """References of samples before they are produced: all but generation, checksum and place.

    What they say of tensors is what :meth:`TargetEngine.check` proves; the target itself is not needed.

    Args:
        tasks: prompts.
        provenance: the target, and what is captured of it.
        hidden_size: of the target.
    """
    policy = provenance.capture
    widths = {AUX_HIDDEN_STATES: len(policy.layer_ids), LAST_HIDDEN_STATES: int(policy.last_hidden_states)}
    states = [(name, provenance.dtype, (n * hidden_size,)) for name, n in widths.items() if n]
    kinds = sorted([*states, (INPUT_IDS, "int32", ()), (LOSS_MASK, "uint8", ())])
    size = torch_dtype(provenance.dtype).itemsize
    token = 4 + 1 + sum(stored_width(width, size, provenance.encoding) for _, _, (width,) in states)
    return [
        SampleRef(
            sample_id(task, provenance),
            0,
            tuple(FeatureSpec(name, dtype, (len(task.input_ids), *rest)) for name, dtype, rest in kinds),
            len(task.input_ids),
            sum(task.loss_mask),
            len(task.input_ids) * token,
            "",
            "",
            task.source,
            provenance,
        )
        for task in tasks
    ]


@dataclass(frozen=True)
class Progress:
    """What one batch added: ``samples`` and ``tokens`` captured, and those ``resumed`` from before."""

    samples: int
    tokens: int
    resumed: int


@dataclass(frozen=True)
class Captured:
    """What one pass gave of a sample."""

    sample_id: str
    task: PromptTask
    tensors: dict[str, Tensor]


def _refuse(error: BadSampleError) -> None:
    raise error


class RolloutWorker:
    """Runs the target over prompts and commits what it captures.

    Args:
        engine: the frozen target.
        store: takes the tensors.
        commit: takes the references of flushed samples.
        provenance: written into every reference.
        flush_bytes: flush and commit when this much is waiting.
        background: puts, flushes and commits there, while the target runs over the next batch; without one, in turn.
        reject: takes what is said of a sample that must not be stored, such as one with NaN; raises it by default.
    """

    def __init__(
        self,
        engine: TargetEngine,
        store: FeatureStore,
        commit: Callable[[Sequence[SampleRef]], object],
        provenance: Provenance,
        flush_bytes: int = 128 << 20,
        background: Executor | None = None,
        reject: Callable[[BadSampleError], object] = _refuse,
    ) -> None:
        self.engine, self.store, self.commit, self.reject = engine, store, commit, reject
        self.provenance, self.flush_bytes, self.background = provenance, flush_bytes, background
        self._refs: list[SampleRef] = []
        self._storing: Future[None] | None = None

    def run(self, tasks: Sequence[PromptTask], batch_tokens: int) -> Iterator[Progress]:
        """Capture every task that the store does not hold yet.

        Args:
            tasks: prompts.
            batch_tokens: most tokens of a forward pass, padding included.

        Raises:
            UserError: the target cannot meet the policy, or the store cannot be written.
        """
        self.engine.check(self.provenance.capture)
        yield from self.produce(tasks, batch_tokens)

    def produce(self, tasks: Sequence[PromptTask], batch_tokens: int) -> Iterator[Progress]:
        """As :meth:`run`, with an engine that has been checked."""
        for batch in plan_batches(tasks, batch_tokens):
            captured = self.capture(batch)
            self.put(captured)
            tokens = sum(len(sample.task.input_ids) for sample in captured)
            yield Progress(len(captured), tokens, len(batch) - len(captured))
        self.flush()

    def capture(self, batch: Sequence[PromptTask], names: Sequence[str] | None = None) -> list[Captured]:
        """Run the target once, over prompts of which the store lacks a sample; those it lacks.

        Args:
            batch: prompts.
            names: of their samples in the store; their identities by default.
        """
        ids = names or [sample_id(task, self.provenance) for task in batch]
        missing = [name not in self.store for name in ids]
        if not any(missing):
            return []
        # The whole batch runs again, so that the features do not depend on where the last run stopped.
        features = self.engine.capture([t.input_ids for t in batch], self.provenance.capture)
        found = zip(ids, batch, features, missing, strict=True)
        return [Captured(name, task, tensors) for name, task, tensors, new in found if new]

    def put(self, captured: Sequence[Captured]) -> None:
        """Store what a pass gave; what storing the pass before has raised is raised here."""
        self._settle()
        if self.background is None:
            self._put(captured)
        else:
            self._storing = self.background.submit(self._put, captured)

    def flush(self) -> None:
        """Make the captured samples durable, then commit them."""
        self._settle()
        self._flush()

    def drop(self) -> None:
        """Delete what was captured and not committed."""
        if self._storing is not None:
            wait([self._storing])
            self._storing = None
        for ref in self._refs:
            self.store.discard(ref)
        self._refs = []

    def _settle(self) -> None:
        storing, self._storing = self._storing, None
        if storing is not None:
            storing.result()

    def _put(self, captured: Sequence[Captured]) -> None:
        for sample in captured:
            task, tensors = sample.task, sample.tensors
            tensors[INPUT_IDS] = torch.tensor(task.input_ids, dtype=torch.int32)
            tensors[LOSS_MASK] = torch.tensor(task.loss_mask, dtype=torch.uint8)
            try:
                ref = self.store.put(
                    sample.sample_id,
                    tensors,
                    num_supervised=sum(task.loss_mask),
                    source=task.source,
                    provenance=self.provenance,
                )
            except BadSampleError as error:
                self.reject(error)
            else:
                self._refs.append(ref)
        if self.store.pending() >= self.flush_bytes:
            self._flush()

    def _flush(self) -> None:
        self.store.flush()
        if self._refs:
            self.commit(self._refs)
            self._refs = []
