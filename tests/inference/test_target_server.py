"""Features over HTTP: those of the engine bit for bit, or a refusal with the reason."""

from __future__ import annotations

import http.client
import http.server
import json
import shlex
import signal
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import specforge.stopping as stopping
from specforge.contracts import CapturePolicy
from specforge.errors import UserError
from specforge.inference import target_server
from specforge.inference.server_client import RefusedError, ServerClient
from specforge.inference.target_engine import HFTargetEngine, HTTPTargetEngine
from specforge.inference.target_engine.base import UnavailableError
from specforge.inference.target_engine.http import CHECKSUM, PATH, body_checksum
from specforge.inference.target_engine.sglang import SGLangTargetEngine
from specforge.inference.target_engine.vllm import VLLMTargetEngine
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_server import TargetServer, make_token
from tests.fuzz import survives
from tests.processes import Command
from tests.runtime.control_plane.redis_server import make_certificates

POLICY = CapturePolicy((1, 3, 4))
SEQUENCES = [[5, 17, 1, 9], [3], [2, 2, 200, 7, 31]]


@contextmanager
def serving(server: TargetServer) -> Iterator[TargetServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def files(target) -> TargetFiles:
    return TargetFiles.find(str(target))


@pytest.fixture(scope="module")
def engine(files) -> HFTargetEngine:
    return HFTargetEngine(files, "float32")


@pytest.fixture(scope="module")
def token_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("token") / "target.token"
    make_token(path)
    return path


@pytest.fixture
def server(engine, files, token_file) -> Iterator[TargetServer]:
    with serving(TargetServer(engine, files, make_token(token_file), max_tokens=512)) as running:
        yield running


def client(server: TargetServer, token_file: Path, **options: object) -> HTTPTargetEngine:
    options = {"patience": 10.0, "target": server.target, "dtype": "float32"} | options
    return HTTPTargetEngine(url=server.url, token_file=token_file, **options)


@pytest.mark.parametrize("policy", [POLICY, CapturePolicy((), True), CapturePolicy((2,), False)])
def test_features_are_those_of_the_engine(server, engine, token_file, policy):
    remote = client(server, token_file)
    remote.check(policy)
    for found, own in zip(remote.capture(SEQUENCES, policy), engine.capture(SEQUENCES, policy), strict=True):
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in own.items())


def test_it_listens_on_the_loopback_and_its_token_is_for_its_owner_alone(server, token_file):
    assert server.server_address[0] == "127.0.0.1"
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    assert make_token(token_file) == make_token(token_file)


def test_what_a_server_refuses_at_the_check_is_no_fault_of_a_prompt(server, token_file, tmp_path):
    """So a producer ends and returns its prompts, instead of giving them up; a missing layer is the trainer's fault."""
    other = write_token(tmp_path / "other", "x" * 20)
    for options in ({"dtype": "bfloat16"}, {"token_file": other}):
        with pytest.raises(UnavailableError, match=r"is float32 here, not bfloat16|the token is not this server's"):
            client(server, **{"token_file": token_file} | options).check(POLICY)
    with pytest.raises(UserError, match="layer 99: ") as found:
        client(server, token_file).check(CapturePolicy((99,)))
    assert not isinstance(found.value, UnavailableError)


def write_token(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("mode", [0o644, 0o666, 0o640, 0o604, 0o620, 0o602, 0o660])
def test_a_token_that_others_can_read_or_write_is_refused_by_server_and_client(files, tmp_path, mode):
    path = write_token(tmp_path / "my token", "x" * 20)
    path.chmod(mode)
    for use in (make_token, lambda path: HTTPTargetEngine(files, "bfloat16", "http://127.0.0.1:1", path)):
        with pytest.raises(UserError, match=f"run chmod 600 '{path}'$"):
            use(path)
    path.chmod(0o400)
    assert make_token(path) == "x" * 20


def request(server: TargetServer, token: str, body: bytes, path: str = PATH, method: str = "POST", **headers):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, {"Authorization": f"Bearer {token}"} | names)
    answer = connection.getresponse()
    return answer.status, answer.read()


def good(server: TargetServer, **changes: object) -> dict[str, object]:
    return {
        "target_fingerprint": server.target.fingerprint,
        "dtype": "float32",
        "capture": {"layer_ids": [1], "last_hidden_states": True},
        "input_ids": [[1, 2]],
    } | changes


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"target_fingerprint": "other"}, 409, "target_fingerprint is"),
        ({"dtype": "bfloat16"}, 409, "dtype is float32 here, not bfloat16"),
        ({"encoding": "zip"}, 400, "encoding must be one of raw, float8_e4m3fn"),
        ({"input_ids": [[1, 264]]}, 400, "tokens below 264"),
        ({"input_ids": [[1, -1]]}, 400, "tokens below"),
        ({"input_ids": [[1, True]]}, 400, "tokens below"),
        ({"input_ids": [[]]}, 400, "tokens below"),
        ({"input_ids": []}, 400, "tokens below"),
        ({"input_ids": "12"}, 400, "tokens below"),
        ({"input_ids": [[1] * 300, [1]]}, 413, "600 tokens with padding; at most 512"),
        ({"capture": {"layer_ids": [8], "last_hidden_states": True}}, 400, "has 8 layers"),
        ({"capture": {"layer_ids": [1.0]}}, 400, "capture must hold"),
        ({"capture": {"layers": [1]}}, 400, "capture must hold"),
        ({"capture": None}, 400, "capture must hold"),
    ],
)
def test_a_wrong_request_is_refused_with_the_reason(server, token_file, changes, status, words):
    token = make_token(token_file)
    found, body = request(server, token, json.dumps(good(server, **changes)).encode())
    assert found == status
    assert words in json.loads(body)["error"]
    assert request(server, token, json.dumps(good(server)).encode())[0] == 200


def test_whoever_takes_it_for_an_openai_server_learns_what_it_is(server):
    with ServerClient(server.url) as client, pytest.raises(RefusedError, match="this is `specforge target serve`"):
        client.get("/v1/models")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 3000, b"\xff", b"null"])
def test_a_body_that_is_not_a_request_is_refused(server, token_file, body):
    assert request(server, make_token(token_file), body)[0] == 400


def test_without_the_token_nothing_is_answered(server):
    body = json.dumps(good(server)).encode()
    for token in ("", "x" * 43, "ä" * 20):
        assert request(server, token.encode().decode("latin-1"), body)[0] == 401
    assert request(server, "x" * 43, body, "/")[0] == 404
    assert request(server, "x" * 43, b"", method="GET")[0] == 404


def test_other_paths_and_lengths_are_refused(server, token_file):
    token = make_token(token_file)
    assert request(server, token, b"{}", "/v1/../secret")[0] == 404
    assert request(server, token, b"x" * (server.max_body + 1))[0] == 413
    assert request(server, token, b"", Content_Length="-5")[0] == 411
    assert request(server, token, b"", Content_Length="9" * 5000)[0] == 411


def test_the_reason_arrives_though_a_large_body_was_not_read(server, token_file):
    with pytest.raises(UserError, match=r"a body of \d+ bytes; at most \d+ .--max_tokens.*HTTP 413"):
        client(server, token_file).capture([[100] * 500_000], POLICY)
    assert client(server, token_file).capture([[1]], POLICY)


def test_silent_connections_are_closed(engine, files, token_file):
    with serving(TargetServer(engine, files, make_token(token_file), idle_seconds=0.05)) as server:
        with socket.create_connection(server.server_address[:2], timeout=10) as connection:
            connection.sendall(b"POST /v1/features HTTP/1.1\r\nContent-")
            assert connection.recv(1) == b""
        remote = client(server, token_file)
        for _ in range(2):
            remote.capture([[1]], POLICY)
            ended = remote._connection.sock.recv(1, socket.MSG_PEEK)  # waits until the server has closed it
            assert ended == b""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "ftp://127.0.0.1"}, "must look like"),
        ({"url": "http://127.0.0.1:8010/x"}, "must look like"),
        ({"url": "http://127.0.0.1:99999"}, "Port out of range"),
        ({"url": "http://[::1"}, "Invalid IPv6 URL"),
        ({"url": "http://user:secret@h"}, "server http://h: must look like"),
        ({"url": "http://h?x=1"}, "must look like"),
        ({"url": "http://a b"}, "must look like"),
        ({"url": "http://" + "a" * 70}, "label"),
        ({"url": "http://"}, "must look like"),
        ({"url": ""}, "must look like"),
        ({"token": "short"}, "at least 16 characters"),
        ({"token": None}, "cannot be read"),
    ],
)
def test_a_wrong_address_or_token_is_refused_at_once(files, tmp_path, options, words):
    path = tmp_path / "token"
    if options.get("token", "x" * 20) is not None:
        write_token(path, options.get("token", "x" * 20))
    with pytest.raises(UserError, match=words):
        HTTPTargetEngine(files, "bfloat16", options.get("url", "http://127.0.0.1:1"), path)


def test_a_wrong_token_is_said_by_the_client(server, tmp_path):
    path = write_token(tmp_path / "token", "x" * 20)
    with pytest.raises(UserError, match=r"the token is not this server's .HTTP 401"):
        client(server, path).check(POLICY)


@pytest.mark.parametrize("engine_class", [SGLangTargetEngine, VLLMTargetEngine])
def test_engines_that_share_a_store_are_told_what_this_server_is(server, files, tmp_path, engine_class):
    (tmp_path / "store").mkdir()
    words = f"server {server.url}: this is `specforge target serve`, which only `--engine http` can use .HTTP 404.$"
    with (
        engine_class(files, "float32", url=server.url, store=str(tmp_path / "store")) as remote,
        pytest.raises(UserError, match=words),
    ):
        remote.check(POLICY)


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("/version", {"version": "0.32.0"}, "a server of --engine vllm; use that engine, or the address that"),
        ("/get_model_info", {"model_path": "m"}, "a server of --engine sglang; use that engine, or the address that"),
        ("/nothing", {}, "not `specforge target serve`; use the address that"),
    ],
)
def test_another_server_at_the_address_is_named(files, token_file, path, answer, words):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps(answer if self.path == path else {"detail": "Not Found"}).encode()
            self.send_response(200 if self.path == path else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, args=[0.01]).start()
        try:
            remote = HTTPTargetEngine(files, "float32", f"http://127.0.0.1:{other.server_port}", token_file)
            with pytest.raises(UserError, match=f"this is {words} `specforge target serve` prints first"):
                remote.check(POLICY)
        finally:
            other.shutdown()


def test_a_server_that_stays_away_is_reported(server, token_file, caplog):
    remote = client(server, token_file, patience=0.3)
    remote.url, remote._connection.port = "http://127.0.0.1:9", 9
    with pytest.raises(UserError, match=r"no answer for 0.3 s .*refused.*restart it with"):
        remote.capture([[1]], POLICY)
    assert "trying for another" in caplog.text


def test_a_damaged_answer_is_asked_for_again(server, engine, token_file, caplog, monkeypatch):
    damaged = iter(["xxh3-64:0", "xxh3-64:1"])
    original = target_server.body_checksum
    monkeypatch.setattr(target_server, "body_checksum", lambda body: next(damaged, None) or original(body))
    (found,) = client(server, token_file).capture([[1, 2]], POLICY)
    (own,) = engine.capture([[1, 2]], POLICY)
    assert all(torch.equal(found[name], x) for name, x in own.items())
    assert caplog.text.count("checksum does not match") == 2


def test_an_answer_that_is_cut_off_is_asked_for_again(engine, files, token_file, caplog, monkeypatch):
    missing = iter([7, 7])
    original = target_server._Handler.send_header

    def send_header(self, name, value):
        original(self, name, str(int(value) + next(missing, 0)) if name == "Content-Length" else value)

    monkeypatch.setattr(target_server._Handler, "send_header", send_header)
    with serving(TargetServer(engine, files, make_token(token_file), idle_seconds=0.05)) as server:
        assert client(server, token_file).capture([[1, 2]], POLICY)
    assert caplog.text.count("IncompleteRead") == 2


# Strangers: connections without the token.


def whole_request(token: str) -> bytes:
    lines = (f"POST {PATH} HTTP/1.1", "Host: x", f"Authorization: Bearer {token}", "Content-Length: 2", "", "{}")
    return "\r\n".join(lines).encode()


def half_a_header(server: TargetServer) -> socket.socket:
    connection = socket.create_connection(server.server_address[:2], timeout=30)
    connection.sendall(b"POST /v1/features HTTP/1.1\r\nContent-")
    return connection


def test_any_number_of_strangers_never_lock_out_who_holds_the_token(server, token_file):
    with ExitStack() as stack:
        connections = [stack.enter_context(half_a_header(server)) for _ in range(150)]
        remote = client(server, token_file, patience=0.0)
        assert remote.capture([[1]], POLICY)
        assert connections[0].recv(1) == b""  # the oldest made room
        for _ in range(100):
            stack.enter_context(half_a_header(server))
        assert remote.capture([[1]], POLICY)  # on the same connection, which stays
        assert remote._connection.sock is not None
        assert len(server._unauthorized) <= 64


@pytest.mark.parametrize(
    "start", [b"POST /v1/features HTTP/1.1\r\nA", b"", b"POST /v1/feat", b"GET / HTTP/1.1\r\nA: b"]
)
def test_a_stranger_that_trickles_is_closed_after_a_while_in_all(engine, files, token_file, monkeypatch, start):
    """However long those who hold the token may take."""
    monkeypatch.setattr(target_server, "_HEADER_SECONDS", 0.2)
    slow = TargetServer(engine, files, make_token(token_file), idle_seconds=60)
    with serving(slow), socket.create_connection(slow.server_address[:2]) as connection:
        connection.sendall(start)
        connection.settimeout(0.02)
        began = time.monotonic()
        for _ in range(1000):
            try:
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                with suppress(OSError):
                    connection.sendall(b"x")
            except OSError:  # reset, with what it sent unread
                break
        assert time.monotonic() - began < 10


def test_a_stranger_that_trickles_behind_a_refusal_is_closed_too(engine, files, token_file):
    """The server goes on reading for a moment, so that the reason arrives; not for as long as somebody sends."""
    ended = threading.Event()
    with serving(TargetServer(engine, files, make_token(token_file), idle_seconds=0.2)) as server:
        shut = server.shutdown_request
        server.shutdown_request = lambda request: (shut(request), ended.set())
        with socket.create_connection(server.server_address[:2], timeout=30) as connection:
            connection.sendall(b"POST /v1/features HTTP/1.1\r\nContent-Length: 999999\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 401"
            for _ in range(1000):
                if ended.wait(0.02):
                    break
                with suppress(OSError):
                    connection.sendall(b"x")
            assert ended.is_set()


def test_who_does_not_read_the_answer_is_left(engine, files, token_file, monkeypatch):
    ended = threading.Event()
    with serving(TargetServer(engine, files, make_token(token_file), idle_seconds=0.2)) as server:
        monkeypatch.setattr(server, "features", lambda body: bytes(64 << 20))
        shut = server.shutdown_request
        server.shutdown_request = lambda request: (shut(request), ended.set())
        with socket.create_connection(server.server_address[:2], timeout=30) as connection:
            connection.sendall(whole_request(make_token(token_file)))
            assert ended.wait(30)
        assert not server._authorized


def test_clients_beyond_the_limit_wait_for_their_turn(server, token_file, monkeypatch, caplog):
    monkeypatch.setattr(target_server, "_AUTHORIZED", 1)
    first, second = client(server, token_file), client(server, token_file)
    assert first.capture([[1]], POLICY)
    threading.Timer(0.3, first._connection.close).start()
    assert second.capture([[1]], POLICY)
    assert "too many connections, HTTP 503" in caplog.text


def test_refused_tokens_are_logged_at_intervals_without_the_token(server, caplog):
    for _ in range(5):
        assert request(server, "s3cret-token-of-another", b"{}")[0] == 401
    server._quiet_until = 0.0
    assert request(server, "", b"{}")[0] == 401
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines == [f"rejected {n} requests without this server's token, the last one from 127.0.0.1" for n in (1, 5)]
    assert "s3cret" not in caplog.text


# Damaged and foreign bytes.


def test_damaged_bodies_are_refused_and_the_server_stays(server, token_file, fuzz):
    token = make_token(token_file)
    good_body = json.dumps(good(server, encoding="raw")).encode()
    for body in fuzz.bytes([good_body], 60):
        status, answer = request(server, token, body)
        assert status in (200, 400, 409, 413), answer
    for value in fuzz.values([good(server, encoding="raw")], 100):
        status, answer = request(server, token, json.dumps(value).encode())
        assert status in (200, 400, 409, 413), answer
        assert status == 200 or len(json.loads(answer)["error"]) < 2000
    assert request(server, token, good_body)[0] == 200


def test_damaged_requests_leave_the_server_as_it_is(engine, files, token_file, fuzz):
    token = make_token(token_file)
    with serving(TargetServer(engine, files, token, idle_seconds=0.2)) as server:
        for data in fuzz.bytes([whole_request(token)], 60):
            with socket.create_connection(server.server_address[:2], timeout=30) as connection, suppress(OSError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
        assert client(server, token_file).capture([[1]], POLICY)


class Rogue:
    """Answers each connection with the next of some bytes, whatever it is asked."""

    def __init__(self, answers) -> None:
        self.answers = iter(answers)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        for answer in self.answers:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.settimeout(30)
                read = b""
                while b"\r\n\r\n" not in read:
                    read += connection.recv(65536) or b"\r\n\r\n"
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass


@pytest.fixture
def rogue():
    made: list[Rogue] = []

    def make(answers) -> Rogue:
        made.append(Rogue(answers))
        return made[-1]

    yield make
    for server in made:
        server.listener.close()


def answer(status: str, body: bytes, *headers: str, length: bool = True) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Connection: close", *headers, *([f"Content-Length: {len(body)}"] if length else [])]
    return "\r\n".join([*lines, "", ""]).encode() + body


def right(server: TargetServer, length: bool = True) -> bytes:
    body = server.features(json.dumps(good(server)).encode())
    return answer("200 OK", body, f"{CHECKSUM}: {body_checksum(body)}", length=length)


def ask(rogue: Rogue, files: TargetFiles, token_file: Path, **options: object):
    options = {"patience": 0.0, "dtype": "float32"} | options
    return HTTPTargetEngine(files, url=rogue.url, token_file=token_file, **options).capture(
        [[1, 2]], CapturePolicy((1,))
    )


@pytest.mark.parametrize("status", ["502 Bad Gateway", "503 Service Unavailable", "504 Gateway Time-out", "522 "])
def test_a_proxy_that_does_not_reach_the_server_is_waited_for(server, files, token_file, rogue, caplog, status):
    page = answer(status, b"<html>" + b"x" * 9999, length=False)
    assert ask(rogue([page, page, right(server)]), files, token_file, patience=10.0)
    assert caplog.text.count(f"HTTP {status[:3]}") == 2


def test_an_answer_through_a_proxy_that_leaves_out_its_length_is_read(server, files, token_file, rogue):
    assert ask(rogue([right(server, length=False)]), files, token_file)


@pytest.mark.parametrize("status", ["400 Bad Request", "401 No", "404 x", "413 x", "429 x", "301 Moved", "500 x"])
def test_a_refusal_ends_at_once_with_the_reason_and_nothing_that_controls_a_terminal(files, token_file, rogue, status):
    reason = json.dumps({"error": "\x1b[2J\x1b]0;title\x07line one\nline two " + "x" * 3000}).encode()
    for body, words in ((reason, "line one line two"), (b"\x1b[31m<html>", "refused"), (b"[" * 9999, "refused")):
        with pytest.raises(UserError, match=rf"{words}.*HTTP {status[:3]}") as found:
            ask(rogue([answer(status, body)]), files, token_file, patience=60.0)
        assert str(found.value).isprintable()
        assert len(str(found.value)) < 500
    long = answer(status, b'{"error": "x"}', length=False) + b" " * (8 << 20)
    with pytest.raises(UserError, match=f"HTTP {status[:3]}"):
        ask(rogue([long]), files, token_file, patience=60.0)


def test_damaged_answers_are_refused_in_one_line(server, files, token_file, rogue, fuzz):
    whole = right(server)
    body = server.features(json.dumps(good(server)).encode())
    size = int.from_bytes(body[:8], "little")
    header, data = json.loads(body[8 : 8 + size]), body[8 + size :]
    answers = list(fuzz.bytes([whole], 60))
    for changed in fuzz.bytes([body], 60):  # with a checksum that is right
        answers.append(answer("200 OK", changed, f"{CHECKSUM}: {body_checksum(changed)}"))
    for value in fuzz.values([header], 60):
        text = json.dumps(value).encode()
        changed = len(text).to_bytes(8, "little") + text + data
        answers.append(answer("200 OK", changed, f"{CHECKSUM}: {body_checksum(changed)}"))
    server = rogue(answers)
    for _ in answers:
        survives(lambda: ask(server, files, token_file))


def test_a_certificate_that_is_not_trusted_ends_at_once(files, token_file, tmp_path):
    make_certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    listener = context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)

    def accept() -> None:
        with suppress(OSError):
            listener.accept()

    thread = threading.Thread(target=accept)
    thread.start()
    url = f"https://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(UserError, match=r"its certificate is not trusted \("):
        HTTPTargetEngine(files, "bfloat16", url, token_file, patience=60.0).capture([[1]], POLICY)
    thread.join()
    listener.close()


def test_a_stop_ends_a_request_whose_connection_is_just_being_made(files, token_file, monkeypatch):
    """The server answers nothing."""
    for name in ("stop_requested", "signal_arrived"):
        monkeypatch.setattr(stopping._State, name, False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        engine = HTTPTargetEngine(files, "float32", f"http://127.0.0.1:{listening.getsockname()[1]}", token_file)
        connect, ended = engine._connection.connect, threading.Event()
        monkeypatch.setattr(engine._connection, "connect", lambda: (stopping.request(), connect()))

        def ask() -> None:
            with pytest.raises(stopping.Stopped):
                engine.capture([[1]], POLICY)
            ended.set()

        threading.Thread(target=ask, daemon=True).start()
        assert ended.wait(20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(target: Path, token_file: Path, port: int = 0) -> Command:
    """`specforge target serve` in a process of its own; its first line comes when it answers."""
    words = ["--dtype", "float32", "--target", target, "--port", port, "--token_file", token_file]
    return Command("target", "serve", *words)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_stopped_and_names_a_taken_port(files, tmp_path, end):
    path = tmp_path / "new folder" / "token"
    process = start(files.folder, path)
    try:
        url = process.stdout.readline().split()[0].rstrip(":")
        assert shlex.split(process.stdout.readline())[-4:] == ["--data.server", url, "--data.token_file", str(path)]
        HTTPTargetEngine(files, "float32", url, path).check(POLICY)
        other = start(files.folder, path, int(url.rpartition(":")[2]))
        output, _ = other.communicate(timeout=60)
        assert other.returncode == 2
        reason = "cannot listen there (Address already in use); choose another port with --port"
        assert f"127.0.0.1:{url.rpartition(':')[2]}: {reason}" in output
    finally:
        process.send_signal(end)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.endswith("stopped\n")
    assert "Traceback" not in output


def test_a_closed_server_has_no_thread_left_in_torch(engine, files, token_file, monkeypatch):
    """The end of the interpreter would abort the process; one client is idle, one answer is written, one waits."""
    before, captures, writes, go_on = (
        set(threading.enumerate()),
        threading.Event(),
        threading.Event(),
        threading.Event(),
    )

    def capture(input_ids, policy):
        captures.set()
        assert go_on.wait(30)
        return engine.capture(input_ids, policy)

    def save(tensors):
        writes.set()
        time.sleep(0.5)
        return b""

    def ask(remote):
        with suppress(UserError):
            remote.capture([[1]], POLICY)

    with serving(TargetServer(engine, files, make_token(token_file))) as server:
        idle, *busy = (client(server, token_file, patience=0.0) for _ in range(3))
        idle.capture([[1]], POLICY)
        monkeypatch.setattr(
            server,
            "engine",
            SimpleNamespace(capture=capture, dtype="float32", description="", check_running=lambda: None),
        )
        monkeypatch.setattr(target_server, "save", save)
        threads = [threading.Thread(target=ask, args=[x]) for x in busy]
        for thread in threads:
            thread.start()
            assert captures.wait(30)
        go_on.set()
        assert writes.wait(30)
    assert set(threading.enumerate()) - before <= set(threads)
    for thread in threads:
        thread.join()
