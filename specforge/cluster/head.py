"""Watches the head of the cluster, without which Ray ends this process after a minute, whatever it is doing."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

_LOOK = 1.0  # seconds between two looks
_ANSWER = 2.0  # seconds in which the head has to accept a connection
_TIMEOUT = "RAY_gcs_rpc_server_reconnect_timeout_s"  # after it, in seconds, Ray's processes end
_DEFAULT = 60.0


class Head(threading.Thread):
    """Ends this process if the head of the cluster stays away for half as long as Ray waits for it.

    The process ends at once, because calls to Ray would block until Ray ends it.

    Args:
        address: ``host:port`` of the head.
        save: has the run save its state within a number of seconds.
    """

    def __init__(self, address: str, save: Callable[[float], None]) -> None:
        super().__init__(name="head", daemon=True)
        host, _, port = address.rpartition(":")
        self._address, self._save = (host.strip("[]"), int(port)), save
        self._patience = float(os.environ.get(_TIMEOUT, _DEFAULT)) / 2
        self._end = threading.Event()
        self.answers = True

    def run(self) -> None:
        """Watch."""
        seen = time.monotonic()
        while not self._end.wait(_LOOK):
            self.answers = self._look()
            if self.answers:
                seen = time.monotonic()
            elif time.monotonic() - seen >= self._patience:
                self._save(self._patience / 2)
                where = ":".join(map(str, self._address))
                print(
                    f"specforge: the head of the Ray cluster ({where}) has not answered for {self._patience:.0f} s; "
                    "start the cluster again, then resume with --ckpt_path last",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)

    def join_if_lost(self) -> None:
        """Wait for the end of this process if the head does not answer: whatever else failed, that is the reason."""
        while not self._look() and self.is_alive():
            time.sleep(_LOOK)

    def close(self) -> None:
        """Stop watching."""
        self._end.set()

    def _look(self) -> bool:
        try:
            with socket.create_connection(self._address, _ANSWER):
                return True
        except OSError:
            return False
