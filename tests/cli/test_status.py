"""`specforge status` with the folder of a run; what it says of the stores is in tests/test_disaggregated.py."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from specforge.cli.main import main
from specforge.cli.status import ClusterRun
from specforge.contracts import PromptTask
from tests.disaggregated import control, places


@pytest.fixture
def where(tmp_path) -> dict[str, str]:
    """Stores with a queued prompt."""
    where = places(tmp_path)
    controller = control(where)
    controller.ingest({"a" * 4: PromptTask("t", (1, 2), (0, 1))})
    controller.metadata.close()
    return where


def write_config(folder: Path, **data: str) -> None:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"class_path": "X", "init_args": data}}))


def test_a_run_knows_its_stores(tmp_path, where, capsys):
    write_config(tmp_path / "run", **where, batch_size="1")
    assert main(["status", str(tmp_path / "run"), "--seconds", "0"]) == 0
    assert "no producer takes the 1 queued prompts" in capsys.readouterr().out


def test_a_run_on_a_cluster_shows_its_processes(tmp_path, where, capsys):
    processes = [["producer 0", "10.0.0.2", "running"], ["producer 1", "", "starting"]]
    (tmp_path / "run").mkdir()
    for since, shown in ((0, "draft: launch is running"), (100, "has not been heard of for 100 s")):
        ClusterRun("draft", **where, processes=processes, time=time.time() - since).save(tmp_path / "run")
        assert main(["status", str(tmp_path / "run"), "--seconds", "0"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert shown in lines[0]
        assert lines[1:4] == ["  producer 0: running on 10.0.0.2", "  producer 1: starting", lines[3]]
        assert lines[3].startswith("samples: 1 queued")
    ClusterRun("draft", **where, processes=[], time=0.0).save(tmp_path / "run")
    assert main(["status", str(tmp_path / "run"), "--seconds", "0"]) == 0
    assert capsys.readouterr().out.startswith("draft: launch has ended\n")


def test_a_folder_without_such_a_run_is_one_line(tmp_path, where, capsys):
    write_config(tmp_path / "offline", features="f")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "cluster.json").write_text('{"name": "draft"}')
    for words, message in (
        ([str(tmp_path / "none")], "no run has begun there"),
        ([str(tmp_path / "offline")], "not a run of DisaggregatedDataModule"),
        ([str(tmp_path / "damaged")], "is not what launch writes"),
        (["--store", where["store"]], "name the run's folder, or its stores"),
    ):
        assert main(["status", *words]) == 2
        assert message in capsys.readouterr().err
