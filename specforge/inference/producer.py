"""A producer of a disaggregated run: leases prompts, runs the target over them, commits their features."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, replace

from specforge.contracts import ANY_ENGINE, PromptTask, Provenance, SampleRef
from specforge.errors import UserError
from specforge.files import first_line
from specforge.inference.rollout_worker import RolloutWorker, plan_named
from specforge.inference.target_engine import TargetEngine
from specforge.inference.target_engine.base import UnavailableError
from specforge.runtime.control_plane.controller import DataFlowController, LeasedPrompt
from specforge.runtime.control_plane.metadata import StateError
from specforge.runtime.data_plane.store import BadSampleError, StoreFullError

logger = logging.getLogger(__name__)

_POLL = 0.05  # seconds between two polls of an empty queue
_LONGEST_PAUSE = 5.0  # seconds between two attempts while the store is full

Batch = list[tuple[str, PromptTask]]  # names of samples, and their prompts


class _CannotCaptureError(Exception):
    """The target cannot capture the features of a policy, whatever the prompt."""


@dataclass(eq=False)
class Producer:
    """Produces the samples that trainers queue, until it is stopped."""

    controller: DataFlowController  # states and tensors
    engine: Callable[[str], TargetEngine]  # returns the target's engine for a compute dtype
    fingerprint: str  # fingerprint of the target; prompts for another target are rejected
    owner: str  # name of this producer; a restart under the same name releases the prompts it had leased
    _: KW_ONLY
    max_prompts: int = 8  # maximum number of prompts to lease at a time
    # Maximum number of tokens per forward pass, including padding; 1 runs each prompt alone, so that features do not
    # depend on other prompts in the batch.
    batch_tokens: int = 1
    vocab_size: int | None = None  # of the target, if known; prompts with larger token ids are given up

    def __post_init__(self) -> None:
        self._background = ThreadPoolExecutor(1, "store")
        self._workers: dict[Provenance, RolloutWorker] = {}
        # Leased prompts by sample, until it is committed; two epochs may want the same sample.
        self._leased: dict[str, list[LeasedPrompt]] = {}
        self.produced = 0

    def run(self, stop: threading.Event, idle_seconds: float | None = None) -> None:
        """Produce until ``stop`` is set, or until nothing has been queued for ``idle_seconds``.

        Raises:
            UserError: the store cannot be written, a prompt is for another target, another engine computes the features
                of its run, or the engine's server does not respond; nothing stays leased.
        """
        self.controller.release(self.owner)
        idle, last, told, pause = 0.0, False, -1, _POLL
        with self._renewing():
            try:
                while not last:
                    last = stop.is_set() or (idle_seconds is not None and idle >= idle_seconds)
                    try:
                        busy = not last and self._work(stop)
                        if not busy:
                            self._flush()
                    except StoreFullError as error:
                        if told != self.produced:  # once, until something fits again
                            logger.warning("the store is full (%s); waiting for space", error)
                            told, pause = self.produced, _POLL
                        pause = min(2 * pause, _LONGEST_PAUSE)
                        stop.wait(pause)
                        for worker in self._workers.values():
                            worker.drop()
                        self._release()
                        busy = True  # prompts are queued
                    idle = 0.0 if busy else idle + _POLL
                    if not busy:
                        stop.wait(_POLL)
            finally:
                self._release()

    def once(self) -> bool:
        """Lease prompts, produce and commit their samples; returns whether there were any."""
        try:
            busy = self._work(threading.Event())
            self._flush()
        finally:
            self._leased = {}
        return busy

    def _work(self, stop: threading.Event) -> bool:
        """Lease and produce prompts; the samples of the last pass are still being stored when it returns."""
        leased = self.controller.lease(self.owner, self.max_prompts)
        if any(prompt.sample_id in self._leased for prompt in leased):
            self._flush()  # the same sample for another epoch is still being stored
        for prompt in leased:
            self._leased.setdefault(prompt.sample_id, []).append(prompt)
        for worker, batch in self._batches(leased):
            if stop.is_set():
                break
            self._produce(worker, batch)
        return bool(leased)

    def _flush(self) -> None:
        for worker in self._workers.values():
            worker.flush()

    def _release(self) -> None:
        self._leased = {}
        self.controller.release(self.owner)

    def _batches(self, leased: Sequence[LeasedPrompt]) -> Iterator[tuple[RolloutWorker, Batch]]:
        groups: dict[Provenance, dict[str, PromptTask]] = {}
        for prompt in leased:
            reason = self._unusable(prompt)
            if prompt.provenance is None or reason:
                self._fail([prompt.sample_id], reason or "it does not specify what to capture", final=True)
            else:
                groups.setdefault(prompt.provenance, {})[prompt.sample_id] = prompt.task
        work: list[tuple[RolloutWorker, Batch]] = []
        for provenance, tasks in groups.items():
            try:
                worker = self._worker(provenance)
            except _CannotCaptureError as error:
                self._fail(list(tasks), str(error), final=True)
            else:
                if provenance.engine != ANY_ENGINE:
                    self.controller.claim_engine(tasks, worker.provenance.engine)
                batches = plan_named(tasks.items(), self.batch_tokens)
                work += [(worker, batch) for batch in ([[*tasks.items()]] if worker.engine.independent else batches)]
        yield from work

    def _unusable(self, prompt: LeasedPrompt) -> str:
        """Why the target cannot read a prompt; empty if it can."""
        ids, size = prompt.task.input_ids, self.vocab_size
        if not ids:
            return "it has no tokens"
        if size is not None and not (min(ids) >= 0 and max(ids) < size):
            return f"token {max(ids) if max(ids) >= size else min(ids)} is not in the target's vocabulary of {size}"
        return ""

    def _worker(self, provenance: Provenance) -> RolloutWorker:
        if provenance not in self._workers:
            if provenance.target_fingerprint != self.fingerprint:
                raise UserError(
                    f"the trainer's target is {provenance.target} ({provenance.target_fingerprint[:8]}), this "
                    f"producer's has the fingerprint {self.fingerprint[:8]}; start it with the same target"
                )
            engine = self.engine(provenance.dtype)
            try:
                engine.check(provenance.capture)
            except (UnavailableError, StoreFullError):
                raise
            except UserError as error:
                raise _CannotCaptureError(str(error)) from error
            made = replace(provenance, engine=engine.description)
            self._workers[provenance] = RolloutWorker(
                engine, self.controller.features, self._commit, made, 0, self._background, self._reject
            )
        return self._workers[provenance]

    def _produce(self, worker: RolloutWorker, batch: Batch) -> None:
        names, tasks = [name for name, _ in batch], [task for _, task in batch]
        try:
            captured = worker.capture(tasks, names)
        except (UnavailableError, StoreFullError):
            raise
        except Exception as error:  # such as out of memory; one prompt must not stop every producer in turn
            reason = f"the target failed: {first_line(error)}"
            logger.warning("%s", reason)
            if len(batch) > 1:  # find the prompt that failed; the others succeed
                for one in batch:
                    self._produce(worker, [one])
                return
            self._fail(names, reason)
            self._check_again(worker, reason)
        else:
            worker.put(captured)

    def _check_again(self, worker: RolloutWorker, reason: str) -> None:
        """Stop if the target no longer works at all, as on an accelerator after some errors."""
        try:
            worker.engine.check(worker.provenance.capture)
        except Exception as error:
            raise UserError(
                f"{reason}; the target no longer works ({first_line(error)}); restart the producer"
            ) from error

    def _reject(self, error: BadSampleError) -> None:
        logger.warning("%s", error)
        self._fail([error.sample_id], str(error))

    def _fail(self, names: Sequence[str], reason: str, final: bool = False) -> None:
        for name in names:
            for prompt in self._leased.pop(name, []):
                with suppress(StateError):  # the trainer has dropped the prompt
                    self.controller.fail(self.owner, prompt, reason, final)

    def _commit(self, refs: Sequence[SampleRef]) -> None:
        """Commit samples; those that the trainer has dropped since, because it restarted, are deleted."""
        for ref in refs:
            new = self._commit_one([prompt.key for prompt in self._leased.get(ref.sample_id, [])], ref)
            if not new:
                self.controller.features.discard(ref)
            self.produced += any(new)
        self.controller.features.disown(refs)
        for ref in refs:
            self._leased.pop(ref.sample_id, None)

    def _commit_one(self, keys: list[str], ref: SampleRef) -> list[bool]:
        """Commit a sample for every epoch that wants it; whether it is new there, except where it was dropped."""
        while keys:
            try:
                return self.controller.commit([(key, ref) for key in keys])
            except StateError as error:  # the trainer has dropped this prompt
                keys.remove(error.key)
        return []

    @contextmanager
    def _renewing(self) -> Iterator[None]:
        """Renew the leases in the background."""
        done = threading.Event()

        def renew() -> None:
            while not done.wait(self.controller.lease_seconds / 3):
                leased = [prompt for prompts in list(self._leased.values()) for prompt in prompts]
                try:
                    self.controller.renew(self.owner, leased)
                except Exception as error:  # the next commit runs into the same error
                    logger.warning("leases could not be renewed: %s", error)

        thread = threading.Thread(target=renew, name="leases", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
