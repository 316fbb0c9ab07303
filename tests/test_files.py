"""Folders and files are written whole, and replace nothing but what the same command wrote, whatever is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from specforge import files
from specforge.cli.main import main
from specforge.errors import UserError
from specforge.files import LineLog, check_json, parse_json, staged_folder, write_file, write_folder
from specforge.modeling.draft import save_draft
from tests.tiny import recipe

OLD, NEW = {"a.json": b"old", "b.bin": b"old"}, {"a.json": b"new", "b.bin": b"new"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def test_new_empty_and_own_folders_are_written(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("deep/new", "empty"):
        for part in (OLD, NEW):
            write_folder(tmp_path / name, part)
            assert content(tmp_path / name) == part
    assert sorted(os.listdir(tmp_path)) == ["deep", "empty"]


@pytest.mark.parametrize("rest", [b"", b"cut off", b"x" * 200_000])
def test_a_log_drops_the_line_that_a_crash_cut_off(tmp_path, rest):
    log = LineLog(tmp_path / "log")
    log.append(["one", "two"])
    with log.path.open("ab") as file:
        file.write(rest)
    assert log.lines() == [b"one", b"two"]
    log.append(["three"])
    assert log.path.read_bytes() == b"one\ntwo\nthree\n"


def test_a_log_appends_all_lines_or_none(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    log = LineLog(tmp_path / "log")
    log.append(["one"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            log.append(["two", "three"])
    assert log.lines() == [b"one"]


def folder_of(tmp_path: Path, *names: str) -> Path:
    for name in names:
        write_file(tmp_path / "there" / name, name)
    return tmp_path / "there"


IN_THE_WAY: dict[str, Callable[[Path], Path]] = {
    "a file more": lambda p: folder_of(p, "a.json", "b.bin", "notes.txt"),
    "a hidden file": lambda p: folder_of(p, "a.json", ".git"),
    "something else in a folder": lambda p: folder_of(p, "a.json", "deep/notes.txt"),
    "a file": lambda p: folder_of(p, "a.json") / "a.json",
    "a link to an own folder": lambda p: linked(p, folder_of(p, "a.json", "b.bin")),
    "a link to nothing": lambda p: linked(p, p / "nowhere"),
    "a link in an own folder": lambda p: linked(folder_of(p, "b.bin"), p / "nowhere", "a.json").parent,
    "the current folder": lambda p: Path(),
    "a folder that holds the current one": lambda p: Path(".."),
    "the root": lambda p: Path("/"),
    "a place beside one that is missing": lambda p: p / "missing" / ".." / "out",
}


def linked(folder: Path, place: Path, name: str = "link") -> Path:
    (folder / name).symlink_to(place)
    return folder / name


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_anything_else_is_refused_and_stays(tmp_path, monkeypatch, name):
    (tmp_path / "parent" / "current").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "parent" / "current")
    folder = IN_THE_WAY[name](tmp_path)
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"contains more|is a file|is a link|current folder|does not exist") as found:
        write_folder(folder, NEW)
    assert str(found.value).startswith(f"{folder}: ")
    assert content(tmp_path) == before


@pytest.mark.parametrize("place", ["file/x", "/proc/nothing/x", "x" * 300, "\0"])
def test_what_cannot_be_written_is_one_line(tmp_path, place):
    (tmp_path / "file").write_text("")
    for write in (lambda path: write_folder(path, NEW), lambda path: write_file(path / "y", b"")):
        with pytest.raises(UserError, match=r"could not be written|cannot be examined"):
            write(tmp_path / place)


def test_what_came_while_the_folder_was_filled_stays(tmp_path):
    def fill() -> None:
        with staged_folder(tmp_path / "out") as staging:
            (staging / "mine").touch()
            write_file(tmp_path / "out" / "precious", b"")

    with pytest.raises(UserError, match=r"more than this command writes \(precious\)"):
        fill()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["precious"]


def killed_at(operation: int, write: Callable[[], object]) -> bool:
    """Run in a process that is killed before its ``operation``-th change of a name; whether it was."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def dying(original):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count > operation:
                    os._exit(9)
                return original(*arguments, **options)

            return call

        for owner, name in ((os, "replace"), (os, "rename"), (Path, "rename"), (os, "rmdir"), (os, "unlink")):
            setattr(owner, name, dying(getattr(owner, name)))
        files._exchange = dying(files._exchange)
        write()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_at_any_point_loses_neither_folder_and_leaves_nothing(tmp_path, monkeypatch, exchanges):
    """Where the system cannot exchange two names, a folder that was to be replaced comes back at the next call."""
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    folder, operation = tmp_path / "out", 0
    write_folder(folder, OLD)
    while killed_at(operation, lambda: write_folder(folder, NEW)):
        operation += 1
        found = [content(x) for x in tmp_path.iterdir()]
        assert OLD in found or NEW in found
        assert not exchanges or folder.exists()
        with pytest.raises(RuntimeError, match="failed"), staged_folder(folder, lambda place: True):
            raise RuntimeError("failed")
        assert content(folder) in (OLD, NEW)
        write_folder(folder, OLD)
        assert content(folder) == OLD
        assert os.listdir(tmp_path) == ["out"]
    assert operation > 3
    assert content(folder) == NEW
    assert os.listdir(tmp_path) == ["out"]


def test_what_another_process_is_filling_is_left_alone(tmp_path):
    with staged_folder(tmp_path / "out") as staging:
        (staging / "mine").touch()
        write_folder(tmp_path / "out", OLD)
        assert (staging / "mine").exists()
        shutil.rmtree(tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]
    assert os.listdir(tmp_path) == ["out"]


def test_json_of_another_kind_is_not_replaced(tmp_path):
    path = tmp_path / "x.json"
    check_json(path, "run")
    for text in ("", json.dumps({"run": 1, "methods": []})):
        path.write_text(text)
        check_json(path, "run", "methods")
    for text in ("{}", "[]", "text", '{"run": 1}', "[" * 10000):
        path.write_text(text)
        with pytest.raises(UserError, match="name a new file"):
            check_json(path, "run", "methods")
    with pytest.raises(UserError, match="is a folder"):
        check_json(tmp_path, "run")


# Commands.


def test_a_draft_replaces_a_draft_and_no_other_model(tmp_path):
    config, tensors = {"dtype": "bfloat16", "torch_dtype": "bfloat16"}, {"x": torch.zeros(1)}
    save_draft(config, tensors, tmp_path / "draft")
    save_draft({**config, "again": 1}, tensors, tmp_path / "draft")
    for other in ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {**config, "dtype": "float32"}):
        (tmp_path / "draft" / "config.json").write_text(json.dumps(other, indent=2, sort_keys=True) + "\n")
        with pytest.raises(UserError, match=r"more than this command writes \(config.json, model.safetensors"):
            save_draft(config, tensors, tmp_path / "draft")
    assert json.loads((tmp_path / "draft" / "config.json").read_text()) == other


def test_no_command_writes_over_what_another_one_wrote(target, prompts, features, conversations, tmp_path, capsys):
    """A run, a target, prompts, features and a draft, each in the place of the others' folders."""
    assert main(["fit", "--config", str(recipe(target, features, tmp_path)), "--trainer.max_steps", "1"]) == 0
    places = {name: tmp_path / name / "train" for name in ("a run", "target", "prompts", "features", "draft")}
    sources = (tmp_path / "run", target, prompts / "train", features / "train")
    for source, place in zip(sources, places.values(), strict=False):
        shutil.copytree(source, place, symlinks=True)
    commands = {
        "draft": ["export", "--draft", tmp_path / "run" / "checkpoints" / "last.ckpt", "--output", places["draft"]],
        "prompts": ["prepare", "--data", conversations, "--target", target, "--output", places["prompts"].parent],
        "features": [
            "capture",
            "--target",
            target,
            "--prompts",
            prompts,
            "--dtype",
            "float32",
            "--output",
            places["features"].parent,
        ],
    }
    for _ in "ab":
        for own, command in commands.items():
            assert main([str(word) for word in command]) == 0, own
    for own, (*command, _) in commands.items():
        for name in set(places) - {own}:
            before = content(places[name])
            capsys.readouterr()
            output = places[name] if own == "draft" else places[name].parent
            assert main([str(word) for word in [*command, output]]) == 2
            assert "contains more than this command writes" in capsys.readouterr().err
            assert content(places[name]) == before


@pytest.mark.parametrize("text", ["notes", '{"messages": []}', "one\ntwo", '{"x": 1}\n', '[{"id": 1}]\n'])
def test_regenerate_leaves_a_file_of_another_kind_as_it_is(target, conversations, tmp_path, capsys, text):
    output = tmp_path / "precious"
    output.write_text(text)
    words = ["regenerate", "--data", conversations, "--target", target, "--output", output]
    assert main([str(x) for x in words]) == 2
    assert "choose another --output" in capsys.readouterr().err
    assert output.read_text() == text


def test_evaluate_leaves_a_file_of_another_kind_as_it_is(target, prompts, tmp_path, capsys):
    output = tmp_path / "config.json"
    output.write_text("{}")
    words = ["evaluate", "--draft", tmp_path / "none", "--prompts", prompts, "--json", output]
    assert main([str(x) for x in words]) == 2
    assert "config.json: was not written by this command" in capsys.readouterr().err


def test_an_address_is_no_folder_even_if_a_folder_is_named_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s3:").mkdir()
    with pytest.raises(UserError, match="s3://bucket/run: is an address"), staged_folder(Path("s3://bucket/run")):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "s3:"]


@pytest.mark.parametrize("text", ['{"a": "b\n"}', '{"a": "b'])
def test_the_place_of_what_is_not_json_is_said_once(text):
    with pytest.raises(ValueError, match=r"not valid JSON .*(?<! at) at column \d+") as found:
        parse_json(text)
    assert "at at" not in str(found.value)
