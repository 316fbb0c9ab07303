"""One contract for every backend: what is put comes back, or is refused by name."""

from __future__ import annotations

import pytest
import torch

from specforge.contracts import CapturePolicy, Provenance
from specforge.runtime.data_plane.encoding import decode, encode
from specforge.runtime.data_plane.local import MemoryBackend, ShardBackend
from specforge.runtime.data_plane.store import BadSampleError, FeatureStore, StoreFullError

PROVENANCE = Provenance("tiny", "f" * 8, "t" * 8, CapturePolicy((1, 3)), "float32")


@pytest.fixture(params=["memory", "shards"])
def backend(request, tmp_path):
    return MemoryBackend() if request.param == "memory" else ShardBackend(tmp_path)


def sample(seed: int = 0, length: int = 5) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "states": torch.randn(length, 4, generator=g),
        "input_ids": torch.arange(length, dtype=torch.int32),
    }


def put(store: FeatureStore, name: str = "a", **options):
    ref = store.put(name, sample(**options), num_supervised=2, source="file, line 1", provenance=PROVENANCE)
    store.flush()
    return ref


def test_what_was_put_comes_back(backend):
    store = FeatureStore(backend)
    ref = put(store)
    with store.get(ref) as tensors:
        assert tensors.keys() == sample().keys()
        assert all(torch.equal(tensors[name], x) for name, x in sample().items())
    assert (ref.num_tokens, ref.num_supervised, ref.nbytes) == (5, 2, 5 * 4 * 4 + 5 * 4)
    assert "a" in store
    assert list(store) == ["a"]


def test_a_second_put_replaces_the_first(backend):
    store = FeatureStore(backend)
    first, second = put(store), put(store, seed=1)
    assert (first.generation, second.generation) == (1, 2)
    with pytest.raises(BadSampleError, match="sample a: generation 1 was replaced by 2"):
        store.get(first)
    assert store.stat().samples == 1
    assert store.stat().nbytes == second.nbytes


def test_a_sample_being_read_is_deleted_when_the_last_reader_lets_go(backend):
    store = FeatureStore(backend)
    ref = put(store)
    lease = store.get(ref)
    assert store.delete(ref)
    assert store.stat().samples == 1
    assert torch.equal(lease.tensors["states"], sample()["states"])
    with pytest.raises(BadSampleError, match="not in the store"):
        store.get(ref)
    store.release(lease)
    store.release(lease)
    assert (store.stat().samples, store.stat().nbytes, store.stat().leases) == (0, 0, 0)
    assert not store.delete(ref)


def test_abandoned_leases_are_swept(backend):
    store = FeatureStore(backend, lease_seconds=10.0)
    ref = put(store)
    store.get(ref)
    store.delete(ref)
    import time

    assert store.sweep(time.monotonic()) == 0
    assert store.sweep(time.monotonic() + 11) == 1
    assert store.stat().samples == 0


def test_the_byte_limit_is_never_passed(backend):
    store = FeatureStore(backend, max_bytes=250)
    first = put(store, "a")
    put(store, "b")
    with pytest.raises(StoreFullError):
        put(store, "c")
    assert "c" not in store
    store.delete(first)
    put(store, "c")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(backend, bad):
    tensors = sample()
    tensors["states"][2, 1] = bad
    with pytest.raises(BadSampleError, match="sample a: states"):
        FeatureStore(backend).put("a", tensors, num_supervised=1, source="", provenance=PROVENANCE)


def test_features_of_different_lengths_are_refused(backend):
    tensors = {**sample(), "input_ids": torch.arange(4)}
    with pytest.raises(BadSampleError, match="disagree"):
        FeatureStore(backend).put("a", tensors, num_supervised=1, source="", provenance=PROVENANCE)


def test_shards_are_found_by_the_next_session(tmp_path):
    refs = []
    for session in range(3):
        store = FeatureStore(ShardBackend(tmp_path))
        store.adopt(refs)
        refs.append(put(store, f"s{session}", seed=session))
    store = FeatureStore(ShardBackend(tmp_path))
    store.adopt(refs)
    for seed, ref in enumerate(refs):
        with store.get(ref) as tensors:
            assert torch.equal(tensors["states"], sample(seed)["states"])
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_shard_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    store = FeatureStore(ShardBackend(tmp_path))
    store.put("a", sample(), num_supervised=1, source="", provenance=PROVENANCE)
    import os

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Exception, match="No space left"):
        store.flush()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    store.flush()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_shard_goes_with_its_last_sample(tmp_path):
    store = FeatureStore(ShardBackend(tmp_path))
    a = store.put("a", sample(), num_supervised=1, source="", provenance=PROVENANCE)
    b = store.put("b", sample(), num_supervised=1, source="", provenance=PROVENANCE)
    store.flush()
    store.delete(a)
    assert list(tmp_path.iterdir())
    store.delete(b)
    assert not list(tmp_path.iterdir())


def test_a_uri_cannot_leave_the_folder(tmp_path):
    with pytest.raises(OSError, match="not the name of a shard"):
        ShardBackend(tmp_path).read("a.1", "../secret.safetensors")


def test_float8_is_within_half_a_step_of_its_scale():
    tensors = {"x": torch.randn(50, 64) * torch.logspace(-4, 4, 50).unsqueeze(1), "ids": torch.arange(50)}
    tensors["x"][7] = 0.0
    stored = encode(tensors, "float8_e4m3fn")
    back = decode(stored, "float8_e4m3fn", {"x": "float32", "ids": "int64"})
    assert torch.equal(back["ids"], tensors["ids"])
    largest = tensors["x"].abs().amax(-1, keepdim=True)
    # 3 mantissa bits: a relative error of 2^-4, or half the smallest step of the token's scale.
    bound = torch.maximum(tensors["x"].abs() * 2**-4, largest / 448 * 2**-10)
    assert bool(((back["x"] - tensors["x"]).abs() <= bound * 1.001).all())
    assert stored["x"].nbytes * 4 == tensors["x"].nbytes
