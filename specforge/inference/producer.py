"""A producer of a disaggregated run: leases prompts, runs the target over them, commits their features."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from specforge.contracts import PromptTask, Provenance, SampleRef
from specforge.errors import UserError
from specforge.files import first_line
from specforge.inference.rollout_worker import RolloutWorker, plan_named
from specforge.inference.target_engine import TargetEngine
from specforge.runtime.control_plane.controller import DataFlowController, LeasedPrompt
from specforge.runtime.control_plane.metadata import StateError
from specforge.runtime.data_plane.store import BadSampleError, StoreFullError

logger = logging.getLogger(__name__)

_POLL = 0.05  # seconds between two looks at an empty queue

Batch = list[tuple[str, PromptTask]]  # prompts by the names of their samples


class _CannotCaptureError(Exception):
    """The target cannot meet a policy, whatever the prompt."""


class Producer:
    """Produces what trainers queue, until it is told to stop.

    Args:
        controller: states and tensors.
        engine: gives the target's engine for a compute dtype.
        fingerprint: of the target; prompts for another one are refused.
        owner: name of this producer; when it starts again under its name it gives back what it held.
        max_prompts: most prompts to lease at a time.
        batch_tokens: most tokens of a forward pass, padding included; 1 takes each prompt by itself, so that features
            do not depend on what they are made together with.
        vocab_size: tokens of the target, where it is known; prompts with others are given up.
    """

    def __init__(
        self,
        controller: DataFlowController,
        engine: Callable[[str], TargetEngine],
        fingerprint: str,
        owner: str,
        *,
        max_prompts: int = 8,
        batch_tokens: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        self.controller, self.engine, self.fingerprint, self.owner = controller, engine, fingerprint, owner
        self.max_prompts, self.batch_tokens, self.vocab_size = max_prompts, batch_tokens, vocab_size
        self._background = ThreadPoolExecutor(1, "store")
        self._workers: dict[Provenance, RolloutWorker] = {}
        # By sample, until it is committed; two epochs may want the same one.
        self._hand: dict[str, list[LeasedPrompt]] = {}
        self.produced = 0

    def run(self, stop: threading.Event, idle_seconds: float | None = None) -> None:
        """Produce until ``stop`` is set, or nothing was queued for ``idle_seconds``.

        Raises:
            UserError: the store cannot be written, or what is queued is for another target; nothing stays leased.
        """
        self.controller.release(self.owner)
        idle, last = 0.0, False
        with self._renewing():
            try:
                while not last:
                    last = stop.is_set() or (idle_seconds is not None and idle >= idle_seconds)
                    try:
                        busy = not last and self._work(stop)
                        if not busy:
                            self._flush()
                    except StoreFullError as error:
                        logger.warning("the store is full (%s); waiting", error)
                        for worker in self._workers.values():
                            worker.drop()
                        self._release()
                        busy = False
                    idle = 0.0 if busy else idle + _POLL
                    if not busy:
                        stop.wait(_POLL)
            finally:
                self._release()

    def once(self) -> bool:
        """Lease some prompts, produce and commit them; whether there were any."""
        try:
            busy = self._work(threading.Event())
            self._flush()
        finally:
            self._hand = {}
        return busy

    def _work(self, stop: threading.Event) -> bool:
        """Lease some prompts and produce them; what the last pass made is then still being stored."""
        leased = self.controller.lease(self.owner, self.max_prompts)
        if any(prompt.sample_id in self._hand for prompt in leased):
            self._flush()  # of another epoch, and being stored
        for prompt in leased:
            self._hand.setdefault(prompt.sample_id, []).append(prompt)
        for worker, batch in self._batches(leased):
            if stop.is_set():
                break
            self._produce(worker, batch)
        return bool(leased)

    def _flush(self) -> None:
        for worker in self._workers.values():
            worker.flush()

    def _release(self) -> None:
        self._hand = {}
        self.controller.release(self.owner)

    def _batches(self, leased: Sequence[LeasedPrompt]) -> Iterator[tuple[RolloutWorker, Batch]]:
        groups: dict[Provenance, dict[str, PromptTask]] = {}
        for prompt in leased:
            reason = self._unusable(prompt)
            if prompt.provenance is None or reason:
                self._fail([prompt.sample_id], reason or "it does not say what to capture", final=True)
            else:
                groups.setdefault(prompt.provenance, {})[prompt.sample_id] = prompt.task
        work: list[tuple[RolloutWorker, Batch]] = []
        for provenance, tasks in groups.items():
            try:
                worker = self._worker(provenance)
            except _CannotCaptureError as error:
                self._fail(list(tasks), str(error), final=True)
            else:
                work += [(worker, batch) for batch in plan_named(tasks.items(), self.batch_tokens)]
        yield from work

    def _unusable(self, prompt: LeasedPrompt) -> str:
        """Why no target could read a prompt; empty where this one may."""
        ids, size = prompt.task.input_ids, self.vocab_size
        if not ids:
            return "it has no tokens"
        if size is not None and not (min(ids) >= 0 and max(ids) < size):
            return f"token {max(ids) if max(ids) >= size else min(ids)} is none of the target's {size}"
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
            except UserError as error:
                raise _CannotCaptureError(str(error)) from error
            self._workers[provenance] = RolloutWorker(
                engine, self.controller.features, self._commit, provenance, 0, self._background, self._reject
            )
        return self._workers[provenance]

    def _produce(self, worker: RolloutWorker, batch: Batch) -> None:
        names, tasks = [name for name, _ in batch], [task for _, task in batch]
        try:
            captured = worker.capture(tasks, names)
        except Exception as error:  # out of memory, say; it must not stop every producer in turn
            reason = f"the target failed: {first_line(error)}"
            logger.warning("%s", reason)
            if len(batch) > 1:  # whichever of them it was, the others go on
                for one in batch:
                    self._produce(worker, [one])
                return
            self._fail(names, reason)
            self._check_again(worker, reason)
        else:
            worker.put(captured)

    def _check_again(self, worker: RolloutWorker, reason: str) -> None:
        """End where the target can do nothing any more, as on an accelerator after some errors.

        Raises:
            UserError: so it is.
        """
        try:
            worker.engine.check(worker.provenance.capture)
        except Exception as error:
            raise UserError(f"{reason}; nothing works since ({first_line(error)}); start it again") from error

    def _reject(self, error: BadSampleError) -> None:
        logger.warning("%s", error)
        self._fail([error.sample_id], str(error))

    def _fail(self, names: Sequence[str], reason: str, final: bool = False) -> None:
        for name in names:
            for prompt in self._hand.pop(name, []):
                with suppress(StateError):  # forgotten meanwhile
                    self.controller.fail(self.owner, prompt, reason, final)

    def _commit(self, refs: Sequence[SampleRef]) -> None:
        """Commit; what was forgotten meanwhile, because the trainer started anew, is deleted."""
        for ref in refs:
            answers = [self._commit_one(prompt.key, ref) for prompt in self._hand.get(ref.sample_id, [])]
            if all(new is None for new in answers):
                self.controller.features.discard(ref)
            self.produced += any(answers)
        self.controller.features.disown(refs)
        for ref in refs:
            self._hand.pop(ref.sample_id, None)

    def _commit_one(self, key: str, ref: SampleRef) -> bool | None:
        """Whether a sample is new; None where nobody wants it any more."""
        try:
            return self.controller.commit([(key, ref)])[0]
        except StateError:
            return None

    @contextmanager
    def _renewing(self) -> Iterator[None]:
        """Renew the leases in hand while the target runs."""
        done = threading.Event()

        def renew() -> None:
            while not done.wait(self.controller.lease_seconds / 3):
                hand = [prompt for prompts in list(self._hand.values()) for prompt in prompts]
                try:
                    self.controller.renew(self.owner, hand)
                except Exception as error:  # whatever it is, the next commit meets it too
                    logger.warning("leases could not be renewed: %s", error)

        thread = threading.Thread(target=renew, name="leases", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
