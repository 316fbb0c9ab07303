"""Answers of servers that return token ids, and of servers that return messages."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from specforge.data.conversations import RecordError
from specforge.errors import UserError
from specforge.inference import openai_server
from specforge.inference.openai_server import (
    ChatServer,
    NoTokenIdsError,
    Sampling,
    ServerOptions,
    TokenServer,
    connect,
    in_flight,
)
from specforge.inference.server_client import RefusedError, ServerClient
from tests.data.chats import chat
from tests.fake_server import FakeServer, completion, message, written

END = 256  # of the tiny target
CALL = {"id": "c1", "type": "function", "function": {"name": "go", "arguments": '{"to": "Oslo"}'}}
USER = {"role": "user", "content": "Where?"}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as made:
        yield made


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(openai_server, "_PAUSE", 0.0)


def tokens(server: FakeServer, **options) -> TokenServer:
    return TokenServer(ServerClient(server.url), **options)


def generate(server: FakeServer, *prompts: list[int], **how) -> list[list[int]]:
    return tokens(server).generate(prompts, **{"max_new_tokens": 40, "end_ids": [END], **how})


def body(prompt: list[int]) -> dict:
    return {"prompt": prompt, "max_tokens": 40, "stop_token_ids": [END]}


# Token ids.


def test_prompts_go_out_and_answers_come_back_as_token_ids(server):
    prompts = [[1, 2, 3], [4, 5], [6]]
    answers = generate(server, *prompts)
    assert answers == [written(body(p)) for p in prompts]
    assert sorted(body["prompt"] for _, body in server.seen) == sorted(prompts)
    path, sent = server.seen[0]
    assert path == "/v1/completions"
    assert {key: value for key, value in sent.items() if key != "prompt"} == {
        "model": "tiny",
        "max_tokens": 40,
        "stop_token_ids": [END],
        "return_token_ids": True,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
    }


def test_every_sampling_option_is_sent_and_each_prompt_has_a_seed(server):
    how = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1.0}
    generate(server, [1], [2], seed=5, repetition_penalty=1.5, **how)
    bodies = {body["prompt"][0]: body for _, body in server.seen}
    assert {key: bodies[1][key] for key in how} == how
    assert bodies[1]["repetition_penalty"] == 1.5
    assert [bodies[1]["seed"], bodies[2]["seed"]] == [5, 6]


def test_so_many_requests_are_in_flight_and_no_more(server):
    lock, running, most, full = threading.Lock(), 0, 0, threading.Event()

    def answer(body):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == 3:
                full.set()
        assert full.wait(30)
        with lock:
            running -= 1
        return completion(body)

    server.answer = answer
    tokens(server, concurrency=3).generate([[i] for i in range(9)], max_new_tokens=40, end_ids=[END])
    assert most == 3


def test_an_answer_ends_where_the_server_can_go_no_further():
    with FakeServer(max_model_len=12) as server:
        assert [len(x) for x in generate(server, [1] * 7, [1] * 11)] == [5, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": None}, "/v1/completions returns no token ids"),
        ({"prompt_token_ids": None}, "/v1/completions returns no token ids"),
        ({"prompt_token_ids": [1, 2, 3]}, r"it answers \[1, 2, 3\], but was asked \[1, 2\]"),
        ({"token_ids": [65, 7]}, r"ends in token 7, which is not one of the target's end tokens \[256\]"),
        ({"token_ids": []}, "ends in token None"),
        ({"finish_reason": "made up"}, "ended an answer with finish_reason 'made up'"),
    ],
)
def test_an_answer_to_something_else_is_refused(server, change, words):
    def answer(body):
        found = completion(body)
        found["choices"][0] |= change
        return found

    server.answer = answer
    with pytest.raises(UserError, match=words):
        generate(server, [1, 2])


@pytest.mark.parametrize("found", [{}, [], {"choices": []}, {"choices": [{}]}, {"choices": {"0": 1}}, 3])
def test_an_answer_without_a_choice_is_one_line(server, found):
    server.answer = lambda body: found
    with pytest.raises(UserError, match="the answer of /v1/completions has no finished choice"):
        generate(server, [1])


@pytest.mark.parametrize(("aborted", "comes"), [(2, True), (3, False)])
def test_an_answer_that_the_server_aborts_is_asked_for_again(server, aborted, comes):
    def answer(body):
        found = completion(body)
        if len(server.seen) <= aborted:
            found["choices"][0]["finish_reason"] = "abort"
        return found

    server.answer = answer
    if comes:
        assert generate(server, [1]) == [written(body([1]))]
    else:
        with pytest.raises(UserError, match="aborted an answer 3 times"):
            generate(server, [1])


# Messages.


def asked(server: FakeServer, messages=(USER,), tools=(), **how) -> dict:
    made = ChatServer(ServerClient(server.url))
    return made.answer(messages, tools, Sampling(**how), max_new_tokens=9, seed=4)[0]


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (message("Hi"), {"finish_reason": "stop"}),
        (message("Hi", "length"), {"finish_reason": "length"}),
        (message(None), {"content": "", "finish_reason": "stop"}),
        (message("Hi", reasoning="R"), {"reasoning_content": "R", "finish_reason": "stop"}),
        (message("Hi", reasoning_content="R"), {"reasoning_content": "R", "finish_reason": "stop"}),
        (message(None, "length", reasoning="R"), {"content": "", "reasoning_content": "R", "finish_reason": "length"}),
        (
            message(None, "tool_calls", tool_calls=[CALL]),
            {"content": "", "tool_calls": [CALL], "finish_reason": "tool_calls"},
        ),
        (
            message("Hi", tool_calls=[CALL], reasoning="R"),
            {"reasoning_content": "R", "tool_calls": [CALL], "finish_reason": "tool_calls"},
        ),
        (
            message("Hi", "function_call", function_call=CALL["function"]),
            {
                "tool_calls": [{**CALL["function"], "type": "function", "function": CALL["function"]}],
                "finish_reason": "tool_calls",
            },
        ),
    ],
)
def test_reasoning_and_calls_are_kept_as_datasets_have_them(server, answer, kept):
    server.answer = lambda body: answer
    assert asked(server) == {"role": "assistant", "content": "Hi", **kept}


def test_earlier_reasoning_and_calls_go_back_in_the_names_of_the_server(server):
    history = {
        "role": "assistant",
        "content": "",
        "reasoning_content": "R",
        "tool_calls": [{**CALL, "function": {"name": "go", "arguments": {"to": "Oslo"}}}],
        "finish_reason": "tool_calls",
        "weight": 0,
    }
    tool = {"type": "function", "function": {"name": "go"}}
    server.answer = lambda body: message("Hi", reasoning="R")
    made = ChatServer(ServerClient(server.url))
    for _ in range(2):
        made.answer([USER, history], [tool], Sampling(), max_new_tokens=9)
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert [body["messages"][1] for _, body in server.seen] == [
        expected | {"reasoning_content": "R"},
        expected | {"reasoning": "R"},
    ]
    assert server.seen[0][1]["tools"] == [tool]


def test_a_stranger_is_asked_for_nothing_that_openai_does_not_have():
    with FakeServer(lambda body: message("Hi"), owner="openai") as server:
        asked(server, temperature=0.5)
        asked(server, top_k=5)
    plain = {"model": "tiny", "messages": [USER], "max_tokens": 9, "top_p": 1.0}
    assert [body for _, body in server.seen] == [
        plain | {"temperature": 0.5, "seed": 4},
        plain | {"temperature": 0.0, "top_k": 5},
    ]


def test_a_call_whose_arguments_are_not_json_is_no_answer(server):
    broken = {**CALL, "function": {"name": "go", "arguments": '{"to": "Os'}}
    server.answer = lambda body: message(None, "tool_calls", tool_calls=[broken])
    with pytest.raises(RecordError, match="arguments of 'go': not valid JSON"):
        asked(server)


# What a server can do.


def connected(server: FakeServer, **options):
    made = ServerOptions(server=server.url, **options)
    return connect(made, chat(), Sampling(temperature=0.5), 40)


def test_a_server_that_returns_token_ids_is_asked_for_them(server):
    found, words = connected(server)
    assert isinstance(found, TokenServer)
    assert words == "answers with token ids"
    assert server.seen[0][1]["temperature"] == 0.5


def test_a_server_may_be_asked_through_its_chat_endpoint_all_the_same(server):
    server.answer = lambda body: message("Hi")
    found, words = connected(server, chat=True)
    assert isinstance(found, ChatServer)
    assert words == "answers through its chat endpoint, with text (as requested)"
    assert [path for path, _ in server.seen] == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    ("without", "reason"),
    [
        ({"choices": [{"text": "Hi", "finish_reason": "stop"}]}, "/v1/completions returns no token ids"),
        ((404, {"detail": "Not Found"}), r"Not Found \(HTTP 404\)"),
        ((400, {"error": {"message": "prompt: not a string"}}), r"prompt: not a string \(HTTP 400\)"),
    ],
)
def test_a_server_without_token_ids_is_asked_with_messages_and_the_reason_is_said(server, without, reason):
    server.answer = lambda body: without if "prompt" in body else message("Hi")
    found, words = connected(server)
    assert isinstance(found, ChatServer)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(words)


@pytest.mark.parametrize("status", [400, 401, 404])
def test_what_a_server_refuses_altogether_is_refused_before_the_work_starts(server, status):
    server.answer = lambda body: (status, {"error": {"message": "no"}})
    with pytest.raises(RefusedError, match=rf"no \(HTTP {status}\)"):
        connected(server)


def test_another_tokenizer_is_refused(server):
    server.tokenize = {"tokens": [1, 2, 3]}
    with pytest.raises(UserError, match="model tiny has another tokenizer than the target"):
        connected(server)


@pytest.mark.parametrize("models", [(), ("a", "b")])
def test_a_model_must_be_chosen_unless_there_is_one(models):
    with FakeServer(models=models) as server:
        with pytest.raises(UserError, match=r"lists .*; choose its model with --model NAME"):
            connected(server)
        found, _ = connected(server, model="b")
        assert found.model.name == server.seen[0][1]["model"] == "b"


def test_a_server_that_lists_no_models_is_asked_by_name(server):
    server.models = (404, {})
    assert connected(server, model="b")[0].model.name == "b"
    with pytest.raises(RefusedError, match="HTTP 404"):
        connected(server)


def test_no_token_ids_is_an_error_of_its_own(server):
    server.answer = lambda body: {"choices": [{"text": "Hi", "finish_reason": "stop"}]}
    with pytest.raises(NoTokenIdsError):
        generate(server, [1])


# In flight.


def test_the_first_error_ends_the_work():
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise ValueError("two")
        return item

    results = in_flight(work, range(1000), 1)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert begun == [0, 1, 2]
