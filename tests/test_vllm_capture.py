"""Features from vLLM itself: a server of its own, our connector in it, a store, and runs that train on them.

vLLM lives in an environment of its own, which ``--vllm-python`` names. One server is shared by the module; the last
test kills it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from specforge.cli.main import main
from specforge.contracts import CapturePolicy
from specforge.errors import UserError
from specforge.inference.handoff import NotDeliveredError
from specforge.inference.target_engine.hf import HFTargetEngine
from specforge.inference.target_engine.vllm import VLLMTargetEngine
from specforge.inference.target_files import TargetFiles
from specforge.inference.vllm_server import VLLMServer
from tests import vllm_cpu
from tests.captured import assert_a_closed_client_leaves_nothing, assert_close, random_prompts, stored
from tests.disaggregated import assert_nothing_is_left, disaggregated, places, producers
from tests.tiny import recipe, write_target

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

POLICY = CapturePolicy((4, 1, 3))
STEP = 64  # tokens that the server reads in one step
ARGUMENTS = [
    "--enforce-eager",
    "--max-num-seqs",
    "8",
    "--max-num-batched-tokens",
    str(STEP),
    "--disable-uvicorn-access-log",
]


@pytest.fixture(scope="module")
def python(pytestconfig: pytest.Config) -> str:
    path = pytestconfig.getoption("--vllm-python")
    if not path:
        pytest.skip("vLLM is elsewhere: --vllm-python names its interpreter")
    return str(path)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """A tiny target whose heads are as wide as vLLM wants them on a CPU."""
    return write_target(tmp_path_factory.mktemp("target") / "tiny", hidden=128)


@pytest.fixture(scope="module")
def files(target) -> TargetFiles:
    return TargetFiles.find(str(target))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory, target, conversations) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    assert main(["prepare", "--data", str(conversations), "--target", str(target), "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def server(python, files, tmp_path_factory):
    """An engine with a server of its own; two workers share each layer."""
    folder = tmp_path_factory.mktemp("vllm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(VLLMServer, "launch", vllm_cpu.SERVE)
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the workers share what cores there are
        options = {"python": python, "tensor_parallel": 2, "max_model_len": 300, "arguments": ARGUMENTS}
        with VLLMTargetEngine(files, "float32", store=str(folder / "store"), log=folder / "log", **options) as engine:
            engine.check(POLICY)
            yield engine


@pytest.fixture
def engine(server, files):
    """A client of that server."""
    with VLLMTargetEngine(files, "float32", url=server.url, store=server.store, patience=600) as engine:
        engine.check(POLICY)
        yield engine


def test_features_are_transformers_whatever_their_prompts_share_steps_with(engine, files):
    """Prompts within a step, at its border, and over several."""
    prompts = random_prompts(1, 3, STEP - 1, STEP, STEP + 1, 150, 200, 299)
    reference = HFTargetEngine(files, "float32")
    found = engine.capture(prompts, POLICY)
    for ids, features in zip(prompts, found, strict=True):
        assert_close(features, reference.capture([ids], POLICY)[0])
    assert engine.description == "vllm 0.32.0 tp2"
    assert not stored(engine)
    (again,) = engine.capture([prompts[6]], POLICY)  # most of it comes from vLLM's prefix cache
    assert all(torch.equal(again[name], found[6][name]) for name in again)
    (longer,) = engine.capture([prompts[6] + [1, 2, 3]], POLICY)
    assert all(torch.equal(longer[name][:128], found[6][name][:128]) for name in longer)
    assert_close(longer, reference.capture([prompts[6] + [1, 2, 3]], POLICY)[0])


def test_it_also_answers_as_transformers_does(engine, files):
    prompts, how = random_prompts(5, 40, 9), {"max_new_tokens": 12, "end_ids": [7]}
    assert engine.generate(prompts, **how) == HFTargetEngine(files, "float32").generate(prompts, **how)


def complete(server, params, **more):
    body = {"model": server.target.name, "prompt": [5, 3, 8], "max_tokens": 2, "temperature": 0}
    return httpx.post(
        f"{server.url}/v1/completions",
        json=body | more | ({"kv_transfer_params": params} if params else {}),
        timeout=60,
    )


def test_other_requests_are_answered_as_ever_and_malformed_tickets_with_an_error(server):
    plain = complete(server, None).json()
    assert plain["kv_transfer_params"] is None
    for ticket in ({"key": "../../etc/passwd.1"}, [1], "x", {"uri": 3}):
        answer = complete(server, {"specforge": ticket}).json()
        assert answer["kv_transfer_params"]["specforge"]["error"].startswith("malformed ticket: ")
        assert answer["choices"][0]["text"] == plain["choices"][0]["text"]
    assert complete(server, {"specforge": {}}).json()["kv_transfer_params"]["specforge"]["layers"] == [1, 3, 4, 7]


def test_a_ticket_for_a_place_outside_the_store_writes_nothing(engine):
    ticket, _ = engine._handoff.expect([5, 3, 8], {"aux_hidden_states": (1, "float32")}, provenance(engine))
    for uri in ("../x.safetensors", "/tmp/x.safetensors", "ab/other.1-0000000000000000.safetensors"):
        assert complete(engine, {"specforge": ticket.to_json() | {"uri": uri}}).status_code == 200
        with pytest.raises(UserError, match="is not the name of a file of"):
            engine._handoff.wait(ticket)
    assert not stored(engine)


def provenance(engine):
    from specforge.contracts import Provenance

    return Provenance("t", engine.target.fingerprint, "", POLICY, "float32")


def test_another_target_and_other_layers_are_refused(server, files, tmp_path):
    other = TargetFiles.find(str(write_target(tmp_path / "other", seed=1, hidden=128)))
    options = {"url": server.url, "store": server.store}
    with (
        VLLMTargetEngine(other, "float32", **options) as engine,
        pytest.raises(UserError, match="serves another target"),
    ):
        engine.check(POLICY)
    with (
        VLLMTargetEngine(files, "float32", **options) as engine,
        pytest.raises(UserError, match="does not capture layer 6"),
    ):
        engine.check(CapturePolicy((6,)))
    with (
        VLLMTargetEngine(files, "bfloat16", **options) as engine,
        pytest.raises(UserError, match="computes in float32"),
    ):
        engine.check(POLICY)


def test_a_store_that_is_gone_for_a_while_stops_neither_the_server_nor_later_requests(engine):
    folder = Path(engine.store)
    hidden = folder.rename(folder.with_name("away"))
    engine._handoff = type(engine._handoff)(engine._handoff.backend, engine.url, patience=0.5)
    try:
        with pytest.raises(NotDeliveredError):
            engine.capture([[1, 2]], POLICY)
    finally:
        hidden.rename(folder)
    assert engine.capture([[1, 2]], POLICY)


def test_a_run_from_no_features_at_all_and_one_with_a_producer(engine, target, prompts, tmp_path):
    """Online, then disaggregated with two producers on the one server: what transformers gives, within rounding."""
    weights = {}
    for name, options in {
        "hf": {"class_path": "HFTargetEngine"},
        "vllm": {"class_path": "VLLMTargetEngine", "init_args": {"url": engine.url, "store": engine.store}},
    }.items():
        data = {"prompts": str(prompts), "batch_size": 4, "dtype": "float32", "engine": options}
        path = recipe(target, prompts, tmp_path / name, data={"class_path": "OnlineDataModule", "init_args": data})
        assert main(["fit", "--config", str(path)]) == 0
        weights[name] = last_weights(tmp_path / name)
    assert_weights_close(weights["vllm"], weights["hf"])

    where = places(tmp_path) | {"store": engine.store}
    path = disaggregated(target, prompts, tmp_path / "run", where)
    with producers(target, where, 2, engine=lambda files, dtype: engine):
        assert main(["fit", "--config", str(path)]) == 0
    assert_nothing_is_left(where, 72)


def last_weights(folder):
    path = next((folder / "run").rglob("last.ckpt"))
    return torch.load(path, weights_only=True, map_location="cpu")["state_dict"]


def assert_weights_close(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.allclose(found[name].float(), x.float(), rtol=1e-3, atol=1e-4), name


def test_a_client_that_is_closed_during_its_requests_leaves_nothing(server, engine):
    assert_a_closed_client_leaves_nothing(engine, server, random_prompts(*[250] * 48), POLICY)


def test_a_server_that_is_killed_during_requests_and_started_again_loses_nothing(server, engine, files):
    prompts = random_prompts(*[250] * 24)
    process, reference = server._own.process, HFTargetEngine(files, "float32")
    path = Path(server._own._folder) / "path"
    begun = threading.Event()
    ask = engine._ask
    engine._ask = lambda *args: begun.set() or ask(*args)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(engine.capture, prompts, POLICY)
        assert begun.wait(60)
        os.killpg(process.pid, signal.SIGKILL)  # with its engine, which would outlive it
        process.wait()
        with server._own._log.open("ab") as log:
            server._own.process = subprocess.Popen(
                process.args,
                env={**os.environ, "PYTHONPATH": str(path)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        features = found.result(600)
    for ids, one in zip(prompts, features, strict=True):
        assert_close(one, reference.capture([ids], POLICY)[0])
