"""Where the states of samples are kept, behind one protocol; here the null and the memory store.

    queued -> leased -> committed -> delivered -> trained(step) -> durable
       ^        |            |           |             |              |
       +--------+            +-----------+-------------+--------------+--> committed, when a run goes back
       expired or failed     features lost: queued again

A sample is *trained* at an optimizer step and *durable* when a checkpoint that covers the step is complete. Every
method is atomic: it does all it was asked, or raises and changes nothing. What goes in and comes out is text
and numbers: payloads are the JSON of :class:`PromptTask` and :class:`SampleRef`, so no tensor can enter. Stores
know no time: the caller says what o'clock it is.

Runs in one process need no record: their samples can be produced or read again, and the checkpoint's data cursor
says which were trained. They use the null store, whose every method does nothing.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from specforge.errors import UserError

QUEUED, LEASED, COMMITTED, DELIVERED = "queued", "leased", "committed", "delivered"
TRAINED, DURABLE, DEAD = "trained", "durable", "dead"
STATES = (QUEUED, LEASED, COMMITTED, DELIVERED, TRAINED, DURABLE, DEAD)


class StateError(Exception):
    """A sample is not in a state in which this can happen to it; nothing was changed."""

    def __init__(self, key: str, state: str, action: str) -> None:
        super().__init__(f"sample {key} is {state or 'unknown'} and cannot be {action}")
        self.key, self.state, self.action = key, state, action


def unusable(where: str, reason: str) -> UserError:
    """What to say when the store itself fails in the middle of a run."""
    return UserError(
        f"metadata {where}: {reason.rstrip('.')}; when it works again, start the producers again and resume with "
        "--ckpt_path last, which loses nothing"
    )


class Grant(NamedTuple):
    """A prompt that is leased: its ``key``, its JSON, and how often it was tried before."""

    key: str
    task: str
    attempt: int


class Entry(NamedTuple):
    """A sample's record.

    Attributes:
        key: of the sample in an epoch.
        state: one of ``STATES``.
        ref: JSON of its reference, empty before it is committed.
        tries: how often it was lent out.
        reason: why it failed last.
        deadline: until when it is lent out; 0 in other states than ``leased``.
    """

    key: str
    state: str
    ref: str
    tries: int
    reason: str
    deadline: float = 0.0


class Claim(NamedTuple):
    """Whose the samples are: the text that names the trainer, and until when it is taken for alive."""

    holder: str
    deadline: float


class MetadataStore(Protocol):
    """States of samples by key."""

    def ingest(self, items: Sequence[tuple[str, str]]) -> list[bool]:
        """Queue prompts, behind those that are queued.

        Args:
            items: key and JSON of each.

        Returns:
            For each, whether it is new; a known key is left as it is.
        """
        ...

    def lease(self, owner: str, count: int, now: float, deadline: float, max_tries: int) -> list[Grant]:
        """Lend out prompts, in the order in which they were ingested.

        Leases whose deadline has come are ended first: their prompts are queued again or, after ``max_tries``, dead.

        Args:
            owner: who asks.
            count: most prompts to lend.
            now: present time in seconds.
            deadline: until when.
            max_tries: how often a prompt is lent.
        """
        ...

    def renew(self, owner: str, keys: Sequence[str], deadline: float) -> list[bool]:
        """Extend leases; for each key, whether ``owner`` still holds it."""
        ...

    def release(self, owner: str) -> list[str]:
        """Queue again what ``owner`` holds, as if it had not been tried; returns the keys."""
        ...

    def fail(self, owner: str, key: str, attempt: int, reason: str, max_tries: int) -> str:
        """End a lease without features.

        Returns:
            The sample's state: queued, or dead after ``max_tries``; another where the lease was no longer held.
        """
        ...

    def commit(self, items: Sequence[tuple[str, str]]) -> list[bool]:
        """Record samples whose features are in the store, whoever produced them.

        Args:
            items: key and JSON of the reference.

        Returns:
            For each, whether it is new (False: its features were committed before, and that reference stands).

        Raises:
            StateError: a key was never ingested.
        """
        ...

    def deliver(self, keys: Sequence[str]) -> list[str]:
        """Record that a trainer was given the samples; returns their references' JSON.

        Raises:
            StateError: one is not committed, or trained already.
        """
        ...

    def mark_trained(self, keys: Sequence[str], step: int) -> None:
        """Record that optimizer step ``step`` used the samples; saying so twice is harmless.

        Raises:
            StateError: one was not delivered, or another step used it.
        """
        ...

    def mark_durable(self, step: int) -> list[str]:
        """Record a complete checkpoint of ``step``; returns the keys that this made durable."""
        ...

    def rewind(self, step: int) -> list[str]:
        """Forget deliveries, and what was trained after ``step``, of whose checkpoint a run resumes.

        Returns:
            Keys that are committed again.
        """
        ...

    def requeue(self, keys: Sequence[str]) -> None:
        """Queue again, with all their tries, samples whose features are lost, or dead ones; twice is harmless.

        Raises:
            StateError: one is unknown, trained or durable.
        """
        ...

    def forget(self, keys: Sequence[str]) -> None:
        """Drop samples in whatever state, as if they had never been ingested; unknown ones are ignored."""
        ...

    def refs(self, keys: Sequence[str]) -> list[str]:
        """JSON of the references; empty where there is none."""
        ...

    def entries(self, states: Collection[str]) -> Iterator[Entry]:
        """Records in some states, in the order in which they were ingested."""
        ...

    def counts(self) -> dict[str, int]:
        """Samples in each state."""
        ...

    def claim(self, holder: str, now: float, deadline: float, instead_of: str = "") -> Claim:
        """Make a trainer the only one, or renew that, unless another one is and its deadline has not come.

        Args:
            holder: text that names the trainer.
            now: present time in seconds.
            deadline: until when.
            instead_of: a trainer that is dead, whatever its deadline.

        Returns:
            Who is the only one now.
        """
        ...

    def resign(self, holder: str) -> None:
        """The trainer is done; nothing where another one has taken its place."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


class NullMetadataStore:
    """Keeps nothing; the control plane of a run that has none."""

    def ingest(self, items: Sequence[tuple[str, str]]) -> list[bool]:
        """Every prompt is new."""
        return [True] * len(items)

    def lease(self, owner: str, count: int, now: float, deadline: float, max_tries: int) -> list[Grant]:
        """Nothing is queued."""
        return []

    def renew(self, owner: str, keys: Sequence[str], deadline: float) -> list[bool]:
        """Nothing is leased."""
        return [False] * len(keys)

    def release(self, owner: str) -> list[str]:
        """Nothing is leased."""
        return []

    def fail(self, owner: str, key: str, attempt: int, reason: str, max_tries: int) -> str:
        """Nothing to record."""
        return QUEUED

    def commit(self, items: Sequence[tuple[str, str]]) -> list[bool]:
        """Every sample is new."""
        return [True] * len(items)

    def deliver(self, keys: Sequence[str]) -> list[str]:
        """No reference is kept."""
        return [""] * len(keys)

    def mark_trained(self, keys: Sequence[str], step: int) -> None:
        """Nothing to record."""

    def mark_durable(self, step: int) -> list[str]:
        """Nothing becomes durable."""
        return []

    def rewind(self, step: int) -> list[str]:
        """Nothing to deliver again."""
        return []

    def requeue(self, keys: Sequence[str]) -> None:
        """Nothing to record."""

    def forget(self, keys: Sequence[str]) -> None:
        """Nothing is known."""

    def refs(self, keys: Sequence[str]) -> list[str]:
        """No reference is kept."""
        return [""] * len(keys)

    def entries(self, states: Collection[str]) -> Iterator[Entry]:
        """None."""
        return iter(())

    def counts(self) -> dict[str, int]:
        """All zero."""
        return dict.fromkeys(STATES, 0)

    def claim(self, holder: str, now: float, deadline: float, instead_of: str = "") -> Claim:
        """Nobody else is there."""
        return Claim(holder, deadline)

    def resign(self, holder: str) -> None:
        """Nothing to record."""

    def close(self) -> None:
        """Nothing to do."""


@dataclass
class _Row:
    task: str
    state: str = QUEUED
    ref: str = ""
    owner: str = ""
    deadline: float = 0.0
    tries: int = 0
    step: int = 0
    reason: str = ""


class MemoryMetadataStore:
    """A dictionary; for tests, and the plainest statement of what the others do."""

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self._claim: Claim | None = None
        self._lock = threading.Lock()

    def ingest(self, items: Sequence[tuple[str, str]]) -> list[bool]:
        """See :class:`MetadataStore`."""
        with self._lock:
            return [self._rows.setdefault(key, row := _Row(task)) is row for key, task in items]

    def lease(self, owner: str, count: int, now: float, deadline: float, max_tries: int) -> list[Grant]:
        """See :class:`MetadataStore`."""
        grants: list[Grant] = []
        with self._lock:
            for row in self._rows.values():
                if row.state == LEASED and row.deadline <= now:
                    _give_up(row, f"the lease of {row.owner} expired", max_tries)
            for key, row in self._rows.items():
                if row.state == QUEUED and len(grants) < count:
                    grants.append(Grant(key, row.task, row.tries))
                    row.state, row.owner, row.deadline, row.tries = LEASED, owner, deadline, row.tries + 1
        return grants

    def renew(self, owner: str, keys: Sequence[str], deadline: float) -> list[bool]:
        """See :class:`MetadataStore`."""
        with self._lock:
            held = [self._holds(owner, key) for key in keys]
            for key, mine in zip(keys, held, strict=True):
                if mine:
                    self._rows[key].deadline = deadline
        return held

    def release(self, owner: str) -> list[str]:
        """See :class:`MetadataStore`."""
        with self._lock:
            held = {key: row for key, row in self._rows.items() if self._holds(owner, key)}
            for row in held.values():
                row.state, row.tries = QUEUED, row.tries - 1
        return list(held)

    def fail(self, owner: str, key: str, attempt: int, reason: str, max_tries: int) -> str:
        """See :class:`MetadataStore`."""
        with self._lock:
            (row,) = self._found([key], STATES, "failed")
            if self._holds(owner, key) and row.tries == attempt + 1:
                _give_up(row, reason, max_tries)
            return row.state

    def commit(self, items: Sequence[tuple[str, str]]) -> list[bool]:
        """See :class:`MetadataStore`."""
        with self._lock:
            rows = self._found([key for key, _ in items], STATES, "committed")
            new: list[bool] = []
            for row, (_, ref) in zip(rows, items, strict=True):
                new.append(row.state in (QUEUED, LEASED, DEAD))
                if new[-1]:
                    row.state, row.ref = COMMITTED, ref
        return new

    def deliver(self, keys: Sequence[str]) -> list[str]:
        """See :class:`MetadataStore`."""
        with self._lock:
            rows = self._found(keys, (COMMITTED, DELIVERED), "delivered")
            for row in rows:
                row.state = DELIVERED
            return [row.ref for row in rows]

    def mark_trained(self, keys: Sequence[str], step: int) -> None:
        """See :class:`MetadataStore`."""
        with self._lock:
            rows = self._found(keys, (DELIVERED, TRAINED), "trained")
            for key, row in zip(keys, rows, strict=True):
                if row.state == TRAINED and row.step != step:
                    raise StateError(key, row.state, "trained")
            for row in rows:
                row.state, row.step = TRAINED, step

    def mark_durable(self, step: int) -> list[str]:
        """See :class:`MetadataStore`."""
        return self._move(lambda row: row.state == TRAINED and row.step <= step, DURABLE)

    def rewind(self, step: int) -> list[str]:
        """See :class:`MetadataStore`."""
        return self._move(
            lambda row: row.state == DELIVERED or (row.state in (TRAINED, DURABLE) and row.step > step), COMMITTED
        )

    def requeue(self, keys: Sequence[str]) -> None:
        """See :class:`MetadataStore`."""
        with self._lock:
            for row in self._found(keys, (QUEUED, LEASED, COMMITTED, DELIVERED, DEAD), "queued again"):
                if row.state not in (QUEUED, LEASED):
                    row.state, row.ref, row.tries = QUEUED, "", 0

    def forget(self, keys: Sequence[str]) -> None:
        """See :class:`MetadataStore`."""
        with self._lock:
            for key in keys:
                self._rows.pop(key, None)

    def refs(self, keys: Sequence[str]) -> list[str]:
        """See :class:`MetadataStore`."""
        with self._lock:
            return [self._rows[key].ref if key in self._rows else "" for key in keys]

    def entries(self, states: Collection[str]) -> Iterator[Entry]:
        """See :class:`MetadataStore`."""
        with self._lock:
            chosen = [(key, row) for key, row in self._rows.items() if row.state in states]
            return iter(
                [
                    Entry(key, r.state, r.ref, r.tries, r.reason, r.deadline if r.state == LEASED else 0.0)
                    for key, r in chosen
                ]
            )

    def counts(self) -> dict[str, int]:
        """See :class:`MetadataStore`."""
        with self._lock:
            found = Counter(row.state for row in self._rows.values())
        return {state: found[state] for state in STATES}

    def claim(self, holder: str, now: float, deadline: float, instead_of: str = "") -> Claim:
        """See :class:`MetadataStore`."""
        with self._lock:
            present = self._claim
            if present and present.holder not in (holder, instead_of) and present.deadline > now:
                return present
            self._claim = Claim(holder, deadline)
            return self._claim

    def resign(self, holder: str) -> None:
        """See :class:`MetadataStore`."""
        with self._lock:
            if self._claim is not None and self._claim.holder == holder:
                self._claim = None

    def close(self) -> None:
        """Nothing to do."""

    def _holds(self, owner: str, key: str) -> bool:
        row = self._rows.get(key)
        return row is not None and row.state == LEASED and row.owner == owner

    def _found(self, keys: Sequence[str], states: Collection[str], action: str) -> list[_Row]:
        check_states(keys, {key: self._rows[key].state for key in keys if key in self._rows}, states, action)
        return [self._rows[key] for key in keys]

    def _move(self, chosen: _Choice, state: str) -> list[str]:
        with self._lock:
            keys = [key for key, row in self._rows.items() if chosen(row)]
            for key in keys:
                self._rows[key].state = state
        return keys


class _Choice(Protocol):
    def __call__(self, row: _Row, /) -> bool: ...


def _give_up(row: _Row, reason: str, max_tries: int) -> None:
    row.state, row.reason = (DEAD if row.tries >= max_tries else QUEUED), reason


def check_states(keys: Sequence[str], found: Mapping[str, str], allowed: Collection[str], action: str) -> None:
    """Refuse an action on samples of which one is in another state than the allowed ones.

    Raises:
        StateError: names the first.
    """
    for key in keys:
        state = found.get(key, "")
        if state not in allowed:
            raise StateError(key, state if state in STATES else "", action)
