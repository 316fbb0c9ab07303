"""A metadata store in a dictionary: the simplest statement of what the others do."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from specforge.runtime.control_plane.metadata import BOUNDED, STATES, Conflict, Move, Row, State, Text


class MemoryMetadataStore:
    """See MetadataStore."""

    def __init__(self) -> None:
        self._rows: dict[str, dict] = {}
        self._lock = threading.RLock()

    def add(self, items: Iterable[tuple[str, str]], state: State = State.QUEUED) -> list[bool]:
        with self._lock:
            new = [{"task": task, "ref": "", "state": state} for _, task in items]
            return [self._rows.setdefault(key, row) is row for (key, _), row in zip(items, new, strict=True)]

    def get(self, keys: Sequence[str], text: Text = "") -> list[Row | None]:
        with self._lock:
            return [self._row(key, text) for key in keys]

    def find(self, states: Collection[State], *, after=None, until=None, limit=None, text: Text = "") -> list[Row]:
        with self._lock:
            rows = [row for key in self._rows if (row := self._row(key, text)) and row.state in states]

        def chosen(row: Row) -> bool:
            if row.state not in BOUNDED:
                return True
            value = getattr(row, BOUNDED[row.state])
            return (after is None or value > after) and (until is None or value <= until)

        found: dict[State, list[Row]] = {}
        for row in filter(chosen, rows):
            found.setdefault(row.state, []).append(row)
        kept = {row.key for of_a_state in found.values() for row in of_a_state[:limit]}
        return [row for row in rows if row.key in kept]

    def lease(self, owner: str, deadline: float, limit: int) -> list[Row]:
        with self._lock:
            found = self.find([State.QUEUED], limit=limit, text="task")
            changes = {"state": State.LEASED, "owner": owner, "deadline": deadline}
            for row in found:
                self._rows[row.key].update(changes, tries=row.tries + 1)
            return found

    def move(self, moves: Sequence[Move], text: Text = "", texts_of: Sequence[str] | None = None) -> dict[str, str]:
        with self._lock:
            rows = {key: self._row(key, text) for move in moves for key in move.keys}
            if not all(move.allows(rows[key]) for move in moves for key in move.keys):
                raise Conflict(rows)
            for move in moves:
                for key in move.keys:
                    self._rows[key].update(move.changes, state=move.to)
                    if move.refs:
                        self._rows[key]["ref"] = move.refs[key]
            found = {key: self._row(key, text) for key in (rows if texts_of is None else texts_of)}
            return {key: row.text if row else "" for key, row in found.items()} if text else {}

    def remove(self, keys: Sequence[str]) -> None:
        with self._lock:
            for key in keys:
                self._rows.pop(key, None)

    def counts(self) -> dict[str, int]:
        with self._lock:
            found = Counter(row["state"] for row in self._rows.values())
        return {state: found[state] for state in STATES}

    def close(self) -> None:
        pass

    def _row(self, key: str, text: Text) -> Row | None:
        row = self._rows.get(key)
        if row is None or row["state"] not in set(State):
            return None
        fields = {name: value for name, value in row.items() if name not in ("task", "ref")}
        if row["state"] not in (State.LEASED, State.CLAIMED):
            fields.pop("deadline", None)
        return Row(key, **fields, text=row[text] if text else "")
