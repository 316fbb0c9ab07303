"""The plugin for SGLang with stand-ins for what its scheduler passes; tests/test_sglang_capture.py runs it there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge.contracts import CapturePolicy, Provenance
from specforge.errors import UserError
from specforge.inference import sglang_plugin
from specforge.inference.handoff import FeatureSink, Handoff, Ticket
from specforge.inference.sglang_plugin import Capture, check_version, describe, write_distribution
from specforge.runtime.data_plane.shared_dir import SharedDirBackend

WIDTH, LAYERS = 4, [1, 3, 5]
DESCRIPTION = {"layers": LAYERS}
MODE = SimpleNamespace(is_full=lambda: True)


class Request:
    """As SGLang's scheduler keeps one."""

    def __init__(self, ids: list[int], ticket: Any = None, asks: bool = True) -> None:
        self.rid, self.origin_input_ids, self.return_hidden_states = "r", ids, asks
        params = None if ticket is None else {"specforge": ticket if isinstance(ticket, str) else json.dumps(ticket)}
        self.sampling_params = SimpleNamespace(custom_params=params)
        self.is_retracted, self.customized_info = False, None
        self.finished_reason = self.to_finish = None

    @property
    def answer(self) -> Any:
        """What the client finds in its answer."""
        return self.customized_info["specforge"][0]


class Server:
    """A scheduler with the plugin, and its client's end of the store."""

    def __init__(self, folder: Path, is_writer: bool = True) -> None:
        self.backend = SharedDirBackend(folder)
        self.sink = FeatureSink(self.backend)
        self.capture = Capture(lambda receiver: (self.sink, DESCRIPTION), lambda: is_writer)
        self.capture.pull(lambda receiver: [], None)
        self.handoff = Handoff(self.backend, "http://server", patience=5.0)
        self.native: list[Any] = []

    def ticket(self, ids: list[int], layers: tuple[int, ...] = (3, 1), last: bool = True) -> tuple[Ticket, Any]:
        features = {"aux_hidden_states": (WIDTH * len(layers), "float32")} if layers else {}
        features |= {"last_hidden_states": (WIDTH, "float32")} if last else {}
        provenance = Provenance("t", "f", "k", CapturePolicy(layers, last), "float32")
        return self.handoff.expect(ids, features, provenance)

    def run(self, batch: list[tuple[Request, Tensor, bool]]) -> None:
        """One forward pass: requests, the rows of a chunk of each ``[T, 4 * WIDTH]``, and whether it is their last."""
        rows = torch.cat([rows for _, rows, _ in batch])
        output = SimpleNamespace(hidden_states=rows[:, : 3 * WIDTH], last_hidden_states=rows[:, 3 * WIDTH :])
        offset = 0
        for req, chunk, is_last in batch:
            offset = self.capture.append_prefill_hidden_states(
                self._native,
                None,
                req=req,
                logits_output=output,
                hidden_state_offset=offset,
                capture_hidden_mode=MODE,
                extend_input_len=len(chunk),
                store=is_last,
            )
        assert offset == len(rows)

    def _native(self, processor: Any, **kwargs: Any) -> int:
        self.native.append(kwargs["req"])
        return kwargs["hidden_state_offset"] + kwargs["extend_input_len"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    torch.manual_seed(0)
    server = Server(tmp_path / "store")
    yield server
    server.sink.close()


def states(tokens: int) -> Tensor:
    """Of layers 1, 3, 5 and the last norm."""
    return torch.randn(tokens, 4 * WIDTH)


def expected(rows: Tensor, *layers: int) -> Tensor:
    return torch.cat([rows.split(WIDTH, -1)[LAYERS.index(layer)] for layer in layers], -1)


def test_prompts_in_chunks_beside_others(server):
    ids, other = [5, 6, 7, 8, 9], [1, 2]
    (ticket, ref), (second, second_ref) = server.ticket(ids), server.ticket(other, (5,), last=False)
    long, short = Request(ids, ticket.to_json()), Request(other, second.to_json())
    plain = Request([3, 4, 5], asks=False)
    rows, more = states(5), states(2)
    server.run([(plain, states(3), True), (long, rows[:2], False), (short, more, True)])
    server.run([(long, rows[2:4], False), (plain, states(1), True)])
    server.run([(long, rows[4:], True)])
    server.handoff.wait(ticket)
    server.handoff.wait(second)
    found, little = server.handoff.take(ref), server.handoff.take(second_ref)
    assert found["input_ids"].tolist() == ids
    assert torch.equal(found["aux_hidden_states"], expected(rows, 3, 1))
    assert torch.equal(found["last_hidden_states"], rows[:, 3 * WIDTH :])
    assert torch.equal(little["aux_hidden_states"], expected(more, 5))
    assert set(little) == {"aux_hidden_states", "input_ids"}
    assert long.answer == short.answer == DESCRIPTION
    assert server.native == [plain, plain]
    assert plain.customized_info is None


def test_rows_are_copied_before_the_next_pass_reuses_their_memory(server):
    ids = [1, 2, 3]
    ticket, ref = server.ticket(ids, (1,))
    rows = states(3)
    before, request = rows.clone(), Request(ids, ticket.to_json())
    server.run([(request, rows, True)])
    rows.zero_()
    server.handoff.wait(ticket)
    assert torch.equal(server.handoff.take(ref)["aux_hidden_states"], expected(before, 1))


class FINISH_ABORT:
    """As SGLang names it."""


@pytest.mark.parametrize("field", ["to_finish", "finished_reason"])
def test_a_request_whose_client_has_gone_leaves_nothing(server, field):
    request = Request([1, 2, 3], server.ticket([1, 2, 3], (1,))[0].to_json())
    setattr(request, field, FINISH_ABORT())
    server.run([(request, states(3), True)])
    server.sink.close()
    assert not server.backend.stored()


def test_a_retracted_request_starts_again(server):
    ids = [1, 2, 3]
    ticket, ref = server.ticket(ids, (1,))
    request = Request(ids, ticket.to_json())
    server.run([(request, states(2), False)])
    request.is_retracted = True
    server.run([(request, states(1), False)])
    request.is_retracted = False
    rows = states(4)  # with the token that it had generated
    server.run([(request, rows, True)])
    server.handoff.wait(ticket)
    assert torch.equal(server.handoff.take(ref)["aux_hidden_states"], expected(rows[:3], 1))


def test_tokens_that_were_not_computed(server):
    ids = [1, 2, 3]
    ticket, _ = server.ticket(ids)
    server.run([(Request(ids, ticket.to_json()), states(2), True)])
    with pytest.raises(UserError, match=r"server http://server: only 2 of 3 tokens were computed"):
        server.handoff.wait(ticket)


def test_states_of_another_shape(server):
    ids = [1, 2, 3]
    ticket, _ = server.ticket(ids)
    output = SimpleNamespace(hidden_states=torch.ones(3, 2 * WIDTH), last_hidden_states=torch.ones(3, WIDTH))
    end = server.capture.append_prefill_hidden_states(
        server._native,
        None,
        req=Request(ids, ticket.to_json()),
        logits_output=output,
        hidden_state_offset=0,
        capture_hidden_mode=MODE,
        extend_input_len=3,
    )
    assert end == 3
    with pytest.raises(UserError, match=r"SGLang returned states of shape \(3, 8\), not \(3, 12\)"):
        server.handoff.wait(ticket)


def test_a_description_is_given_without_capture(server):
    request = Request([1], {})
    server.run([(request, states(1), True)])
    assert request.answer == DESCRIPTION
    assert server.backend.stored() == []


MALFORMED: dict[str, Any] = {
    "not JSON": "{",
    "too deep": "[" * 100_000,
    "not an object": [1],
    "path in its key": {"key": "../../x.1"},
    "unknown layer": {"capture": {"layer_ids": [2], "last_hidden_states": True}},
    "a layer many times": {"capture": {"layer_ids": [1] * 1000, "last_hidden_states": True}},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_tickets_are_refused_in_the_answer(name, server):
    found = MALFORMED[name]
    ticket, _ = server.ticket([1, 2])
    request = Request([1, 2], {**ticket.to_json(), **found} if isinstance(found, dict) else found)
    after, ref = server.ticket([3])
    rows = states(1)
    server.run([(request, states(2), True), (Request([3], after.to_json()), rows, True)])
    assert request.answer["error"].startswith("malformed ticket: ")
    server.handoff.wait(after)
    assert torch.equal(server.handoff.take(ref)["last_hidden_states"], rows[:, 3 * WIDTH :])
    assert server.backend.stored() == []


def test_a_ticket_for_a_place_outside_the_store(server, tmp_path):
    ticket, _ = server.ticket([1])
    request = Request([1], {**ticket.to_json(), "uri": "../x", "error_uri": f"{tmp_path}/y"})
    server.run([(request, states(1), True)])
    assert server.sink.drain(5)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert server.backend.stored() == []


def test_other_ranks_hand_nothing_over(tmp_path):
    server = Server(tmp_path, is_writer=False)
    ticket, _ = server.ticket([1, 2])
    request = Request([1, 2], ticket.to_json())
    server.run([(request, states(2), True)])
    assert server.sink.drain(5)
    assert server.backend.stored() == []
    assert request.customized_info is None


class AbortReq(SimpleNamespace):
    """Known by its name, as SGLang's."""


def test_requests_with_a_ticket_wait_while_the_sink_is_full(server, monkeypatch):
    has_room = True
    monkeypatch.setattr(server.sink, "has_room", lambda: has_room)
    asks = [Request([1], {}) for _ in range(4)]
    for i, request in enumerate(asks):
        request.rid = f"r{i}"
    batch, plain, abort = SimpleNamespace(rid="b", batch=[asks[3]]), Request([1]), AbortReq(rid="r1", abort_all=False)

    def pull(*received: Any) -> list[Any] | None:
        return server.capture.pull(lambda receiver: list(received), None)

    assert pull(asks[0]) == [asks[0]]
    has_room = False
    assert pull(asks[1], plain, asks[2], batch) == [plain]
    assert pull(plain) == [plain]
    assert pull(abort) == [asks[1], abort]  # SGLang answers requests that it knows
    has_room = True
    assert pull(asks[0]) == [asks[2], batch, asks[0]]
    assert pull() == []
    assert server.capture.pull(lambda receiver: None, None) is None  # a rank that receives nothing


OPTIONS = {
    "enable_return_aux_hidden_states": True,
    "return_aux_hidden_state_layer_ids": [4, 1],
    "disable_radix_cache": True,
    "tp_size": 2,
    "ep_size": 1,
}


def test_the_description_of_a_server(target, monkeypatch):
    monkeypatch.setattr(sglang_plugin, "version", lambda name: "0.5.23")
    model = SimpleNamespace(dtype=torch.bfloat16, quantization=None, context_len=99)
    found = describe({**OPTIONS, "model_path": str(target)}, model, "/store")
    assert (found["layers"], found["dtype"], found["tensor_parallel"]) == ([1, 4], "bfloat16", 2)
    with pytest.raises(UserError, match=r"radix cache holds; add --disable-radix-cache"):
        describe({**OPTIONS, "disable_radix_cache": False}, model, "/store")
    with pytest.raises(UserError, match=r"captures no layers; start it with --enable-return-aux-hidden-states"):
        describe({**OPTIONS, "return_aux_hidden_state_layer_ids": None}, model, "/store")


def test_versions_that_were_not_tested_are_refused():
    check_version("0.5.23")
    with pytest.raises(UserError, match=r"SGLang 0.5.17: features cannot be captured with it; install 0.5.23"):
        check_version("0.5.17")


class Owner:
    def method(self, one, other): ...


def test_methods_that_have_changed_are_refused(monkeypatch):
    module = ModuleType("fake_sglang")
    module.Owner = Owner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_sglang", module)
    assert sglang_plugin._find("fake_sglang:Owner.method", ("self", "one", "other")) == (Owner, "method")
    with pytest.raises(UserError, match=r"fake_sglang:Owner.method takes self, one, other, not self, one$"):
        sglang_plugin._find("fake_sglang:Owner.method", ("self", "one"))
    for path in ("fake_sglang:Owner.gone", "fake_sglang:Gone.method", "no_such_module:Owner.method"):
        with pytest.raises(UserError, match=rf"SGLang: {path} is missing"):
            sglang_plugin._find(path, ("self",))


def test_an_unsupported_version_ends_the_server(monkeypatch):
    monkeypatch.setattr(sglang_plugin, "version", lambda name: "0.4.1")
    with pytest.raises(SystemExit, match=r"specforge: SGLang 0.4.1"):
        sglang_plugin.install()


def test_the_folder_for_pythonpath_holds_the_plugin_alone(tmp_path):
    write_distribution(tmp_path, "/store", 5)
    assert {path.name for path in tmp_path.iterdir()} == {"specforge", "specforge_sglang_plugin-1.dist-info"}
    code = (
        "from importlib.metadata import distribution, entry_points\n"
        "(found,) = entry_points(group='sglang.srt.plugins')\n"
        "print(found.name, found.load().__name__, found.dist.read_text('store.json'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split(maxsplit=2) == ["specforge", "install", '{"store": "/store", "max_bytes": 5}\n'], (
        done.stderr
    )
