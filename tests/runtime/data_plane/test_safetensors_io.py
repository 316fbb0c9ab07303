"""Files in the safetensors form: the library reads what is written here and the other way round; damage is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge.runtime.data_plane.safetensors_io import SAMPLE_HEADER, FlatTensors, chunks, write_flat
from tests.fuzz import survives

TENSORS = {
    "states": torch.randn(7, 32).bfloat16(),
    "wide": torch.randn(3, 5, 2, dtype=torch.float64),
    "ids": torch.arange(7, dtype=torch.int32),
    "mask": torch.tensor([1, 0, 1], dtype=torch.uint8),
    "flag": torch.tensor([True, False, True]),
    "eight": torch.randn(5, 3).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3.5),
    "turned": torch.arange(12.0).view(3, 4).T,
}


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    bits = lambda x: x.contiguous().reshape(-1).view(torch.uint8)  # noqa: E731
    return found.shape == wanted.shape and found.dtype == wanted.dtype and torch.equal(bits(found), bits(wanted))


def test_the_library_reads_what_is_written(tmp_path):
    write_flat(tmp_path / "a", TENSORS, sync=True)
    found = load_file(tmp_path / "a")
    assert found.keys() == TENSORS.keys()
    assert all(same(found[name], x) for name, x in TENSORS.items())


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {name: x.contiguous() for name, x in TENSORS.items()}
    save_file(tensors, tmp_path / "a", metadata={"by": "someone"})
    flat = FlatTensors.map(tmp_path / "a")
    assert set(flat) == set(tensors)
    assert all(same(flat[name], x) for name, x in tensors.items())


def test_mapped_tensors_start_on_64_bytes_and_keep_no_file_open(tmp_path):
    write_flat(tmp_path / "a", TENSORS | {"mask": torch.ones(128, dtype=torch.uint8)}, sync=False)
    before = os.listdir("/proc/self/fd")
    flat = FlatTensors.map(tmp_path / "a")
    assert flat["states"].data_ptr() % 64 == 0
    assert flat["mask"].data_ptr() % 64 == 0
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("most", [1, 7, 4096])
def test_short_writes_and_many_pieces_make_the_same_file(tmp_path, monkeypatch, most):
    tensors = {f"t{i}": torch.full((3,), i, dtype=torch.int16) for i in range(1500)}
    original, calls = os.writev, []

    def writev(handle, pieces):
        calls.append(len(pieces))
        return original(handle, [memoryview(b"".join(pieces))[:most]])

    monkeypatch.setattr(os, "writev", writev)
    write_flat(tmp_path / "a", tensors if most > 7 else TENSORS, sync=False)
    assert (tmp_path / "a").read_bytes() == b"".join(chunks(tensors if most > 7 else TENSORS))
    assert max(calls) <= 1024


def damaged(path: Path, header: object, data: int = 16) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def place(shape: object, offsets: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "entry",
    [
        None,
        3,
        [],
        {},
        {"dtype": "F32", "shape": [4]},
        place([4], [0, 17]),
        place([5], [0, 20]),
        place([2], [0, 16]),
        place([-4], [0, -16]),
        place([4], [0, 16], "X"),
        place([4.0], [0, 16]),
        place("4", [0, 16]),
        place([-2, -2], [0, 16]),
        place([1], [-4, 0]),
        place([0, 2**70], [0, 0]),
        place([4], [0, 16], []),
        place([3], [1, 13]),
        place([4], [0]),
        place([1] * 17, [0, 1], "U8"),
    ],
)
def test_a_tensor_outside_the_data_is_refused(tmp_path, entry):
    flat = FlatTensors.map(damaged(tmp_path / "a", {"x": entry, "y": place([16], [0, 16], "U8")}))
    with pytest.raises(OSError, match="damaged or cut off"):
        flat["x"]
    assert same(flat["y"], torch.zeros(16, dtype=torch.uint8))


@pytest.mark.parametrize("header", [b"", b"{", b"3", b"\xff", b"[" * 100_000, [1], "text"])
def test_a_file_without_a_header_is_refused(tmp_path, header):
    with pytest.raises(OSError, match="damaged or cut off"):
        FlatTensors.map(damaged(tmp_path / "a", header))


@pytest.mark.parametrize("content", [b"\x01", b"\xff" * 8, (9).to_bytes(8, "little") + b"{}"])
def test_a_header_that_is_cut_off_is_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(OSError, match="the header is missing or incomplete"):
        FlatTensors.map(tmp_path / "a")


def test_a_header_of_more_bytes_than_a_reader_expects_is_not_read(tmp_path):
    """A sample's own file has a few tensors; reading a header takes ten times its bytes of memory."""
    path = damaged(tmp_path / "a", b'{"x":{"y":[' + b"1," * (4 << 20) + b"1]}}")
    with pytest.raises(OSError, match="no header"):
        FlatTensors.map(path, SAMPLE_HEADER)
    path = damaged(tmp_path / "b", b'{"__metadata__":' + b'{"":' * (20 << 20))
    assert survives(lambda: FlatTensors.map(path), refusals=(OSError,)) is False


def read_all(path: Path) -> None:
    flat = FlatTensors.map(path)
    for name in flat:
        flat[name].float().sum()


def test_damaged_files_are_refused_in_one_line(tmp_path, fuzz):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a"
    write_flat(path, TENSORS, sync=False)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    for content in fuzz.bytes([whole], 300):
        path.unlink()
        path.write_bytes(content)
        survives(lambda: read_all(path), outside=tmp_path / "out", refusals=(OSError,))
    for value in fuzz.values([header], 300):
        path.unlink()
        damaged(path, value, 0).open("ab").write(data)
        survives(lambda: read_all(path), outside=tmp_path / "out", refusals=(OSError,))
