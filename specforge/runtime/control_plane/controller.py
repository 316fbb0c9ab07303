"""The control plane: prompts in, references out, every sample trained exactly once per epoch.

The controller holds the state machine of :mod:`~specforge.runtime.control_plane.metadata`: each method reads rows of a
metadata store, decides, and changes them by compare-and-set. The tensors are in a feature store. Producers lease
prompts and commit references to stored features; the trainer receives references and reports steps and checkpoints.
Only metadata crosses: text, numbers and the frozen records of :mod:`specforge.contracts`.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal, TypeVar

from specforge.contracts import SAMPLE_ID, FeatureSpec, PromptTask, Provenance, SampleRef, engine_label, plain
from specforge.errors import UserError
from specforge.files import parse_json
from specforge.runtime.control_plane.claim import claim_engine
from specforge.runtime.control_plane.metadata import Conflict, MetadataStore, Move, Row, State, StateError, Text
from specforge.runtime.data_plane.store import FeatureStore

logger = logging.getLogger(__name__)

_EPOCH = re.compile(r"-?\d{1,15}", re.ASCII)
_UNCOMMITTED = (State.QUEUED, State.LEASED, State.DEAD)
_WAITING = (State.COMMITTED, State.DELIVERED)
_DELIVERED = (State.DELIVERED, State.TRAINED, State.DURABLE)
T = TypeVar("T")
_ATTEMPTS = 1000  # compare-and-set attempts; other processes change a row only now and then


@dataclass(frozen=True)
class LeasedPrompt:
    """A prompt to produce features for.

    Attributes:
        key: its key in the control plane.
        sample_id: identity of the sample to produce.
        task: the prompt; ``attempt`` counts earlier tries.
        provenance: what to capture and from which target; None if the trainer did not specify it.
    """

    key: str
    sample_id: str
    task: PromptTask
    provenance: Provenance | None = None


@dataclass(frozen=True)
class GivenUpPrompt:
    """A prompt that was given up: how often it was tried, and why it failed last."""

    key: str
    tries: int
    reason: str


@dataclass(frozen=True)
class Reconciled:
    """What a restart repaired: samples whose features were ``lost``, and uncommitted features (``orphans``)."""

    lost: int
    orphans: int


def sample_key(sample_id: str, epoch: int, stamp: str = "") -> str:
    """Key of a sample in an epoch.

    Args:
        sample_id: its identity.
        epoch: the epoch; each epoch trains the sample once.
        stamp: distinguishes it from samples of other runs in the same stores; becomes part of its name there.
    """
    return f"{stamped(sample_id, stamp)}@{epoch}"


def stamped(sample_id: str, stamp: str) -> str:
    """Name of a sample in the stores of a run with this stamp."""
    return f"{sample_id}-{stamp}" if stamp else sample_id


class DataFlowController:
    """The state machine of samples: ingest, lease, commit, deliver, trained, durable.

    Args:
        metadata: the rows.
        features: the tensors.
        clock: current time in seconds, the same for all processes.
        lease_seconds: a producer that has not renewed a lease for this long is presumed dead.
        max_tries: how often a prompt is tried before it is given up.
        retain: keep features until a checkpoint covers them, or only until they are trained; the trainer then frees
            them, and a run that is rewound has them produced again.
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
        """Queue the prompts of an epoch in order; known ones are left unchanged.

        Args:
            samples: prompts by the identity of the sample that each becomes.
            epoch: the epoch.
            provenance: tells producers what to capture and from which target.

        Returns:
            How many are new.
        """
        items = [(sample_key(name, epoch), dump_task(task, provenance)) for name, task in samples.items()]
        return sum(self.metadata.add(items))

    def lease(self, owner: str, count: int) -> list[LeasedPrompt]:
        """Lease prompts to produce, in the order in which they were queued.

        Expired leases end first: their prompts are queued again or, after ``max_tries``, given up. If the features of
        the same sample in the previous epoch are still held, they are committed and the prompt is not leased. Features
        that a dead producer stored but did not commit are deleted, so that the store never holds a sample twice.
        Damaged prompts are dropped; the trainer queues missing ones again.

        Args:
            owner: name of the producer, unique among those that run.
            count: maximum number of prompts.
        """
        _plain(owner)
        while True:
            leased, held, damaged = [], [], []
            for row, ref in zip(*self._lease(owner, count), strict=True):
                if ref is not None and self.features.holds(ref):
                    held.append((row.key, dump_ref(ref)))
                    continue
                try:
                    leased.append(_load_prompt(row))
                except ValueError as error:
                    logger.warning("prompt %r in the metadata store is damaged (%s); it is dropped", row.key, error)
                    damaged.append(row.key)
            if damaged:
                self.metadata.remove(damaged)
            if held:  # the trainer may have dropped some of them meanwhile
                self._commit(held, lambda row: True)
            if leased or not held:
                if again := [prompt.key for prompt in leased if prompt.task.attempt]:
                    self._remove_orphans(self.features.backend.stored(), again)
                return leased

    def _lease(self, owner: str, count: int) -> tuple[list[Row], list[SampleRef | None]]:
        """Lease queued prompts; returns their rows as they were, and references of the previous epoch."""
        now, states = self.clock(), (State.QUEUED, State.LEASED)
        found = self.metadata.find(states, until=now, limit=1)  # one request for both, which waits for no other
        if any(row.state is State.LEASED for row in found):
            self._end_leases(
                lambda: self.metadata.find((State.LEASED,), until=now),
                lambda row: (self._after_failure(row.tries), {"reason": f"the lease of {row.owner} expired"}),
            )
        rows = self.metadata.lease(owner, now + self.lease_seconds, max(count, 0)) if found else []
        return rows, self._refs([_shift(row.key, -1) for row in rows])

    def _after_failure(self, tries: int) -> State:
        return State.DEAD if tries >= self.max_tries else State.QUEUED

    def claim_engine(self, names: Iterable[str], engine: str) -> None:
        """Make an engine the only one that produces samples of their runs; the first producer decides it.

        Args:
            names: leased samples, with the stamps of their runs.
            engine: description of the engine, as provenance has it.

        Raises:
            UserError: another producer's engine was faster.
        """
        for stamp in {name.partition("-")[2] for name in names}:
            holder = claim_engine(self.metadata, stamp, engine_label(engine))
            if holder != engine_label(engine):
                raise UserError(
                    f"the features of this run are computed by {holder[:80]}, not {engine_label(engine)}, which differ "
                    "in their last bits; start producers of that engine, or train with --data.mix_engines true"
                )

    def renew(self, owner: str, leased: Sequence[LeasedPrompt]) -> list[bool]:
        """Extend leases; returns for each whether ``owner`` still holds it."""
        lease = {"deadline": self.clock() + self.lease_seconds}
        keys = list(dict.fromkeys(x.key for x in leased))
        move = Move(keys, (State.LEASED,), State.LEASED, lease, {"owner": owner})
        held = self._move(move, "renewed", lambda row: True)
        return [x.key in held for x in leased]

    def release(self, owner: str) -> int:
        """Queue everything that ``owner`` holds as if it had not been tried: before it stops, or when it restarts.

        Features that it stored but did not commit are deleted.

        Returns:
            How many prompts it held.
        """
        try:
            stored = self.features.backend.stored()  # before others can lease the prompts and store features
        finally:
            keys = self._end_leases(
                lambda: [row for row in self.metadata.find((State.LEASED,)) if row.owner == owner],
                lambda row: (State.QUEUED, {"tries": row.tries - 1}),
            )
        if keys:
            self._remove_orphans(stored, keys)
        return len(keys)

    def fail(self, owner: str, leased: LeasedPrompt, reason: str, final: bool = False) -> State:
        """Report that a prompt gave no features.

        Args:
            owner: the producer.
            leased: the prompt.
            reason: why.
            final: give the prompt up, because another try cannot succeed.

        Returns:
            The state of the sample: ``dead`` after the last try; unaffected if ``owner`` no longer held the lease.

        Raises:
            StateError: the sample is unknown.
        """
        _plain(owner, reason)
        tries = leased.task.attempt + 1
        state = State.DEAD if final else self._after_failure(tries)
        lease = {"owner": owner, "tries": tries}
        try:
            self.metadata.move([Move([leased.key], (State.LEASED,), state, {"reason": reason}, lease)])
        except Conflict as conflict:
            row = conflict.rows[leased.key]
            if row is None:
                raise StateError(leased.key, "", "failed") from None
            return row.state
        return state

    def commit(self, refs: Iterable[tuple[str, SampleRef]]) -> list[bool]:
        """Record samples whose features are flushed, whoever produced them.

        The first commit of a sample stands. Features of a duplicate are deleted, unless another sample of this call has
        the same, or those of the first are gone: then the duplicate replaces them.

        Args:
            refs: key and reference of each.

        Returns:
            Whether each is new.

        Raises:
            StateError: a key was never ingested; nothing is committed.
        """
        items = [(key, ref, dump_ref(ref)) for key, ref in refs]
        new = self._commit([(key, text) for key, _, text in items])
        needed = {text for (_, _, text), fresh in zip(items, new, strict=True) if fresh}
        for (key, ref, text), fresh in zip(items, new, strict=True):
            if not fresh:
                self._settle_duplicate(key, ref, text, text in needed)
        return new

    def _commit(
        self, items: Sequence[tuple[str, str]], is_done: Callable[[Row | None], bool] = lambda row: row is not None
    ) -> list[bool]:
        refs: dict[str, str] = {}
        for key, text in items:
            refs.setdefault(key, text)
        move = Move(list(refs), _UNCOMMITTED, State.COMMITTED, refs=refs)
        fresh = self._move(move, "committed", is_done)
        return [fresh.pop(key, None) is not None for key, _ in items]  # a key that comes twice is new once

    def _settle_duplicate(self, key: str, ref: SampleRef, text: str, is_needed: bool) -> None:
        (row,) = self.metadata.get([key], "ref")
        first = None if row is None else _read_ref(row.key, row.text)
        if row is None or first is None or _same_bytes(first, ref):
            return
        if self.features.holds(first) or row.state not in _WAITING:
            if not is_needed:
                self.features.discard(ref)
            return
        try:
            self.metadata.move([Move([key], _WAITING, State.COMMITTED, {"ref": text, "tries": 0})])
        except Conflict:  # it was queued again meanwhile
            self.commit([(key, ref)])

    # The trainer.

    def deliver(self, keys: Sequence[str]) -> list[SampleRef]:
        """References of samples to train on; their features may now be read from the store.

        Samples with a damaged reference are left out; report them by :meth:`lost`.

        Raises:
            StateError: a sample is not committed, or already trained; none is delivered.
        """
        move = Move(list(dict.fromkeys(keys)), _WAITING, State.DELIVERED)
        refs = [ref for ref in _read_refs(keys, self._move(move, "delivered", text="ref")) if ref is not None]
        self.features.adopt(refs)
        return refs

    def trained(self, keys: Sequence[str], step: int) -> None:
        """Record the optimizer step that used samples; repeating the call is harmless.

        Raises:
            StateError: a sample was not delivered, or another step used it; nothing is recorded.
        """
        _plain(step)
        move = Move(list(dict.fromkeys(keys)), (State.DELIVERED,), State.TRAINED, {"step": step})
        self._move(move, "trained", lambda row: row is not None and (row.state, row.step) == (State.TRAINED, step))

    def durable(self, step: int) -> int:
        """Record that the checkpoint of ``step`` is complete, and free the features that it covers.

        Returns:
            How many samples became durable.
        """
        _plain(step)
        rows, following = self._mark_durable(step)
        if self.retain == "until_durable":
            self._free(rows, following)
        return len(rows)

    def _mark_durable(self, step: int) -> tuple[list[Row], list[SampleRef | None]]:
        """Returns the rows that became durable, and references of the following epoch."""

        def attempt() -> tuple[list[Row], list[SampleRef | None]]:
            rows = self.metadata.find((State.TRAINED,), until=step, text="ref")
            following = [_shift(row.key, 1) for row in rows]
            move = Move([row.key for row in rows], (State.TRAINED,), State.DURABLE)
            return rows, _read_refs(following, self.metadata.move([move], "ref", following))

        return _until_undisturbed(attempt)

    def resume(self, step: int, keep: Collection[str], queued: Collection[str] = ()) -> None:
        """Return to the checkpoint of ``step`` after a restart.

        Samples delivered or trained since are to be trained again; those whose features are lost are queued. Samples
        that wait but are not needed next are dropped with their features, and so are features that nobody committed.

        Args:
            step: the optimizer step of the checkpoint.
            keep: keys of leased and committed samples that stay.
            queued: keys of queued prompts that stay; the trainer queues the others again when it needs them.
        """
        self.rewind(step)
        self.durable(step)
        self.reconcile()
        waiting = self.metadata.find((State.QUEUED, State.LEASED, State.COMMITTED))
        self.forget([row.key for row in waiting if row.key not in (queued if row.state is State.QUEUED else keep)])
        self.remove_orphans()  # of the leases that are forgotten

    def rewind(self, step: int) -> list[str]:
        """Return to the checkpoint of ``step``: samples delivered or trained since are to be trained again.

        Returns:
            Their keys; samples whose features are no longer held are queued again.
        """
        _plain(step)

        def attempt() -> list[Row]:
            rows = self.metadata.find(_DELIVERED, after=step, text="ref")
            self.metadata.move([Move([row.key for row in rows], _DELIVERED, State.COMMITTED)])
            return rows

        rows = _until_undisturbed(attempt)
        self._requeue_lost(rows)
        return [row.key for row in rows]

    def free(self, keys: Sequence[str]) -> None:
        """Delete features of trained samples before a checkpoint covers them.

        If the run is rewound they are produced again.
        """
        rows = [row for row in self.metadata.get(keys, "ref") if row is not None]
        self._free(rows, self._refs([_shift(row.key, 1) for row in rows]))

    def _free(self, rows: Sequence[Row], following: Sequence[SampleRef | None]) -> None:
        """Delete features, unless the following epoch uses the same."""
        for row, other in zip(rows, following, strict=True):
            ref = _read_ref(row.key, row.text)
            if ref is not None and (other is None or not _same_bytes(ref, other)):
                self.features.discard(ref)

    def forget(self, keys: Sequence[str]) -> None:
        """Drop samples and their features as if they had never been ingested; unknown ones are ignored."""
        refs = self._refs(keys)
        self.metadata.remove(keys)
        self._discard(refs)

    def lost(self, keys: Sequence[str]) -> None:
        """Queue samples again whose features are missing or damaged.

        Raises:
            StateError: a sample is unknown, trained or durable; none is queued.
        """
        refs = self._refs(keys)
        self._requeue(keys)
        self._discard(refs)

    def _discard(self, refs: Iterable[SampleRef | None]) -> None:
        for ref in refs:
            if ref is not None:
                self.features.discard(ref)

    # Both.

    def reconcile(self) -> Reconciled:
        """After a restart: queue samples whose features are lost, delete features that nobody committed.

        Features of leased prompts are left alone: they may be about to be committed.
        """
        return Reconciled(self._requeue_lost(self.metadata.find(_WAITING, text="ref")), self.remove_orphans())

    def remove_orphans(self) -> int:
        """Delete features that nobody committed or is about to commit, such as those of killed producers."""
        return self._remove_orphans(self.features.backend.stored())

    def _remove_orphans(self, stored: Iterable[tuple[str, str]], keys: Collection[str] | None = None) -> int:
        """Delete the orphans in ``stored``; if ``keys`` are given, only features of these, whose leases end."""
        # The order matters, because producers keep working: features that are stored, leased or committed after any
        # of these lines are not deleted by the last.
        samples = None if keys is None else {_sample(key) for key in keys}

        def selects(sample_id: str) -> bool:
            return samples is None or sample_id in samples

        stored = [(key, uri) for key, uri in stored if selects(key.rpartition(".")[0])]
        if not stored:
            return 0
        leased = {_sample(row.key) for row in self.metadata.find((State.LEASED,)) if row.key not in (keys or ())}
        refs = self.references((*_WAITING, State.TRAINED), selects)
        return self.features.remove_orphans(refs, leased, stored)

    def references(
        self, states: Collection[State], selects: Callable[[str], bool] = lambda sample_id: True
    ) -> list[SampleRef]:
        """References of all samples in some states, or only of those that ``selects`` chooses by sample id."""
        rows = [row for row in self.metadata.find(states, text="ref") if selects(_sample(row.key))]
        return [ref for row in rows if (ref := _read_ref(row.key, row.text)) is not None]

    def unfinished(self) -> int:
        """Number of leased samples that the store is already writing."""
        stored = {key.rpartition(".")[0] for key, _ in self.features.backend.stored()}
        now = self.clock()
        return len(stored & {_sample(x.key) for x in self.metadata.find((State.LEASED,)) if x.deadline > now})

    def stalled(self) -> int:
        """Number of leases that have expired and that no other producer has taken over yet."""
        return len(self.metadata.find((State.LEASED,), until=self.clock()))

    def given_up(self) -> list[GivenUpPrompt]:
        """Prompts that were given up; :meth:`revive` tries them again."""
        return [GivenUpPrompt(row.key, row.tries, row.reason) for row in self.metadata.find((State.DEAD,))]

    def revive(self, keys: Sequence[str]) -> None:
        """Queue given-up prompts again, with all their tries."""
        self._requeue(keys)

    def counts(self) -> dict[str, int]:
        """Number of samples in each state."""
        return self.metadata.counts()

    def _refs(self, keys: Sequence[str]) -> list[SampleRef | None]:
        rows = self.metadata.get(keys, "ref") if any(keys) else [None] * len(keys)
        return [None if row is None else _read_ref(row.key, row.text) for row in rows]

    def _requeue_lost(self, rows: Sequence[Row]) -> int:
        refs = [(row.key, _read_ref(row.key, row.text)) for row in rows]
        lost = [key for key, ref in refs if ref is None or not self.features.holds(ref)]
        if lost:
            self._requeue(lost)
        return len(lost)

    def _requeue(self, keys: Sequence[str]) -> None:
        """Queue samples again, with all their tries; repeating the call is harmless."""
        move = Move(list(dict.fromkeys(keys)), (*_WAITING, State.DEAD), State.QUEUED, {"ref": "", "tries": 0})
        self._move(move, "queued again", lambda row: row is not None and row.state in (State.QUEUED, State.LEASED))

    # Transitions.

    def _move(
        self, move: Move, action: str, is_done: Callable[[Row | None], bool] = lambda row: False, text: Text = ""
    ) -> dict[str, str]:
        """Move samples, all or none.

        Args:
            move: the change.
            action: what happens to the samples, for the error.
            is_done: rows that stay unchanged without being an error.
            text: the long column to return.

        Returns:
            The text of each sample that was moved, by key.

        Raises:
            StateError: a sample is unknown, or its state permits neither the move nor leaving it unchanged.
        """
        for _ in range(_ATTEMPTS):
            try:
                return self.metadata.move([move], text) or dict.fromkeys(move.keys, "")
            except Conflict as conflict:
                move = move._replace(keys=_left(move, conflict, action, is_done))
        raise _busy()

    def _end_leases(
        self, find: Callable[[], list[Row]], outcome: Callable[[Row], tuple[State, Mapping[str, object]]]
    ) -> list[str]:
        """End leases, unless they were renewed or taken over meanwhile; returns their keys."""

        def move(row: Row) -> Move:
            lease = {"owner": row.owner, "tries": row.tries, "deadline": row.deadline}
            return Move([row.key], (State.LEASED,), *outcome(row), lease)

        def attempt() -> list[str]:
            rows = find()
            self.metadata.move(list(map(move, rows)))
            return [row.key for row in rows]

        return _until_undisturbed(attempt)


def _until_undisturbed(attempt: Callable[[], T]) -> T:
    """Find rows and move them, again if another process changed one of them in between."""
    for _ in range(_ATTEMPTS):
        with suppress(Conflict):
            return attempt()
    raise _busy()


def _busy() -> UserError:
    return UserError(
        f"metadata store: rows changed during each of {_ATTEMPTS:,} attempts; does another program write it?"
    )


def _left(move: Move, conflict: Conflict, action: str, is_done: Callable[[Row | None], bool]) -> list[str]:
    """The keys of a move that are still to be moved after a conflict; raises StateError if one never can be."""
    left = []
    for key in move.keys:
        row = conflict.rows[key]
        if move.allows(row):
            left.append(key)
        elif not is_done(row):
            raise StateError(key, row.state if row else "", action) from None
    return left


def _sample(key: str) -> str:
    return key.rpartition("@")[0]


def _shift(key: str, epochs: int) -> str:
    """Key of the same sample some epochs later; empty if it is not the key of a sample."""
    sample_id, _, epoch = key.rpartition("@")
    return sample_key(sample_id, int(epoch) + epochs) if _EPOCH.fullmatch(epoch) else ""


def _load_prompt(row: Row) -> LeasedPrompt:
    """The prompt of a row as it was before the lease; raises ValueError if it is damaged."""
    name = _sample(row.key)
    if not (SAMPLE_ID.fullmatch(name) and _shift(row.key, 0)):
        raise ValueError("its key is not a sample's")
    task, provenance = load_task(row.text)
    return LeasedPrompt(row.key, name, replace(task, attempt=row.tries), provenance)


def _read_ref(key: str, text: str) -> SampleRef | None:
    """A reference; None if there is none, or it is damaged, which is logged."""
    if not text:
        return None
    try:
        return load_ref(text)
    except ValueError as error:
        logger.warning("the reference of %r in the metadata store is damaged (%s)", key, error)
        return None


def _read_refs(keys: Sequence[str], texts: Mapping[str, str]) -> list[SampleRef | None]:
    return [_read_ref(key, texts[key]) for key in keys]


def _same_bytes(a: SampleRef, b: SampleRef) -> bool:
    return (a.sample_id, a.generation, a.uri) == (b.sample_id, b.generation, b.uri)


def _plain(*values: object) -> None:
    """Reject everything but text and integers, such as tensors and arrays."""
    for value in values:
        if type(value) not in (str, int):
            raise TypeError(f"{type(value).__name__} cannot cross the control plane")


# A reference is three lines of JSON: the fields that differ between samples, the tensors' shapes, and the provenance.
# A run has few different second lines and one third line, so each is formatted and parsed once. A prompt likewise has
# an optional second line: what to capture.


def dump_task(task: PromptTask, provenance: Provenance | None = None) -> str:
    """Text of a prompt."""
    own = json.dumps(task.to_json(), separators=(",", ":"))
    return own if provenance is None else f"{own}\n{_dump((provenance,))}"


def load_task(text: str) -> tuple[PromptTask, Provenance | None]:
    """A prompt, and what to capture, from its text.

    Raises:
        ValueError: the text is damaged.
    """
    own, _, provenance = text.partition("\n")
    return PromptTask.from_json(parse_json(own)), _load_provenance(provenance) if provenance else None


def dump_ref(ref: SampleRef) -> str:
    """Text of a reference.

    Raises:
        TypeError: a field is neither text nor a number.
    """
    own = json.dumps([getattr(ref, name) for name in _OWN_FIELDS])
    return f"{own}\n{_dump(ref.features)}\n{_dump((ref.provenance,))}"


def load_ref(text: str) -> SampleRef:
    """A reference from its text; references of one run share their provenance.

    Raises:
        ValueError: the text is damaged.
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
