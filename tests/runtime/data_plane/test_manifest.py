"""The manifest: every committed reference, whatever was cut off; what is damaged is named by its line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from specforge.contracts import CapturePolicy, Provenance, SampleRef
from specforge.errors import UserError
from specforge.runtime.data_plane.local import ShardBackend
from specforge.runtime.data_plane.manifest import Manifest
from specforge.runtime.data_plane.store import FeatureStore
from tests.fuzz import survives

PROVENANCE = Provenance("tiny", "f" * 8, "t" * 8, CapturePolicy((1, 3)), "float32")


@pytest.fixture
def refs(tmp_path) -> list[SampleRef]:
    store = FeatureStore(ShardBackend(tmp_path))
    found = [
        store.put(f"s{i}", {"x": torch.ones(i + 1, 4)}, num_supervised=1, source="", provenance=PROVENANCE)
        for i in range(4)
    ]
    store.flush()
    Manifest(tmp_path).append(found)
    return found


def test_a_line_that_was_cut_off_is_dropped_and_the_others_stay(tmp_path, refs):
    manifest = Manifest(tmp_path)
    with manifest.path.open("a") as file:
        file.write(json.dumps(refs[0].to_json())[:-5])
    assert manifest.refs() == refs
    manifest.append([replace(refs[0], sample_id="s9")])
    assert [ref.sample_id for ref in manifest.refs()] == ["s0", "s1", "s2", "s3", "s9"]


def test_of_a_sample_that_comes_again_the_later_line_counts_and_nothing_is_deleted(tmp_path, refs):
    """As in a manifest to which somebody appended another one."""
    manifest, again = Manifest(tmp_path), [replace(ref, generation=2) for ref in refs]
    manifest.append(again)
    assert manifest.refs() == again
    FeatureStore(ShardBackend(tmp_path)).adopt(manifest.refs())
    assert list(tmp_path.glob("shard-*"))


@pytest.mark.parametrize(
    "change",
    [
        {"uri": None},
        {"num_tokens": 10**12},
        {"sample_id": "../x"},
        {"generation": -1},
        {"nbytes": float("nan")},
        {"features": {}},
        {"provenance": None},
        {"num_supervised": 9},
        {"more": 1},
    ],
)
def test_a_tampered_line_is_named(tmp_path, refs, change):
    manifest = Manifest(tmp_path)
    lines = manifest.path.read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), **change})
    manifest.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"manifest\.jsonl, line 3: not a sample reference \("):
        manifest.refs()


def test_damaged_manifests_are_refused_in_one_line(tmp_path, refs, fuzz):
    manifest = Manifest(tmp_path / "in")
    manifest.path.parent.mkdir()
    original = (tmp_path / "manifest.jsonl").read_bytes()
    for data in fuzz.bytes([original], 150):
        manifest.path.write_bytes(data)
        survives(manifest.refs, outside=tmp_path / "out")
    for value in fuzz.values([json.loads(line) for line in original.splitlines()], 150):
        manifest.path.write_text(json.dumps(value) + "\n")
        survives(manifest.refs, outside=tmp_path / "out")
    manifest.path.unlink()
    manifest.path.mkdir()
    survives(manifest.refs)
