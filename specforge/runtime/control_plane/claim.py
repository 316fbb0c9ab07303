"""One trainer at a time: a claim on a metadata store, renewed while the trainer lives, which names its process."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specforge.errors import UserError
from specforge.files import parse_json
from specforge.runtime.control_plane.metadata import Claim, MetadataStore

logger = logging.getLogger(__name__)


class TrainerClaim:
    """Makes this process the only trainer of a metadata store.

    Args:
        metadata: the store.
        where: what to call it in messages.
        run: what to call this trainer's run.
        seconds: a trainer that has not renewed its claim for so long is taken for dead.
        clock: present time in seconds, the same for all processes.
    """

    def __init__(
        self, metadata: MetadataStore, where: str, run: str, seconds: float, clock: Callable[[], float]
    ) -> None:
        self._metadata, self._where, self._seconds, self._clock = metadata, where, seconds, clock
        own = {"host": socket.gethostname(), "pid": os.getpid(), "run": run, "token": secrets.token_hex(8)}
        self._holder = json.dumps(own | {"began": _began(os.getpid()), "machine": _machine()})
        self._taken_by: Claim | None = None
        self._done = threading.Event()

    def take(self) -> None:
        """Claim the store, and renew the claim from now on.

        Raises:
            UserError: another trainer is at work, or the store cannot be written.
        """
        found = self._ask()
        if found.holder != self._holder and _is_gone(_read(found.holder)):
            found = self._ask(instead_of=found.holder)
        if found.holder != self._holder:
            raise UserError(
                f"metadata {self._where}: {_describe(found)} is at work on it; end that one first, or give this run "
                f"stores of its own (if it is dead, its claim ends in {found.deadline - self._clock():.0f} s)"
            )
        threading.Thread(target=self._keep, name="claim", daemon=True).start()

    def renew(self) -> None:
        """Renew the claim, which writes to the store.

        Raises:
            UserError: the store cannot be written.
        """
        found = self._ask()
        self._taken_by = None if found.holder == self._holder else found

    def check(self) -> None:
        """End a trainer whose place was taken while it was silent.

        Raises:
            UserError: it was.
        """
        if self._taken_by is not None:
            raise UserError(
                f"metadata {self._where}: {_describe(self._taken_by)} took this trainer's place, which had been silent "
                f"for more than {self._seconds:g} s"
            )

    def end(self) -> None:
        """Let others train."""
        self._done.set()
        try:
            self._metadata.resign(self._holder)
        except UserError as error:  # the claim ends by itself
            logger.warning("%s", error)

    def _ask(self, instead_of: str = "") -> Claim:
        now = self._clock()
        return self._metadata.claim(self._holder, now, now + self._seconds, instead_of)

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
    """Whether a trainer certainly trains no more: its process ended, or is this one; or nobody can read who it is."""
    if not holder:
        return True
    pid, machine = holder.get("pid"), _machine()
    if type(pid) is not int or not machine or holder.get("machine") != machine:
        return False
    return pid == os.getpid() or _began(pid) != holder.get("began")


def _machine() -> str:
    """This boot of this machine, and this process's space of process ids; empty where Linux does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _began(pid: int) -> str | None:
    """When a process of this machine began; None if it has ended, or Linux does not say."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else fields[18]
