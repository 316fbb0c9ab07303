"""The table of all algorithms, made on the tiny target from two recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import results
from tests.processes import Command
from tests.tiny import TINY_OPTIONS, recipe

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def arguments(target, features, prompts, tmp_path):
    """Two recipes that the command finds by their names, and one that it must not take."""
    configs = tmp_path / "configs"
    for name, module in (("quickstart", "Eagle3Module"), ("small-smollm2", "StandaloneModule")):
        path = recipe(target, features, tmp_path, model__class_path=module, data__init_args__batch_size=2)
        content = yaml.safe_load(path.read_text())
        content["model"]["init_args"] = {**TINY_OPTIONS[module], "target": "elsewhere"}
        content["data"]["init_args"]["features"] = "elsewhere"
        configs.mkdir(exist_ok=True)
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (configs / "eagle3-qwen3-8b.yaml").write_text("not: read\n")
    options = {
        "--target": target,
        "--features": features,
        "--prompts": prompts,
        "--configs": configs,
        "--seed": 3,
        "--runs": tmp_path / "runs",
        "--output": tmp_path / "docs",
        "--tokens": 300,
        "--num_prompts": 4,
        "--max_new_tokens": 12,
        "--speed_prompts": 1,
        "--gamma": 3,
    }
    return [str(word) for pair in options.items() for word in pair]


def specforge(*words: object) -> None:
    """As the benchmark's, in a process that need not import anything."""
    process = Command(*words)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


@pytest.mark.slow
def test_all_are_trained_for_the_same_tokens_and_measured_once(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "specforge", specforge)
    assert results.main(arguments) == 0
    content = json.loads((tmp_path / "docs" / "results.json").read_text())
    assert [m["method"] for m in content["methods"]] == ["none", "ngram", "suffix", "eagle3", "small"]
    assert (content["run"]["gamma"], content["run"]["seed"], content["run"]["num_prompts"]) == (3, 3, 4)
    for method in content["methods"]:
        assert method["lossless"] is True
        assert method["tau"] == method["offline_tau"]
        assert method["tokens_per_second"] > 0
    assert set(content["training"]) == {"eagle3", "small"}
    for cost in content["training"].values():
        assert 200 < cost["supervised_tokens"] < 400
        assert cost["steps"] > 1
        assert cost["cpu_seconds_per_step"] > 0
        assert cost["peak_rss_mib"] > 100
        assert cost["parameters"] > 1000
    text = (tmp_path / "docs" / "results.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["none", "ngram", "suffix", "eagle3", "small"]
    assert len({line.count("|") for line in table}) == 1

    monkeypatch.setattr(results, "specforge", lambda *words: pytest.fail(f"{words} was done already"))
    assert results.main(arguments) == 0
    assert json.loads((tmp_path / "docs" / "results.json").read_text()) == content


@pytest.mark.parametrize("name", ["results", "results-gpu"])
def test_the_pages_say_what_their_figures_say(name):
    content = json.loads((DOCS / f"{name}.json").read_text())
    assert (DOCS / f"{name}.md").read_text() == results.page(content)


def test_the_budget_is_the_same_whatever_the_batch(features, tmp_path):
    path = tmp_path / "recipe.yaml"

    def steps(data: dict, accumulate: int = 1) -> int:
        config = {"trainer": {"accumulate_grad_batches": accumulate}, "data": {"init_args": data}}
        path.write_text(yaml.safe_dump(config))
        return results.steps_for(path, features, 100_000)

    one = steps({"batch_size": 1})
    assert steps({"batch_size": 4}) == pytest.approx(one / 4, abs=1)
    assert steps({"batch_size": 2}, accumulate=3) == pytest.approx(one / 6, abs=1)
    assert 1 < steps({"max_tokens": 1000}) < one


def test_one_that_fails_does_not_stop_the_others(arguments, tmp_path, monkeypatch, capsys):
    def fail(entry, options):
        raise results.subprocess.CalledProcessError(2, entry.name)

    monkeypatch.setattr(results, "train", fail)
    assert results.main(arguments) == 1
    assert "eagle3: failed" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()
