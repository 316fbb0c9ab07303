"""`specforge regenerate --server`: answers of a server, whatever it refuses, and whatever is killed."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from specforge.cli.main import main
from specforge.data.prompts import PromptSet
from tests.data.chats import TEMPLATES, chat, says, talk
from tests.fake_server import FakeServer, completion, message
from tests.processes import Command
from tests.tiny import write_target

COUNT = 12


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(root="/models/tiny", max_model_len=512) as made:
        yield made


@pytest.fixture
def data(tmp_path) -> Path:
    """Conversations of two turns."""
    return write(tmp_path / "d.jsonl", *(talk(f"{i}?", "-", "and?", "-", id=f"c{i}") for i in range(COUNT)))


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(server: FakeServer, target: Path, data: Path, output: Path, **options) -> list[str]:
    options = {"max_new_tokens": 40, "concurrency": 4, **options}
    more = [f"--{key}={value}" for key, value in options.items()]
    places = ["--data", data, "--target", target, "--output", output, "--server", server.url]
    return ["regenerate", *map(str, places), *more]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(server: FakeServer) -> list[tuple[int, ...]]:
    """The prompts that the server was asked with, without the test request."""
    return [tuple(body["prompt"]) for _, body in server.seen[1:]]


_TOKENIZER = chat().tokenizer  # reads bytes as the tiny target does


def text(body: dict) -> str:
    return _TOKENIZER.decode(body["prompt"])


# Token ids.


def test_what_the_server_is_asked_and_writes_is_what_the_draft_learns(server, target, data, tmp_path, capsys):
    output = tmp_path / "a.jsonl"
    assert main(words(server, target, data, output, max_new_tokens=8)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{server.url}: vllm with model tiny; answers with token ids" in said
    assert "note" not in said
    assert f"{COUNT} conversations answered now, 0 before" in said
    assert f"{2 * COUNT} answers cut off at max_new_tokens (8)" in said
    found = rows(output)
    assert [row["id"] for row in found] == [f"c{i}" for i in range(COUNT)]
    assert found[0]["regenerated"]["server"] == "vllm"
    assert "dtype" not in found[0]["regenerated"]
    assert [m["finish_reason"] for m in found[0]["messages"][1::2]] == ["length", "length"]
    kept = [answer for row in found for answer in row["regenerated"]["answers"]]
    assert sorted(asked(server)) == sorted(tuple(answer["prompt_ids"]) for answer in kept)
    assert main(["prepare", "--data", str(output), "--target", str(target), "--output", str(tmp_path / "p")]) == 0
    tasks = {task.input_ids for task in PromptSet.load(tmp_path / "p" / "train").tasks}
    assert tasks >= {tuple(a["prompt_ids"] + a["answer_ids"]) for a in kept[1::2]}


def test_sampled_answers_depend_on_the_seed_and_not_on_what_else_is_asked(server, target, data, tmp_path):
    files = [tmp_path / f"{name}.jsonl" for name in "abce"]
    some = write(tmp_path / "some.jsonl", *rows(data)[3:7])
    for file, source, options in zip(
        files,
        (data, data, data, some),
        ({"seed": 1}, {"seed": 1, "concurrency": 1}, {"seed": 2}, {"seed": 1}),
        strict=True,
    ):
        assert main(words(server, target, source, file, temperature=1, **options)) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert rows(files[0])[3:7] == rows(files[3])
    answers = [[row["regenerated"]["answers"] for row in rows(file)] for file in files]
    assert all(a != b for a, b in zip(answers[0], answers[2], strict=True))
    seeds = {body["seed"] for _, body in server.seen[1 : 1 + 2 * COUNT]}
    assert len(seeds) == 2 * COUNT


def test_answers_of_another_server_or_with_other_options_are_not_mixed_in(server, target, data, tmp_path, capsys):
    output = tmp_path / "a.jsonl"
    assert main(words(server, target, data, output, top_k=5)) == 0
    assert main(words(server, target, data, output, top_k=5)) == 0
    for options, reason in (({}, "top_k 5, not None"), ({"top_k": 5, "min_p": 0.5}, "min_p None, not 0.5")):
        assert main(words(server, target, data, output, **options)) == 2
        assert f"was generated with {reason}" in " ".join(capsys.readouterr().err.split())
    server.answer = lambda body: message("Hi")
    assert main(words(server, target, data, output, top_k=5, chat="true")) == 2
    assert "server 'vllm', not 'vllm, chat'" in " ".join(capsys.readouterr().err.split())


def test_a_model_of_another_name_is_mentioned(server, target, data, tmp_path, capsys):
    server.models["data"][0] |= {"id": "gpt", "root": "/models/other"}
    assert main(words(server, target, data, tmp_path / "a.jsonl")) == 0
    assert "note: nothing in this name says that it is" in " ".join(capsys.readouterr().out.split())


# What a server refuses.


def test_conversations_that_a_server_refuses_are_named_and_asked_again_later(server, target, data, tmp_path, capsys):
    output = tmp_path / "a.jsonl"

    def answer(body):
        refused = "3?" in text(body)
        return (400, {"error": {"message": "not that one"}}) if refused else completion(body)

    server.answer = answer
    assert main(words(server, target, data, output)) == 2
    said = capsys.readouterr()
    assert f"{COUNT - 1} conversations answered now" in " ".join(said.out.split())
    assert (
        f"1 conversations are not answered, such as {data}, line 4: server {server.url}: not that one (HTTP 400)"
        in " ".join(said.err.split())
    )
    server.answer, before = completion, len(server.seen)
    assert main(words(server, target, data, output)) == 0
    assert len(server.seen) == before + 1 + 2
    assert [row["id"] for row in rows(output)] == [f"c{i}" for i in range(COUNT)]


def test_a_turn_that_a_server_refuses_ends_its_conversation(server, target, data, tmp_path, capsys, caplog):
    def answer(body):
        refused = "3?" in text(body) and "and?" in text(body)
        return (400, {"message": "too long"}) if refused else completion(body)

    server.answer = answer
    with caplog.at_level(logging.WARNING):
        assert main(words(server, target, data, tmp_path / "a.jsonl")) == 0
    assert "1 turns left out, because the chat template or the server rejects an earlier answer" in " ".join(
        capsys.readouterr().out.split()
    )
    assert f"{data}, line 4: answer 2 is left out (server {server.url}: too long (HTTP 400))" in caplog.text
    assert [message["role"] for message in rows(tmp_path / "a.jsonl")[3]["messages"]] == ["user", "assistant"]


def test_an_answer_cut_off_where_the_server_can_go_no_further_is_reported(server, target, data, tmp_path, capsys):
    server.models["data"][0]["max_model_len"] = 60
    assert main(words(server, target, data, tmp_path / "a.jsonl", max_new_tokens=30)) == 0
    assert "answers cut off at the server's maximum length" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_that_refuses_everything_ends_the_run_but_what_is_answered_stays(
    server, target, data, tmp_path, capsys, status
):
    output = tmp_path / "a.jsonl"
    server.answer = lambda body: completion(body) if len(server.seen) < 8 else (status, {"detail": "no"})
    assert main(words(server, target, data, output, concurrency=1)) == 2
    assert f"no (HTTP {status})" in capsys.readouterr().err
    assert 0 < len(rows(output)) < COUNT


# Restarts and kills.


def whole(target: Path, data: Path, output: Path) -> bytes:
    """What an undisturbed server answers."""
    with FakeServer(root="/models/tiny", max_model_len=512) as server:
        assert main(words(server, target, data, output, temperature=1)) == 0
    return output.read_bytes()


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(server, target, data, tmp_path, status):
    lock, busy = threading.Lock(), {2, 3, 9}

    def answer(body):
        with lock:
            if len(server.seen) in busy:
                return status, {"error": "busy"}
        return completion(body)

    server.answer = answer
    output = tmp_path / "a.jsonl"
    assert main(words(server, target, data, output, temperature=1, concurrency=1)) == 0
    assert len(server.seen) == 1 + 2 * COUNT + len(busy)
    assert output.read_bytes() == whole(target, data, tmp_path / "whole.jsonl")


def test_a_server_that_is_killed_and_restarts_loses_nothing(server, target, data, tmp_path):
    dying, dead = threading.Event(), threading.Event()

    def answer(body):
        if len(server.seen) >= 8 and not dead.is_set():
            dying.set()
            assert dead.wait(60)
        return completion(body)

    def restart() -> None:
        assert dying.wait(60)
        server.stop()
        dead.set()
        server.start()

    server.answer = answer
    thread = threading.Thread(target=restart)
    thread.start()
    output = tmp_path / "a.jsonl"
    assert main(words(server, target, data, output, temperature=1)) == 0
    thread.join()
    assert output.read_bytes() == whole(target, data, tmp_path / "whole.jsonl")


@pytest.fixture
def hanging(server, target, data, tmp_path) -> Iterator[tuple[Command, Path, int]]:
    """A command whose server has gone silent, its output, and the number of conversations answered before."""
    output, end, lock = tmp_path / "a.jsonl", threading.Event(), threading.Lock()
    silent: list[threading.Event] = [threading.Event() for _ in range(4)]
    given = whole = 0

    def answer(body):
        nonlocal given, whole
        with lock:
            given += 1
            mine = given
            whole += mine <= 10 and "and?" in text(body)
        if mine > 10:
            silent[(mine - 11) % 4].set()
            end.wait(120)
            return None
        return completion(body)

    server.answer = answer
    process = Command(*words(server, target, data, output, temperature=1))
    try:
        assert all(event.wait(120) for event in silent)  # all requests in flight
        deadline = time.monotonic() + 60
        while (len(rows(output)) if output.exists() else 0) < whole and time.monotonic() < deadline:
            time.sleep(0.01)
        yield process, output, whole
    finally:
        process.kill()
        process.wait()
        end.set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_that_is_killed_loses_what_was_in_flight_at_most(server, target, data, tmp_path, hanging, number):
    process, output, answered = hanging
    assert answered >= 2
    process.send_signal(number)
    assert process.wait(20) == -number
    assert ("specforge: stopped by a signal\n" in process.stdout.read()) == (number == signal.SIGTERM)
    assert len(rows(output)) == answered
    server.answer, before = completion, len(server.seen)
    assert main(words(server, target, data, output, temperature=1)) == 0
    assert len(server.seen) == before + 1 + 2 * (COUNT - answered)
    assert output.read_bytes() == whole(target, data, tmp_path / "whole.jsonl")


# Chat.

TOOL = {"type": "function", "function": {"name": "go", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "go", "arguments": '{"to": "Oslo"}'}}


@pytest.fixture(scope="module")
def thinking(tmp_path_factory) -> Path:
    """A target with a template that renders reasoning and calls."""
    folder = write_target(tmp_path_factory.mktemp("thinking") / "tiny")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}"
        "</think>{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
        "{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return folder


def test_reasoning_and_calls_of_a_chat_endpoint_reach_the_draft(thinking, tmp_path, capsys):
    data = write(
        tmp_path / "d.jsonl",
        {"id": "a", "tools": [TOOL], **talk("Where?", "-", "And then?", "-")},
        talk("Hi", "-", id="b"),
    )

    def answer(body):
        if "prompt" in body:
            return 404, {"detail": "Not Found"}
        if body["messages"][-1]["content"] == "Where?":
            return message(None, "tool_calls", reasoning="Far.", tool_calls=[CALL])
        return message("Hello.", "length" if body["messages"][-1]["content"] == "Hi" else "stop")

    output = tmp_path / "a.jsonl"
    with FakeServer(answer, owner="someone") as server:
        assert main(words(server, thinking, data, output)) == 0
        sent = next(body for _, body in server.seen if len(body.get("messages", ())) == 3)
        assert sent["tools"] == [TOOL]
        assert sent["messages"][1] == {"role": "assistant", "content": "", "reasoning": "Far.", "tool_calls": [CALL]}
        before = len(server.seen)
        assert main(words(server, thinking, data, output)) == 0
        assert len(server.seen) == before + 2
    said = " ".join(capsys.readouterr().out.split())
    assert "someone with model tiny; answers through its chat endpoint, with text (Not Found (HTTP 404))" in said
    assert "1 answers cut off at max_new_tokens (40)" in said
    first, second = rows(output)
    assert [m.get("finish_reason") for m in first["messages"]] == [None, "tool_calls", None, "stop"]
    assert second["messages"][1] == {"role": "assistant", "content": "Hello.", "finish_reason": "length"}
    assert first["regenerated"]["answers"] == [{"message": 1}, {"message": 3}]
    assert (first["regenerated"]["server"], first["regenerated"]["model"]) == ("someone, chat", "tiny")
    assert main(["prepare", "--data", str(output), "--target", str(thinking), "--output", str(tmp_path / "p")]) == 0
    assert '«<think>Far.</think><call>go {"to": "Oslo"}</call>' in capsys.readouterr().out


def test_a_call_that_is_not_json_is_left_out(thinking, tmp_path, capsys):
    data = write(tmp_path / "d.jsonl", talk("Where?", "-", id="a"), talk("Hi", "-", id="b"))
    broken = {**CALL, "function": {"name": "go", "arguments": '{"to": '}}

    def answer(body):
        asks = body["messages"][-1]["content"] == "Where?"
        return message(None, "tool_calls", tool_calls=[broken]) if asks else message("Hello.")

    with FakeServer(answer) as server:
        assert main(words(server, thinking, data, tmp_path / "a.jsonl", chat="true")) == 2
    assert "1 conversations are not answered" in " ".join(capsys.readouterr().err.split())
    assert [row["id"] for row in rows(tmp_path / "a.jsonl")] == ["b"]


# What is refused.


@pytest.mark.parametrize("option", ["min_p=0.5", "presence_penalty=1", "repetition_penalty=1.1"])
def test_sampling_that_transformers_is_not_asked_for_needs_a_server(target, data, tmp_path, capsys, option):
    places = ["--data", data, "--target", target, "--output", tmp_path / "a.jsonl", f"--{option}"]
    assert main(["regenerate", *map(str, places)]) == 2
    assert f"{option.split('=')[0]}: needs a server (--server)" in capsys.readouterr().err


def test_a_template_that_rejects_a_conversation_is_named_before_it_is_answered(server, tmp_path, capsys):
    target = write_target(tmp_path / "tiny")
    (target / "chat_template.jinja").write_text(TEMPLATES["alternating"])
    data = write(tmp_path / "d.jsonl", {"messages": [says("user", "1"), says("user", "2")]})
    assert main(words(server, target, data, tmp_path / "a.jsonl")) == 2
    assert "line 1: the chat template rejects it" in " ".join(capsys.readouterr().err.split())
    assert not server.seen


@pytest.mark.parametrize(
    ("ids", "before", "reason"),
    [
        ([], "", "--data holds no conversations to answer"),
        (["a", "a"], "", "line 2: has the same id 'a' as"),
        (["a"], "{}", "a.jsonl: was not written by `specforge regenerate`; choose another --output"),
    ],
)
def test_files_are_checked_before_the_server_is_asked(server, target, tmp_path, capsys, ids, before, reason):
    """It may be down, which is waited for."""
    server.stop()
    data = write(tmp_path / "d.jsonl", *(talk("1?", "-", id=id_) for id_ in ids))
    (tmp_path / "a.jsonl").write_text(before)
    start = time.monotonic()
    assert main(words(server, target, data, tmp_path / "a.jsonl")) == 2
    assert reason in " ".join(capsys.readouterr().err.split())
    assert time.monotonic() - start < 60
