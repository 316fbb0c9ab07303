"""One trainer at a time: a claim on a metadata store that names the trainer's process and is renewed while it lives."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from specforge.errors import UserError
from specforge.files import parse_json
from specforge.runtime.control_plane.metadata import Conflict, MetadataStore, Move, State

logger = logging.getLogger(__name__)

_KEY = "trainer"  # of the trainer's row; the rows of engines have longer ones


_FOREVER = 2.0**53  # seconds


class Claim(NamedTuple):
    """The text that names the only trainer, and until when it is presumed alive."""

    holder: str
    deadline: float


def claim(
    metadata: MetadataStore, holder: str, now: float, deadline: float, instead_of: str = "", key: str = _KEY
) -> Claim:
    """Make a trainer the only one, or renew its claim, unless the claim of another one has not expired.

    Args:
        metadata: the store.
        holder: text that names the trainer.
        now: current time in seconds.
        deadline: when the claim expires.
        instead_of: a trainer that is dead, whether or not its claim has expired.
        key: the row to claim.

    Returns:
        The claim that now holds.
    """
    damaged = False
    while True:
        (row,) = metadata.get([key])
        if row is None or row.state is not State.CLAIMED:
            if damaged:  # there is a row, but not of a claim
                metadata.remove([key])
            (new,) = metadata.add([(key, "")], State.CLAIMED)
            damaged = not new
            continue
        if row.owner not in (holder, instead_of) and row.deadline > now:
            return Claim(row.owner, row.deadline)
        claimed, expected = {"owner": holder, "deadline": deadline}, {"owner": row.owner, "deadline": row.deadline}
        with suppress(Conflict):  # another trainer was faster
            metadata.move([Move([key], (State.CLAIMED,), State.CLAIMED, claimed, expected)])
            return Claim(holder, deadline)


def claim_engine(metadata: MetadataStore, stamp: str, engine: str) -> str:
    """Make an engine the only one whose features a run trains on, unless another one was faster.

    Args:
        metadata: the store.
        stamp: the run's samples, see :func:`~specforge.runtime.control_plane.controller.sample_key`.
        engine: its name.

    Returns:
        The engine that holds the claim, forever.
    """
    key = f"engine {stamp}"
    (row,) = metadata.get([key])
    if row is not None and row.deadline == _FOREVER:
        return row.owner
    return claim(metadata, engine, 0.0, _FOREVER, key=key).holder


def live_trainer(metadata: MetadataStore, now: float) -> str:
    """The trainer that holds the claim, in words; empty if there is none, or if it is certainly dead.

    Args:
        metadata: the store.
        now: current time in seconds.
    """
    (row,) = metadata.get([_KEY])
    if row is None or row.state is not State.CLAIMED or not row.owner or row.deadline <= now:
        return ""
    return "" if _is_gone(_read(row.owner)) else _describe(Claim(row.owner, row.deadline))


def resign(metadata: MetadataStore, holder: str) -> None:
    """End the claim of a trainer; does nothing if another one has replaced it."""
    with suppress(Conflict):
        free = {"owner": "", "deadline": 0.0}
        metadata.move([Move([_KEY], (State.CLAIMED,), State.CLAIMED, free, {"owner": holder})])


class TrainerClaim:
    """Makes this process the only trainer of a metadata store.

    Args:
        metadata: the store.
        where: name of the store in messages.
        run: name of this trainer's run in messages.
        seconds: a trainer that has not renewed its claim for this long is presumed dead.
        clock: current time in seconds, the same for all processes.
    """

    def __init__(
        self, metadata: MetadataStore, where: str, run: str, seconds: float, clock: Callable[[], float]
    ) -> None:
        self._metadata, self._where, self._seconds, self._clock = metadata, where, seconds, clock
        own = {"host": socket.gethostname(), "pid": os.getpid(), "run": run, "token": secrets.token_hex(8)}
        self._holder = json.dumps(own | {"began": _start_time(os.getpid()), "machine": _machine()})
        self._taken_by: Claim | None = None
        self._done = threading.Event()

    def take(self) -> None:
        """Claim the store, and keep renewing the claim.

        Raises:
            UserError: another trainer is running, or the store cannot be written.
        """
        found = self._claim()
        if found.holder != self._holder and _is_gone(_read(found.holder)):
            found = self._claim(instead_of=found.holder)
        if found.holder != self._holder:
            raise UserError(
                f"metadata {self._where}: {_describe(found)} is using it; stop that trainer first, or give this run "
                f"its own stores (if it is dead, its claim expires in {found.deadline - self._clock():.0f} s)"
            )
        threading.Thread(target=self._keep, name="claim", daemon=True).start()

    def renew(self) -> None:
        """Renew the claim, which writes to the store.

        Raises:
            UserError: the store cannot be written.
        """
        found = self._claim()
        self._taken_by = None if found.holder == self._holder else found

    @property
    def lost(self) -> bool:
        """Whether another trainer has replaced this one."""
        return self._taken_by is not None

    def check(self) -> None:
        """Stop a trainer that another one has replaced.

        Raises:
            UserError: it was replaced.
        """
        if self._taken_by is not None:
            raise UserError(
                f"metadata {self._where}: {_describe(self._taken_by)} has replaced this trainer, which had not renewed "
                f"its claim for more than {self._seconds:g} s"
            )

    def end(self) -> None:
        """Let other trainers claim the store."""
        self._done.set()
        try:
            resign(self._metadata, self._holder)
        except UserError as error:  # the claim expires by itself
            logger.warning("%s", error)

    def _claim(self, instead_of: str = "") -> Claim:
        now = self._clock()
        return claim(self._metadata, self._holder, now, now + self._seconds, instead_of)

    def _keep(self) -> None:
        failed = False
        while self._taken_by is None and not self._done.wait(self._seconds / 3):
            try:
                self.renew()
                failed = False
            except UserError as error:
                if not failed:
                    logger.warning("the trainer's claim could not be renewed: %s", error)
                failed = True


def _read(holder: str) -> dict[str, Any]:
    try:
        found = parse_json(holder)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _describe(claim: Claim) -> str:
    holder = _read(claim.holder)
    return f"the trainer of {holder.get('run')} (process {holder.get('pid')} on {holder.get('host')})"


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a trainer has certainly ended: its process ended or is this one, or its claim is unreadable."""
    if not holder:
        return True
    pid, machine = holder.get("pid"), _machine()
    if type(pid) is not int or not machine or holder.get("machine") != machine:
        return False
    return pid == os.getpid() or _start_time(pid) != holder.get("began")


def _machine() -> str:
    """This boot of this machine, and this process's pid namespace; empty if Linux does not report it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """When a process of this machine started; None if it has ended, or if Linux does not report it."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else fields[18]
