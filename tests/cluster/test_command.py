"""What `specforge launch` refuses from its options alone, and what its recipe becomes on the ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from specforge.cli.arguments import expand
from specforge.cli.main import main
from specforge.cluster import command
from tests.disaggregated import disaggregated, places
from tests.tiny import recipe


@pytest.fixture
def path(target, prompts, tmp_path) -> Path:
    return disaggregated(target, prompts, tmp_path, places(tmp_path))


@pytest.fixture
def has_ray(monkeypatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: name)


def test_without_ray_one_line_says_what_to_install(path, monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["launch", "--config", str(path)]) == 2
    assert capsys.readouterr().err.startswith("specforge: launch needs Ray: pip install 'ray[default,train]")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cluster.producers.engine", "tpu"], "engine tpu: use one of hf, vllm, sglang, http"),
        (["--cluster.producers.cuont", "1"], "unknown option 'cluster.producers.cuont'; did you mean"),
        (["--cluster.trainers.count", "0"], "cluster.trainers.count: must be a whole number of at least 1"),
        (
            ["--cluster.producers.count", "2", "--cluster.producers.max_count", "1"],
            "cluster.producers.max_count 1: must be at least count 2",
        ),
        (["--cluster.placement", "near"], "cluster.placement: must be one of 'pack', 'spread', 'beside_trainers'"),
        (["--trainer.strategy", "deepspeed"], "trainer.strategy: must be one of auto, ddp, fsdp, fsdp2"),
        (["--model.target", "nowhere"], "nowhere"),
    ],
)
def test_what_no_run_can_use_is_refused(path, has_ray, words, message, capsys):
    assert main(["launch", "--config", str(path), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_only_disaggregated_runs_are_launched(target, features, tmp_path, has_ray, capsys):
    assert main(["launch", "--config", str(recipe(target, features, tmp_path))]) == 2
    assert "launch trains with DisaggregatedDataModule" in capsys.readouterr().err


def read(path: Path, *words: str) -> command.Launch:
    cli = command.LaunchCLI(expand("launch", ["--config", str(path), *words]))
    return command.read(cli.parser, cli.config)


def test_ranks_get_the_recipe_without_the_cluster(path, tmp_path):
    found = read(path, "--cluster.trainers.count", "2", "--cluster.producers.engine", "hf")
    content = yaml.safe_load(found.recipe)
    assert not {"cluster", "plan", "scale", "ckpt_path"} & set(content)
    assert content["trainer"]["devices"] == 2
    assert content["trainer"]["accelerator"] == "cpu"
    assert content["data"]["init_args"]["store"] == found.producer.store == str(tmp_path / "store")
    assert found.name == "run"


def test_stores_that_a_recipe_does_not_name_are_in_the_runs_folder(path, tmp_path):
    content = yaml.safe_load(path.read_text())
    for name in ("store", "metadata"):
        del content["data"]["init_args"][name]
    path.write_text(yaml.safe_dump(content))
    alone, joined = read(path), read(path, "--cluster.address", "auto")
    assert alone.producer.store == joined.producer.store == str(tmp_path / "run" / "store")
    assert alone.producer.metadata == str(tmp_path / "run" / "metadata.db")
    assert yaml.safe_load(alone.recipe)["data"]["init_args"]["metadata"] == alone.producer.metadata
    assert joined.producer.metadata == "auto"  # Redis, once the run starts


def test_a_run_resumes_from_its_last_checkpoint_only(path, tmp_path, has_ray, capsys):
    """Trainers that are started again would go back to it, whatever the first ones started from."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("step-00000004.ckpt", "step-00000008.ckpt"):
        (folder / name).touch()
    assert main(["launch", "--config", str(path), "--ckpt_path", str(folder / "step-00000004.ckpt")]) == 2
    assert "only last is accepted" in capsys.readouterr().err
    assert read(path, "--ckpt_path", "last").ckpt_path is None
    elsewhere = read(path, "--ckpt_path", str(folder / "step-00000004.ckpt"), "--trainer.default_root_dir", "new")
    assert elsewhere.ckpt_path == str(folder / "step-00000004.ckpt")
