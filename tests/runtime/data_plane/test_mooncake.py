"""The real Mooncake store: nothing evicted, nothing half there, and what is lost is said to be lost."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from threading import Event

import pytest
import torch

from specforge.cli.serve import mooncake_master
from specforge.errors import UserError
from specforge.runtime.data_plane import mooncake
from specforge.runtime.data_plane.mooncake import MooncakeAddress, MooncakeBackend, connect
from specforge.runtime.data_plane.store import BadSampleError, FeatureStore, StoreFullError
from tests.runtime.data_plane.mooncake_store import free_ports, mooncake_store, needs_mooncake, store_up
from tests.runtime.data_plane.test_store import PROVENANCE, SampleRef, put, sample

MB = 1 << 20


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def running():
    with mooncake_store() as (address, _):
        yield address


@pytest.fixture
def address(running, tmp_path):
    """A namespace of its own in one store."""
    return f"{running}#{tmp_path.name}"


def close(*stores: FeatureStore) -> None:
    for store in stores:
        store.backend.close()


@pytest.mark.parametrize(
    "text", ["mooncake://h:1?metrics=2", "mooncake://h:50051?metrics=9003&protocol=rdma&devices=mlx5_0,mlx5_1#run"]
)
def test_an_address_is_read_and_written(text):
    assert str(MooncakeAddress.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "mooncake://",
        "mooncake://h:x",
        "mooncake://h?metrics=x",
        "mooncake://h?protocol=carrier-pigeon",
        "mooncake://h?a=1",
        "mooncake://h?host=x",
        "mooncake://h?metrics=99999",
        "mooncake://h?metrics=",
        "mooncake://h:99999",
        "mooncake://h/path",
        "mooncake://user@h",
        "mooncake://[::1",
    ],
)
def test_a_wrong_address_is_refused(text):
    with pytest.raises(UserError, match="store mooncake://") as found:
        MooncakeBackend(text)
    assert "__init__" not in str(found.value)


@needs_mooncake
def test_without_a_master_it_is_said_at_once():
    port, metrics = free_ports(2)
    backend = MooncakeBackend(f"mooncake://127.0.0.1:{port}?metrics={metrics}")
    with pytest.raises(UserError, match=r"no master answers .*specforge store up"):
        backend.write("a.1", sample())


def put_only(store: FeatureStore, name: str, seed: int = 0, length: int = 300_000) -> SampleRef:
    return store.put(name, sample(seed, length), num_supervised=1, source="", provenance=PROVENANCE)


@needs_mooncake
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
def test_a_full_store_refuses_and_evicts_nothing(together):
    """The flush refuses; what arrived can be read, and what did not waits until there is room or it is discarded."""
    with mooncake_store(64 * MB) as (address, _):
        store = FeatureStore(MooncakeBackend(address))
        refs: list[SampleRef] = []
        with pytest.raises(StoreFullError, match="no space"):  # noqa: PT012 - until it is full
            while len(refs) < 20:
                refs.append(put_only(store, f"s{len(refs)}", seed=len(refs)))
                if not together:
                    store.flush()
            store.flush()
        kept = [ref for ref in refs if store.holds(ref)]
        assert 8 <= len(kept) < 20
        for ref in kept:
            tensors = store.get(ref)
            assert torch.equal(tensors["states"], sample(int(ref.sample_id[1:]), 300_000)["states"])
        with pytest.raises(StoreFullError):
            store.flush()  # nothing that a flush has let pass is missing
        store.delete(kept.pop(0))
        with pytest.raises(StoreFullError) if together else nullcontext():
            store.flush()  # there is room for one more
        for ref in refs:
            if not store.holds(ref):
                store.discard(ref)
        store.flush()
        assert store.pending() == 0
        store.delete(kept[0])
        put(store, "again", length=300_000)
        close(store)


class Gate:
    """A client of which puts wait, break off, or go to a dead owner."""

    def __init__(self, backend: MooncakeBackend) -> None:
        self._client = backend._join()[0]
        backend._joined = (os.getpid(), self, *backend._join()[1:])
        self.started, self.opened, self.broken = Event(), Event(), False
        self.lost = 0  # puts whose owner is dead
        self.puts: list[int] = []

    def __getattr__(self, name):
        return getattr(self._client, name)

    def batch_put_from_multi_buffers(self, names, *rest):
        self.puts.append(len(names))
        self.started.set()
        assert self.opened.wait(60)
        if self.broken:
            raise ConnectionError
        if self.lost:
            self.lost -= 1
            return [mooncake._TRANSFER] * len(names)
        return self._client.batch_put_from_multi_buffers(names, *rest)


@needs_mooncake
def test_what_waits_goes_in_one_call_and_what_is_discarded_on_its_way_does_not_stay(address):
    store = FeatureStore(backend := MooncakeBackend(address))
    gate = Gate(backend)
    refs = [put_only(store, "s0")]
    assert gate.started.wait(60)
    refs += [put_only(store, f"s{i}", i) for i in range(1, 4)]
    assert store.pending() > sum(ref.nbytes for ref in refs)
    assert not any(store.holds(ref) for ref in refs)
    with ThreadPoolExecutor(1) as pool:
        discarded = [pool.submit(store.discard, ref) for ref in refs[:2]]
        while len(backend._waiting) == 4:
            time.sleep(0.001)  # the discarding has begun; it tells nobody
        gate.opened.set()
        for done in discarded:
            done.result()
    store.flush()
    assert gate.puts[0] == 1
    assert len(gate.puts) == 2
    assert store.pending() == 0
    assert [store.holds(ref) for ref in refs] == [False, False, True, True]
    store.flush()
    assert len(gate.puts) == 2
    close(store)


@needs_mooncake
def test_a_flush_that_breaks_off_is_done_again(address):
    store = FeatureStore(backend := MooncakeBackend(address))
    gate = Gate(backend)
    gate.broken = True
    gate.opened.set()
    ref = put_only(store, "a")
    with pytest.raises(ConnectionError):
        store.flush()
    assert not store.holds(ref)
    gate.broken = False
    store.flush()
    tensors = store.get(ref)
    assert torch.equal(tensors["states"], sample(0, 300_000)["states"])
    close(store)


@needs_mooncake
def test_a_flush_waits_until_a_dead_owner_is_known_to_be_dead(address, monkeypatch):
    monkeypatch.setattr(mooncake, "_PAUSE", 0.0)
    store = FeatureStore(backend := MooncakeBackend(address))
    gate = Gate(backend)
    gate.opened.set()
    gate.lost = 3
    ref = put_only(store, "a")
    store.flush()
    assert store.holds(ref)
    gate.lost = 2
    monkeypatch.setattr(mooncake, "_FORGOTTEN", 0.0)
    put_only(store, "b")
    with pytest.raises(UserError, match=r"could not be put \(Mooncake error -800\)"):
        store.flush()
    store.flush()
    close(store)


@needs_mooncake
def test_what_is_written_last_arrives_before_the_store_is_left(address):
    store = FeatureStore(backend := MooncakeBackend(address))
    gate = Gate(backend)
    refs = [put_only(store, f"s{i}", i) for i in range(3)]
    gate.opened.set()
    close(store)
    other = FeatureStore(MooncakeBackend(address))
    assert all(other.holds(ref) for ref in refs)
    close(other)


@needs_mooncake
def test_buffers_are_registered_once_and_handed_out_again_only_when_nobody_reads_them(address):
    store = FeatureStore(MooncakeBackend(address))
    refs = [put(store, f"s{i}", seed=i, length=20_000) for i in range(4)]
    read = [store.get(ref) for ref in refs]
    for i, tensors in enumerate(read):
        assert torch.equal(tensors["states"], sample(i, 20_000)["states"])
    kept = read[0]["states"][3:5]
    places = {tensors["states"].data_ptr() for tensors in read}
    del tensors, read
    gc.collect()
    for _ in range(10):
        tensors = store.get(refs[1])
        assert tensors["states"].data_ptr() in places
    assert torch.equal(kept, sample(0, 20_000)["states"][3:5])
    close(store)


@needs_mooncake
def test_other_processes_read_and_delete_what_was_put(address):
    code = (
        "import json, sys\n"
        "from tests.runtime.data_plane.test_mooncake import *\n"
        "store = FeatureStore(MooncakeBackend(sys.argv[1]))\n"
        "print(json.dumps([put(store, f's{i}', seed=i).to_json() for i in range(5)]), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    output = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True).stdout
    refs = [SampleRef.from_json(fields) for fields in json.loads(output)]
    store = FeatureStore(MooncakeBackend(address))
    store.adopt(refs[:4])
    for seed, ref in enumerate(refs[:4]):
        tensors = store.get(ref)
        assert torch.equal(tensors["states"], sample(seed)["states"])
    store.discard(refs[0])
    assert store.remove_orphans(refs[1:4]) == 1
    assert [store.holds(ref) for ref in refs] == [False, True, True, True, False]
    assert FeatureStore(MooncakeBackend(address + "-other")).backend.stored() == []
    close(store)


@needs_mooncake
def test_samples_go_through_registered_buffers_where_the_transport_wants_that(address):
    store = FeatureStore(backend := MooncakeBackend(address))
    first = put(store, "a")
    backend.address = replace(backend.address, protocol="rdma")  # joined over TCP, which takes any memory
    refs = [first, put(store, "b", seed=1), put(store, "c", seed=2, length=100_000)]
    for seed, ref in enumerate(refs):
        tensors = store.get(ref)
        assert torch.equal(tensors["states"], sample(seed, ref.num_tokens)["states"])
    close(store)


@needs_mooncake
def test_no_memory_is_taken_for_the_size_that_a_tampered_name_says(address):
    store = FeatureStore(MooncakeBackend(address))
    ref = put(store, "a")
    huge = replace(ref, uri=ref.uri.rpartition("-")[0] + "-999999999999")
    with pytest.raises(BadSampleError, match="not in a"):
        store._read("a.1", huge)
    close(store)


@needs_mooncake
def test_a_uri_is_only_good_for_its_own_sample(address):
    store = FeatureStore(MooncakeBackend(address))
    a, b = put(store, "a"), put(store, "b")
    other = FeatureStore(MooncakeBackend(address))
    other.adopt([replace(b, uri=a.uri)])
    with pytest.raises(BadSampleError, match=r"is not the name of a value of b\.1"):
        other.get(replace(b, uri=a.uri))
    close(store)


@needs_mooncake
def test_after_a_restart_with_nothing_samples_are_lost_and_new_ones_are_kept():
    ports = free_ports(2)
    first = store_up(*ports)
    address = first.stdout.readline().split(": ")[0]
    store = FeatureStore(MooncakeBackend(address))
    ref = put(store)
    first.kill()  # the owner; the master ends with it
    first.communicate()
    with pytest.raises(BadSampleError, match=r"sample a: .* is lost"):
        store.get(ref)
    for port in ports:
        while is_open(port):
            time.sleep(0.01)  # there is nothing to wait on but the port
    with pytest.raises(UserError, match="does not answer"):
        store.holds(ref)
    second = store_up(*ports)
    try:
        assert second.stdout.readline().startswith(address)
        tensors = store.get(put(store, "c"))  # by the client that knew the first
        assert torch.equal(tensors["states"], sample()["states"])
        close(store)
        store = FeatureStore(MooncakeBackend(address))
        store.adopt([ref])
        assert not store.holds(ref)
        with pytest.raises(BadSampleError, match="sample a: not in"):
            store.get(ref)
        new = put(store, "b")
        tensors = store.get(new)
        assert torch.equal(tensors["states"], sample()["states"])
        close(store)
    finally:
        second.terminate()
        second.communicate()


@needs_mooncake
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_the_command_names_a_taken_port_and_stops_cleanly(end):
    with mooncake_store(16 * MB) as (address, process):
        found = MooncakeAddress.parse(address)
        assert found.host == "127.0.0.1"
        for ports in ((found.port, free_ports(1)[0]), (free_ports(1)[0], found.metrics)):
            taken = found.port if found.port in ports else found.metrics
            words = rf"127\.0\.0\.1:{taken}: cannot listen there \(Address already in use\)"
            with pytest.raises(UserError, match=words), mooncake_master("127.0.0.1", *ports):
                pass
        process.send_signal(end)
        output, error = process.communicate(timeout=60)
        assert process.returncode == 0
        assert output.endswith("stopped\n")
        assert "Traceback" not in error
    with pytest.raises(UserError, match="no master answers"):
        MooncakeBackend(address).holds("a.1", "a.1-0123456789abcdef-1")


@needs_mooncake
def test_too_small_a_store_is_refused():
    with pytest.raises(UserError, match="1000 bytes; Mooncake needs at least 16777216"):
        connect(MooncakeAddress("127.0.0.1", 1, 2), 1000)
