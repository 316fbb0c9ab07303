"""A small, stateless HTTP server for a frozen target: token ids in, features out.

Responses are bit-identical to what the engine computes for the same sequences in this process. Every request carries a
token; body size, sequence length, time and number of connections are limited. Connections that have not presented the
token are limited separately and expire sooner; if there are too many, the oldest is closed, so clients with the token
are always served.
"""

from __future__ import annotations

import hmac
import io
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import save

from specforge.contracts import ENCODINGS, CapturePolicy
from specforge.errors import UserError
from specforge.files import first_line
from specforge.inference.target_engine.base import TargetEngine, check_layers
from specforge.inference.target_engine.http import (
    CHECKSUM,
    ENGINE,
    PATH,
    SERVED_BY,
    body_checksum,
    printable,
    read_token,
)
from specforge.inference.target_files import TargetFiles
from specforge.runtime.data_plane.encoding import encode
from specforge.system import cannot_listen

_BYTES_PER_TOKEN = 12  # a token id in JSON
_AUTHORIZED, _UNAUTHORIZED = 64, 64  # maximum connections that have presented the token, and that have not
_HEADER_SECONDS = 10.0  # time in which a new connection must present the token
_SLOWEST = 64 << 10  # bytes per second; slower requests and responses are aborted
_PIECE, _LINGER = 1 << 20, 64
_WHAT_IT_IS = f"this is {SERVED_BY}, which only `--engine http` can use"
_QUIET_SECONDS = 10.0  # between two log lines about rejected tokens

logger = logging.getLogger(__name__)


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def make_token(path: Path) -> str:
    """Read the token from a file that only its owner can read; create the file if it does not exist.

    Raises:
        UserError: the file cannot be written, or contains no token.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_token(path)
    except OSError as error:
        raise UserError(f"token {path}: cannot be written ({error.strerror})") from error
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    return read_token(path)


class TargetServer(ThreadingHTTPServer):
    """Serves a target's features; one forward pass at a time.

    Args:
        engine: the engine that runs the target.
        target: the target's files.
        token: token that requests must carry.
        host: address to listen on.
        port: port to listen on; 0 for any free port.
        max_tokens: maximum number of tokens per request, padding included.
        idle_seconds: close connections that are idle for this long, or for ten seconds before they present the token.

    Raises:
        UserError: the address is in use or does not belong to this machine.
    """

    daemon_threads = False  # a thread that the interpreter ends within torch aborts the process
    request_queue_size = 64

    def __init__(
        self,
        engine: TargetEngine,
        target: TargetFiles,
        token: str,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        max_tokens: int = 65536,
        idle_seconds: float = 60.0,
    ) -> None:
        self.engine, self.target, self.max_tokens = engine, target, max_tokens
        self.idle_seconds = idle_seconds
        self._authorization = f"Bearer {token}".encode()
        self._one_at_a_time = threading.Lock()
        self._lock = threading.Lock()
        self._unauthorized: dict[socket.socket, None] = {}  # oldest first
        self._authorized: set[socket.socket] = set()
        self._refused, self._quiet_until = 0, 0.0
        self._closing = False
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise cannot_listen(host, port, error) from error

    def server_close(self) -> None:
        """Close the port and all connections, wait for a running forward pass, and start no more of them."""
        with self._lock:
            self._closing = True
            connections = [*self._unauthorized, *self._authorized]
        for connection in connections:
            with suppress(OSError):  # it is closed
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()  # waits for the connections' threads

    @property
    def url(self) -> str:
        """Address of this server."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def is_authorized(self, header: str | None) -> bool:
        """Whether an Authorization header contains the token."""
        return hmac.compare_digest((header or "").encode(), self._authorization)

    @property
    def max_body(self) -> int:
        """Maximum size of a request body in bytes."""
        return 4096 + _BYTES_PER_TOKEN * self.max_tokens

    def features(self, body: bytes) -> bytes:
        """Process a request body; returns safetensors with tensors named ``<sequence>/<feature>``."""
        request = _parse(body)
        for name, own in (("target_fingerprint", self.target.fingerprint), ("dtype", self.engine.dtype)):
            if request.get(name) != own:
                raise _RefusedError(
                    HTTPStatus.CONFLICT, f"{name} is {own} here, not {printable(str(request.get(name)))}"
                )
        encoding = request.get("encoding", "raw")
        if encoding not in ENCODINGS:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, f"encoding must be one of {', '.join(ENCODINGS)}")
        policy, input_ids = _policy(request), self._sequences(request)
        try:
            check_layers(policy, self.target.num_layers, self.target.name)
        except UserError as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, str(error)) from error
        try:
            with self._one_at_a_time:
                if self._closing:
                    raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping")
                features = self.engine.capture(input_ids, policy)
        except UserError as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, str(error)) from error
        except _RefusedError:
            raise
        except Exception as error:
            logger.exception("the target failed")
            raise _RefusedError(
                HTTPStatus.INTERNAL_SERVER_ERROR, f"the target failed ({type(error).__name__}: {first_line(error)})"
            ) from error
        encoded = [encode(group, encoding) for group in features]
        return save({f"{i}/{name}": x for i, group in enumerate(encoded) for name, x in group.items()})

    def _sequences(self, request: Mapping[str, Any]) -> list[list[int]]:
        found = request.get("input_ids")
        if not (
            isinstance(found, list)
            and found
            and all(isinstance(ids, list) and ids for ids in found)
            and all(type(x) is int and 0 <= x < self.target.vocab_size for ids in found for x in ids)
        ):
            raise _RefusedError(
                HTTPStatus.BAD_REQUEST, f"input_ids must be lists of tokens below {self.target.vocab_size}"
            )
        tokens = len(found) * max(map(len, found))
        if tokens > self.max_tokens:
            raise _RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"{tokens} tokens with padding; at most {self.max_tokens} (--max_tokens of `specforge target serve`)",
            )
        return found

    def service_actions(self) -> None:
        """End the loop of requests with an error if the engine's own server has ended."""
        self.engine.check_running()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Accept a connection; closes the oldest one without the token if there are too many of those."""
        with self._lock:
            if len(self._unauthorized) >= _UNAUTHORIZED:
                oldest = next(iter(self._unauthorized))
                del self._unauthorized[oldest]
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            self._unauthorized[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection that has ended."""
        with self._lock:
            self._unauthorized.pop(request, None)
            self._authorized.discard(request)
        super().shutdown_request(request)

    def is_admitted(self, connection: socket.socket) -> bool:
        """Whether a connection has presented the token."""
        return connection in self._authorized

    def admit(self, connection: socket.socket) -> None:
        """Count a connection as one that has presented the token."""
        with self._lock:
            if connection not in self._authorized and len(self._authorized) >= _AUTHORIZED:
                raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections")
            self._unauthorized.pop(connection, None)
            self._authorized.add(connection)

    def note_refusal(self, address: str) -> None:
        """Log rejected tokens, at most every ten seconds, with their number."""
        with self._lock:
            self._refused += 1
            now, count = time.monotonic(), self._refused
            if now < self._quiet_until:
                return
            self._refused, self._quiet_until = 0, now + _QUIET_SECONDS
        logger.warning("rejected %d requests without this server's token, the last one from %s", count, address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a connection that was closed early, without a traceback on the console."""
        logger.info("connection of %s ended early", client_address, exc_info=True)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "the body is not JSON") from error
    if not isinstance(request, dict):
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "the body is not a JSON object")
    return request


def _policy(request: Mapping[str, Any]) -> CapturePolicy:
    try:
        return CapturePolicy.from_json(request.get("capture"))
    except ValueError as error:
        message = f"capture must hold layer_ids and last_hidden_states ({error})"
        raise _RefusedError(HTTPStatus.BAD_REQUEST, message) from error


class _Reads(io.RawIOBase):
    """Reads from a socket until a deadline, however the data is split into packets."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self.deadline = connection, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        _set_timeout(self._connection, self.deadline)
        return self._connection.recv_into(buffer)


def _set_timeout(connection: socket.socket, deadline: float) -> None:
    """Limit the next socket call by a deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("too slow")
    connection.settimeout(left)


class _Handler(BaseHTTPRequestHandler):
    server: TargetServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "specforge", ""

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reads = _Reads(self.connection)
        self.rfile = io.BufferedReader(self._reads)

    def handle_one_request(self) -> None:
        self._reads.deadline = self._deadline()
        super().handle_one_request()

    def _deadline(self, nbytes: int = 0) -> float:
        """The time by which a connection must have transferred its header, or ``nbytes`` bytes."""
        idle = self.server.idle_seconds
        if not self.server.is_admitted(self.connection):
            idle = min(idle, _HEADER_SECONDS)
        return time.monotonic() + idle + nbytes / _SLOWEST

    def do_POST(self) -> None:
        try:
            answer = self.server.features(self._body())
        except _RefusedError as refusal:
            self._refuse(refusal.status, str(refusal))
        else:
            self._send(HTTPStatus.OK, "application/octet-stream", answer)

    def do_GET(self) -> None:
        self._refuse(HTTPStatus.NOT_FOUND, _WHAT_IT_IS)

    def _body(self) -> bytes:
        if self.path != PATH:
            raise _RefusedError(HTTPStatus.NOT_FOUND, _WHAT_IT_IS)
        if not self.server.is_authorized(self.headers.get("Authorization")):
            self.server.note_refusal(self.client_address[0])
            raise _RefusedError(HTTPStatus.UNAUTHORIZED, "the token is not this server's")
        self.server.admit(self.connection)
        size = self.headers.get("Content-Length", "")
        if not (size.isascii() and size.isdigit() and len(size) < 16):
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "Content-Length must be given")
        if int(size) > self.server.max_body:
            raise _RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a body of {size} bytes; at most {self.server.max_body} (--max_tokens of `specforge target serve`)",
            )
        self._reads.deadline = self._deadline(int(size))
        return self.rfile.read(int(size))

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self.close_connection = True
        self._send(status, "application/json", json.dumps({"error": message}).encode())
        # If it were closed with the body unread, the connection would be reset and the client might miss the reason.
        self.connection.shutdown(socket.SHUT_WR)
        self._reads.deadline = self._deadline()
        for _ in range(_LINGER):
            if not self.rfile.read1(_PIECE):
                break

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        deadline = self._deadline(len(body))
        _set_timeout(self.connection, deadline)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header(CHECKSUM, body_checksum(body))
        self.send_header(ENGINE, self.server.engine.description)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        view = memoryview(body)
        for start in range(0, len(body), _PIECE):
            _set_timeout(self.connection, min(deadline, time.monotonic() + self.server.idle_seconds))
            self.wfile.write(view[start : start + _PIECE])

    def log_message(self, format: str, *args: Any) -> None:
        logger.info("%s: %s", self.client_address[0], printable(format % args))
