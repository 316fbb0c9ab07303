"""The client of a vLLM server, with a stand-in for the server; tests/test_vllm_capture.py has the real one."""

from __future__ import annotations

import errno
import shlex
import signal
import socket
import sys
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from specforge.contracts import CapturePolicy, PromptTask, Provenance
from specforge.errors import UserError
from specforge.inference.handoff import NotDeliveredError
from specforge.inference.rollout_worker import RolloutWorker, capture_one
from specforge.inference.target_engine import served
from specforge.inference.target_engine.base import UnavailableError
from specforge.inference.target_engine.hf import HFTargetEngine
from specforge.inference.target_engine.http import HTTPTargetEngine
from specforge.inference.target_engine.vllm import VLLMTargetEngine
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_server import TargetServer, make_token
from specforge.inference.vllm_server import VLLMServer
from specforge.runtime.data_plane import shared_dir
from specforge.runtime.data_plane.local import MemoryBackend
from specforge.runtime.data_plane.store import BadSampleError, FeatureStore, StoreFullError
from tests.fake_vllm import fake_vllm
from tests.processes import Command
from tests.tiny import recipe, write_target

POLICY = CapturePolicy((4, 1))
PROMPTS = [[5, 3, 8], list(range(60)), [7], list(range(100, 120))]


@pytest.fixture
def server(target, tmp_path):
    with fake_vllm(target, tmp_path / "store") as server:
        yield server


@pytest.fixture
def files(target):
    return TargetFiles.find(str(target))


@pytest.fixture
def engine(server, files, tmp_path):
    with VLLMTargetEngine(files, "float32", url=server.url, store=str(tmp_path / "store"), patience=10) as engine:
        yield engine


def test_the_options_for_training_can_be_pasted(server, files, tmp_path):
    store = tmp_path / "my store"
    store.mkdir()
    with VLLMTargetEngine(files, "float32", url=server.url, store=str(store)) as engine:
        words = ["--data.engine", "vllm", "--data.engine.url", server.url, "--data.engine.store", str(store)]
        assert shlex.split(engine.options) == words


def stored(engine):
    return engine._handoff.backend.stored()


def test_features_are_those_of_the_server_and_nothing_stays_in_the_store(engine, server, files):
    engine.check(POLICY)
    found, expected = engine.capture(PROMPTS, POLICY), HFTargetEngine(files, "float32")
    for ids, features in zip(PROMPTS, found, strict=True):
        (same,) = expected.capture([ids], POLICY)
        assert features.keys() == same.keys()
        assert all(torch.equal(features[name], same[name]) for name in same)
    assert engine.description == "vllm 0.32.0 tp1"
    assert not stored(engine)


def test_samples_are_delivered_into_the_store_of_a_run(engine, server, files, tmp_path):
    engine.check(POLICY)
    tasks = [PromptTask("t", tuple(ids), (1,) * len(ids), f"f, line {i}") for i, ids in enumerate(PROMPTS)]
    provenance = Provenance("tiny", files.fingerprint, "t", POLICY, "float32", encoding="float8_e4m3fn")
    refs = engine.deliver(tasks, ["a", "b", "c", "d"], provenance)
    store = FeatureStore(engine._handoff.backend)
    store.adopt(refs)
    for ref, task in zip(refs, tasks, strict=True):
        tensors = store.get(ref)
        assert tensors["input_ids"].tolist() == list(task.input_ids)
        assert tensors["loss_mask"].tolist() == list(task.loss_mask)
        assert (ref.source, ref.num_supervised) == (task.source, len(task.input_ids))
    assert sorted(key for key, _ in stored(engine)) == ["a.1", "b.1", "c.1", "d.1"]


def hang_up(body):
    raise ConnectionAbortedError


@pytest.mark.parametrize("fault", [hang_up, lambda body: 503, lambda body: 500])
def test_an_attempt_that_is_lost_is_repeated_under_another_name(engine, server, fault):
    engine.check(POLICY)
    names = []
    server.faults = [lambda body: names.append(body["kv_transfer_params"]["specforge"]["uri"]) or fault(body)]
    server.faults.append(lambda body: names.append(body["kv_transfer_params"]["specforge"]["uri"]))
    (features,) = engine.capture([[1, 2]], POLICY)
    assert len(features["last_hidden_states"]) == 2
    assert len(set(names)) == 2
    assert not stored(engine)


def test_a_server_that_dies_between_its_answer_and_the_features_is_asked_again(engine, server, monkeypatch):
    engine.check(POLICY)
    engine._handoff = type(engine._handoff)(engine._handoff.backend, engine.url, patience=0.2)
    lost, submit = [1, 1], server.sink.submit
    monkeypatch.setattr(server.sink, "submit", lambda *args: lost.pop() if lost else submit(*args))
    assert engine.capture([[1, 2]], POLICY)
    lost.extend([1, 1, 1])
    with pytest.raises(NotDeliveredError, match="it has answered, but after"):
        engine.capture([[1, 2]], POLICY)


def test_a_server_that_does_not_come_back_is_unavailable(target, files, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        engine = VLLMTargetEngine(files, "float32", url=url, store=str(tmp_path), patience=0.1)
        with pytest.raises(UnavailableError, match="no answer for"):
            engine.check(POLICY)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target_fingerprint": "0" * 32}, "serves another target than .*fingerprints 00000000 and"),
        ({"dtype": "bfloat16"}, "computes in bfloat16, not float32; set --dtype bfloat16 .in `fit`: --data.dtype"),
        (
            {"layers": [1, 2]},
            r"does not capture layer 4, only layers \[1, 2\] and the last .*; start it again with "
            r"--layer_ids '\[4, 1\]'$",
        ),
        ({"last_hidden_states": False}, r"does not capture the last hidden states, .*; start it again with the --alg"),
        ({"error": "malformed"}, "malformed"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(engine, server, changes, reason):
    server.description |= changes
    with pytest.raises(UserError, match=reason) as refused:
        engine.check(POLICY)
    # A producer ends then, and gives up no prompt.
    assert isinstance(refused.value, UnavailableError) == ("error" not in changes)


def test_layers_that_the_server_behind_target_serve_lacks_are_refused_with_the_option(engine, files, tmp_path):
    engine.check(POLICY)
    make_token(tmp_path / "token")
    with TargetServer(engine, files, (tmp_path / "token").read_text().strip()) as front:
        thread = threading.Thread(target=front.serve_forever, args=[0.01])
        thread.start()
        with (
            HTTPTargetEngine(files, "float32", front.url, tmp_path / "token") as client,
            pytest.raises(UserError, match=r"start it again with --layer_ids '\[5\]' .HTTP 400.$"),
        ):
            client.check(CapturePolicy((5,)))
        front.shutdown()
        thread.join()


def test_a_misspelt_store_of_a_running_server_is_refused_and_not_created(server, files, tmp_path):
    store = tmp_path / "stor"
    with pytest.raises(
        UserError, match=f"no such folder.*name the store that the server {server.url} was started with"
    ):
        VLLMTargetEngine(files, "float32", url=server.url, store=str(store))
    assert not store.exists()


def test_a_missing_store_is_named_by_its_option(files):
    with pytest.raises(UserError, match=r"no store; set --engine\.store STORE .in `fit`: --data\.engine\.store"):
        VLLMTargetEngine(files, "float32", url="http://127.0.0.1:1")


def test_versions_and_servers_without_the_connector_are_refused_by_name(engine, server):
    server.description = {}
    with pytest.raises(UserError, match="does not capture; start it with `specforge target serve"):
        engine.check(POLICY)
    server.version = "0.31.9"
    with pytest.raises(UserError, match=r"vLLM 0\.31\.9 is not supported; use 0\.26, 0\.32"):
        engine.check(POLICY)


def test_a_store_that_is_not_the_servers_is_named(server, files, tmp_path):
    own, other = str(tmp_path / "store"), str(tmp_path / "other")
    (tmp_path / "other").mkdir()  # a store that does not exist is refused before
    engine = VLLMTargetEngine(files, "float32", url=server.url, store=other, patience=0.2)
    with engine, pytest.raises(UnavailableError, match=f"do not arrive in {other}; it writes to {own}, which must"):
        engine.check(POLICY)
    server.sink.drain()
    assert not server.sink._backend.stored()
    assert not stored(engine)


def test_what_a_stopped_client_has_asked_for_does_not_stay(engine, server):
    """The server answers some requests before the client goes, and does not hear of that while it reads others."""
    engine.check(POLICY)
    began, gone = threading.Semaphore(0), threading.Event()

    def answer_late(body):
        began.release()
        gone.wait(30)

    server.faults = [answer_late, lambda body: None] * 4
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(engine.capture, [[i, 2, 3] for i in range(8)], POLICY)
        for _ in range(4):
            assert began.acquire(timeout=30)
        threading.Timer(0.5, gone.set).start()
        engine.close()
        with pytest.raises((UserError, RuntimeError, CancelledError)):
            found.result(30)
    assert gone.is_set()
    server.sink.drain()
    assert not stored(engine)


def test_a_stopped_fit_and_a_stopped_capture_leave_nothing_in_the_servers_store(target, prompts, tmp_path):
    data = {
        "class_path": "OnlineDataModule",
        "init_args": {"prompts": str(prompts), "batch_size": 4, "dtype": "float32"},
    }
    path = recipe(target, prompts, tmp_path, data=data)
    with fake_vllm(target, tmp_path / "store") as server:
        options = ["vllm", "url", server.url, "store", str(tmp_path / "store"), "compare", "false"]
        for command, number in [("fit", signal.SIGTERM), ("capture", signal.SIGTERM), ("capture", signal.SIGINT)]:
            began, gone = threading.Event(), threading.Event()
            server.faults = [lambda body: None] * 3 + [
                lambda body, b=began, g=gone: b.set() or (g.wait(30) and None)
            ] * 99
            words = ["--config", str(path)] if command == "fit" else []
            prefix = "--data.engine" if command == "fit" else "--engine"
            words += [prefix, options[0]]
            words += [x for key, y in zip(options[1::2], options[2::2], strict=True) for x in (f"{prefix}.{key}", y)]
            if command == "capture":
                words += ["--target", str(target), "--prompts", str(prompts), "--output", str(tmp_path / "features")]
                words += ["--dtype", "float32", "--layer_ids", "[1,3,4]"]
            process = Command(command, *words)
            assert began.wait(60), process.communicate(timeout=1)
            process.send_signal(number)
            threading.Timer(0.5, gone.set).start()
            output, _ = process.communicate(timeout=60)
            assert process.returncode == (143 if command == "fit" else 130), output
            server.sink.drain()
            assert not server.sink._backend.stored(), command


def test_an_interrupted_capture_does_not_wait_for_features(engine, server, monkeypatch):
    engine.check(POLICY)
    looked, holds = threading.Event(), engine._handoff.backend.holds

    def interrupt(future: Future) -> None:
        assert looked.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(server.sink, "submit", lambda *_: None)  # it answers, but stores nothing
    monkeypatch.setattr(engine._handoff.backend, "holds", lambda *where: looked.set() or holds(*where))
    monkeypatch.setattr(Future, "result", interrupt)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine.capture([[1]], POLICY)
    assert time.monotonic() - began < engine._handoff.patience / 2


def test_states_that_are_not_the_targets_are_noticed(server, files, tmp_path, tmp_path_factory):
    server.engine = HFTargetEngine(TargetFiles.find(str(write_target(tmp_path / "x", seed=1))), "float32")
    options = {"url": server.url, "store": str(tmp_path / "store")}
    engine = VLLMTargetEngine(files, "float32", **options)
    with engine, pytest.raises(UserError, match="its aux_hidden_states differ from transformers' by"):
        engine.check(POLICY)
    with VLLMTargetEngine(files, "float32", **options, compare=False) as engine:
        engine.check(POLICY)


def test_a_prompt_that_is_too_long_is_refused_before_it_is_sent(engine, server):
    engine.check(POLICY)
    with pytest.raises(UserError, match="a prompt of 128 tokens, but the server reads at most 127"):
        engine.capture([[1] * 128], POLICY)


def test_a_server_that_was_restarted_as_another_is_refused(engine, server):
    engine.check(POLICY)
    server.description |= {"target_fingerprint": "1"}
    with pytest.raises(UserError, match="was restarted with another target_fingerprint"):
        engine.capture([[1, 2]], POLICY)
    server.sink.drain()  # it may write what it has answered
    engine.close()
    assert not stored(engine)


def test_tokens_are_compared(engine, server, monkeypatch):
    engine.check(POLICY)
    complete = server.complete
    monkeypatch.setattr(server, "complete", lambda body: complete(body | {"prompt": [9, *body["prompt"][1:]]}))
    with pytest.raises(UserError, match="has read other tokens than it was sent"):
        engine.capture([[1, 2]], POLICY)


def test_what_a_store_refuses_is_reported_per_sample(engine, server, files, monkeypatch):
    engine.check(POLICY)
    tasks = [PromptTask("t", (i,), (1,)) for i in range(1, 4)]
    write = server.sink._backend.write

    def fail(key, group, uri):
        if key == "b.1" and "error" not in group:
            raise StoreFullError("no space")
        return write(key, group, uri)

    monkeypatch.setattr(server.sink._backend, "write", fail)
    submit = server.sink.submit

    def spoil(ticket, ids, states, nbytes):
        broken = {k: v * torch.nan for k, v in states().items()}
        submit(ticket, ids, (lambda: broken) if ticket.key == "c.1" else states, nbytes)

    monkeypatch.setattr(server.sink, "submit", spoil)
    provenance = Provenance("tiny", files.fingerprint, "t", POLICY, "float32")
    good, full, bad = engine.deliver(tasks, ["a", "b", "c"], provenance)
    assert good.sample_id == "a"
    assert isinstance(full, StoreFullError)
    assert isinstance(bad, BadSampleError)
    assert [key for key, _ in stored(engine)] == ["a.1"]
    assert not engine._handoff.late


@pytest.fixture
def full(server, tmp_path, monkeypatch):
    """A disk with space for some number of bytes."""
    room, write = SimpleNamespace(bytes=1 << 30), shared_dir.write_flat

    def limited(path, tensors, *, sync):
        held = sum(x.stat().st_size for x in (tmp_path / "store").rglob("*.safetensors"))
        if held + sum(x.nbytes for x in tensors.values()) > room.bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors, sync=sync)

    monkeypatch.setattr(shared_dir, "write_flat", limited)
    return room


def bytes_per_token(engine):
    (features,) = engine.capture([[1] * 100], POLICY)
    return sum(x.nbytes for x in features.values()) / 100


def test_a_capture_waits_for_space_and_says_so_once(engine, full, caplog):
    engine.check(POLICY)
    prompts = [[i] * 20 for i in range(1, 9)]
    some = 2.5 * 20 * bytes_per_token(engine)
    full.bytes = 600  # the reason
    threading.Timer(0.3, setattr, (full, "bytes", some)).start()
    found = engine.capture(prompts, POLICY)
    assert [len(x["aux_hidden_states"]) for x in found] == [20] * 8
    assert [x.getMessage()[:20] for x in caplog.records if x.name.endswith("served")] == ["the store is full (s"]
    assert not stored(engine)


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_a_capture_into_a_store_that_stays_full_keeps_what_fits(engine, full, files, monkeypatch, batch_tokens):
    engine.check(POLICY)
    monkeypatch.setattr(served, "_FULL_SECONDS", 0.3)
    tasks = [PromptTask(f"t{n}", (1,) * n, (1,) * n) for n in (2, 3, 100)]
    full.bytes, committed = 20 * bytes_per_token(engine), []
    provenance = Provenance("tiny", files.fingerprint, "t", POLICY, "float32")
    worker = RolloutWorker(engine, FeatureStore(MemoryBackend()), committed.extend, provenance)
    with pytest.raises(StoreFullError, match=r"the store .* was full for 0\.3 s"):
        list(worker.produce(tasks, batch_tokens))
    assert [ref.num_tokens for ref in committed] == [2, 3]
    with pytest.raises(UserError, match="was full for") as found:
        capture_one(engine, worker.store, tasks[2], provenance)
    assert not isinstance(found.value, StoreFullError)  # which would be the trainer's memory


def test_if_one_request_is_refused_the_others_leave_nothing(engine, server, files):
    engine.check(POLICY)
    tasks = [PromptTask("t", (1,) * n, (1,) * n) for n in (2, 200, 3)]
    provenance = Provenance("tiny", files.fingerprint, "t", POLICY, "float32")
    with pytest.raises(UserError, match="a prompt of 200 tokens"):
        engine.deliver(tasks, ["a", "b", "c"], provenance)
    assert not stored(engine)


def test_a_server_of_its_own_that_is_killed_is_reported_at_once(server, files, tmp_path, monkeypatch, caplog):
    class Own(VLLMServer):
        launch = ("-c", "import time; time.sleep(600)")

        def wait(self):
            assert self.url == "http://127.0.0.1:12345"
            self.url = server.url  # the stand-in answers for the process

        def _check_python(self, python):
            pass

    monkeypatch.setattr(VLLMTargetEngine, "server", Own)
    options = {"python": sys.executable, "arguments": ["--port", "12345"], "log": tmp_path / "log"}
    (tmp_path / "store").rmdir()
    with VLLMTargetEngine(files, "float32", store=str(tmp_path / "store"), **options) as engine:
        engine.check(POLICY)
        assert f"new feature store: {tmp_path / 'store'}" in caplog.text
        engine._own.process.send_signal(signal.SIGKILL)
        engine._own.process.wait()
        ended = f"vLLM was ended by SIGKILL; see {tmp_path / 'log'}"
        with pytest.raises(UserError, match=ended):
            engine.capture([[1]], POLICY)
        with pytest.raises(UserError, match=ended):
            engine._ask([0])  # the first request of a check, which asks for the server's description only
        with TargetServer(engine, files, "x" * 20, port=0) as proxy, pytest.raises(UserError, match=ended):
            proxy.serve_forever(poll_interval=0.01)


@pytest.mark.parametrize("words", ["decrease `--gpu-memory-utilization`", "Decrease GPU memory utilization or"])
def test_the_option_for_a_flag_of_the_server_is_named(files, words):
    with VLLMTargetEngine(files, "float32") as engine, pytest.raises(UserError) as found, engine._own_names():
        raise UserError(f"vLLM ended with status 1: {words}")
    assert str(found.value).endswith(f"{words}; --gpu-memory-utilization is --engine.memory")


@pytest.mark.parametrize("models", [{"data": []}, [], {"data": [7]}, {}])
def test_what_is_no_list_of_models_is_one_line(engine, monkeypatch, models):
    get = engine._client.get
    monkeypatch.setattr(engine._client, "get", lambda path: models if path == "/v1/models" else get(path))
    with pytest.raises(UserError, match=r"/v1/models (lists no model$|is not a list of models in OpenAI's form but )"):
        engine.check(POLICY)


def test_a_warning_is_not_why_a_server_ended(tmp_path):
    server = object.__new__(VLLMServer)
    server._log = tmp_path / "vllm.log"
    server._log.write_text(
        "(APIServer pid=1) WARNING 11-29 06:01:00 [system_utils.py:299] This can cause fd limit errors like `OSError: "
        "[Errno 24] Too many open files`.\n"
        "(APIServer pid=1) ERROR 11-29 06:01:01 [registry.py:1019] ModuleNotFoundError: No module named 'x'\n"
    )
    assert server._last_error() == "ModuleNotFoundError: No module named 'x'"
