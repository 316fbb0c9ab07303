"""The controller: prompts in, references out, every sample trained once in each epoch of the surviving history.

It joins a metadata store, which knows the states, with a feature store, which holds the tensors. Producers lease
prompts and commit references of flushed features; trainers are given references and report steps and checkpoints.
Only metadata passes through: text, numbers and the frozen records of :mod:`specforge.contracts`.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal

from specforge.contracts import SAMPLE_ID, FeatureSpec, PromptTask, Provenance, SampleRef, plain
from specforge.errors import UserError
from specforge.files import parse_json
from specforge.runtime.control_plane.metadata import COMMITTED, DEAD, DELIVERED, LEASED, TRAINED, Grant, MetadataStore
from specforge.runtime.data_plane.store import FeatureStore

logger = logging.getLogger(__name__)

_EPOCH = re.compile(r"-?\d{1,15}", re.ASCII)


@dataclass(frozen=True)
class LeasedPrompt:
    """A prompt to produce features for.

    Attributes:
        key: its key in the control plane.
        sample_id: identity of the sample that it becomes.
        task: the prompt; ``attempt`` says how often it was tried before.
        provenance: what is to be captured, and of which target; None where ingestion did not say.
    """

    key: str
    sample_id: str
    task: PromptTask
    provenance: Provenance | None = None


@dataclass(frozen=True)
class DeadLetter:
    """A prompt that was given up: what it was, how often it was tried, and why it failed last."""

    key: str
    tries: int
    reason: str


@dataclass(frozen=True)
class Reconciled:
    """What a restart put right: samples whose features were ``lost``, features that nobody committed (``orphans``)."""

    lost: int
    orphans: int


def sample_key(sample_id: str, epoch: int, stamp: str = "") -> str:
    """Key of a sample in an epoch; each epoch trains it once.

    Args:
        sample_id: its identity.
        epoch: which.
        stamp: what else tells it from samples of other runs in the same stores; part of its name there.
    """
    return f"{stamped(sample_id, stamp)}@{epoch}"


def stamped(sample_id: str, stamp: str) -> str:
    """Name of a sample in the stores of a run with such a stamp."""
    return f"{sample_id}-{stamp}" if stamp else sample_id


class DataFlowController:
    """Ingest, lease, commit, deliver, trained, durable.

    Args:
        metadata: the states.
        features: the tensors.
        clock: present time in seconds, the same for all processes.
        lease_seconds: a producer that has not renewed a lease for so long is taken for dead.
        max_tries: how often a prompt is tried before it becomes a dead letter.
        retain: keep features until a checkpoint covers them, or only until they are trained, when whoever trained them
            frees them (they are then produced again when a run goes back).
    """

    def __init__(
        self,
        metadata: MetadataStore,
        features: FeatureStore,
        *,
        clock: Callable[[], float] = time.time,
        lease_seconds: float = 60.0,
        max_tries: int = 3,
        retain: Literal["until_durable", "until_trained"] = "until_durable",
    ) -> None:
        if lease_seconds <= 0 or max_tries < 1:
            raise UserError("control plane: lease_seconds must be positive and max_tries at least 1")
        self.metadata, self.features, self.clock = metadata, features, clock
        self.lease_seconds, self.max_tries, self.retain = lease_seconds, max_tries, retain

    # Producers.

    def ingest(self, samples: Mapping[str, PromptTask], epoch: int = 0, provenance: Provenance | None = None) -> int:
        """Queue prompts of an epoch, in their order; what is known already is left as it is.

        Args:
            samples: prompts by the identity of the sample that each becomes.
            epoch: which.
            provenance: tells producers what to capture, and of which target.

        Returns:
            How many are new.
        """
        items = [(sample_key(name, epoch), dump_task(task, provenance)) for name, task in samples.items()]
        return sum(self.metadata.ingest(items))

    def lease(self, owner: str, count: int) -> list[LeasedPrompt]:
        """Prompts to produce, at most ``count``; those of dead producers and failed ones come again.

        A sample whose features of the epoch before are still held is committed with them and not lent. What a dead
        producer had put and not committed is deleted, so that the store never holds a sample twice. What is no prompt
        is dropped: who trains queues what is missing again.

        Args:
            owner: the producer; unique among those that run.
            count: most prompts.
        """
        _plain(owner)
        while True:
            now = self.clock()
            grants = self.metadata.lease(owner, count, now, now + self.lease_seconds, self.max_tries)
            leased, held, damaged = [], [], []
            for grant, ref in zip(grants, self._refs([_shift(g.key, -1) for g in grants]), strict=True):
                if ref is not None and self.features.holds(ref):
                    held.append((grant.key, dump_ref(ref)))
                    continue
                try:
                    leased.append(_load_prompt(grant))
                except ValueError as error:
                    logger.warning("prompt %r in the metadata store is damaged (%s); it is dropped", grant.key, error)
                    damaged.append(grant.key)
            if damaged:
                self.metadata.forget(damaged)
            if held:
                self.metadata.commit(held)
            if leased or not held:
                if again := [prompt.key for prompt in leased if prompt.task.attempt]:
                    self._remove_orphans(self.features.backend.stored(), again)
                return leased

    def renew(self, owner: str, leased: Sequence[LeasedPrompt]) -> list[bool]:
        """Extend leases; for each, whether ``owner`` still holds it."""
        return self.metadata.renew(owner, [x.key for x in leased], self.clock() + self.lease_seconds)

    def release(self, owner: str) -> int:
        """Give back everything ``owner`` holds, untried: before it stops, or when it starts again under its name.

        What it had put and not committed is deleted.

        Returns:
            How many prompts it held.
        """
        try:
            stored = self.features.backend.stored()  # before others can be lent the prompts, and put them
        finally:
            keys = self.metadata.release(owner)
        if keys:
            self._remove_orphans(stored, keys)
        return len(keys)

    def fail(self, owner: str, leased: LeasedPrompt, reason: str, final: bool = False) -> str:
        """Report that a prompt gave no features; returns its state, ``dead`` where it was the last try.

        Args:
            owner: the producer.
            leased: the prompt.
            reason: why.
            final: whether another try could not do better.
        """
        _plain(owner, reason)
        return self.metadata.fail(owner, leased.key, leased.task.attempt, reason, 1 if final else self.max_tries)

    def commit(self, refs: Iterable[tuple[str, SampleRef]]) -> list[bool]:
        """Record samples whose features are flushed.

        Features of a duplicate are deleted, unless those of the first are gone: then the newer take their place.

        Args:
            refs: key and reference of each.

        Returns:
            For each, whether it is new.

        Raises:
            StateError: a key was never ingested; nothing is committed.
        """
        items = [(key, ref, dump_ref(ref)) for key, ref in refs]
        new = self.metadata.commit([(key, text) for key, _, text in items])
        for (key, ref, text), fresh in zip(items, new, strict=True):
            if not fresh:
                self._settle_duplicate(key, ref, text)
        return new

    def _settle_duplicate(self, key: str, ref: SampleRef, text: str) -> None:
        (first,) = self._refs([key])
        if first is None or _same_bytes(first, ref):
            return
        if self.features.holds(first) or not self._is_waiting(key):
            self.features.discard(ref)
        else:
            self.metadata.requeue([key])
            self.metadata.commit([(key, text)])

    def _is_waiting(self, key: str) -> bool:
        return any(entry.key == key for entry in self.metadata.entries((COMMITTED, DELIVERED)))

    # Trainers.

    def deliver(self, keys: Sequence[str]) -> list[SampleRef]:
        """References of samples to train on; their features may now be read from the store.

        Nothing over the null store, and nothing of a sample whose reference is damaged, which is :meth:`lost`.

        Raises:
            StateError: one is not committed, or trained already; none is delivered.
        """
        found = zip(keys, self.metadata.deliver(keys), strict=True)
        refs = [ref for key, text in found if (ref := _read_ref(key, text)) is not None]
        self.features.adopt(refs)
        return refs

    def trained(self, keys: Sequence[str], step: int) -> None:
        """Record the optimizer step that used samples.

        Raises:
            StateError: one was not delivered, or another step used it; nothing is recorded.
        """
        _plain(step)
        self.metadata.mark_trained(keys, step)

    def durable(self, step: int) -> int:
        """Record that the checkpoint of ``step`` is complete, and free what it covers; returns the samples."""
        _plain(step)
        keys = self.metadata.mark_durable(step)
        if self.retain == "until_durable":
            self.free(keys)
        return len(keys)

    def rewind(self, step: int) -> list[str]:
        """Go back to the checkpoint of ``step``: what was delivered or trained since is to be trained again.

        Returns:
            Those keys; samples whose features are no longer held are queued again.
        """
        _plain(step)
        keys = self.metadata.rewind(step)
        self._requeue_lost(keys)
        return keys

    def free(self, keys: Sequence[str]) -> None:
        """Let go of the features of trained samples before a checkpoint covers them.

        Where the run goes back they are produced again.
        """
        others = self._refs([_shift(key, 1) for key in keys])
        for ref, other in zip(self._refs(keys), others, strict=True):
            if ref is not None and (other is None or not _same_bytes(ref, other)):
                self.features.discard(ref)

    def forget(self, keys: Sequence[str]) -> None:
        """Drop samples and their features, as if they had never been ingested."""
        refs = self._refs(keys)
        self.metadata.forget(keys)
        for ref in refs:
            if ref is not None:
                self.features.discard(ref)

    def lost(self, keys: Sequence[str]) -> None:
        """Queue samples again whose features turned out to be missing or damaged."""
        refs = self._refs(keys)
        self.metadata.requeue(keys)
        for ref in refs:
            if ref is not None:
                self.features.discard(ref)

    # Both.

    def reconcile(self) -> Reconciled:
        """After a restart: queue samples whose features are lost, delete features that nobody committed.

        Features of prompts that somebody holds a lease of are left alone: they may be about to be committed.
        """
        waiting = [entry.key for entry in self.metadata.entries((COMMITTED, DELIVERED))]
        return Reconciled(self._requeue_lost(waiting), self.remove_orphans())

    def remove_orphans(self) -> int:
        """Delete features that nobody committed and nobody is about to, such as those of killed producers."""
        return self._remove_orphans(self.features.backend.stored())

    def _remove_orphans(self, stored: Iterable[tuple[str, str]], keys: Collection[str] | None = None) -> int:
        """Delete those of ``stored`` that are orphans; of ``keys`` alone, whose leases end, where they are given."""
        # In this order, because producers go on meanwhile: what is put before, leased or committed after one of these
        # lines is not deleted by the last.
        samples = None if keys is None else {_sample(key) for key in keys}

        def concerned(sample_id: str) -> bool:
            return samples is None or sample_id in samples

        stored = [(key, uri) for key, uri in stored if concerned(key.rpartition(".")[0])]
        if not stored:
            return 0
        leased = {_sample(x.key) for x in self.metadata.entries((LEASED,)) if x.key not in (keys or ())}
        refs = self.references((COMMITTED, DELIVERED, TRAINED), concerned)
        return self.features.remove_orphans(refs, leased, stored)

    def references(
        self, states: Collection[str], concerned: Callable[[str], bool] = lambda sample_id: True
    ) -> list[SampleRef]:
        """References of all samples in some states, or of those that concern the caller."""
        entries = [entry for entry in self.metadata.entries(states) if concerned(_sample(entry.key))]
        return [ref for x in entries if (ref := _read_ref(x.key, x.ref)) is not None]

    def unfinished(self) -> int:
        """Samples in work of which the store has bytes already: their puts take long."""
        stored = {key.rpartition(".")[0] for key, _ in self.features.backend.stored()}
        now = self.clock()
        return len(stored & {_sample(x.key) for x in self.metadata.entries((LEASED,)) if x.deadline > now})

    def silent(self) -> int:
        """Prompts in work whose producers do not renew their leases, and which nobody else has taken."""
        now = self.clock()
        return sum(entry.deadline <= now for entry in self.metadata.entries((LEASED,)))

    def dead_letters(self) -> list[DeadLetter]:
        """Prompts that were given up; :meth:`revive` tries them again."""
        return [DeadLetter(x.key, x.tries, x.reason) for x in self.metadata.entries((DEAD,))]

    def revive(self, keys: Sequence[str]) -> None:
        """Queue dead letters again, with all their tries."""
        self.metadata.requeue(keys)

    def counts(self) -> dict[str, int]:
        """Samples in each state."""
        return self.metadata.counts()

    def _refs(self, keys: Sequence[str]) -> list[SampleRef | None]:
        return [_read_ref(key, text) for key, text in zip(keys, self.metadata.refs(keys), strict=True)]

    def _requeue_lost(self, keys: Sequence[str]) -> int:
        lost = [
            key for key, ref in zip(keys, self._refs(keys), strict=True) if ref is None or not self.features.holds(ref)
        ]
        if lost:
            self.metadata.requeue(lost)
        return len(lost)


def _sample(key: str) -> str:
    return key.rpartition("@")[0]


def _shift(key: str, epochs: int) -> str:
    sample_id, _, epoch = key.rpartition("@")
    return sample_key(sample_id, int(epoch) + epochs) if _EPOCH.fullmatch(epoch) else ""


def _load_prompt(grant: Grant) -> LeasedPrompt:
    """A prompt that was leased.

    Raises:
        ValueError: it is damaged.
    """
    name = _sample(grant.key)
    if not (SAMPLE_ID.fullmatch(name) and _shift(grant.key, 0)):
        raise ValueError("its key is not a sample's")
    task, provenance = load_task(grant.task)
    return LeasedPrompt(grant.key, name, replace(task, attempt=grant.attempt), provenance)


def _read_ref(key: str, text: str) -> SampleRef | None:
    """A reference; None where there is none, or a damaged one, which is said."""
    if not text:
        return None
    try:
        return load_ref(text)
    except ValueError as error:
        logger.warning("the reference of %r in the metadata store is damaged (%s)", key, error)
        return None


def _same_bytes(a: SampleRef, b: SampleRef) -> bool:
    return (a.sample_id, a.generation, a.uri) == (b.sample_id, b.generation, b.uri)


def _plain(*values: object) -> None:
    """No tensor, array or other object may pass: only text and whole numbers."""
    for value in values:
        if type(value) not in (str, int):
            raise TypeError(f"{type(value).__name__} cannot cross the control plane")


# References are three lines of JSON: what differs from sample to sample, the tensors' shapes, and where they come
# from. Runs have few different second lines and one third, so those are made and read once. So it is with prompts,
# whose second line, where there is one, says what to capture.


def dump_task(task: PromptTask, provenance: Provenance | None = None) -> str:
    """Text of a prompt."""
    own = json.dumps(task.to_json(), separators=(",", ":"))
    return own if provenance is None else f"{own}\n{_dump((provenance,))}"


def load_task(text: str) -> tuple[PromptTask, Provenance | None]:
    """A prompt, and what to capture, from its text.

    Raises:
        ValueError: it is not the text of one.
    """
    own, _, provenance = text.partition("\n")
    return PromptTask.from_json(parse_json(own)), _load_provenance(provenance) if provenance else None


def dump_ref(ref: SampleRef) -> str:
    """Text of a reference.

    Raises:
        TypeError: something in it is neither text nor a number.
    """
    own = json.dumps([getattr(ref, name) for name in _OWN_FIELDS])
    return f"{own}\n{_dump(ref.features)}\n{_dump((ref.provenance,))}"


def load_ref(text: str) -> SampleRef:
    """A reference from its text; those of one run share their provenance.

    Raises:
        ValueError: it is not the text of one.
    """
    lines = text.split("\n")
    if len(lines) != 3:
        raise ValueError("it is not three lines")
    own, features, provenance = lines
    values = parse_json(own)
    if not (isinstance(values, list) and len(values) == len(_OWN_FIELDS)):
        raise ValueError(f"its first line is not a list of {len(_OWN_FIELDS)}")
    ref = SampleRef(
        **dict(zip(_OWN_FIELDS, values, strict=True)),
        features=_load_features(features),
        provenance=_load_provenance(provenance),
    )
    ref.check()
    return ref


_OWN_FIELDS = tuple(f.name for f in fields(SampleRef) if f.name not in ("features", "provenance"))


@lru_cache(maxsize=8192)
def _dump(records: tuple[FeatureSpec, ...] | tuple[Provenance]) -> str:
    return json.dumps(plain(records))


@lru_cache(maxsize=8192)
def _load_features(text: str) -> tuple[FeatureSpec, ...]:
    items = parse_json(text)
    if not isinstance(items, list):
        raise ValueError("the features are not a list")
    return tuple(map(FeatureSpec.from_json, items))


@lru_cache(maxsize=64)
def _load_provenance(text: str) -> Provenance:
    items = parse_json(text)
    if not (isinstance(items, list) and len(items) == 1):
        raise ValueError("what is to be captured is not a list of one")
    return Provenance.from_json(items[0])
