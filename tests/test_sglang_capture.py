"""Features from SGLang itself: a server of its own with our plugin, a store, and runs that train on them.

SGLang lives in an environment of its own, which ``--sglang-python`` names; the kernels that it has no CPU build of are
stood in for by ``tests/sglang_cpu``. One server is shared by the module; the last test kills it.
"""

from __future__ import annotations

import json
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
from specforge.contracts import CapturePolicy, Provenance
from specforge.errors import UserError
from specforge.inference.handoff import NotDeliveredError
from specforge.inference.sglang_server import SGLangServer
from specforge.inference.target_engine.hf import HFTargetEngine
from specforge.inference.target_engine.sglang import SGLangTargetEngine
from specforge.inference.target_files import TargetFiles
from tests.captured import assert_a_closed_client_leaves_nothing, assert_close, random_prompts, stored
from tests.sglang_cpu import CAPTURE, LAUNCH, environment
from tests.tiny import recipe, write_target

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

POLICY = CapturePolicy((4, 1, 3))
CHUNK = 16  # tokens of a prompt that the server reads in one pass


@pytest.fixture(scope="module")
def python(pytestconfig: pytest.Config) -> str:
    """The interpreter of SGLang's environment."""
    path = pytestconfig.getoption("--sglang-python")
    if not path:
        pytest.skip("SGLang is elsewhere: --sglang-python names its interpreter (docs/user-guide.md, section 5)")
    return str(path)


@pytest.fixture(scope="module")
def files(target) -> TargetFiles:
    return TargetFiles.find(str(target))


@pytest.fixture(scope="module")
def server(python, files, tmp_path_factory):
    """An engine with a server of its own."""
    folder = tmp_path_factory.mktemp("sglang")
    options = {"python": python, "arguments": [*CAPTURE, "--chunked-prefill-size", str(CHUNK)]}
    with SGLangTargetEngine(files, "float32", store=str(folder / "store"), log=folder / "log", **options) as engine:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SGLangServer, "launch", LAUNCH)
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setenv("TORCHDYNAMO_DISABLE", "1")
            engine.check(POLICY)
        yield engine


@pytest.fixture
def engine(server, files):
    """A client of that server."""
    with SGLangTargetEngine(files, "float32", url=server.url, store=server.store) as engine:
        engine.check(POLICY)
        yield engine


def generate(engine, ticket=None, **more):
    sampling = {"temperature": 0, "max_new_tokens": 3}
    if ticket is not None:
        sampling["custom_params"] = {"specforge": ticket if isinstance(ticket, str) else json.dumps(ticket)}
    body = {"input_ids": [5, 3, 8], "sampling_params": sampling, "return_hidden_states": ticket is not None} | more
    answer = httpx.post(f"{engine.url}/generate", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def expect(engine):
    provenance = Provenance("t", engine.target.fingerprint, "", POLICY, "float32")
    features = {"aux_hidden_states": (96, "float32"), "last_hidden_states": (32, "float32")}
    return engine._handoff.expect([5, 3, 8], features, provenance)


def test_features_are_transformers_however_their_prompts_are_cut_and_mixed(engine, files):
    prompts = random_prompts(1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 70, 150)
    reference = HFTargetEngine(files, "float32")
    with ThreadPoolExecutor(1) as other:
        plain = other.submit(generate, engine)
        found = engine.capture(prompts, POLICY)
        again = engine.capture(prompts, CapturePolicy((3,), last_hidden_states=False))
    for ids, features, some in zip(prompts, found, again, strict=True):
        (expected,) = reference.capture([ids], POLICY)
        assert_close(features, expected)
        assert_close(some, {"aux_hidden_states": expected["aux_hidden_states"][:, 64:]})
    assert "specforge" not in plain.result()["meta_info"]
    assert engine.description == "sglang 0.5.23 tp1"
    assert not stored(engine)


def test_it_also_answers_as_transformers_does(engine, files):
    prompts, how = random_prompts(5, 40, 9), {"max_new_tokens": 12, "end_ids": [7]}
    assert engine.generate(prompts, **how) == HFTargetEngine(files, "float32").generate(prompts, **how)


def test_tickets_that_are_malformed_or_name_other_places(engine):
    plain = generate(engine)["output_ids"]
    for ticket in ({"key": "../../etc/passwd.1"}, [1], "{", {"uri": 3}):
        answer = generate(engine, ticket)
        assert answer["meta_info"]["specforge"][0]["error"].startswith("malformed ticket: ")
        assert answer["output_ids"] == plain
    assert generate(engine, {})["meta_info"]["specforge"][0]["layers"] == [1, 3, 4]
    ticket, _ = expect(engine)
    for uri in ("../x.safetensors", "/tmp/x.safetensors", "ab/other.1-0000000000000000.safetensors"):
        generate(engine, ticket.to_json() | {"uri": uri})
        with pytest.raises(UserError, match="is not the name of a file of"):
            engine._handoff.wait(ticket)
    assert not stored(engine)


def test_another_target_dtype_and_layers_are_refused(server, files, tmp_path):
    options = {"url": server.url, "store": server.store}
    other = TargetFiles.find(str(write_target(tmp_path / "other", seed=1)))
    for target, dtype, policy, reason in [
        (other, "float32", POLICY, "serves another target"),
        (files, "bfloat16", POLICY, "computes in float32"),
        (files, "float32", CapturePolicy((6,)), r"does not capture layer 6, only layers \[1, 3, 4\]"),
    ]:
        with SGLangTargetEngine(target, dtype, **options) as engine, pytest.raises(UserError, match=reason):
            engine.check(policy)


def test_a_store_that_is_gone_for_a_while_stops_neither_the_server_nor_later_requests(engine):
    folder = Path(engine.store)
    hidden = folder.rename(folder.with_name("away"))
    handoff, engine._handoff = engine._handoff, type(engine._handoff)(engine._handoff.backend, engine.url, patience=0.5)
    try:
        with pytest.raises(NotDeliveredError):
            engine.capture([[1, 2]], POLICY)
    finally:
        hidden.rename(folder)
    engine._handoff = handoff
    assert engine.capture([[1, 2]], POLICY)


def test_a_run_from_no_features_at_all(engine, target, prompts, tmp_path):
    weights = {}
    for name, options in {
        "hf": {"class_path": "HFTargetEngine"},
        "sglang": {"class_path": "SGLangTargetEngine", "init_args": {"url": engine.url, "store": engine.store}},
    }.items():
        data = {"prompts": str(prompts), "batch_size": 4, "dtype": "float32", "engine": options}
        path = recipe(target, prompts, tmp_path / name, data={"class_path": "OnlineDataModule", "init_args": data})
        assert main(["fit", "--config", str(path)]) == 0
        last = next((tmp_path / name / "run").rglob("last.ckpt"))
        weights[name] = torch.load(last, weights_only=True, map_location="cpu")["state_dict"]
    assert weights["hf"].keys() == weights["sglang"].keys()
    for name, x in weights["hf"].items():
        assert torch.allclose(weights["sglang"][name].float(), x.float(), rtol=1e-3, atol=1e-4), name


def test_a_client_that_is_closed_during_its_requests_leaves_nothing(server, engine):
    assert_a_closed_client_leaves_nothing(engine, server, random_prompts(*[150] * 48), POLICY)


def test_a_server_that_is_killed_during_requests_and_started_again_loses_nothing(server, engine, files, monkeypatch):
    prompts = random_prompts(*[150] * 12)
    process, reference = server._own.process, HFTargetEngine(files, "float32")
    path = {"PYTHONPATH": str(server._own._folder / "path")}
    begun = threading.Event()
    post = engine._post
    monkeypatch.setattr(engine, "_post", lambda *args: begun.set() or post(*args))
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(engine.capture, prompts, POLICY)
        assert begun.wait(60)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        server._own.process = subprocess.Popen(
            process.args, env=environment() | path, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        features = found.result(600)
    for ids, one in zip(prompts, features, strict=True):
        assert_close(one, reference.capture([ids], POLICY)[0])
