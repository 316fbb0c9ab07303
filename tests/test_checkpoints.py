"""The checkpoint file: its checksum finds damage at any byte, and nothing in it is ever run."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specforge.checkpoints import checkpoint_bytes, read_checkpoint
from specforge.errors import UserError
from tests.fuzz import survives

DRAFT = {"algorithm": "eagle3", "draft_config": {"x": [1]}, "target": "m", "target_fingerprint": "f" * 8}
CONTENT = {"state_dict": {"draft.w": torch.arange(35.0).view(5, 7)}, "specforge": DRAFT, "loops": {"n": 3}}


def without_checksum(content: object) -> bytes:
    """As earlier versions wrote it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        read_checkpoint(path)
    line = str(refused.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return line


def same(found: dict) -> bool:
    return torch.equal(found["state_dict"]["draft.w"], CONTENT["state_dict"]["draft.w"]) and all(
        found[key] == CONTENT[key] for key in ("specforge", "loops")
    )


def flips(path: Path, data: bytes, step: int) -> Iterator[int]:
    """Flip a bit of the file at every so many places in turn."""
    path.write_bytes(data)
    with path.open("r+b", buffering=0) as file:
        for place in range(0, len(data), step):
            os.pwrite(file.fileno(), bytes([data[place] ^ 1 << place % 8]), place)
            yield place
            os.pwrite(file.fileno(), data[place : place + 1], place)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "step-00000001.ckpt"


def test_what_is_written_is_read_here_and_by_torch(path):
    path.write_bytes(checkpoint_bytes(CONTENT))
    assert same(read_checkpoint(path))
    for mmap in (False, True):
        assert same(torch.load(path, weights_only=True, mmap=mmap))


def test_a_flipped_bit_is_found_at_every_byte(path):
    for _ in flips(path, bytes(checkpoint_bytes(CONTENT)), 1):
        refusal(path)


def test_a_flipped_bit_in_an_older_file_is_found_or_changes_nothing(path):
    data = without_checksum(CONTENT)
    path.write_bytes(data)
    assert same(read_checkpoint(path))
    found = 0
    for place in flips(path, data, 3):
        try:
            assert same(read_checkpoint(path)), place
        except UserError:
            found += 1
    assert found > 300


@pytest.mark.parametrize("write", [checkpoint_bytes, without_checksum])
def test_a_file_that_is_cut_off_or_longer_is_refused(path, write):
    data = bytes(write(CONTENT))
    for size in random.Random(0).sample(range(len(data)), 100):
        path.write_bytes(data[:size])
        refusal(path)
    path.write_bytes(data + b"\0")
    refusal(path)


class Bomb:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("write", [checkpoint_bytes, without_checksum, pickle.dumps])
def test_code_in_a_file_is_not_run(path, tmp_path, write):
    path.write_bytes(write({**CONTENT, "loops": Bomb(tmp_path / "exploded")}))
    assert "pickled objects" in refusal(path)
    assert not (tmp_path / "exploded").exists()


def test_what_is_no_checkpoint_is_refused(path, tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "none.ckpt")
    (tmp_path / "last.ckpt").symlink_to("step-00000007.ckpt")
    assert "no such checkpoint" in refusal(tmp_path / "last.ckpt")
    assert "a folder" in refusal(tmp_path)
    path.write_bytes(b"")
    refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("huge", b"\0" * 50_000_000)
    assert "not a SpecForge checkpoint" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", b"<x/>")
    refusal(path)


def test_the_error_for_a_missing_best_checkpoint_names_the_last_one(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(checkpoint_bytes(CONTENT))
    assert str(tmp_path / "last.ckpt") in refusal(tmp_path / "best.ckpt")


def test_a_checkpoint_that_does_not_say_what_it_is_of_is_refused(path, fuzz):
    for content in (
        [1],
        {},
        {**CONTENT, "state_dict": [1]},
        {**CONTENT, "state_dict": {"draft.w": 3}},
        {**CONTENT, "specforge": 3},
        *({**CONTENT, "specforge": draft} for draft in fuzz.values([DRAFT], 100)),
    ):
        path.write_bytes(checkpoint_bytes(content))
        if survives(lambda: read_checkpoint(path)):
            saved = read_checkpoint(path)["specforge"]
            assert all(isinstance(saved[key], type(value)) for key, value in DRAFT.items())


def test_damaged_bytes_are_refused_in_one_line(path, fuzz, tmp_path):
    originals = [bytes(checkpoint_bytes(CONTENT)), without_checksum(CONTENT)]
    for data in fuzz.bytes(originals, 300):
        path.write_bytes(data)
        if survives(lambda: read_checkpoint(path), megabytes=64) and data not in originals:
            assert same(read_checkpoint(path))
