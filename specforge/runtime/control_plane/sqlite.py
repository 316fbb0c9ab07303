"""A metadata store in one SQLite file: for several processes of one host.

Write-ahead logging with ``synchronous=NORMAL``: a process that dies can neither damage nor lose anything. A host that
loses power may lose the last transactions; reconciling with the feature store repairs that.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from specforge.errors import UserError
from specforge.files import first_line
from specforge.runtime.control_plane.metadata import BOUNDED, STATES, Conflict, Move, Row, State, Text, unusable

# Prompts are in a table of their own: a change of state rewrites its row, which should be short.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    seq INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, state TEXT NOT NULL,
    ref TEXT NOT NULL DEFAULT '', owner TEXT NOT NULL DEFAULT '', deadline REAL NOT NULL DEFAULT 0,
    tries INTEGER NOT NULL DEFAULT 0, step INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX IF NOT EXISTS samples_by_state ON samples (state, seq);
CREATE TABLE IF NOT EXISTS tasks (seq INTEGER PRIMARY KEY, task TEXT NOT NULL) STRICT;
"""
_VERSION = 1
_DEADLINE = "CASE WHEN state IN ('leased', 'claimed') THEN deadline ELSE 0.0 END"
_KEYS = "key IN (SELECT value FROM json_each(?))"
_TEXTS = {"": "''", "ref": "ref", "task": "coalesce((SELECT task FROM tasks WHERE seq = samples.seq), '')"}
_STATES = {str(state): state for state in State}


class SQLiteMetadataStore:
    """A :class:`~specforge.runtime.control_plane.metadata.MetadataStore` in a file.

    Args:
        path: the file; must be on a local disk, because its locks do not work over a network.
        timeout: seconds to wait for another process's transaction.
        create: create a missing file; otherwise it is an error.

    Raises:
        UserError: the file is missing, is not a metadata store, or cannot be opened.
    """

    def __init__(self, path: Path, timeout: float = 60.0, create: bool = True) -> None:
        self.path = path
        self._lock = threading.Lock()
        if not create and not path.exists():
            raise UserError(f"metadata {path}: no such file; a run creates it when it starts")
        try:
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA synchronous=NORMAL")
            if self._is_new():
                if not create:
                    raise UserError(f"metadata {path}: holds no run; a run writes to it when it starts")
                self._log_ahead(timeout)
            if create:
                with self._transaction() as db:
                    for statement in _SCHEMA.split(";"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version={_VERSION}")
        except (sqlite3.Error, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be opened as a metadata store ({error})") from error

    def _log_ahead(self, timeout: float) -> None:
        """Switch a new file to write-ahead logging, which SQLite refuses at once while another process does so."""
        end = time.monotonic() + timeout
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def _is_new(self) -> bool:
        """Whether the file is empty; raises UserError if another program or version wrote it."""
        look = "SELECT user_version, (SELECT json_group_array(name) FROM sqlite_master) FROM pragma_user_version"
        version, names = self._db.execute(look).fetchone()  # in one statement: another process may be creating them
        tables = json.loads(names)
        if version not in (0, _VERSION):
            raise UserError(f"{self.path}: format {version}; this version reads format {_VERSION}")
        if bool(version) != ("samples" in tables) or (tables and not version):
            raise UserError(f"{self.path}: is another program's database")
        return not tables

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._db
            except (sqlite3.Error, UnicodeError, OverflowError) as error:  # such as a full disk
                raise unusable(str(self.path), first_line(error)) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                if db.in_transaction:
                    db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # SQLite itself rolls back when the disk is full
                    db.execute("ROLLBACK")
                raise

    def add(self, items: Iterable[tuple[str, str]], state: State = State.QUEUED) -> list[bool]:
        """See :class:`MetadataStore`."""
        new: list[bool] = []
        with self._transaction() as db:
            for key, task in items:
                row = db.execute("INSERT OR IGNORE INTO samples (key, state) VALUES (?, ?)", (key, state))
                new.append(row.rowcount > 0)
                if new[-1]:
                    db.execute("INSERT OR REPLACE INTO tasks VALUES (?, ?)", (row.lastrowid, task))
        return new

    def get(self, keys: Sequence[str], text: Text = "") -> list[Row | None]:
        """See :class:`MetadataStore`."""
        with self._reading() as db:
            return _get(db, keys, text)

    def find(
        self,
        states: Collection[State],
        *,
        after: float | None = None,
        until: float | None = None,
        limit: int | None = None,
        text: Text = "",
    ) -> list[Row]:
        """See :class:`MetadataStore`."""
        bounds = {sign: bound for sign, bound in ((">", after), ("<=", until)) if bound is not None}
        values = [*bounds.values(), -1 if limit is None else limit]
        selects, parameters = [], []
        for state in states:
            column = BOUNDED.get(state)
            conditions = [f"state = '{state}'", *(f"{column} {sign} ?" for sign in bounds if column)]
            selects.append(f"SELECT * FROM ({_select(' AND '.join(conditions), text)} ORDER BY seq LIMIT ?)")
            parameters += values if column else values[-1:]
        with self._reading() as db:
            return _rows(sorted(db.execute(" UNION ALL ".join(selects), parameters))) if selects else []

    def lease(self, owner: str, deadline: float, limit: int) -> list[Row]:
        """See :class:`MetadataStore`."""
        first = _select("state = 'queued'", "task") + " ORDER BY seq LIMIT ?"
        with self._transaction() as db:
            found = db.execute(first, (limit,)).fetchall()
            change = "UPDATE samples SET state = 'leased', owner = ?, deadline = ?, tries = tries + 1 WHERE seq = ?"
            db.executemany(change, ((owner, deadline, seq) for seq, *_ in found))
        return _rows(found)

    def move(self, moves: Sequence[Move], text: Text = "", texts_of: Sequence[str] | None = None) -> dict[str, str]:
        """See :class:`MetadataStore`."""
        keys = [key for move in moves for key in move.keys]
        if not keys:
            return {}
        with self._transaction() as db:
            if sum(_update(db, move) for move in moves) == len(keys):
                return _get_texts(db, keys if texts_of is None else texts_of, text)
            db.execute("ROLLBACK")
            found = _get(db, keys, text)
        raise Conflict(dict(zip(keys, found, strict=True)))

    def remove(self, keys: Sequence[str]) -> None:
        """See :class:`MetadataStore`."""
        names = json.dumps(keys)
        with self._transaction() as db:
            db.execute(f"DELETE FROM tasks WHERE seq IN (SELECT seq FROM samples WHERE {_KEYS})", (names,))
            db.execute(f"DELETE FROM samples WHERE {_KEYS}", (names,))

    def counts(self) -> dict[str, int]:
        """See :class:`MetadataStore`."""
        with self._reading() as db:
            found = dict(db.execute("SELECT state, count(*) FROM samples GROUP BY state"))
        return {state: found.get(state, 0) for state in STATES}

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()


def _update(db: sqlite3.Connection, move: Move) -> int:
    """Change the rows that are as expected; returns how many are."""
    keys, states, to, changes, expected, refs = move
    values, conditions = (to, *changes.values()), tuple(expected.values())
    if refs:
        rows: Iterable[tuple[object, ...]] = ((*values, refs[key], key, *conditions) for key in keys)
    else:
        rows = ((*values, key, *conditions) for key in keys)
    columns = (*changes, "ref") if refs else tuple(changes)
    return db.executemany(_update_statement(tuple(states), columns, tuple(expected)), rows).rowcount


@lru_cache
def _update_statement(states: tuple[State, ...], changes: tuple[str, ...], expected: tuple[str, ...]) -> str:
    values = ", ".join(f"{name} = ?" for name in ("state", *changes))
    names = ", ".join(f"'{state}'" for state in states)
    conditions = " AND ".join(["key = ?", f"state IN ({names})", *(f"{name} = ?" for name in expected)])
    return f"UPDATE samples SET {values} WHERE {conditions}"


def _get(db: sqlite3.Connection, keys: Sequence[str], text: Text) -> list[Row | None]:
    found = {row.key: row for row in _rows(db.execute(_select(_KEYS, text), (json.dumps(keys),)))}
    return [found.get(key) for key in keys]


def _get_texts(db: sqlite3.Connection, keys: Sequence[str], text: Text) -> dict[str, str]:
    if not text:
        return {}
    found = db.execute(f"SELECT key, {_TEXTS[text]} FROM samples WHERE {_KEYS}", (json.dumps(keys),))
    return dict.fromkeys(keys, "") | dict(found)


def _select(where: str, text: Text) -> str:
    return f"SELECT seq, key, state, owner, {_DEADLINE}, tries, step, reason, {_TEXTS[text]} FROM samples WHERE {where}"


def _rows(found: Iterable[tuple[Any, ...]]) -> list[Row]:
    return [Row(key, _STATES[state], *rest) for _, key, state, *rest in found if state in _STATES]
