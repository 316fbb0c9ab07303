"""Features from a server's sink to its client, through a shared folder and Mooncake."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specforge.contracts import AUX_HIDDEN_STATES, INPUT_IDS, LAST_HIDDEN_STATES, LOSS_MASK, CapturePolicy, Provenance
from specforge.errors import UserError
from specforge.inference import handoff as handoff_module
from specforge.inference.handoff import FeatureSink, Handoff, Ticket, select_states
from specforge.runtime.addresses import open_backend
from specforge.runtime.data_plane import shared_dir
from specforge.runtime.data_plane.store import BadSampleError, FeatureStore, StoreFullError
from tests.runtime.data_plane.mooncake_store import absent, mooncake_store

IDS, WIDTH = [5, 3, 8, 1], 6
POLICY = CapturePolicy((4, 1))
FEATURES = {AUX_HIDDEN_STATES: (2 * WIDTH, "bfloat16"), LAST_HIDDEN_STATES: (WIDTH, "bfloat16")}


@pytest.fixture(params=["folder", pytest.param("mooncake", marks=[pytest.mark.mooncake, absent])])
def address(request, tmp_path) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path / "store")
        return
    with mooncake_store() as (found, _):
        yield found


@pytest.fixture
def sink(address) -> Iterator[FeatureSink]:
    made = FeatureSink(open_backend(address, create=True))
    yield made
    made.close()


def provenance(encoding: str = "raw") -> Provenance:
    return Provenance("tiny", "f" * 8, "t" * 8, POLICY, "bfloat16", encoding=encoding)


def captured(last: Tensor | None, layers: dict[int, Tensor] | None = None) -> Callable[[], dict[str, Tensor]]:
    return lambda: select_states(POLICY, states() if layers is None else layers, None if last is None else lambda: last)


def states() -> dict[int, Tensor]:
    return {v: torch.randn(len(IDS), WIDTH, generator=torch.Generator().manual_seed(v)).bfloat16() for v in (0, 1, 4)}


@pytest.mark.parametrize("encoding", ["raw", "float8_e4m3fn"])
def test_features_arrive_as_they_were_captured_and_leave_nothing_behind(address, sink, encoding):
    backend = open_backend(address)
    handoff = Handoff(backend, "http://s")
    ticket, ref = handoff.expect(IDS, FEATURES, provenance(encoding), loss_mask=[0, 1, 1, 0])
    last = torch.ones(len(IDS), WIDTH).bfloat16()
    sink.submit(Ticket.from_json(ticket.to_json()), IDS, captured(last), 1)
    handoff.wait(ticket)
    found = handoff.take(ref)
    aux = torch.cat([states()[4], states()[1]], dim=-1)
    assert torch.allclose(found[AUX_HIDDEN_STATES].float(), aux.float(), atol=0 if encoding == "raw" else 0.15)
    assert torch.equal(found[LAST_HIDDEN_STATES], last)
    assert found[INPUT_IDS].tolist() == IDS
    assert found[LOSS_MASK].tolist() == [0, 1, 1, 0]
    assert ref.nbytes == sum(x.nbytes for x in found.values()) or encoding != "raw"
    assert not backend.stored()


def test_a_reference_is_as_good_as_one_from_a_put(address, sink):
    """Any process that gets it reads the features, and notices damage."""
    handoff = Handoff(open_backend(address), "http://s")
    ticket, ref = handoff.expect(IDS, FEATURES, provenance(), sample_id="abc", loss_mask=[1] * 4, source="f, line 3")
    sink.submit(ticket, IDS, captured(torch.zeros(4, WIDTH).bfloat16()), 1)
    handoff.wait(ticket)
    reader = FeatureStore(open_backend(address))
    reader.adopt([ref])
    assert reader.get(ref)[AUX_HIDDEN_STATES].shape == (4, 2 * WIDTH)
    assert (ref.sample_id, ref.num_supervised, ref.source) == ("abc", 4, "f, line 3")
    if "://" not in address:
        (path,) = reader.backend.folder.rglob("*.safetensors")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        other = FeatureStore(open_backend(address))
        other.adopt([ref])
        with pytest.raises(BadSampleError, match="checksum does not match"):
            other.get(ref)
    handoff.discard(ticket)


def test_a_reference_without_a_checksum_needs_one_beside_the_features(tmp_path):
    handoff = Handoff(open_backend(str(tmp_path)), "http://s")
    ticket, ref = handoff.expect(IDS, FEATURES, provenance())
    handoff.backend.write(ticket.key, {INPUT_IDS: torch.tensor(IDS, dtype=torch.int32)}, ticket.uri)
    with pytest.raises(BadSampleError, match="checksum does not match"):
        handoff.take(ref)


def test_reasons_reach_the_client(address, sink):
    handoff = Handoff(open_backend(address), "http://s")
    for case, error, reason in [
        (
            lambda t: sink.submit(t, IDS, captured(None, {1: states()[1]}), 1),
            UserError,
            r"layer 4 is not among the captured layers \[1\]",
        ),
        (lambda t: sink.submit(t, IDS, captured(None), 1), UserError, "does not capture the last hidden states"),
        (lambda t: sink.submit(t, IDS, captured(torch.full((4, WIDTH), torch.nan)), 1), BadSampleError, "NaN"),
        (lambda t: sink.submit(t, IDS[:2], captured(states()[0]), 1), BadSampleError, "number of tokens"),
        (lambda t: sink.fail(t, "the request was aborted"), UserError, "server http://s: the request was aborted"),
    ]:
        ticket, _ = handoff.expect(IDS, FEATURES, provenance())
        case(ticket)
        with pytest.raises(error, match=reason):
            handoff.wait(ticket)
    assert not handoff.backend.stored()


def test_a_store_that_fails_or_is_full_never_stops_the_server(tmp_path):
    backend = open_backend(str(tmp_path))
    handoff, write = Handoff(backend, "http://s", patience=0.1), backend.write
    sink = FeatureSink(backend)
    failures = [StoreFullError("no space"), OSError("gone"), None]

    def fail(key, tensors, uri):
        if AUX_HIDDEN_STATES in tensors and (error := failures.pop(0)):
            raise error
        return write(key, tensors, uri)

    backend.write = fail
    for error, reason in ((StoreFullError, "no space"), (UserError, "gone"), (None, "")):
        ticket, ref = handoff.expect(IDS, FEATURES, provenance())
        sink.submit(ticket, IDS, captured(states()[0]), 1)
        if error:
            with pytest.raises(error, match=f"server http://s: {reason}"):
                handoff.wait(ticket)
        else:
            handoff.wait(ticket)
            assert handoff.take(ref)
    ticket, _ = handoff.expect(IDS, FEATURES, provenance())
    with pytest.raises(UserError, match="the features are not in the store"):
        handoff.wait(ticket)
    sink.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_without_space_is_a_full_store(tmp_path, monkeypatch, number):
    backend = open_backend(str(tmp_path))
    handoff, sink, write = Handoff(backend, "http://s"), FeatureSink(backend), shared_dir.write_flat

    def full(path, tensors, *, sync):
        if AUX_HIDDEN_STATES not in tensors:
            return write(path, tensors, sync=sync)
        path.write_bytes(b"what still fitted")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shared_dir, "write_flat", full)
    ticket, _ = handoff.expect(IDS, FEATURES, provenance())
    sink.submit(ticket, IDS, captured(states()[0]), 1)
    with pytest.raises(StoreFullError, match=os.strerror(number)):
        handoff.wait(ticket)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    sink.close()


def test_a_disk_without_space_even_for_the_reason_is_reported_as_a_full_store(tmp_path, monkeypatch):
    backend = open_backend(str(tmp_path))
    handoff, sink = Handoff(backend, "http://s", patience=5.0), FeatureSink(backend)

    def full(path, tensors, *, sync):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shared_dir, "write_flat", full)
    ticket, _ = handoff.expect(IDS, FEATURES, provenance())
    sink.submit(ticket, IDS, captured(states()[0]), 1)
    with pytest.raises(StoreFullError, match="server http://s: no space left in the store"):
        handoff.wait(ticket)
    assert not backend.stored()
    sink.close()


def test_features_that_were_taken_use_no_space_of_the_store(tmp_path):
    handoff, sink = Handoff(open_backend(str(tmp_path)), "http://s"), FeatureSink(open_backend(str(tmp_path)))
    ticket, ref = handoff.expect(IDS, FEATURES, provenance())
    sink.submit(ticket, IDS, captured(states()[0]), 1)
    handoff.wait(ticket)
    found = handoff.take(ref)
    assert found[INPUT_IDS].tolist() == IDS
    assert ticket.key not in Path("/proc/self/maps").read_text()
    sink.close()


def test_a_server_that_computes_in_python_leaves_the_sink_its_turns(tmp_path, monkeypatch):
    """A small sample waited for 350 ms beside a thread that never paused, with the interpreter's own 5 ms."""
    set_interval, intervals = sys.setswitchinterval, []
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: intervals.append(seconds))
    before = sys.getswitchinterval()
    try:
        for interval in (5e-3, 1e-5):
            set_interval(interval)
            FeatureSink(open_backend(str(tmp_path))).close()
    finally:
        set_interval(before)
    assert intervals == [1e-4, pytest.approx(1e-5)]


def test_a_slow_store_fills_the_queue_and_nothing_is_lost(tmp_path):
    backend = open_backend(str(tmp_path))
    go, write = threading.Event(), backend.write
    backend.write = lambda *args: go.wait(60) and write(*args)
    one = sum(x.nbytes for x in states().values())
    sink, handoff = FeatureSink(backend, max_bytes=2 * one), Handoff(backend, "http://s")
    tickets = []
    while sink.has_room():
        tickets.append(handoff.expect(IDS, FEATURES, provenance())[0])
        sink.submit(tickets[-1], IDS, captured(states()[0]), one)
    assert len(tickets) == 2
    assert not sink.drain(0.01)
    go.set()
    assert sink.drain(60)
    assert sink.has_room()
    for ticket in tickets:
        handoff.wait(ticket)
    sink.close()


@pytest.mark.parametrize(
    "change",
    [
        {"key": "../x.1"},
        {"key": "abc"},
        {"key": 3},
        {"loss_mask": "012"},
        {"encoding": "zip"},
        {"uri": None},
        {"capture": {"layer_ids": [1] * 1000, "last_hidden_states": True}},
        {"more": 1},
    ],
)
def test_a_hostile_ticket_is_refused(change, tmp_path):
    ticket, _ = Handoff(open_backend(str(tmp_path)), "http://s").expect(IDS, FEATURES, provenance())
    with pytest.raises(ValueError, match=next(iter(change))):
        Ticket.from_json(ticket.to_json() | change)


@pytest.mark.parametrize("uri", ["../../x.safetensors", "ab/other.1-0000000000000000.safetensors", ""])
def test_a_ticket_cannot_name_a_place_outside_the_store_or_another_sample(uri, tmp_path):
    backend = open_backend(str(tmp_path / "store"), create=True)
    ticket, _ = Handoff(backend, "http://s").expect(IDS, FEATURES, provenance(), sample_id="abc")
    sink = FeatureSink(backend)
    sink.submit(Ticket.from_json(ticket.to_json() | {"uri": uri or "x"}), IDS, captured(states()[0]), 1)
    sink.drain()
    assert [uri for _, uri in backend.stored()] == [ticket.error_uri]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    sink.close()


class Clock:
    """Stands in for ``time``; ``event`` is called once, when ``at`` is reached."""

    def __init__(self, at: float, event: Callable[[], object]) -> None:
        self.now, self._at, self._event = 0.0, at, event

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        before, self.now = self.now, self.now + seconds
        if before < self._at <= self.now:
            self._event()


def test_what_arrives_after_its_client_has_gone_is_deleted_and_not_waited_for_long(address, sink, monkeypatch):
    handoff = Handoff(open_backend(address), "http://s")
    tickets = [handoff.expect(IDS, FEATURES, provenance())[0] for _ in range(3)]
    last = torch.ones(len(IDS), WIDTH).bfloat16()

    def write() -> None:
        sink.submit(tickets[0], IDS, captured(last), 0)
        sink.fail(tickets[1], "too late")
        assert sink.drain(10)

    clock = Clock(1.5, write)
    monkeypatch.setattr(handoff_module, "time", clock)
    for ticket in tickets:
        handoff.discard(ticket)
    assert set(handoff.recent()) == set(tickets)
    handoff.clear()
    assert not handoff.backend.stored()
    assert list(handoff.late) == [tickets[2]]
    assert clock.now == pytest.approx(1.5 + handoff_module._LATE, abs=0.1)
    assert not handoff.recent()
    before = clock.now
    handoff.clear()  # nothing is expected any more
    assert clock.now == before


def test_a_closed_client_waits_for_nothing(address):
    handoff = Handoff(open_backend(address, create=True), "http://s")
    handoff.closed.set()
    with pytest.raises(UserError, match="its client is closed"):
        handoff.wait(handoff.expect(IDS, FEATURES, provenance())[0])
