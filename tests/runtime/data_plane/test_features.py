"""Captured folders: resumable, append-safe, one provenance."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from specforge.cli import main
from specforge.errors import UserError
from specforge.runtime.data_plane.features import FeatureFolder


def capture(target, prompts, output, *options) -> int:
    words = [
        "capture",
        "--target",
        target,
        "--prompts",
        prompts,
        "--output",
        output,
        "--dtype",
        "float32",
        *options,
    ]
    return main([str(word) for word in words])


def content(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    opened = FeatureFolder.open(folder / "train")
    found = {}
    for ref in opened.refs:
        with opened.store.get(ref) as tensors:
            found[ref.sample_id] = {name: x.clone() for name, x in tensors.items()}
    return found


def assert_same(a: Path, b: Path) -> None:
    mine, others = content(a), content(b)
    assert mine.keys() == others.keys()
    for name in mine:
        assert all(torch.equal(mine[name][key], others[name][key]) for key in mine[name])


def test_capture_goes_on_where_it_was_stopped(target, prompts, features, tmp_path):
    assert capture(target, prompts, tmp_path / "f", "--limit_samples", 7) == 0
    assert len(FeatureFolder.open(tmp_path / "f" / "train").refs) == 7
    assert capture(target, prompts, tmp_path / "f") == 0
    assert content(tmp_path / "f").keys() == content(features).keys()


def test_a_second_capture_changes_nothing(target, prompts, features, tmp_path):
    folder = Path(shutil.copytree(features, tmp_path / "f"))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("shard-*")}
    assert capture(target, prompts, folder) == 0
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("shard-*")} == before


def test_a_line_torn_by_a_crash_is_captured_again(target, prompts, features, tmp_path):
    folder = Path(shutil.copytree(features, tmp_path / "f"))
    manifest = folder / "train" / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-40])
    assert len(FeatureFolder.open(folder / "train").refs) == 31
    assert capture(target, prompts, folder) == 0
    assert_same(folder, features)


def test_another_target_is_not_mixed_in(target, prompts, features, tmp_path):
    from tests.tiny import write_target

    folder = Path(shutil.copytree(features, tmp_path / "f"))
    other = write_target(tmp_path / "other", seed=3)
    assert capture(other, prompts, folder) != 0
    assert_same(folder, features)


def test_a_folder_of_a_later_format_is_refused(features, tmp_path):
    folder = Path(shutil.copytree(features, tmp_path / "f")) / "train"
    meta = folder / "features.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(UserError, match="format 99"):
        FeatureFolder.open(folder)


def test_float8_features_train(target, prompts, tmp_path):
    from tests.tiny import recipe

    assert capture(target, prompts, tmp_path / "f", "--encoding", "float8_e4m3fn") == 0
    assert main(["fit", "--config", str(recipe(target, tmp_path / "f", tmp_path))]) == 0


@pytest.mark.parametrize("encoding", ["raw", "float8_e4m3fn"])
def test_folders_that_name_their_encoding_elsewhere_are_read_and_gone_on_with(
    target, prompts, tmp_path, capsys, encoding
):
    """As they were before the encoding was part of a sample's provenance."""
    folder = tmp_path / "f"
    assert capture(target, prompts, folder, "--encoding", encoding) == 0
    for name in ("train", "heldout"):
        now = FeatureFolder.open(folder / name)
        wanted = {ref.sample_id: now.store.get(ref).tensors for ref in now.refs}
        meta, manifest = folder / name / "features.json", folder / name / "manifest.jsonl"
        fields = json.loads(meta.read_text())
        fields["encoding"] = fields["provenance"].pop("encoding")
        meta.write_text(json.dumps(fields))
        lines = [json.loads(line) for line in manifest.read_text().splitlines()]
        assert all(line["provenance"].pop("encoding") == encoding for line in lines)
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
        old = FeatureFolder.open(folder / name)
        for ref in old.refs:
            found = old.store.get(ref).tensors
            assert all(torch.equal(found[key], x) for key, x in wanted[ref.sample_id].items())
    assert capture(target, prompts, folder, "--encoding", encoding) == 0
    other = "raw" if encoding == "float8_e4m3fn" else "float8_e4m3fn"
    assert capture(target, prompts, folder, "--encoding", other) == 2
    assert f"encoding {encoding}, not {other}" in capsys.readouterr().err
