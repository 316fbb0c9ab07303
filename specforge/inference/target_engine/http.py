"""The target over HTTP (`specforge target serve`): the response contains the features, so no store is shared.

A request is JSON (token ids, capture policy, target); a response is a safetensors file with a checksum. Requests name
the target and its dtype, so after a restart the same target answers or the request fails.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import torch
import xxhash
from safetensors.torch import load
from torch import Tensor

import specforge.stopping as stopping
from specforge.contracts import ENCODINGS, CapturePolicy, engine_label
from specforge.errors import UserError
from specforge.files import read_secret
from specforge.inference.target_engine.base import TargetEngine, UnavailableError, check_layers, feature_widths
from specforge.inference.target_files import TargetFiles, torch_dtype
from specforge.runtime.addresses import shown
from specforge.runtime.data_plane.encoding import decode, encode

PATH = "/v1/features"
SERVED_BY = "`specforge target serve`"
CHECKSUM, ENGINE = "X-Checksum", "X-Engine"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_LONGEST_REASON = 4096
_ABSENT = (404, 405, 501)  # no such endpoint
_OTHERS = {"sglang": ("/get_model_info", "model_path"), "vllm": ("/version", "version")}  # what only they answer
_SECONDS = 2.0  # for such an answer
_TEMPORARY = (502, 503, 504, *range(520, 528))  # a proxy does not reach the server, or the server is busy

logger = logging.getLogger(__name__)


def body_checksum(body: bytes | memoryview) -> str:
    """Checksum header of a response body: algorithm and hex digest."""
    return f"xxh3-64:{xxhash.xxh3_64_hexdigest(body)}"


def printable(text: str, most: int = 300) -> str:
    """The beginning of foreign text, in one line and without control characters."""
    return "".join(c if c.isprintable() else " " for c in text[:most])


def read_token(path: Path) -> str:
    """Read the token of a server.

    Raises:
        UserError: the file does not exist, other users can read or write it, or it contains no token.
    """
    if not path.exists():
        raise UserError(f"token {path}: cannot be read (no such file); `specforge target serve` creates it")
    token = read_secret(path, "token", private=True)
    if len(token) < 16 or not (token.isascii() and token.isprintable()) or " " in token:
        raise UserError(f"token {path}: must be one word of at least 16 characters")
    return token


class _NoAnswerError(Exception):
    """The server did not respond, or the response was damaged in transit; a retry may succeed."""


class HTTPTargetEngine(TargetEngine):
    """A client of a target server (`specforge target serve`), whose responses hold the features.

    Args:
        target: files of the expected target.
        dtype: its compute dtype.
        url: address of the server, such as http://127.0.0.1:8010.
        token_file: file with the server's token.
        patience: seconds to retry while the server does not respond.
        timeout: seconds to wait for one response.

    Raises:
        UserError: the address or the token is malformed.
    """

    encodings = ENCODINGS

    def __init__(
        self,
        target: TargetFiles,
        dtype: str,
        url: str,
        token_file: Path = Path("runs/target.token"),
        patience: float = 300.0,
        timeout: float = 120.0,
    ) -> None:
        super().__init__(target, dtype)
        try:
            parts = urlsplit(url)
            port, host = parts.port, (parts.hostname or "").encode("idna").decode()
        except ValueError as error:
            raise UserError(f"server {shown(url)}: {error}") from error
        more = parts.path.strip("/") or parts.query or parts.fragment or parts.username
        if parts.scheme not in ("http", "https") or not host or more or not host.isprintable() or " " in host:
            raise UserError(f"server {shown(url)}: must look like http://127.0.0.1:8010")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(host, port, timeout=timeout)
        self._token = read_token(token_file)
        self.url, self.patience = url.rstrip("/"), patience
        self._served_by: str | None = None  # the server's engine, as its first answer names it
        self._lock = threading.Lock()

    @property
    def description(self) -> str:
        """What the server describes its own engine as."""
        return self._served_by or ""

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def check(self, policy: CapturePolicy) -> None:
        """Test the policy on two tokens."""
        check_layers(policy, self.target.num_layers, self.target.name)
        try:
            self.capture([[0, 0]], policy)
        except UnavailableError:
            raise
        except UserError as error:  # no prompt is to blame
            raise UnavailableError(str(error)) from error

    def capture(self, input_ids: Sequence[Sequence[int]], policy: CapturePolicy) -> list[dict[str, Tensor]]:
        """Features of each sequence, as :meth:`TargetEngine.capture` specifies.

        Raises:
            UnavailableError: the server does not respond for ``patience`` seconds.
            UserError: it rejects the request, or returns something else.
        """
        widths, dtype = feature_widths(policy, self.target.hidden_size), torch_dtype(self.dtype)
        encoded = encode({name: torch.empty(1, width, dtype=dtype) for name, width in widths.items()}, self.encoding)
        expected = {
            f"{i}/{name}": ((len(ids), x.shape[1]), x.dtype)
            for i, ids in enumerate(input_ids)
            for name, x in encoded.items()
        }
        request = {
            "target_fingerprint": self.target.fingerprint,
            "dtype": self.dtype,
            "capture": policy.to_json(),
            "encoding": self.encoding,
            "input_ids": [list(ids) for ids in input_ids],
        }
        nbytes = sum(length * width * kind.itemsize for (length, width), kind in expected.values())
        with self._lock:
            features = self._request(json.dumps(request).encode(), nbytes + 4096 + 256 * len(expected))
        found = {name: (tuple(x.shape), x.dtype) for name, x in features.items()}
        if found != expected:
            raise UserError(f"server {self.url}: returned {printable(str(found), 200)}, not {expected}"[:500])
        return [
            decode({name: features[f"{i}/{name}"] for name in encoded}, dict.fromkeys(widths, self.dtype))
            for i in range(len(input_ids))
        ]

    def _request(self, body: bytes, limit: int) -> dict[str, Tensor]:
        deadline, pause = time.monotonic() + self.patience, _FIRST_PAUSE
        fresh = self._connection.sock is None
        while True:
            try:
                with stopping.call_on_stop(self._hang_up):
                    return self._post(body, limit)
            except _NoAnswerError as error:
                self._connection.close()
                if time.monotonic() + pause > deadline:
                    raise UnavailableError(
                        f"server {self.url}: no answer for {self.patience:g} s ({error}); restart it with "
                        "`specforge target serve`"
                    ) from error
                if fresh:  # a server closes idle connections, which is not worth a warning
                    left = deadline - time.monotonic()
                    logger.warning("server %s: no answer (%s); trying for another %.0f s", self.url, error, left)
                    stopping.pause(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
                fresh = True

    def _hang_up(self) -> None:
        """Interrupt another thread that waits for the server."""
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _post(self, body: bytes, limit: int) -> dict[str, Tensor]:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        try:
            if self._connection.sock is None:
                self._connection.connect()
                stopping.check()  # there was nothing to hang up before
            self._connection.request("POST", PATH, body, headers)
            with self._connection.getresponse() as answer:
                if answer.status != http.client.OK:
                    self._raise_refusal(answer)
                size = int(answer.headers.get("Content-Length", "-1"))
                # A proxy may omit the length.
                data = answer.read() if 0 <= size <= limit else answer.read(limit + 1)
        except ssl.SSLCertVerificationError as error:
            raise UserError(f"server {self.url}: its certificate is not trusted ({error.verify_message})") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _NoAnswerError(printable(str(error)) or type(error).__name__) from error
        if max(size, len(data)) > limit:
            self._connection.close()
            raise UserError(
                f"server {self.url}: a response of {max(size, len(data))} bytes, but at most {limit} were expected"
            )
        if answer.headers.get(CHECKSUM) != body_checksum(data):
            raise _NoAnswerError("checksum does not match")
        self._check_engine(printable(answer.headers.get(ENGINE, "")))
        try:
            return load(data)
        except Exception as error:  # the library may raise anything for foreign bytes
            raise UserError(f"server {self.url}: its response is not safetensors ({printable(str(error))})") from error

    def _check_engine(self, found: str) -> None:
        """Reject a server that was restarted with another engine, whose features would differ in their last bits."""
        if self._served_by is None:
            self._served_by = found
        elif found != self._served_by:
            raise UserError(
                f"server {self.url}: its engine is now {engine_label(found)}, and was "
                f"{engine_label(self._served_by)}; restart it as before"
            )

    def _raise_refusal(self, answer: http.client.HTTPResponse) -> NoReturn:
        """Turn an error response into an exception."""
        reason = _reason(answer.read(_LONGEST_REASON))
        self._connection.close()
        if answer.status in _TEMPORARY:
            raise _NoAnswerError(f"{reason or answer.reason}, HTTP {answer.status}")
        if not reason and answer.status in _ABSENT:
            other = self._other()
            hint = f"a server of --engine {other}; use that engine, or" if other else f"not {SERVED_BY}; use"
            where = f"server {self.url}: refused (HTTP {answer.status})"
            raise UserError(f"{where}; this is {hint} the address that {SERVED_BY} prints first")
        raise UserError(f"server {self.url}: {reason or 'refused'} (HTTP {answer.status})")

    def _other(self) -> str:
        """The engine whose server answers at this address; empty if it is unknown."""
        for name, (path, key) in _OTHERS.items():
            try:
                self._connection.connect()
                self._connection.sock.settimeout(_SECONDS)
                self._connection.request("GET", path)
                with self._connection.getresponse() as answer:
                    found = json.loads(answer.read(_LONGEST_REASON))
                if isinstance(found, dict) and key in found:
                    return name
            except (OSError, http.client.HTTPException, ValueError, RecursionError):
                continue
            finally:
                self._connection.close()
        return ""


def _reason(body: bytes) -> str:
    """The reason in an error response; empty if the response is not from a SpecForge server."""
    try:
        return printable(str(json.loads(body)["error"]), 440)
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
