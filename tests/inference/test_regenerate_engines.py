"""`specforge regenerate --server` on vLLM and SGLang themselves: the answers of transformers, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from specforge.cli.main import main
from tests import sglang_cpu, vllm_cpu
from tests.data.chats import talk
from tests.processes import Command
from tests.tiny import QUESTIONS, write_target

pytestmark = pytest.mark.slow

TOKENS = 32
Serve = Callable[[], AbstractContextManager[None]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def vllm(python: str, target: Path, log: Path, port: int) -> Iterator[None]:
    """A vLLM server; at the end all its processes are killed at once."""
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"]
    command = [python, *vllm_cpu.SERVE, "--model", target, *options, "--port", port]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(word) for word in command], env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).is_success:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def sglang(python: str, target: Path, log: Path, port: int) -> Iterator[None]:
    """An SGLang server; at the end all its processes are killed at once."""
    with sglang_cpu.serve(python, log, "--model-path", target, "--port", port):
        yield


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """A tiny target with heads as wide as vLLM wants them on a CPU."""
    return write_target(tmp_path_factory.mktemp("target") / "tiny", layers=4, hidden=128)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Conversations of two turns."""
    path = tmp_path_factory.mktemp("data") / "d.jsonl"
    texts = [QUESTIONS[i % 3].format(a=i, b=i + 1) for i in range(16)]
    path.write_text(
        "".join(json.dumps(talk(text, "-", "And?", "-", id=f"c{i}")) + "\n" for i, text in enumerate(texts))
    )
    return path


def command(target: Path, data: Path, output: Path, **options) -> list[str]:
    options = {"max_new_tokens": TOKENS, **options}
    more = [f"--{key}={value}" for key, value in options.items()]
    return ["regenerate", *map(str, ["--data", data, "--target", target, "--output", output]), *more]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def answers(path: Path) -> list:
    return [(row["messages"], row["regenerated"]["answers"]) for row in rows(path)]


@pytest.fixture(scope="module")
def expected(target, data, tmp_path_factory) -> list:
    """What transformers writes, some of which ends: with what it often writes as a second end token."""
    folder = tmp_path_factory.mktemp("expected")
    assert main(command(target, data, folder / "once.jsonl", dtype="float32")) == 0
    written = Counter(i for _, found in answers(folder / "once.jsonl") for a in found for i in set(a["answer_ids"][4:]))
    often = min(written, key=lambda token: abs(written[token] - len(rows(data))))
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, often]}))
    assert main(command(target, data, folder / "a.jsonl", dtype="float32")) == 0
    reasons = {m["finish_reason"] for messages, _ in answers(folder / "a.jsonl") for m in messages[1::2]}
    assert reasons == {"stop", "length"}
    return answers(folder / "a.jsonl")


class Server:
    """A server that can be killed and started again on the same port."""

    def __init__(self, start: Serve, url: str) -> None:
        self._start, self.url, self._running = start, url, ExitStack()

    def start(self) -> None:
        self._running.enter_context(self._start())

    def kill(self) -> None:
        self._running.close()


ENGINES = [pytest.param(f, marks=getattr(pytest.mark, f.__name__)) for f in (vllm, sglang)]


@pytest.fixture(scope="module", params=ENGINES)
def server(request, expected, target, tmp_path_factory) -> Iterator[Server]:
    """A running server; vLLM's last test kills it."""
    kind = request.param
    python = request.config.getoption(f"--{kind.__name__}-python")
    if not python:
        pytest.skip(f"--{kind.__name__}-python names no interpreter")
    port, folder = free_port(), tmp_path_factory.mktemp(kind.__name__)
    found = Server(lambda: kind(python, target, folder / "log", port), f"http://127.0.0.1:{port}")
    found.start()
    yield found
    found.kill()


def test_the_answers_are_those_of_transformers(server, target, data, expected, tmp_path, capsys):
    """Token for token and end token included; sampled ones depend on the seed; chat gives their text."""
    url = server.url
    assert main(command(target, data, tmp_path / "a.jsonl", server=url)) == 0
    assert "answers with token ids" in capsys.readouterr().out
    assert answers(tmp_path / "a.jsonl") == expected
    assert main(command(target, data, tmp_path / "chat.jsonl", server=url, chat="true")) == 0
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps(talk("?" * 600, "-", id="long")) + "\n" + data.read_text().splitlines()[0] + "\n")
    assert main(command(target, long, tmp_path / "d.jsonl", server=url)) == 2
    assert answers(tmp_path / "d.jsonl") == expected[:1]
    assert "1 conversations are not answered, such as" in capsys.readouterr().err
    for name, concurrency in (("b", 4), ("c", 1)):
        more = {"server": url, "temperature": 1, "concurrency": concurrency}
        assert main(command(target, data, tmp_path / f"{name}.jsonl", **more)) == 0
    compared = 0
    for (messages, _), (same, found) in zip(answers(tmp_path / "chat.jsonl"), expected, strict=True):
        # The first answer: its text comes back as other tokens, so the next one differs.
        assert messages[1]["finish_reason"] == same[1]["finish_reason"]
        if all(token < 256 for token in found[0]["answer_ids"]):  # others have no text
            assert messages[1]["content"].rstrip("\ufffd") == same[1]["content"].rstrip("\ufffd")
            compared += 1
    assert compared
    assert answers(tmp_path / "b.jsonl") != expected
    if "vllm" in str(rows(tmp_path / "b.jsonl")[0]["regenerated"]["server"]):
        assert answers(tmp_path / "b.jsonl") == answers(tmp_path / "c.jsonl")


@pytest.mark.parametrize("server", ENGINES[:1], indirect=True)  # it is the client that waits, for any engine
def test_a_server_that_is_killed_and_restarts_loses_nothing(server, target, data, expected, tmp_path):
    output = tmp_path / "a.jsonl"
    process = Command(*command(target, data, output, server=server.url, concurrency=4))
    while process.poll() is None and len(rows(output)) < 4:
        time.sleep(0.01)
    server.kill()
    killed_at = len(rows(output))
    server.start()
    assert process.wait(300) == 0
    assert 4 <= killed_at < len(expected)
    assert answers(output) == expected
