"""Captured folders: resumable, append-safe, one provenance."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specforge.cli.main import main
from specforge.errors import UserError
from specforge.runtime.data_plane.feature_folder import FeatureFolder
from tests.fuzz import Fuzz, survives
from tests.tiny import conversation


def capture(target, prompts, output, *options) -> int:
    words = ["capture", "--target", target, "--prompts", prompts, "--output", output, "--dtype", "float32", *options]
    return main([str(word) for word in words])


def content(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    opened = FeatureFolder.open(folder / "train")
    found = {}
    for ref in opened.refs:
        tensors = opened.store.get(ref)
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
        wanted = {ref.sample_id: now.store.get(ref) for ref in now.refs}
        meta, manifest = folder / name / "features.json", folder / name / "manifest.jsonl"
        fields = json.loads(meta.read_text())
        fields["encoding"] = fields["provenance"].pop("encoding")
        meta.write_text(json.dumps(fields))
        lines = [json.loads(line) for line in manifest.read_text().splitlines()]
        assert all(line["provenance"].pop("encoding") == encoding for line in lines)
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
        old = FeatureFolder.open(folder / name)
        for ref in old.refs:
            found = old.store.get(ref)
            assert all(torch.equal(found[key], x) for key, x in wanted[ref.sample_id].items())
    assert capture(target, prompts, folder, "--encoding", encoding) == 0
    other = "raw" if encoding == "float8_e4m3fn" else "float8_e4m3fn"
    assert capture(target, prompts, folder, "--encoding", other) == 2
    assert f"encoding {encoding}, not {other}" in capsys.readouterr().err


def prepared(target: Path, folder: Path, *options: object, count: int = 12, first: int = 0) -> Path:
    """Prompts of some conversations that name no split."""
    data = folder.with_suffix(".jsonl")
    rows = ({"messages": conversation(i)["messages"]} for i in range(first, first + count))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["prepare", "--data", data, "--target", target, "--output", folder, *options]
    assert main([str(word) for word in words]) == 0
    return folder


@pytest.fixture(scope="module")
def drawn(target, tmp_path_factory) -> Path:
    """A folder with prompts, four of twelve held out, and their features."""
    folder = tmp_path_factory.mktemp("drawn")
    prepared(target, folder / "p", "--holdout", 4)
    assert capture(target, folder / "p", folder / "f") == 0
    return folder


OTHERS = {
    "another draw": (("--holdout", 4, "--seed", 1), {}),
    "fewer held out": (("--holdout", 3), {}),
    "nothing held out": ((), {}),
    "more data": (("--holdout", 4), {"count": 13}),
    "other data": (("--holdout", 4), {"first": 20}),
    "cut shorter": (("--holdout", 4, "--max_length", 70, "--long_samples", "truncate"), {}),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_features_of_other_prompts_are_not_mixed_in(target, drawn, tmp_path, capsys, monkeypatch, name, old):
    folder = Path(shutil.copytree(drawn / "f", tmp_path / "f"))
    if old:  # a folder of the first version, which does not name its prompts
        forget_prompts(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    options, more = OTHERS[name]
    prompts = prepared(target, tmp_path / "p", *options, **more)
    no_engine = lambda *_: pytest.fail("the target was loaded")  # noqa: E731
    monkeypatch.setattr("specforge.inference.target_engine.HFTargetEngine", no_engine)
    assert capture(target, prompts, folder) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def forget_prompts(folder: Path) -> None:
    for meta in folder.glob("*/features.json"):
        fields = json.loads(meta.read_text())
        del fields["prompts"]
        meta.write_text(json.dumps(fields, indent=2))


@pytest.mark.parametrize("old", [False, True])
def test_a_capture_of_the_same_prompts_goes_on(target, drawn, tmp_path, old):
    again = prepared(target, tmp_path / "p", "--holdout", 4)
    assert capture(target, again, tmp_path / "f", "--limit_samples", 3) == 0
    if old:
        forget_prompts(tmp_path / "f")
    assert capture(target, again, tmp_path / "f", "--limit_samples", 5) == 0
    assert len(FeatureFolder.open(tmp_path / "f" / "train").refs) == 5
    assert capture(target, drawn / "p", tmp_path / "f") == 0
    assert_same(tmp_path / "f", drawn / "f")


def test_a_held_out_split_that_the_prompts_no_longer_have_is_refused(target, drawn, tmp_path, capsys):
    """Even where the other split is the same, as it is when held-out records are taken out of the data."""
    folder = Path(shutil.copytree(drawn / "f", tmp_path / "f"))
    forget_prompts(folder)
    prompts = tmp_path / "p"
    shutil.copytree(drawn / "p" / "train", prompts / "train")
    assert capture(target, prompts, folder) == 2
    assert "a split heldout, which the prompts do not have" in capsys.readouterr().err


def test_prompts_with_the_same_counts_of_tokens_are_other_prompts(target, tmp_path, capsys):
    """The first question and the second one change places between the splits, and have the same letters."""
    texts = ("12?", "21?")
    for name, splits in (("a", ("train", "heldout")), ("b", ("heldout", "train"))):
        rows = [
            {"split": split, "messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "x"}]}
            for split, t in zip(splits, texts, strict=True)
        ]
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["prepare", "--data", data, "--target", target, "--output", tmp_path / name]
        assert main([str(word) for word in words]) == 0
    assert capture(target, tmp_path / "a", tmp_path / "f") == 0
    assert capture(target, tmp_path / "b", tmp_path / "f") == 2
    assert "holds features of other prompts" in capsys.readouterr().err


def test_a_folder_in_which_nothing_was_captured_is_free(features, tmp_path):
    there = FeatureFolder.open(features / "train")
    other = replace(there.provenance, dtype="bfloat16")
    FeatureFolder.create(tmp_path / "f", other, there.counts, "other prompts")
    begun = FeatureFolder.create(tmp_path / "f", there.provenance, there.counts, "prompts")
    assert begun.provenance == there.provenance


def test_damaged_folders_are_read_or_refused_in_one_line(drawn, tmp_path, fuzz: Fuzz):
    folder = Path(shutil.copytree(drawn / "f" / "heldout", tmp_path / "f"))
    for name in ("features.json", "token_counts.safetensors"):
        original = (folder / name).read_bytes()
        for data in fuzz.bytes([original], 100):
            (folder / name).write_bytes(data)
            survives(lambda: FeatureFolder.open(folder))
        (folder / name).write_bytes(original)
    fields = json.loads((folder / "features.json").read_text())
    for value in fuzz.values([fields], 200):
        (folder / "features.json").write_text(json.dumps(value))
        survives(lambda: FeatureFolder.open(folder))
