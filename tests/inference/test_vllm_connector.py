"""vLLM's connector without vLLM: what it notes, copies, holds and reports; tests/test_vllm_capture.py has the rest."""

from __future__ import annotations

import pickle
import sys
import threading
import types
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy, Provenance
from specforge.errors import UserError
from specforge.inference.handoff import Handoff
from specforge.inference.target_files import TargetFiles
from specforge.runtime.addresses import open_backend
from tests.families import FAMILIES, write_family

BLOCK, IDS, HIDDEN = 4, [2, 4, 8], 32
POLICY = CapturePolicy((3, 1))
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
FEATURES = {AUX_HIDDEN_STATES: (2 * HIDDEN, "float32"), LAST_HIDDEN_STATES: (HIDDEN, "float32")}


class Base:
    """The part of vLLM's base class that the connector relies on."""

    def __init__(self, vllm_config, role, kv_cache_config):
        self._vllm_config, self._connector_metadata = vllm_config, None


class Spec:
    """A group of blocks of hidden states."""


@pytest.fixture
def vllm(monkeypatch):
    """The names that the connector imports; ``rank`` is the worker's."""
    state = SimpleNamespace(rank=0, layers=["states"])
    module = "vllm.distributed.kv_transfer.kv_connector.v1.base"
    names = {
        "vllm": {"__version__": "0.32.0"},
        "vllm.config": {"get_layers_from_vllm_config": lambda config, kind, names: dict.fromkeys(state.layers)},
        "vllm.distributed.parallel_state": {"get_tensor_model_parallel_rank": lambda: state.rank},
        "vllm.model_executor.models.extract_hidden_states": {"CacheOnlyAttentionLayer": object},
        "vllm.v1.kv_cache_interface": {"HiddenStateCacheSpec": Spec},
        module: {
            "KVConnectorBase_V1": Base,
            "KVConnectorMetadata": type("KVConnectorMetadata", (), {}),
            "KVConnectorRole": SimpleNamespace(SCHEDULER=1, WORKER=2),
            "SupportsHMA": type("SupportsHMA", (), {}),
        },
    }
    for name, values in names.items():
        for i in range(1, name.count(".") + 2):
            part = ".".join(name.split(".")[:i])
            monkeypatch.setitem(sys.modules, part, sys.modules.get(part) or types.ModuleType(part))
        vars(sys.modules[name]).update(values)
    monkeypatch.delitem(sys.modules, "specforge.inference.vllm_connector", raising=False)
    import specforge.inference.vllm_connector as connector

    yield SimpleNamespace(state=state, SpecForgeConnector=connector.SpecForgeConnector, Exporter=connector.Exporter)
    sys.modules.pop("specforge.inference.vllm_connector")


def config(target, store, ids=IDS, **changes):
    hf_config = SimpleNamespace(eagle_aux_hidden_state_layer_ids=ids)
    speculative = SimpleNamespace(
        method="extract_hidden_states", draft_model_config=SimpleNamespace(hf_config=hf_config)
    )
    parallel = SimpleNamespace(tensor_parallel_size=2, decode_context_parallel_size=1, enable_expert_parallel=False)
    extra = {"store": str(store)}
    fields = {
        "model_config": SimpleNamespace(model=str(target), dtype=torch.float32, quantization=None, max_model_len=64),
        "speculative_config": speculative,
        "parallel_config": parallel,
        "kv_transfer_config": SimpleNamespace(get_from_extra_config=lambda key, default: extra.get(key, default)),
    }
    return SimpleNamespace(**fields | changes)


class Server:
    """A scheduler's connector and those of its workers, connected as vLLM does it."""

    def __init__(self, vllm, target, store, workers=1, groups=1, device="cpu", **changes):
        options = config(target, store, **changes)
        specs = [SimpleNamespace(kv_cache_spec=Spec() if i == groups - 1 else None) for i in range(groups)]
        self.scheduler = vllm.SpecForgeConnector(options, 1, SimpleNamespace(kv_cache_groups=specs))
        self.cache = torch.randn(20, len(IDS), BLOCK, HIDDEN, generator=torch.Generator().manual_seed(0))
        self.cache, self.workers = self.cache.to(device), []
        for rank in range(workers):
            vllm.state.rank = rank
            self.workers.append(vllm.SpecForgeConnector(options, 2, None))
            self.workers[-1].register_kv_caches({"states": self.cache})

    def finish(self, ticket, ids, blocks, read=True, groups=(), status="FINISHED_LENGTH_CAPPED"):
        request = SimpleNamespace(
            request_id=f"r{blocks}",
            prompt_token_ids=ids,
            num_output_tokens=int(read),
            status=SimpleNamespace(name=status),
            kv_transfer_params=None if ticket is None else {"specforge": ticket},
        )
        return self.scheduler.request_finished_all_groups(request, [*groups, blocks])

    def steps(self):
        """The requests that the first worker reports, over as many steps as it takes."""
        while not (done := self.step()[0]):
            pass
        return done

    def step(self):
        """What each worker reports."""
        metadata = pickle.loads(pickle.dumps(self.scheduler.build_connector_meta(None)))
        for worker in self.workers:
            worker._connector_metadata = metadata
        return [worker.get_finished(set())[0] for worker in self.workers]


def expect(store, ids, **options):
    handoff = Handoff(open_backend(str(store)), "http://s", patience=10)
    return handoff, *handoff.expect(ids, FEATURES, Provenance("tiny", "f", "t", POLICY, "float32"), **options)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])
def test_the_rows_of_a_prompt_arrive_in_the_order_of_the_request(vllm, target, tmp_path, device):
    server, ids = Server(vllm, target, tmp_path, groups=2, device=device), [5, 6, 7, 8, 9, 10]
    handoff, ticket, ref = expect(tmp_path, ids)
    held, answer = server.finish(ticket.to_json(), ids, [7, 3], groups=[[1]])
    assert held
    assert answer["specforge"]["layers"] == [1, 3, 7]
    assert answer["specforge"]["target_fingerprint"] == TargetFiles.find(str(target)).fingerprint
    assert server.steps() == {"r[7, 3]"}
    handoff.wait(ticket)
    found, cache = handoff.take(ref), server.cache.cpu()
    rows = torch.cat([cache[7], cache[3]], dim=1)[:, : len(ids)]
    assert torch.equal(found[AUX_HIDDEN_STATES], torch.cat([rows[1], rows[0]], dim=-1))
    norm = AutoModelForCausalLM.from_pretrained(target).model.norm
    assert torch.allclose(found[LAST_HIDDEN_STATES], norm(rows[2]), atol=0 if device == "cpu" else 1e-6)


def test_the_cache_of_another_version_has_the_same_rows(vllm, target, tmp_path, monkeypatch):
    server, ids = Server(vllm, target, tmp_path), [5, 6, 7, 8, 9, 10]
    handoff, ticket, ref = expect(tmp_path, ids)
    swapped = server.cache.transpose(1, 2).contiguous()
    with pytest.raises(UserError, match=r"vLLM 0\.32\.0 has an unknown form"):
        server.workers[0].register_kv_caches({"states": swapped})
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.26.0")
    server.workers[0].register_kv_caches({"states": swapped})
    server.finish(ticket.to_json(), ids, [7, 3])
    server.steps()
    handoff.wait(ticket)
    rows = torch.cat([server.cache[7], server.cache[3]], dim=1)[:, : len(ids)]
    assert torch.equal(handoff.take(ref)[AUX_HIDDEN_STATES], torch.cat([rows[1], rows[0]], dim=-1))


def test_requests_that_ask_for_nothing_are_not_touched(vllm, target, tmp_path):
    server = Server(vllm, target, tmp_path)
    assert server.finish(None, [1], [2]) == (False, None)
    first, second = server.scheduler.build_connector_meta(None), server.scheduler.build_connector_meta(None)
    assert first is second
    assert server.step() == [None]


def test_an_empty_request_asks_who_the_server_is(vllm, target, tmp_path):
    held, answer = Server(vllm, target, tmp_path).finish({}, [1], [2])
    assert not held
    assert answer["specforge"] == {
        "version": "0.32.0",
        "target_fingerprint": TargetFiles.find(str(target)).fingerprint,
        "dtype": "float32",
        "quantization": "",
        "layers": [1, 3, 7],
        "last_hidden_states": True,
        "max_model_len": 64,
        "tensor_parallel": 2,
        "expert_parallel": False,
        "store": str(tmp_path),
    }


@pytest.mark.parametrize("ticket", [[], "x", 3, {"key": "../x.1"}, {"key": "a.1"}])
def test_a_malformed_ticket_is_answered(vllm, target, tmp_path, ticket):
    server = Server(vllm, target, tmp_path)
    held, answer = server.finish(ticket, [1], [2])
    assert not held
    assert answer["specforge"]["error"].startswith("malformed ticket: ")
    assert server.step() == [None]


def test_only_the_first_worker_of_the_stage_with_the_states_exports(vllm, target, tmp_path):
    server = Server(vllm, target, tmp_path, workers=2)
    handoff, ticket, _ = expect(tmp_path, [1, 2])
    server.finish(ticket.to_json(), [1, 2], [4])
    assert server.step() == [{"r[4]"}, None]
    assert server.scheduler.get_finished_count() == 1
    handoff.wait(ticket)
    assert len(handoff.backend.stored()) == 1
    vllm.state.layers, vllm.state.rank = [], 0  # an earlier stage of the pipeline
    early = vllm.SpecForgeConnector(config(target, tmp_path), 2, None)
    early.register_kv_caches({"other": server.cache})
    assert early.get_finished(set()) == (None, None)


def test_a_request_whose_client_has_gone_leaves_nothing(vllm, target, tmp_path):
    server = Server(vllm, target, tmp_path)
    handoff, ticket, _ = expect(tmp_path, [1, 2])
    for read in (False, True):
        held, _ = server.finish(ticket.to_json(), [1, 2], [4], read=read, status="FINISHED_ABORTED")
        assert not held
    assert server.step() == [None]
    server.workers[0]._exporter.sink.close()
    assert not handoff.backend.stored()


def test_a_request_that_ended_early_is_answered_in_the_store(vllm, target, tmp_path):
    server = Server(vllm, target, tmp_path)
    handoff, ticket, _ = expect(tmp_path, [1, 2])
    held, _ = server.finish(ticket.to_json(), [1, 2], [], read=False, status="FINISHED_IGNORED")
    assert not held
    assert server.step() == [None]
    with pytest.raises(UserError, match="the request ended before its prompt was read"):
        handoff.wait(ticket)


def test_whatever_fails_ends_the_request_not_the_engine(vllm, target, tmp_path):
    server = Server(vllm, target, tmp_path)
    handoff, ticket, _ = expect(tmp_path, list(range(9)))
    server.finish(ticket.to_json(), list(range(9)), [4, 5])
    assert server.step() == [{"r[4, 5]"}]
    with pytest.raises(UserError, match="2 blocks do not hold 9 tokens"):
        handoff.wait(ticket)


def test_blocks_are_held_while_the_store_is_slow_and_nothing_is_lost(vllm, target, tmp_path):
    server = Server(vllm, target, tmp_path)
    sink, go = server.workers[0]._exporter.sink, threading.Event()
    sink._max_bytes, write = 1, sink._backend.write
    sink._backend.write = lambda *args: go.wait(60) and write(*args)
    first, second = expect(tmp_path, [1, 2]), expect(tmp_path, [3, 4])
    server.finish(first[1].to_json(), [1, 2], [4])
    assert server.step() == [{"r[4]"}]
    server.finish(second[1].to_json(), [3, 4], [5])
    assert server.step() == [None]
    assert server.step() == [None]
    go.set()
    assert sink.drain(60)
    assert server.step() == [{"r[5]"}]
    for handoff, ticket, _ in (first, second):
        handoff.wait(ticket)


@pytest.mark.parametrize("ids", [[], [0, 2], [2, 2, 4], [9], None, ["2"]])
def test_ids_that_do_not_exist_stop_the_server_from_starting(vllm, target, tmp_path, ids):
    with pytest.raises(UserError, match="needs different ids between 1 and 8"):
        Server(vllm, target, tmp_path, ids=ids)


def test_a_server_that_cannot_capture_does_not_start(vllm, target, tmp_path):
    parallel = SimpleNamespace(decode_context_parallel_size=2)
    for changes, reason in [
        ({"speculative_config": None}, "extract_hidden_states"),
        ({"parallel_config": parallel}, "context parallelism"),
    ]:
        with pytest.raises(UserError, match=reason):
            Server(vllm, target, tmp_path, **changes)
    with pytest.raises(UserError, match="names no feature store"):
        Server(vllm, target, "")


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.refusal is None])
def test_the_norm_after_the_layers_gives_the_last_hidden_states(name, tmp_path):
    files = TargetFiles.find(str(write_family(name, tmp_path)))
    model = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32).eval()
    from specforge.inference.target_layers import backbone, decoder_layers

    outputs = []
    decoder_layers(model)[-1].register_forward_hook(
        lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        expected = backbone(model)(input_ids=torch.tensor([[5, 3, 8]]), use_cache=False).last_hidden_state
        found = files.norm_module(torch.float32)(outputs[0])
    assert torch.equal(found, expected)
