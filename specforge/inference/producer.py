"""A producer of a disaggregated run: leases prompts, runs the target over them, commits their features."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from specforge.contracts import PromptTask, Provenance, SampleRef
from specforge.errors import UserError
from specforge.inference.rollout_worker import RolloutWorker, plan_batches, sample_id
from specforge.inference.target_engine import TargetEngine
from specforge.runtime.control_plane.controller import DataFlowController, LeasedPrompt
from specforge.runtime.control_plane.metadata import StateError
from specforge.runtime.data_plane.store import BadSampleError, StoreFullError

logger = logging.getLogger(__name__)

_POLL = 0.05  # seconds between two looks at an empty queue


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
    """

    def __init__(
        self, controller: DataFlowController, engine: Callable[[str], TargetEngine], fingerprint: str, owner: str, *,
        max_prompts: int = 8, batch_tokens: int = 1,
    ) -> None:  # fmt: skip
        self.controller, self.engine, self.fingerprint, self.owner = controller, engine, fingerprint, owner
        self.max_prompts, self.batch_tokens = max_prompts, batch_tokens
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
        for worker, tasks in self._batches(leased):
            if stop.is_set():
                break
            self._produce(worker, tasks)
        return bool(leased)

    def _flush(self) -> None:
        for worker in self._workers.values():
            worker.flush()

    def _release(self) -> None:
        self._hand = {}
        self.controller.release(self.owner)

    def _batches(self, leased: Sequence[LeasedPrompt]) -> Iterator[tuple[RolloutWorker, list[PromptTask]]]:
        groups: dict[Provenance, dict[str, PromptTask]] = {}
        for prompt in leased:
            if prompt.provenance is None:
                raise UserError(f"sample {prompt.sample_id}: its prompt does not say what to capture")
            groups.setdefault(prompt.provenance, {})[prompt.sample_id] = prompt.task
        work = [(self._worker(provenance), list(tasks.values())) for provenance, tasks in groups.items()]
        for worker, tasks in work:
            for batch in plan_batches(tasks, self.batch_tokens):
                yield worker, batch

    def _worker(self, provenance: Provenance) -> RolloutWorker:
        if provenance not in self._workers:
            if provenance.target_fingerprint != self.fingerprint:
                raise UserError(
                    f"the trainer's target is {provenance.target} ({provenance.target_fingerprint[:8]}), this "
                    f"producer's has the fingerprint {self.fingerprint[:8]}; start it with the same target"
                )
            engine = self.engine(provenance.dtype)
            engine.check(provenance.capture)
            self._workers[provenance] = RolloutWorker(
                engine, self.controller.features, self._commit, provenance, 0, self._background, self._reject
            )
        return self._workers[provenance]

    def _produce(self, worker: RolloutWorker, tasks: list[PromptTask]) -> None:
        try:
            captured = worker.capture(tasks)
        except RuntimeError as error:  # out of memory, say; it must not stop every producer in turn
            reason = f"the target failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
            logger.warning("%s", reason)
            self._fail([sample_id(task, worker.provenance) for task in tasks], reason)
        else:
            worker.put(captured)

    def _reject(self, error: BadSampleError) -> None:
        logger.warning("%s", error)
        self._fail([error.sample_id], str(error))

    def _fail(self, names: Sequence[str], reason: str) -> None:
        for name in names:
            for prompt in self._hand.pop(name, []):
                self.controller.fail(self.owner, prompt, reason)

    def _commit(self, refs: Sequence[SampleRef]) -> None:
        """Commit; what was forgotten meanwhile, because the trainer started anew, is deleted."""
        for ref in refs:
            items = [(prompt.key, ref) for prompt in self._hand.get(ref.sample_id, [])]
            try:
                new = self.controller.commit(items)
            except StateError:
                new = []
            if not new:
                self.controller.features.discard(ref)
            self.produced += any(new)
        self.controller.features.disown(refs)
        for ref in refs:
            self._hand.pop(ref.sample_id, None)

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
