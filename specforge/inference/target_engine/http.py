"""A target behind HTTP: features come inside the answer, so no store is shared (`specforge target serve` answers).

A request is JSON (token ids, what to capture, which target); an answer is a safetensors file with a checksum. Requests
name the target and its dtype, so whatever answers after a restart is the same target or refuses.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from specforge import stopping
from specforge.contracts import CapturePolicy
from specforge.errors import UserError
from specforge.inference.target_engine.base import check_layers, feature_widths
from specforge.runtime.data_plane.encoding import decode, encode
from specforge.target_files import TargetFiles, torch_dtype

PATH = "/v1/features"
CHECKSUM = "X-Checksum"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0

logger = logging.getLogger(__name__)


def body_checksum(body: bytes | memoryview) -> str:
    """Algorithm and hex digest of an answer's body."""
    return f"xxh3-64:{xxhash.xxh3_64_hexdigest(body)}"


def read_token(path: Path) -> str:
    """The secret of a server.

    Raises:
        UserError: there is no such file, or no token in it.
    """
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"token {path}: cannot be read ({error}); `specforge target serve` makes it"
        ) from error
    if len(token) < 16 or not token.isprintable() or " " in token:
        raise UserError(f"token {path}: must be one word of at least 16 characters")
    return token


class _NoAnswerError(Exception):
    """The server did not answer this time, or the answer was damaged on its way; another try may succeed."""


class HTTPTargetEngine:
    """The target of a server; see :class:`TargetEngine`.

    Args:
        url: such as ``http://127.0.0.1:8010``.
        token_file: holds the server's token.
        target: files of the target that must answer.
        dtype: its compute dtype.
        encoding: features travel as they are, or in 8 bits.
        patience: seconds to go on asking a server that does not answer.
        timeout: seconds to wait for one answer.

    Raises:
        UserError: the address or the token is not one.
    """

    def __init__(
        self, url: str, token_file: Path, target: TargetFiles, dtype: str = "bfloat16", *,
        encoding: str = "raw", patience: float = 300.0, timeout: float = 120.0,
    ) -> None:  # fmt: skip
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as error:
            raise UserError(f"server {url}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise UserError(f"server {url}: must look like http://127.0.0.1:8010")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, port, timeout=timeout)
        self._token = read_token(token_file)
        self.url, self.target, self.dtype, self.patience = url.rstrip("/"), target, dtype, patience
        self.encoding = encoding
        self._lock = threading.Lock()

    def check(self, policy: CapturePolicy) -> None:
        """Prove on two tokens that the server meets the policy.

        Raises:
            UserError: it cannot, or does not answer.
        """
        check_layers(policy, self.target.num_layers, self.target.name)
        self.capture([[0, 0]], policy)

    def capture(self, input_ids: Sequence[Sequence[int]], policy: CapturePolicy) -> list[dict[str, Tensor]]:
        """Features of each sequence; see :class:`TargetEngine`.

        Raises:
            UserError: the server refuses, answers something else, or has not answered for ``patience`` seconds.
        """
        widths, dtype = feature_widths(policy, self.target.hidden_size), torch_dtype(self.dtype)
        token = encode(
            {name: torch.empty(1, width, dtype=dtype) for name, width in widths.items()}, self.encoding
        )
        expected = {
            f"{i}/{name}": ((len(ids), x.shape[1]), x.dtype)
            for i, ids in enumerate(input_ids)
            for name, x in token.items()
        }
        request = {
            "target_fingerprint": self.target.fingerprint, "dtype": self.dtype, "capture": policy.to_json(),
            "encoding": self.encoding, "input_ids": [list(ids) for ids in input_ids],
        }  # fmt: skip
        nbytes = sum(length * width * kind.itemsize for (length, width), kind in expected.values())
        with self._lock:
            features = self._ask(json.dumps(request).encode(), nbytes + 4096 + 256 * len(expected))
        found = {name: (tuple(x.shape), x.dtype) for name, x in features.items()}
        if found != expected:
            raise UserError(f"server {self.url}: answered with {found}, not {expected}"[:400])
        return [
            decode({name: features[f"{i}/{name}"] for name in token}, dict.fromkeys(widths, self.dtype))
            for i in range(len(input_ids))
        ]

    def _ask(self, body: bytes, limit: int) -> dict[str, Tensor]:
        deadline, pause = time.monotonic() + self.patience, _FIRST_PAUSE
        fresh = self._connection.sock is None
        while True:
            try:
                with stopping.waking(self._hang_up):
                    return self._post(body, limit)
            except _NoAnswerError as error:
                self._connection.close()
                if time.monotonic() + pause > deadline:
                    raise UserError(
                        f"server {self.url}: no answer for {self.patience:g} s ({error}); start it again with "
                        "`specforge target serve` and go on with --ckpt_path last"
                    ) from error
                if fresh:  # a server closes connections that were idle for long, which is nothing to report
                    left = deadline - time.monotonic()
                    logger.warning(
                        "server %s: no answer (%s); trying for another %.0f s", self.url, error, left
                    )
                    stopping.pause(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
                fresh = True

    def _hang_up(self) -> None:
        """End a wait for the server in another thread."""
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _post(self, body: bytes, limit: int) -> dict[str, Tensor]:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        try:
            self._connection.request("POST", PATH, body, headers)
            answer = self._connection.getresponse()
            size = int(answer.headers.get("Content-Length", "-1"))
            if not 0 <= size <= limit:
                self._connection.close()
                raise UserError(f"server {self.url}: an answer of {size} bytes; at most {limit} can be right")
            data = answer.read()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _NoAnswerError(str(error) or type(error).__name__) from error
        if answer.status == http.client.SERVICE_UNAVAILABLE:
            raise _NoAnswerError("it is busy")
        if answer.status != http.client.OK:
            raise UserError(f"server {self.url}: {_reason(data)} (HTTP {answer.status})")
        if answer.headers.get(CHECKSUM) != body_checksum(data):
            raise _NoAnswerError("checksum does not match")
        try:
            return load(data)
        except SafetensorError as error:
            raise UserError(f"server {self.url}: its answer is not safetensors ({error})") from error


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])[:300]
    except (ValueError, KeyError, TypeError):
        return "refused"
