"""Answers of servers: both protocols, rounds in each form of counter, and errors in the middle of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from specforge.errors import UserError
from specforge.eval.served import Answer, Question, Server, SGLangServer, VLLMServer, find_server
from specforge.inference.server_client import ServerClient
from tests.eval.fake_server import Fake, serving

TOKENS, ACCEPTED = [5, 6, 7, 8, 9, 10, 11], [2, 0, 3]  # the last round accepts two tokens past the end
STEPS = [3, 1, 2]
QUESTION = Question([1, 2, 3], 7, [11], 0.5, "a1")


@pytest.fixture(params=["vllm", "sglang"])
def fake(request: pytest.FixtureRequest) -> Iterator[Fake]:
    with serving(lambda prompt: (list(TOKENS), list(ACCEPTED)), engine=request.param) as made:
        yield made


def server(fake: Fake) -> Server:
    return find_server(ServerClient(fake.url, patience=0))


def test_tokens_times_and_rounds_are_read(fake):
    made = server(fake)
    answer = made.ask(QUESTION)
    assert (answer.tokens, answer.rounds, answer.steps, answer.gamma) == (TOKENS, 3, STEPS, 3)
    assert 0 < answer.first <= answer.seconds
    assert str(made) == f"{fake.engine} 1.2 at {fake.url}"


def test_the_sampler_is_stated_completely(fake):
    server(fake).ask(QUESTION)
    (body,) = fake.asked
    sampling = body if fake.engine == "vllm" else body["sampling_params"]
    length = sampling["max_tokens" if fake.engine == "vllm" else "max_new_tokens"]
    assert (length, sampling["stop_token_ids"], sampling["temperature"]) == (7, [11], 0.5)
    assert (sampling["top_p"], sampling["top_k"], sampling["min_p"], sampling["repetition_penalty"]) == (1, -1, 0, 1)
    assert "a1" in (body.get("cache_salt"), body.get("extra_key"))


def test_no_more_requests_are_open_than_asked_for(fake):
    answers = server(fake).load([QUESTION] * 20, 4)
    assert [a.tokens for a in answers] == [TOKENS] * 20
    assert fake.most <= 4


def test_a_server_without_a_draft_has_no_rounds(fake):
    fake.script = lambda prompt: ([5, 6], None)
    answer = server(fake).ask(QUESTION)
    assert (answer.tokens, answer.rounds, answer.steps) == ([5, 6], None, None)


def test_the_counter_of_all_requests_is_summed_over_engines(fake):
    made = server(fake)
    made.ask(QUESTION)
    made.ask(QUESTION)
    assert made.rounds() == (6 if fake.engine == "vllm" else None)


def test_rounds_without_a_draft_are_counted_although_vllm_does_not(monkeypatch):
    """Of six tokens after the first, one counted round adds three."""
    answer = Answer(tokens=list(TOKENS))
    counted = {"speculative_decoding": {"acceptance_histogram": [0, 0, 1, 0]}}
    VLLMServer.read(object.__new__(VLLMServer), {"choices": [], "metrics": counted}, answer)
    assert (answer.rounds, answer.gamma, answer.steps) == (4, 3, None)


def test_steps_are_unknown_where_messages_were_merged():
    answer = Answer(rounds=3)
    for part in ([5], [6, 7, 8, 9], [10, 11]):
        answer.take(part)
    assert answer.steps is None


def test_increments_of_sglang_are_appended():
    made, answer = object.__new__(SGLangServer), Answer()
    made.gamma = None
    for ids, total in (([5], 1), ([6, 7], 3), ([8], 4)):
        made.read({"output_ids": ids, "meta_info": {"completion_tokens": total}}, answer)
    assert (answer.tokens, answer.parts) == ([5, 6, 7, 8], [1, 2, 1])


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (['data: {"error": {"message": "out of memory"}}'], "out of memory"),
        (['data: {"error": "gone"}'], "gone"),
        (["data: {"], r"cannot read its answer \{"),
        (['data: {"choices": 7}'], "cannot read its answer"),
        (["data: []"], "cannot read its answer"),
        (['data: {"choices": [{"text": "a"}]}', "data: [DONE]"], "an answer has no tokens"),
    ],
)
def test_a_broken_stream_is_one_line(fake, monkeypatch, lines, reason):
    made = VLLMServer(ServerClient(fake.url, patience=0), "tiny", "")
    monkeypatch.setattr(made.client, "stream", lambda path, body: _Stream(lines))
    with pytest.raises(UserError, match=rf"^server {fake.url}: {reason}"):
        made.ask(QUESTION)


class _Stream:
    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def __enter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        ({"data": []}, "lists no model$"),
        ([], r"/v1/models is not a list of models in OpenAI's form but \[\]"),
        ({"data": [{"id": "m", "owned_by": "llamacpp"}]}, "is neither vLLM nor SGLang but 'llamacpp'"),
    ],
)
def test_other_servers_are_refused(fake, monkeypatch, models, reason):
    client = ServerClient(fake.url, patience=0)
    monkeypatch.setattr(client, "get", lambda path: json.loads(json.dumps(models)))
    with pytest.raises(UserError, match=reason):
        find_server(client)
