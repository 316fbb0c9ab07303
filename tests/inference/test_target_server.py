"""Features over HTTP: those of the engine bit for bit, or a refusal with the reason."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from specforge.contracts import CapturePolicy
from specforge.errors import UserError
from specforge.inference import target_server
from specforge.inference.target_engine import HFTargetEngine, HTTPTargetEngine
from specforge.inference.target_engine.http import PATH
from specforge.inference.target_server import TargetServer, make_token
from specforge.target_files import TargetFiles

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
    return HTTPTargetEngine(server.url, token_file, **options)


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


def request(server: TargetServer, token: str, body: bytes, path: str = PATH, method: str = "POST", **headers):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, {"Authorization": f"Bearer {token}"} | names)
    answer = connection.getresponse()
    return answer.status, answer.read()


def good(server: TargetServer, **changes: object) -> dict[str, object]:
    return {
        "target_fingerprint": server.target.fingerprint, "dtype": "float32",
        "capture": {"layer_ids": [1], "last_hidden_states": True}, "input_ids": [[1, 2]],
    } | changes  # fmt: skip


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


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 3000, b"\xff", b"null"])
def test_a_body_that_is_not_a_request_is_refused(server, token_file, body):
    assert request(server, make_token(token_file), body)[0] == 400


def test_without_the_token_nothing_is_answered(server):
    body = json.dumps(good(server)).encode()
    for token in ("", "x" * 43, "ä" * 20):
        assert request(server, token.encode().decode("latin-1"), body)[0] == 401
    assert request(server, "x" * 43, body, "/")[0] == 401
    assert request(server, "x" * 43, b"", method="GET")[0] == 501


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
        ({"token": "short"}, "at least 16 characters"),
        ({"token": None}, "cannot be read"),
    ],
)
def test_a_wrong_address_or_token_is_refused_at_once(files, tmp_path, options, words):
    path = tmp_path / "token"
    if options.get("token", "x" * 20) is not None:
        path.write_text(options.get("token", "x" * 20))
    with pytest.raises(UserError, match=words):
        HTTPTargetEngine(options.get("url", "http://127.0.0.1:1"), path, files)


def test_a_wrong_token_is_said_by_the_client(server, tmp_path):
    path = tmp_path / "token"
    path.write_text("x" * 20)
    with pytest.raises(UserError, match=r"the token is not this server's .HTTP 401"):
        client(server, path).check(POLICY)


def test_a_server_that_stays_away_is_reported(server, token_file, caplog):
    remote = client(server, token_file, patience=0.3)
    remote.url, remote._connection.port = "http://127.0.0.1:9", 9
    with pytest.raises(UserError, match=r"no answer for 0.3 s .*refused.*start it again"):
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(target: Path, token_file: Path, port: int = 0) -> subprocess.Popen:
    """`specforge target serve` in a process of its own; its first line comes when it answers."""
    words = [
        "target",
        "serve",
        "--dtype",
        "float32",
        "--target",
        target,
        "--port",
        port,
        "--token_file",
        token_file,
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "specforge.cli", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_stopped_and_names_a_taken_port(files, tmp_path, end):
    path = tmp_path / "new" / "token"
    process = start(files.folder, path)
    try:
        url = process.stdout.readline().split()[0].rstrip(":")
        HTTPTargetEngine(url, path, files, "float32").check(POLICY)
        other = start(files.folder, path, int(url.rpartition(":")[2]))
        _, error = other.communicate(timeout=60)
        assert other.returncode == 2
        assert f"127.0.0.1:{url.rpartition(':')[2]}: cannot listen there (Address already in use)" in error
    finally:
        process.send_signal(end)
        output, error = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.endswith("stopped\n")
    assert "Traceback" not in error
