"""Requests to a server that fails, refuses, restarts, or answers nonsense."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from specforge.errors import UserError
from specforge.inference import server_client
from specforge.inference.server_client import RefusedError, ServerClient


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])) if self.command == "POST" else b"{}"
        self.server.seen.append((self.path, json.loads(body), self.headers.get("Authorization")))
        self.server.connections.append(self.client_address)
        status, answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as made:
        made.answers, made.seen, made.connections = [(200, b'{"ok": 1}')], [], []
        thread = threading.Thread(target=made.serve_forever, args=[0.01])
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def client(server: ThreadingHTTPServer, **options) -> ServerClient:
    return ServerClient(f"http://127.0.0.1:{server.server_port}/v1", **options)


def test_a_body_and_a_key_arrive(server, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    with client(server, api_key_file=tmp_path / "key") as made:
        assert made.post("/v1/completions", {"prompt": [1]}) == {"ok": 1}
    assert server.seen == [("/v1/completions", {"prompt": [1]}, "Bearer secret")]


def test_a_connection_that_the_server_may_be_closing_is_not_used_again(server, monkeypatch):
    """vLLM and SGLang close one that has been idle for 5 s, and a request may be on its way."""
    now = time.monotonic
    with client(server) as made:
        for seconds in (0, 2, 6):
            monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: now() + seconds)
            made.post("/v1/completions", {})
    first, second, third = server.connections
    assert first == second != third


@pytest.mark.parametrize("path", ["/api", "/api/", "/api/v1", "/api/v1/"])
def test_a_server_may_be_behind_the_path_of_a_gateway(server, path):
    with ServerClient(f"http://127.0.0.1:{server.server_port}{path}") as made:
        made.post("/v1/completions", {})
    assert server.seen[0][0] == "/api/v1/completions"
    assert made.url == f"http://127.0.0.1:{server.server_port}/api"


def test_patience_counts_from_the_first_failure(server, monkeypatch):
    """An answer may take longer than a server may be away."""
    clock = 0.0

    def request(*args, **fields):
        nonlocal clock
        clock += 1000
        return ask(*args, **fields)

    monkeypatch.setattr(server_client, "time", SimpleNamespace(monotonic=lambda: clock))
    server.answers = [(503, b"busy"), (200, b"7")]
    with client(server, patience=300) as made:
        ask = made._client.request
        monkeypatch.setattr(made._client, "request", request)
        assert made.post("/x", {}) == 7


@pytest.mark.parametrize("status", [429, 502, 503, 500])
def test_a_server_that_is_busy_or_restarts_is_asked_again(server, status):
    server.answers = [(status, b"busy"), (status, b"busy"), (200, b"[7]")]
    with client(server) as made:
        assert made.post("/x", {}) == [7]


def test_a_server_that_stays_busy_is_not_reported_at_every_attempt(server, caplog):
    server.answers = [(503, b"busy"), (503, b"busy"), (503, b"busy"), (200, b"[7]")]
    with client(server) as made:
        assert made.post("/x", {}) == [7]
    assert caplog.text.count("busy (HTTP 503); trying for another 300 s") == 1


@pytest.mark.parametrize(
    ("status", "answer", "reason"),
    [
        (400, b'{"error": {"message": "too long"}}', "too long"),
        (400, b'{"object": "error", "message": "too long"}', "too long"),
        (422, b'{"detail": "too long"}', "too long"),
        (404, b"", "Not Found"),
        (404, b"<!DOCTYPE HTML>\n<html>File not found", "Not Found"),
        (400, b"\x1b[31m red", " [31m red"),
        (500, b"the engine is dead", "the engine is dead"),
    ],
)
def test_a_refusal_is_one_line_with_its_reason(server, status, answer, reason):
    server.answers = [(status, answer)]
    with client(server) as made, pytest.raises(UserError) as error:
        made.post("/x", {})
    assert str(error.value) == f"server {made.url}: {reason} (HTTP {status})"
    assert len(server.seen) == (3 if status == 500 else 1)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_refused_key_is_named_with_its_option(server, tmp_path, status, streamed):
    server.answers = [(status, b"no")]
    (tmp_path / "key").write_text("secret\n")
    options = {"key_option": "--engine.api_key_file"}
    for more, reason in (
        ({}, "no key was sent; name a file with it by --engine.api_key_file"),
        ({"api_key_file": tmp_path / "key"}, "it refuses the key in --engine.api_key_file"),
    ):
        with client(server, **options, **more) as made, pytest.raises(RefusedError) as error:
            made.stream("/x", {}).__enter__() if streamed else made.post("/x", {})
        assert str(error.value) == f"server {made.url}: no (HTTP {status}); {reason}"


def test_a_failing_server_is_asked_as_often_as_the_warning_says(server, caplog):
    server.answers = [(500, b"broken")]
    with client(server) as made, pytest.raises(RefusedError):
        made.post("/x", {})
    assert "broken (HTTP 500); trying at most 2 more times" in caplog.text
    assert len(server.seen) == 3


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_without_the_endpoint_is_perhaps_another_one(server, status):
    server.answers = [(status, b"<html>no")]
    with client(server) as made, pytest.raises(RefusedError) as error:
        made.get("/v1/models")
    assert str(error.value).endswith(f"(HTTP {status}); is it a vLLM or SGLang server? It has no /v1/models")
    assert error.value.status == status


def test_an_answer_that_is_not_json_is_refused(server):
    server.answers = [(200, b"<html>")]
    with client(server) as made, pytest.raises(UserError, match=r"the answer of /x is not JSON"):
        made.post("/x", {})


def test_a_server_that_is_not_there_is_one_line():
    with ServerClient("http://127.0.0.1:9", patience=0.2) as made, pytest.raises(UserError) as error:
        made.get("/health")
    assert str(error.value).startswith("server http://127.0.0.1:9: no answer for 0.2 s (")


@pytest.mark.parametrize("url", ["ftp://h", "http://", "127.0.0.1:8000", "http://h:x", "http://h/?q=1", "http://[::1"])
def test_malformed_addresses_are_refused(url):
    with pytest.raises(UserError, match=r"^server "):
        ServerClient(url)


def test_a_stream_is_read_line_by_line_and_a_refusal_has_its_reason(server):
    server.answers = [(200, b"data: 1\n\ndata: [DONE]\n"), (400, b'{"error": {"message": "no"}}')]
    with client(server) as made:
        with made.stream("/x", {}) as lines:
            assert list(lines) == ["data: 1", "", "data: [DONE]"]
        with pytest.raises(UserError, match=r"no \(HTTP 400\)"), made.stream("/x", {}) as lines:
            pass


@pytest.mark.parametrize("half", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"], ids=["nothing", "half"])
@pytest.mark.parametrize("streamed", [False, True])
def test_closing_ends_requests_that_wait_for_a_silent_server(half, streamed):
    """A thread that reads from a socket does not notice that another one closes it.

    Of many requests, the first ones read by the time that the last one arrives.
    """
    ended = []

    def ask() -> None:
        if streamed:
            with asking.stream("/", {}) as lines:
                list(lines)
        else:
            asking.post("/", {})

    def fail() -> None:
        with pytest.raises(UserError, match="no answer"):
            ask()
        ended.append(True)

    with socket.create_server(("127.0.0.1", 0)) as listening, ExitStack() as connections:
        asking = ServerClient(f"http://127.0.0.1:{listening.getsockname()[1]}", patience=0)
        threads = [threading.Thread(target=fail, daemon=True) for _ in range(16)]
        for thread in threads:
            thread.start()
            connection = connections.enter_context(listening.accept()[0])
            connection.recv(1 << 16)
            connection.sendall(half)
        asking.close()
        for thread in threads:
            thread.join(20)
        assert len(ended) == len(threads)


def test_a_connection_that_is_made_while_the_client_is_closed_is_given_up(monkeypatch):
    """The server answers nothing, and closing does not know the connection yet."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        asking, ended = ServerClient(f"http://127.0.0.1:{listening.getsockname()[1]}"), threading.Event()
        trace = asking._trace

        def close_first(event, info):
            if event == "connection.connect_tcp.complete":
                closing = threading.Thread(target=asking.close)
                closing.start()
                closing.join()
            trace(event, info)

        def ask() -> None:
            with pytest.raises(UserError, match="no answer; its client is closed"):
                asking.post("/", {})
            ended.set()

        monkeypatch.setattr(asking, "_trace", close_first)
        threading.Thread(target=ask, daemon=True).start()
        assert ended.wait(20)
        with pytest.raises(UserError, match="its client is closed"):
            asking.get("/")


def test_descriptors_stay_open_while_a_thread_reads_from_them(monkeypatch):
    """Otherwise it would read from the next connection that gets the same one."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        asking, hung_up, closed = ServerClient(f"http://127.0.0.1:{listening.getsockname()[1]}"), [], threading.Event()
        close = asking._client.close
        monkeypatch.setattr(server_client, "_hang_up", hung_up.append)
        monkeypatch.setattr(asking._client, "close", lambda: (closed.set(), close()))
        asked = pool.submit(asking.post, "/", {})
        connection = listening.accept()[0]
        connection.recv(1 << 16)
        asking.close()
        (connected,) = hung_up
        assert connected.fileno() >= 0
        assert not closed.is_set()
        connection.close()
        assert isinstance(asked.exception(20), UserError)
        assert connected.fileno() < 0
        assert closed.is_set()
