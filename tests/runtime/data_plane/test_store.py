"""One contract for every backend: what is put comes back, or is refused by name."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specforge.contracts import CapturePolicy, Provenance, SampleRef
from specforge.errors import UserError
from specforge.runtime.data_plane.encoding import decode, encode
from specforge.runtime.data_plane.local import MemoryBackend, ShardBackend
from specforge.runtime.data_plane.mooncake import MooncakeBackend
from specforge.runtime.data_plane.shared_dir import SharedDirBackend
from specforge.runtime.data_plane.store import BadSampleError, FeatureStore, StoreFullError
from tests.fuzz import survives
from tests.runtime.data_plane.mooncake_store import absent, mooncake_store

PROVENANCE = Provenance("tiny", "f" * 8, "t" * 8, CapturePolicy((1, 3)), "float32")


BACKENDS = {"memory": lambda folder: MemoryBackend(), "shards": ShardBackend, "shared_dir": SharedDirBackend}


@pytest.fixture(scope="module")
def mooncake_address():
    with mooncake_store() as (address, _):
        yield address


@pytest.fixture(params=[*BACKENDS, pytest.param("mooncake", marks=[pytest.mark.mooncake, absent])])
def backend(request, tmp_path):
    if request.param != "mooncake":
        yield BACKENDS[request.param](tmp_path)
        return
    address = request.getfixturevalue("mooncake_address")
    found = MooncakeBackend(f"{address}#{tmp_path.name}")
    yield found
    found.close()


@pytest.fixture(params=["shards", "shared_dir"])
def on_disk(request):
    """Makes the backend of a folder, anew at each call, as another process would."""
    return BACKENDS[request.param]


def sample(seed: int = 0, length: int = 5) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"states": torch.randn(length, 4, generator=g), "input_ids": torch.arange(length, dtype=torch.int32)}


def put(store: FeatureStore, name: str = "a", **options):
    ref = store.put(name, sample(**options), num_supervised=2, source="file, line 1", provenance=PROVENANCE)
    store.flush()
    return ref


def test_what_was_put_comes_back(backend):
    store = FeatureStore(backend)
    ref = put(store)
    tensors = store.get(ref)
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


def test_tensors_stay_valid_when_their_sample_is_deleted(backend):
    """Even once other samples have been stored and read in its place."""
    store = FeatureStore(backend)
    ref = put(store)
    tensors = store.get(ref)
    assert store.delete(ref)
    assert (store.stat().samples, store.stat().nbytes) == (0, 0)
    assert backend.stored() == []
    with pytest.raises(BadSampleError, match="not in the store"):
        store.get(ref)
    for seed in range(1, 4):
        other = put(store, seed=seed)
        assert torch.equal(store.get(other)["states"], sample(seed)["states"])
    assert all(torch.equal(tensors[name], x) for name, x in sample().items())
    assert not store.delete(ref)


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


@pytest.mark.parametrize("name", ["../a", "a/b", "/etc/a", "..", ".a", "", "a\0", "a\n", "x" * 129, "a b", "ä"])
def test_an_identity_that_could_name_a_path_is_refused(backend, name):
    store = FeatureStore(backend)
    good = put(store)
    for action in (
        lambda: put(store, name),
        lambda: store.adopt([replace(good, sample_id=name)]),
        lambda: store.discard(replace(good, sample_id=name)),
    ):
        with pytest.raises(BadSampleError, match="could name a path"):
            action()
    assert list(store) == ["a"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(names=st.lists(st.from_regex(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,20}", fullmatch=True), unique=True, max_size=5))
def test_any_other_identity_comes_back(tmp_path_factory, names):
    for make in BACKENDS.values():
        store = FeatureStore(make(tmp_path_factory.mktemp("store")))
        refs = [put(store, name, seed=i) for i, name in enumerate(names)]
        for i, ref in enumerate(refs):
            tensors = store.get(ref)
            assert torch.equal(tensors["states"], sample(i)["states"])
        found = [key for key, _ in store.backend.stored()]
        assert sorted(found) == sorted(f"{name}.1" for name in names)


@pytest.mark.parametrize(
    "uri", ["../secret.safetensors", "a./../../a.1-0123456789abcdef.safetensors", "/etc/passwd", "", "a./b.1-0.tmp"]
)
def test_a_uri_cannot_leave_the_folder(on_disk, tmp_path, uri):
    (tmp_path / "secret.safetensors").write_text("secret")
    store = FeatureStore(on_disk(tmp_path / "inside"))
    ref = replace(put(store), sample_id="b", uri=uri)
    store.adopt([ref])
    with pytest.raises(BadSampleError, match="is not the name of"):
        store.get(ref)


def test_a_uri_is_only_good_for_its_own_sample(tmp_path):
    store = FeatureStore(SharedDirBackend(tmp_path))
    a, b = put(store, "a"), put(store, "b")
    swapped = replace(b, uri=a.uri)
    store = FeatureStore(SharedDirBackend(tmp_path))
    store.adopt([swapped])
    with pytest.raises(BadSampleError, match=r"is not the name of a file of b\.1"):
        store.get(swapped)


def test_nothing_is_read_written_or_deleted_through_a_link_out_of_the_store(tmp_path, caplog):
    """Neither by the name of a sample nor when orphans are removed."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    ref = put(FeatureStore(SharedDirBackend(inside)))
    (inside / "a.").rename(outside)
    (inside / "a.").symlink_to(outside)
    before = {path: path.read_bytes() for path in outside.iterdir()}
    store = FeatureStore(SharedDirBackend(inside))
    store.adopt([ref])
    assert store.backend.stored() == []
    assert store.remove_orphans([]) == 0
    assert not store.holds(ref)
    with pytest.raises(BadSampleError, match="leads out of the store by a link"):
        store.get(ref)
    store.discard(ref)
    assert "could not be deleted" in caplog.text
    with pytest.raises(UserError, match="leads out of the store by a link"):
        put(store)
    assert {path: path.read_bytes() for path in outside.iterdir()} == before


def test_a_sample_that_is_a_link_is_not_read_and_only_the_link_deleted(tmp_path):
    ref = put(FeatureStore(SharedDirBackend(tmp_path / "inside")))
    path = the_file(tmp_path / "inside")
    path.rename(tmp_path / "secret")
    path.symlink_to(tmp_path / "secret")
    store = FeatureStore(SharedDirBackend(tmp_path / "inside"))
    store.adopt([ref])
    with pytest.raises(BadSampleError, match="leads out of the store by a link"):
        store.get(ref)
    store.remove_orphans([])
    assert (tmp_path / "secret").exists()


def test_a_store_is_only_made_by_those_who_write(tmp_path):
    with pytest.raises(OSError, match="no such folder"):
        SharedDirBackend(tmp_path / "mistyped", create=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["raw", "float8_e4m3fn"])
def test_damaged_samples_are_refused_in_one_line(on_disk, tmp_path, fuzz, encoding):
    """With the checksum and without it, for whoever damages a file may know how to write its checksum."""
    provenance = replace(PROVENANCE, encoding=encoding)
    store = FeatureStore(on_disk(tmp_path / "in"))
    ref = store.put("a", sample(), num_supervised=2, source="", provenance=provenance)
    store.flush()
    path = the_file(tmp_path)
    for data in fuzz.bytes([path.read_bytes()], 60):
        path.unlink()  # who has it mapped keeps it
        path.write_bytes(data)
        for verified in ((), ("a.1",)):
            again = FeatureStore(on_disk(tmp_path / "in"))
            again.adopt([ref])
            again._verified.update(verified)
            survives(lambda s=again: s.get(ref), outside=tmp_path / "out", refusals=(BadSampleError,))


def test_adopting_twice_keeps_the_bytes(backend):
    store = FeatureStore(backend)
    ref = put(store)
    store.adopt([ref, ref])
    tensors = store.get(ref)
    assert len(tensors["states"]) == 5
    assert store.stat().samples == 1


def test_samples_are_found_by_the_next_session(on_disk, tmp_path):
    refs = []
    for session in range(3):
        store = FeatureStore(on_disk(tmp_path))
        store.adopt(refs)
        refs.append(put(store, f"s{session}", seed=session))
    store = FeatureStore(on_disk(tmp_path))
    store.adopt(refs)
    for seed, ref in enumerate(refs):
        assert store.holds(ref)
        tensors = store.get(ref)
        assert torch.equal(tensors["states"], sample(seed)["states"])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def the_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.safetensors")
    return path


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_cut_off_file_is_refused_by_name(on_disk, tmp_path, part):
    ref = put(FeatureStore(on_disk(tmp_path)))
    path = the_file(tmp_path)
    os.truncate(path, int(path.stat().st_size * part))
    store = FeatureStore(on_disk(tmp_path))
    store.adopt([ref])
    with pytest.raises(BadSampleError, match="sample a: "):
        store.get(ref)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data())
def test_every_flipped_bit_is_noticed(on_disk, tmp_path_factory, data):
    """In the tensors' bytes by the checksum; in the header it may also be harmless: then the tensors are right."""
    folder = tmp_path_factory.mktemp("flip")
    ref = put(FeatureStore(on_disk(folder)))
    path = the_file(folder)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) * 8 - 1))
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)
    store = FeatureStore(on_disk(folder))
    store.adopt([ref])
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    try:
        tensors = store.get(ref)
    except BadSampleError:
        return
    assert at // 8 < header
    assert all(torch.equal(tensors[name], x) for name, x in sample().items())


def test_a_lost_sample_is_refused_by_name_and_no_longer_held(backend):
    store = FeatureStore(backend)
    ref, other = put(store), put(store, "b")
    assert store.holds(ref)
    backend.remove("a.1", ref.uri)
    assert not store.holds(ref)
    with pytest.raises(BadSampleError, match=r"sample a: (not in|.* is missing)"):
        store.get(ref)
    assert store.holds(other)
    assert [key for key, _ in backend.stored()] == ["b.1"]


def test_orphans_are_removed_and_the_wanted_and_the_spared_stay(backend):
    store = FeatureStore(backend)
    wanted, spared = put(store, "wanted"), put(store, "spared")
    put(store, "orphan")
    tensors = store.get(put(store, "read"))
    assert store.remove_orphans([wanted], spare={"spared"}) == 2
    assert torch.equal(tensors["states"], sample()["states"])
    assert sorted(key for key, _ in backend.stored()) == ["spared.1", "wanted.1"]
    assert sorted(store) == ["spared", "wanted"]
    assert store.stat().nbytes == wanted.nbytes + spared.nbytes


def test_what_was_left_to_others_is_neither_counted_nor_deleted(backend):
    store = FeatureStore(backend)
    ref = put(store)
    store.disown([ref])
    assert "a" not in store
    assert (store.stat().samples, store.stat().nbytes) == (0, 0)
    assert store.holds(ref)
    again = put(store)
    assert again.generation == 2
    assert store.holds(ref)


def test_discarding_deletes_what_another_process_put(tmp_path):
    ref = put(FeatureStore(SharedDirBackend(tmp_path)))
    store = FeatureStore(SharedDirBackend(tmp_path))
    assert store.holds(ref)
    store.discard(ref)
    assert not store.holds(ref)
    store.discard(ref)
    assert list(tmp_path.rglob("*.safetensors")) == []


@contextmanager
def small_disk(nbytes: int) -> Iterator[None]:
    """The system itself refuses to write more than so many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_behind_and_the_store_usable(on_disk, tmp_path):
    store = FeatureStore(on_disk(tmp_path))
    with small_disk(4096), pytest.raises(UserError, match="could not be written"):
        put(store, "a", length=1000)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert [p.name for p in tmp_path.rglob("*.tmp")] == []
    ref = put(store, "a", length=1000)
    tensors = store.get(ref)
    assert len(tensors["states"]) == 1000


def test_several_processes_share_a_folder(tmp_path):
    """Each puts the same samples; none touches another's bytes, and every reference can be read here."""
    code = (
        "import json, sys, pathlib\n"
        "from tests.runtime.data_plane.test_store import FeatureStore, SharedDirBackend, put\n"
        "store = FeatureStore(SharedDirBackend(pathlib.Path(sys.argv[1])))\n"
        "for i in range(20):\n"
        "    print(json.dumps(put(store, f's{i}', seed=i).to_json()))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [worker.communicate()[0].splitlines() for worker in workers]
    parts = [[SampleRef.from_json(json.loads(line)) for line in lines] for lines in outputs]
    assert [len(part) for part in parts] == [20] * 3
    assert len({ref.uri for part in parts for ref in part}) == 60
    for part in parts:
        store = FeatureStore(SharedDirBackend(tmp_path))
        store.adopt(part)
        for i, ref in enumerate(part):
            tensors = store.get(ref)
            assert torch.equal(tensors["states"], sample(i)["states"])
    assert FeatureStore(SharedDirBackend(tmp_path)).remove_orphans(parts[1]) == 40
    assert all(store.holds(ref) for ref in parts[1])


def test_an_unfinished_file_of_a_dead_writer_is_an_orphan(tmp_path):
    store = FeatureStore(SharedDirBackend(tmp_path))
    ref = put(store)
    (tmp_path / "a." / ".a.1-0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / "a." / "README").write_text("not ours")
    assert store.remove_orphans([ref]) == 1
    assert sorted(p.name for p in (tmp_path / "a.").iterdir()) == sorted(["README", Path(ref.uri).name])


def test_a_shard_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    store = FeatureStore(ShardBackend(tmp_path))
    store.put("a", sample(), num_supervised=1, source="", provenance=PROVENANCE)

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


def test_float8_is_within_half_a_step_of_its_scale():
    tensors = {"x": torch.randn(50, 64) * torch.logspace(-4, 4, 50).unsqueeze(1), "ids": torch.arange(50)}
    tensors["x"][7] = 0.0
    stored = encode(tensors, "float8_e4m3fn")
    back = decode(stored, {"x": "float32", "ids": "int64"})
    assert torch.equal(back["ids"], tensors["ids"])
    largest = tensors["x"].abs().amax(-1, keepdim=True)
    # 3 mantissa bits: a relative error of 2^-4, or half the smallest step of the token's scale.
    bound = torch.maximum(tensors["x"].abs() * 2**-4, largest / 448 * 2**-10)
    assert bool(((back["x"] - tensors["x"]).abs() <= bound * 1.001).all())
    assert stored["x"].nbytes * 4 == tensors["x"].nbytes


def test_a_scale_of_another_shape_is_refused_before_anything_is_multiplied():
    stored = encode({"x": torch.ones(5, 4)}, "float8_e4m3fn")
    for scale in (torch.ones(5, 1, 1), torch.ones(1, 1), torch.ones(1000, 1, 1), torch.ones(5)):
        with pytest.raises(ValueError, match="has a scale of shape"):
            decode(stored | {"x.scale": scale}, {"x": "float32"})
    with pytest.raises(ValueError, match="has a scale"):
        decode(stored, {})
