"""States of samples in one SQLite file: the embedded store of one host, for several processes.

Write-ahead logging with ``synchronous=NORMAL``: no process that dies can damage or lose anything; a host that loses
power may lose the last transactions, which is what reconciling with the feature store is for.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from specforge.errors import UserError
from specforge.files import first_line
from specforge.runtime.control_plane.metadata import (
    COMMITTED,
    DEAD,
    DELIVERED,
    DURABLE,
    LEASED,
    QUEUED,
    STATES,
    TRAINED,
    Claim,
    Entry,
    Grant,
    StateError,
    check_states,
    unusable,
)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    seq INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, state TEXT NOT NULL,
    ref TEXT NOT NULL DEFAULT '', owner TEXT NOT NULL DEFAULT '', deadline REAL NOT NULL DEFAULT 0,
    tries INTEGER NOT NULL DEFAULT 0, step INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX IF NOT EXISTS samples_by_state ON samples (state, seq);
CREATE TABLE IF NOT EXISTS tasks (seq INTEGER PRIMARY KEY, task TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS trainer (
    id INTEGER PRIMARY KEY CHECK (id = 1), holder TEXT NOT NULL, deadline REAL NOT NULL
) STRICT;
"""
_VERSION = 1
_KEYS = "key IN (SELECT value FROM json_each(?))"


class SQLiteMetadataStore:
    """See :class:`~specforge.runtime.control_plane.metadata.MetadataStore`.

    Args:
        path: the file; on a local disk, for its locks do not work over a network.
        timeout: seconds to wait for another process's transaction.
        create: make it if it is missing; else it is refused.

    Raises:
        UserError: the file is missing or not such a store, or cannot be opened.
    """

    def __init__(self, path: Path, timeout: float = 60.0, create: bool = True) -> None:
        self.path = path
        self._lock = threading.Lock()
        if not create and not path.exists():
            raise UserError(f"metadata {path}: no such file; a run makes it when it starts")
        try:
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA synchronous=NORMAL")
            if self._is_new():
                if not create:
                    raise UserError(f"metadata {path}: holds no run; one writes to it when it starts")
                self._db.execute("PRAGMA journal_mode=WAL")
            if create:
                with self._transaction() as db:
                    for statement in _SCHEMA.split(";"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version={_VERSION}")
        except (sqlite3.Error, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be opened as a metadata store ({error})") from error

    def _is_new(self) -> bool:
        """Whether nobody has written into the file.

        Raises:
            UserError: another program has, or another version.
        """
        look = "SELECT user_version, (SELECT json_group_array(name) FROM sqlite_master) FROM pragma_user_version"
        version, names = self._db.execute(look).fetchone()  # at once: another process may be making them
        tables = json.loads(names)
        if version not in (0, _VERSION):
            raise UserError(f"{self.path}: format {version}; this version reads {_VERSION}")
        if bool(version) != ("samples" in tables) or (tables and not version):
            raise UserError(f"{self.path}: is another program's database")
        return not tables

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._db
            except (sqlite3.Error, UnicodeError, OverflowError) as error:  # the disk is full, say
                raise unusable(str(self.path), first_line(error)) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # SQLite itself undoes what finds no place on the disk
                    db.execute("ROLLBACK")
                raise

    def ingest(self, items: Sequence[tuple[str, str]]) -> list[bool]:
        """See :class:`MetadataStore`."""
        # Prompts lie in a table of their own: a change of state rewrites its row, which should be short.
        insert = f"INSERT OR IGNORE INTO samples (key, state) VALUES (?, '{QUEUED}')"
        new: list[bool] = []
        with self._transaction() as db:
            for key, task in items:
                row = db.execute(insert, (key,))
                new.append(row.rowcount > 0)
                if new[-1]:
                    db.execute("INSERT OR REPLACE INTO tasks VALUES (?, ?)", (row.lastrowid, task))
        return new

    def lease(self, owner: str, count: int, now: float, deadline: float, max_tries: int) -> list[Grant]:
        """See :class:`MetadataStore`."""
        with self._transaction() as db:
            db.execute(
                f"UPDATE samples SET reason = 'the lease of ' || owner || ' expired', "
                f"state = CASE WHEN tries >= ? THEN '{DEAD}' ELSE '{QUEUED}' END "
                f"WHERE state = '{LEASED}' AND deadline <= ?",
                (max_tries, now),
            )
            select = (
                "SELECT key, coalesce(task, ''), tries FROM samples LEFT JOIN tasks USING (seq) "
                f"WHERE state = '{QUEUED}' ORDER BY seq LIMIT ?"
            )
            grants = [Grant(*row) for row in db.execute(select, (count,))]
            db.executemany(
                f"UPDATE samples SET state = '{LEASED}', owner = ?, deadline = ?, tries = tries + 1 WHERE key = ?",
                [(owner, deadline, grant.key) for grant in grants],
            )
        return grants

    def renew(self, owner: str, keys: Sequence[str], deadline: float) -> list[bool]:
        """See :class:`MetadataStore`."""
        update = f"UPDATE samples SET deadline = ? WHERE key = ? AND state = '{LEASED}' AND owner = ?"
        with self._transaction() as db:
            return [db.execute(update, (deadline, key, owner)).rowcount > 0 for key in keys]

    def release(self, owner: str) -> list[str]:
        """See :class:`MetadataStore`."""
        held = f"state = '{LEASED}' AND owner = ?"
        with self._transaction() as db:
            keys = [key for (key,) in db.execute(f"SELECT key FROM samples WHERE {held}", (owner,))]
            db.execute(f"UPDATE samples SET state = '{QUEUED}', tries = tries - 1 WHERE {held}", (owner,))
        return keys

    def fail(self, owner: str, key: str, attempt: int, reason: str, max_tries: int) -> str:
        """See :class:`MetadataStore`."""
        with self._transaction() as db:
            self._found(db, [key], STATES, "failed")
            db.execute(
                f"UPDATE samples SET reason = ?, state = CASE WHEN tries >= ? THEN '{DEAD}' ELSE '{QUEUED}' END "
                f"WHERE key = ? AND state = '{LEASED}' AND owner = ? AND tries = ?",
                (reason, max_tries, key, owner, attempt + 1),
            )
            return str(db.execute("SELECT state FROM samples WHERE key = ?", (key,)).fetchone()[0])

    def commit(self, items: Sequence[tuple[str, str]]) -> list[bool]:
        """See :class:`MetadataStore`."""
        with self._transaction() as db:
            found = self._found(db, [key for key, _ in items], STATES, "committed")
            fresh = {key: row[0] in (QUEUED, LEASED, DEAD) for key, row in found.items()}
            new = [fresh.pop(key, False) for key, _ in items]  # a key that comes twice is new once
            db.executemany(
                f"UPDATE samples SET state = '{COMMITTED}', ref = ? WHERE key = ?",
                [(ref, key) for (key, ref), first in zip(items, new, strict=True) if first],
            )
        return new

    def deliver(self, keys: Sequence[str]) -> list[str]:
        """See :class:`MetadataStore`."""
        with self._transaction() as db:
            found = self._found(db, keys, (COMMITTED, DELIVERED), "delivered")
            db.execute(f"UPDATE samples SET state = '{DELIVERED}' WHERE {_KEYS}", (json.dumps(keys),))
            return [found[key][2] for key in keys]

    def mark_trained(self, keys: Sequence[str], step: int) -> None:
        """See :class:`MetadataStore`."""
        with self._transaction() as db:
            found = self._found(db, keys, (DELIVERED, TRAINED), "trained")
            for key in keys:
                if found[key][0] == TRAINED and found[key][1] != step:
                    raise StateError(key, TRAINED, "trained")
            db.execute(f"UPDATE samples SET state = '{TRAINED}', step = ? WHERE {_KEYS}", (step, json.dumps(keys)))

    def mark_durable(self, step: int) -> list[str]:
        """See :class:`MetadataStore`."""
        return self._move(f"state = '{TRAINED}' AND step <= ?", step, DURABLE)

    def rewind(self, step: int) -> list[str]:
        """See :class:`MetadataStore`."""
        later = f"state = '{DELIVERED}' OR (state IN ('{TRAINED}', '{DURABLE}') AND step > ?)"
        return self._move(later, step, COMMITTED)

    def requeue(self, keys: Sequence[str]) -> None:
        """See :class:`MetadataStore`."""
        with self._transaction() as db:
            self._found(db, keys, (QUEUED, LEASED, COMMITTED, DELIVERED, DEAD), "queued again")
            db.execute(
                f"UPDATE samples SET state = '{QUEUED}', ref = '', tries = 0 "
                f"WHERE {_KEYS} AND state NOT IN ('{QUEUED}', '{LEASED}')",
                (json.dumps(keys),),
            )

    def forget(self, keys: Sequence[str]) -> None:
        """See :class:`MetadataStore`."""
        names = json.dumps(keys)
        with self._transaction() as db:
            db.execute(f"DELETE FROM tasks WHERE seq IN (SELECT seq FROM samples WHERE {_KEYS})", (names,))
            db.execute(f"DELETE FROM samples WHERE {_KEYS}", (names,))

    def refs(self, keys: Sequence[str]) -> list[str]:
        """See :class:`MetadataStore`."""
        with self._reading() as db:
            found = dict(db.execute(f"SELECT key, ref FROM samples WHERE {_KEYS}", (json.dumps(keys),)))
        return [found.get(key, "") for key in keys]

    def entries(self, states: Collection[str]) -> Iterator[Entry]:
        """See :class:`MetadataStore`."""
        select = (
            f"SELECT key, state, ref, tries, reason, CASE state WHEN '{LEASED}' THEN deadline ELSE 0.0 END "
            "FROM samples WHERE state IN (SELECT value FROM json_each(?)) ORDER BY seq"
        )
        with self._reading() as db:
            return iter([Entry(*row) for row in db.execute(select, (json.dumps(list(states)),))])

    def counts(self) -> dict[str, int]:
        """See :class:`MetadataStore`."""
        with self._reading() as db:
            found = dict(db.execute("SELECT state, count(*) FROM samples GROUP BY state"))
        return {state: found.get(state, 0) for state in STATES}

    def claim(self, holder: str, now: float, deadline: float, instead_of: str = "") -> Claim:
        """See :class:`MetadataStore`."""
        with self._transaction() as db:
            row = db.execute("SELECT holder, deadline FROM trainer").fetchone()
            if row is not None and row[0] not in (holder, instead_of) and row[1] > now:
                return Claim(*row)
            db.execute("INSERT OR REPLACE INTO trainer VALUES (1, ?, ?)", (holder, deadline))
        return Claim(holder, deadline)

    def resign(self, holder: str) -> None:
        """See :class:`MetadataStore`."""
        with self._transaction() as db:
            db.execute("DELETE FROM trainer WHERE holder = ?", (holder,))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @staticmethod
    def _found(
        db: sqlite3.Connection, keys: Sequence[str], states: Collection[str], action: str
    ) -> dict[str, tuple[str, int, str]]:
        select = f"SELECT key, state, step, ref FROM samples WHERE {_KEYS}"
        found = {key: rest for key, *rest in db.execute(select, (json.dumps(keys),))}
        check_states(keys, {key: row[0] for key, row in found.items()}, states, action)
        return {key: (row[0], row[1], row[2]) for key, row in found.items()}

    def _move(self, where: str, step: int, state: str) -> list[str]:
        with self._transaction() as db:
            select = f"SELECT key FROM samples WHERE {where} ORDER BY seq"
            keys = [key for (key,) in db.execute(select, (step,))]
            db.execute(f"UPDATE samples SET state = '{state}' WHERE {where}", (step,))
        return keys
