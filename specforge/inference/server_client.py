"""A client of vLLM, SGLang, and other servers that speak JSON over HTTP."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit
from weakref import WeakSet

import httpx

import specforge.stopping as stopping
from specforge.errors import UserError
from specforge.files import read_secret
from specforge.inference.target_engine.base import UnavailableError
from specforge.inference.target_engine.http import SERVED_BY, printable
from specforge.runtime.addresses import shown

_BUSY = (429, 502, 503, 504, *range(520, 528))  # worth another attempt for as long as patience lasts
_ABSENT = (404, 405, 501)  # no such endpoint
_FAILURES = (
    3  # attempts at a request that the server fails with status 500: it may be restarting, or the request is bad
)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_BETWEEN_WARNINGS = 30.0  # seconds
_TELL_SECONDS = 2.0  # for an answer that nobody needs
_KEEP_ALIVE = 3.0  # seconds; vLLM and SGLang close connections that are idle for 5, maybe while a request is on its way

logger = logging.getLogger(__name__)


class RefusedError(UserError):
    """The server answers, but refuses a request, whose repetition it would refuse as well."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status  # of HTTP

    def if_absent(self, hint: str) -> RefusedError:
        """The same, with a hint if the server has no such endpoint."""
        unknown = self.status in _ABSENT and SERVED_BY not in str(self)
        return RefusedError(f"{self}; {hint}", self.status) if unknown else self


class ServerClient:
    """Requests to one server; may be used by many threads at once.

    Args:
        url: such as ``http://127.0.0.1:8000``, or ``https://host/api`` behind a gateway; ``/v1`` at its end is ignored.
        api_key_file: file with the server's key, sent as a bearer token; None if it wants none.
        patience: seconds to retry while the server does not answer.
        timeout: seconds to wait for one answer.
        connections: maximum number of requests at a time.
        key_option: the option that names ``api_key_file``, for messages.

    Raises:
        UserError: the address is malformed, or the file cannot be read.
    """

    def __init__(
        self,
        url: str,
        api_key_file: Path | None = None,
        *,
        patience: float = 300.0,
        timeout: float = 600.0,
        connections: int = 64,
        key_option: str = "--api_key_file",
    ) -> None:
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError as error:
            raise UserError(f"server {shown(url)}: {error}") from error
        path = parts.path.rstrip("/").removesuffix("/v1")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UserError(f"server {shown(url)}: must look like http://127.0.0.1:8000")
        key = None if api_key_file is None else read_secret(api_key_file, "api_key_file")
        self.url, self.patience = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}", patience
        self._has_key, self._key_option = key is not None, key_option
        self._next_warning = 0.0  # when the next one may be logged: many threads may wait for the same server
        self._client = httpx.Client(
            base_url=f"{parts.scheme}://{parts.netloc}{path}",
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(timeout, connect=10.0),
            limits=httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=_KEEP_ALIVE
            ),
            event_hooks={"request": [lambda request: request.extensions.update(trace=self._trace)]},
            trust_env=False,
        )
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._lock = threading.RLock()  # the handler of a signal may close the client
        self._closed, self._requests = False, 0  # requests that threads make at the moment

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all requests, which fail in their threads, and allow no others."""
        with self._lock:
            self._closed = True
            sockets = list(self._sockets)
        for connected in sockets:
            _hang_up(connected)
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        """Close the connections of a closed client once no thread reads from them.

        Otherwise such a thread might go on with the next file or connection that gets the same descriptor.
        """
        with self._lock:
            unused = self._closed and not self._requests
        if unused:
            self._client.close()

    @contextmanager
    def _open(self) -> Iterator[httpx.Client]:
        """The client, for one request of this thread.

        Raises:
            UserError: it is closed.
        """
        with self._lock:
            if self._closed:
                raise self._closed_error()
            self._requests += 1
        try:
            yield self._client
        finally:
            with self._lock:
                self._requests -= 1
            self._close_if_unused()

    def _closed_error(self) -> UserError:
        return UserError(f"server {self.url}: no answer; its client is closed")

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Remember what connections read from, as httpcore reports them; one that comes too late is of no use."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            connected = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets.add(connected)
                closed = self._closed
            if closed:
                _hang_up(connected)

    def get(self, path: str) -> Any:
        """JSON at a path.

        Raises:
            UserError: as in :meth:`post`.
        """
        return self._json(self._find(path), path)

    def models(self) -> list[dict[str, Any]]:
        """What the server lists at ``/v1/models``, at least one model.

        Raises:
            UserError: it is not a list of models in OpenAI's form, or as in :meth:`post`.
        """
        found = self.get("/v1/models")
        listed = found.get("data") if isinstance(found, dict) else None
        if not isinstance(listed, list) or not all(isinstance(x, dict) and "id" in x for x in listed):
            said = printable(str(found), 60)
            raise UserError(f"server {self.url}: /v1/models is not a list of models in OpenAI's form but {said}")
        if not listed:
            raise UserError(f"server {self.url}: /v1/models lists no model")
        return listed

    def text(self, path: str) -> str:
        """Text at a path.

        Raises:
            UserError: as in :meth:`post`.
        """
        return self._find(path).text

    def post(self, path: str, body: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> Any:
        """JSON answer to a JSON body.

        Args:
            path: begins with a slash.
            body: the body, or a function that makes one for each attempt.

        Raises:
            RefusedError: the server refuses the request; the message has its reason.
            UnavailableError: it does not answer for ``patience`` seconds.
            UserError: it answers something other than JSON.
        """
        return self._json(self._send("POST", path, body), path)

    def tell(self, path: str, body: Mapping[str, Any]) -> bool:
        """Send a body once, also after :meth:`close`; returns whether the server has answered."""
        base, headers = self._client.base_url, self._client.headers
        try:
            httpx.post(base.join(path.lstrip("/")), json=body, headers=headers, timeout=_TELL_SECONDS, trust_env=False)
        except (httpx.HTTPError, OSError):
            return False
        return True

    @contextmanager
    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Iterator[str]]:
        """Lines of a streamed answer; a request that fails is not repeated.

        Raises:
            UserError: the server refuses the request, does not answer, or breaks off.
        """
        try:
            with self._open() as client, client.stream("POST", path, json=body) as answer:
                if answer.status_code != httpx.codes.OK:
                    answer.read()
                    raise self._refusal(answer)
                yield answer.iter_lines()
        except httpx.HTTPError as error:
            raise UserError(f"server {self.url}: no answer ({_name(error)})") from error

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None
    ) -> httpx.Response:
        deadline, pause, failures = float("inf"), _FIRST_PAUSE, 0
        while True:
            stopping.check()
            left = ""
            try:
                with self._open() as client:
                    answer = client.request(method, path, json=body() if callable(body) else body)
            except (httpx.HTTPError, OSError) as error:
                stopping.check()  # the client was closed because of a stop
                if self._closed:
                    raise self._closed_error() from error
                reason = _name(error)
            else:
                if answer.status_code == httpx.codes.OK:
                    return answer
                reason = f"{_reason(answer)} (HTTP {answer.status_code})"
                if answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR:
                    failures += 1
                    left = f"at most {_FAILURES - failures} more times"
                if answer.status_code not in _BUSY and not 0 < failures < _FAILURES:
                    raise self._refusal(answer)
            deadline = min(deadline, time.monotonic() + self.patience)  # an answer may take longer than that
            if time.monotonic() + pause > deadline:
                raise UnavailableError(f"server {self.url}: no answer for {self.patience:g} s ({reason})")
            if self._next_warning <= time.monotonic():
                self._next_warning = time.monotonic() + _BETWEEN_WARNINGS
                left = left or f"for another {deadline - time.monotonic():.0f} s"
                logger.warning("server %s: %s; trying %s", self.url, reason, left)
            stopping.pause(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _refusal(self, answer: httpx.Response) -> RefusedError:
        """The error for an answer that refuses a request."""
        hint = ""
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            given = "it refuses the key in" if self._has_key else "no key was sent; name a file with it by"
            hint = f"; {given} {self._key_option}"
        reason = f"{_reason(answer)} (HTTP {answer.status_code}){hint}"
        return RefusedError(f"server {self.url}: {reason}", answer.status_code)

    def _find(self, path: str) -> httpx.Response:
        try:
            return self._send("GET", path, None)
        except RefusedError as error:
            raise error.if_absent(f"is it a vLLM or SGLang server? It has no {path}") from error

    def _json(self, answer: httpx.Response, path: str) -> Any:
        try:
            return answer.json() if answer.content else None
        except (ValueError, RecursionError) as error:
            raise UserError(f"server {self.url}: the answer of {path} is not JSON") from error


def _hang_up(connected: socket.socket) -> None:
    """Wake a thread that reads from a socket; closing it would not."""
    with suppress(OSError):  # it is closed
        connected.shutdown(socket.SHUT_RDWR)


def _name(error: Exception) -> str:
    return printable(str(error)) or type(error).__name__


def _reason(answer: httpx.Response) -> str:
    """The reason in an error answer: ``error.message``, ``message``, or ``detail``, depending on the server."""
    try:
        found = answer.json()
        found = found.get("error", found) if isinstance(found, dict) else found
        found = found.get("message") or found.get("detail") if isinstance(found, dict) else found
    except (ValueError, RecursionError):
        found = "" if answer.text.lstrip().startswith("<") else answer.text  # no web page
    return printable(str(found or answer.reason_phrase or "refused"))
