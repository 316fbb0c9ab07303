"""What a metadata store keeps: one row per sample, changed by compare-and-set.

    queued -> leased -> committed -> delivered -> trained(step) -> durable
       ^        |            |           |             |              |
       +--------+            +-----------+-------------+--------------+--> committed, when a run is rewound
       expired or failed     features lost: queued again

A sample is *trained* at an optimizer step and *durable* once a checkpoint that covers the step is complete. The
transitions are written in :mod:`~specforge.runtime.control_plane.controller`; a store only keeps rows and changes them
atomically. Rows hold text and numbers (prompts and references as JSON), so no tensor can enter. Stores have no clock;
the caller passes the current time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Literal, NamedTuple, Protocol

from specforge.errors import UserError


class State(StrEnum):
    """State of a row; all but ``CLAIMED``, which marks the trainer's claim, are states of samples."""

    QUEUED = "queued"
    LEASED = "leased"
    COMMITTED = "committed"
    DELIVERED = "delivered"
    TRAINED = "trained"
    DURABLE = "durable"
    DEAD = "dead"
    CLAIMED = "claimed"


STATES = tuple(state for state in State if state is not State.CLAIMED)
BOUNDED = {State.LEASED: "deadline", State.CLAIMED: "deadline", State.TRAINED: "step", State.DURABLE: "step"}

Text = Literal["", "task", "ref"]  # a long column that is read only on request: the prompt, or the reference


class Row(NamedTuple):
    """A row as it was read.

    Attributes:
        key: the sample in an epoch, or the trainer's claim.
        state: its state.
        owner: the producer that leased it last, or the trainer that holds the claim.
        deadline: when the lease or the claim expires; 0 in other states.
        tries: how often it was leased.
        step: the optimizer step that trained it.
        reason: why it failed last.
        text: JSON of the prompt or the reference, if requested.
    """

    key: str
    state: State
    owner: str = ""
    deadline: float = 0.0
    tries: int = 0
    step: int = 0
    reason: str = ""
    text: str = ""


class Move(NamedTuple):
    """A change of rows, made only if all of them are as expected.

    Attributes:
        keys: which rows.
        states: each row must be in one of these states.
        to: the new state.
        changes: other new values by column: ``owner``, ``deadline``, ``tries``, ``step``, ``reason`` or ``ref``.
        expected: values that each row must have: ``owner``, ``deadline`` or ``tries``.
        refs: new value of ``ref`` by key, if it differs between the rows.
    """

    keys: Sequence[str]
    states: Collection[State]
    to: State
    changes: Mapping[str, object] = {}
    expected: Mapping[str, object] = {}
    refs: Mapping[str, str] = {}

    def allows(self, row: Row | None) -> bool:
        """Whether a row is as expected."""
        return (
            row is not None
            and row.state in self.states
            and all(getattr(row, name) == value for name, value in self.expected.items())
        )


class Conflict(Exception):
    """A row was not as a move expected; nothing was changed.

    Attributes:
        rows: the present rows of all moves by key; None where there is none.
    """

    def __init__(self, rows: Mapping[str, Row | None]) -> None:
        super().__init__("the rows changed")
        self.rows = rows


class StateError(Exception):
    """The state of a sample does not permit an action; nothing was changed."""

    def __init__(self, key: str, state: str, action: str) -> None:
        super().__init__(f"sample {key} is {state or 'unknown'} and cannot be {action}")
        self.key, self.state, self.action = key, state, action


def unusable(where: str, reason: str) -> UserError:
    """The error to raise when the store itself fails in the middle of a run."""
    return UserError(
        f"metadata {where}: {reason.rstrip('.')}; once it works again, restart the producers and resume with "
        "--ckpt_path last; nothing is lost"
    )


class MetadataStore(Protocol):
    """Rows by key. Every method is atomic: it does everything it was asked to do, or raises and changes nothing."""

    def add(self, items: Iterable[tuple[str, str]], state: State = State.QUEUED) -> list[bool]:
        """Add rows after the existing ones; existing rows are left unchanged.

        Args:
            items: key and prompt of each.
            state: their state.

        Returns:
            Whether each is new.
        """
        ...

    def get(self, keys: Sequence[str], text: Text = "") -> list[Row | None]:
        """Rows by key; None where there is none.

        Args:
            keys: which rows.
            text: the long column to read as well.
        """
        ...

    def find(
        self,
        states: Collection[State],
        *,
        after: float | None = None,
        until: float | None = None,
        limit: int | None = None,
        text: Text = "",
    ) -> list[Row]:
        """Rows in some states, in the order in which they were added.

        Args:
            states: which states.
            after: of leases and trained samples, only those that expire or were trained after this time or step.
            until: of leases and trained samples, only those that expire or were trained by this time or step.
            limit: maximum number of rows in each state.
            text: the long column to read as well.
        """
        ...

    def lease(self, owner: str, deadline: float, limit: int) -> list[Row]:
        """Lease the first queued rows, and count one more try of each; two callers never get the same row.

        Producers that look for the first rows and then move them would get into each other's way.

        Args:
            owner: the producer.
            deadline: when the leases expire.
            limit: maximum number of rows.

        Returns:
            The rows as they were, with their prompts, in the order in which they were added.
        """
        ...

    def move(self, moves: Sequence[Move], text: Text = "", texts_of: Sequence[str] | None = None) -> dict[str, str]:
        """Change rows: all of them, or none. All keys must differ.

        Args:
            moves: the changes.
            text: the long column to return.
            texts_of: keys of the rows to return it of; by default the changed rows.

        Returns:
            The text by key, empty for missing rows; no texts if no column was requested.

        Raises:
            Conflict: a row is missing or not as expected.
        """
        ...

    def remove(self, keys: Sequence[str]) -> None:
        """Delete rows; missing ones are ignored."""
        ...

    def counts(self) -> dict[str, int]:
        """Number of samples in each state."""
        ...

    def close(self) -> None:
        """Close files and connections."""
        ...
