"""What is SGLang's own in its client; tests/inference/test_vllm_engine.py tests what it shares with vLLM's."""

from __future__ import annotations

import json
import tempfile
from types import SimpleNamespace

import pytest

from specforge.contracts import CapturePolicy
from specforge.errors import UserError
from specforge.inference.engine_server import ServerOptions
from specforge.inference.sglang_server import SGLangServer, capture_arguments
from specforge.inference.target_engine.sglang import SGLangTargetEngine
from specforge.inference.target_files import TargetFiles

IDS = [5, 3, 8]


@pytest.fixture
def files(target):
    return TargetFiles.find(str(target))


@pytest.fixture
def engine(files, tmp_path):
    with SGLangTargetEngine(files, "float32", url="http://127.0.0.1:1", store=str(tmp_path)) as engine:
        yield engine


def answered(engine, monkeypatch, answer):
    bodies = []
    monkeypatch.setattr(engine, "_client", SimpleNamespace(post=lambda path, body: bodies.append(body()) or answer))
    monkeypatch.setattr(engine, "close", lambda: None)
    return engine._post(IDS, lambda: {"key": "a.1"}), bodies[0]


def meta(**fields):
    return {"prompt_token_ids": IDS, "meta_info": {"finish_reason": {"type": "length", "length": 1}} | fields}


def test_a_ticket_is_sent_as_text_and_the_servers_description_comes_back(engine, monkeypatch):
    found, body = answered(engine, monkeypatch, meta(specforge=[{"version": "0"}]))
    assert found == {"version": "0"}
    assert json.loads(body["sampling_params"]["custom_params"]["specforge"]) == {"key": "a.1"}
    assert body["return_hidden_states"] is True
    assert (body["input_ids"], body["sampling_params"]["max_new_tokens"]) == (IDS, 1)


def test_a_server_without_the_plugin(engine, monkeypatch):
    assert answered(engine, monkeypatch, meta(hidden_states=[[1.0]]))[0] is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (meta(specforge=[{}]) | {"prompt_token_ids": [1, *IDS]}, "has read other tokens than it was sent"),
        (meta(finish_reason={"type": "abort", "message": "no room"}), r"the request was aborted \(no room\)"),
        ({"choices": []}, "its answer is not that of an SGLang server"),
        (None, "its answer is not that of an SGLang server"),
    ],
)
def test_other_answers_are_refused(answer, reason, engine, monkeypatch):
    with pytest.raises(UserError, match=f"server http://127.0.0.1:1: {reason}"):
        answered(engine, monkeypatch, answer)


def test_the_last_layer_is_refused_before_a_server_starts(files, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(UserError, match=r"layer 7: SGLang captures the output of every layer but the last"):
        SGLangServer(files, "float32", CapturePolicy((1, 7)), None, ServerOptions("/no/such/python"))
    with pytest.raises(UserError, match=r"python /no/such/python: cannot be run .*; set --engine.python FILE"):
        SGLangServer(files, "float32", CapturePolicy((1,)), None, ServerOptions("/no/such/python"))
    assert not list(tmp_path.iterdir())


def test_options_of_a_server(files, monkeypatch):
    with SGLangTargetEngine(
        files, "float32", tensor_parallel=2, expert_parallel=True, max_model_len=99, arguments=["--x"]
    ) as engine:
        words = engine._start_options.arguments
    assert words == ("--tp-size", "2", "--context-length", "99", "--ep-size", "2", "--x")
    with pytest.raises(
        UserError,
        match=r"engine sglang: --engine.tensor_parallel is for starting a server; leave out either it or --engine.url",
    ):
        SGLangTargetEngine(files, "float32", url="http://127.0.0.1:1", store="s", tensor_parallel=2)


def test_the_last_states_alone_are_captured_beside_some_layer():
    arguments = capture_arguments([4, 1])
    layers = arguments.index("--return-aux-hidden-state-layer-ids") + 1
    assert arguments[layers:] == ["1", "4", "--disable-radix-cache", "--sleep-on-idle"]
