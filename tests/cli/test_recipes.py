"""Recipes: heads that are complete and agree with the recipe and its commands, the table, details and copies."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import yaml

import lightning_modules
from specforge.cli.main import main
from specforge.cli.recipes import Recipe, read_comments, read_head, recipe_folder, recipes, resolve_recipes

ROOT = Path(__file__).parents[2]
PATHS = sorted(recipe_folder().glob("*.yaml"))
PRESETS = sorted(recipe_folder().glob("debug/*.yaml"))
every_recipe = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)


def head(path: Path) -> Recipe:
    found = read_head(path)
    assert found is not None
    return found


def commands(path: Path) -> dict[str, dict[str, str]]:
    """Options of each command in a recipe's comments."""
    lines = [shlex.split(line) for line in read_comments(path)[1].splitlines() if line.startswith("  specforge ")]
    assert len({words[1] for words in lines}) == len(lines)
    return {words[1]: dict(zip(words[2::2], words[3::2], strict=False)) for words in lines}


@every_recipe
def test_the_head_is_complete_and_agrees_with_the_recipe(path):
    recipe, model = head(path), yaml.safe_load(path.read_text())["model"]
    assert len(recipe.summary) <= 38
    assert lightning_modules.algorithms()[recipe.algorithm].__name__ == model["class_path"]
    assert recipe.target == model["init_args"].get("target", "any")
    for need in (recipe.fit, recipe.capture):
        assert need.gpus >= 0
        assert (need.gpus > 0) == (need.gpu_gb > 0)
    assert recipe.ram_gb > 0
    assert recipe.disk_gb > 0
    assert set(recipe.measured) <= {"fit", "capture", "ram_gb", "disk_gb"}


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_a_preset_has_a_summary_alone(path):
    assert set(read_comments(path)[0]) == {"summary"}
    assert read_head(path) is None


@every_recipe
def test_the_figures_of_the_head_are_those_of_the_text(path):
    recipe, text = head(path), " ".join(read_comments(path)[1].split())
    peak = re.search(r"peaks at ([\d.]+) GiB, measured", text)
    assert (peak is not None) == ("fit" in recipe.measured)
    if peak:
        assert 0 <= recipe.fit.gpu_gb - math.ceil(float(peak[1]) * 2**30 / 1e9) <= 2
        assert f"| {path.stem} |" in (ROOT / "benchmarks" / "README.md").read_text()
    for gpus, gpu_gb in re.findall(r"(\d+) GPUs of (\d+) GB", text):
        assert (int(gpus), float(gpu_gb)) == (recipe.capture.gpus, recipe.capture.gpu_gb)
    for figure in re.findall(r"([\d.]+) GB of GPU memory", text):
        assert float(figure) in (recipe.fit.gpu_gb, recipe.capture.gpu_gb)
    if per_token := re.search(r"(\d+) kB per token", text):
        assert float(per_token[1]) * 10 < recipe.disk_gb  # kB per token are GB per million; of 10 million
    assert ("cannot capture" in text) == (recipe.capture.gpus > 1)


@every_recipe
def test_measured_memory_is_that_of_the_results(path):
    rows = json.loads((ROOT / "docs" / "results.json").read_text())["training"].values()
    peaks = [row["peak_rss_mib"] for row in rows if row["recipe"] == path.name]
    assert len(peaks) == ("ram_gb" in head(path).measured)
    assert all(peak * 2**20 < head(path).ram_gb * 1e9 for peak in peaks)


@every_recipe
def test_a_recipe_has_its_own_commands(path):
    """They lead from conversations to the folder and the layers that the recipe trains on."""
    recipe, config, run = head(path), yaml.safe_load(path.read_text()), commands(path)
    data, layers = config["data"]["init_args"], config["model"]["init_args"].get("layer_ids")
    assert run["fit"]["--config"] == path.name
    target = "Qwen/Qwen3-0.6B" if recipe.target == "any" else recipe.target
    assert all(options.get("--target", target) == target for options in run.values())
    assert run["prepare"]["--output"] == data.get("prompts", run.get("capture", {}).get("--prompts"))
    assert "--holdout" in run["prepare"] or "configs/quickstart" in run["prepare"]["--data"]
    if "features" in data:
        assert run["capture"]["--output"] == data["features"]
        if layers:
            assert json.loads(run["capture"]["--layer_ids"]) == layers
        assert run["capture"].get("--algorithm", recipe.algorithm) == recipe.algorithm
    if "store" in data:
        assert {run["produce"][f"--{name}"] for name in ("store", "metadata")} == {data["store"], data["metadata"]}


@pytest.mark.parametrize("path", [p for p in PATHS if "smollm2" in p.name], ids=lambda p: p.stem)
def test_the_smollm2_recipes_share_the_quickstarts_prompts_and_features(path):
    of_the_quickstart = (ROOT / "Makefile").read_text().replace("$(TARGET)", head(path).target)
    of_the_quickstart = of_the_quickstart.replace("$(SPECFORGE)", "specforge").replace("$(RUN)", "runs/quickstart")
    lines = [line.strip() for line in read_comments(path)[1].splitlines() if line.startswith("  specforge ")]
    assert [line.split()[1] for line in lines][:2] == ["target", "prepare"]
    assert all(line in of_the_quickstart for line in lines if line.split()[1] in ("target", "prepare", "capture"))


def test_the_table_has_a_line_for_each_recipe_and_fits_120_columns(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) == len(recipes()) + 5
    for name, path in recipes().items():
        (line,) = [line for line in lines if line.startswith(name + " ")]
        assert str(read_comments(path)[0]["summary"]) in line
    (line,) = [line for line in lines if line.startswith("eagle3-kimi-k2.yaml")]
    assert line.split()[1:6] == ["eagle3", "Kimi-K2-Instruct", "16", "x", "141"]


@pytest.mark.parametrize("name", ["dflash-qwen3-8b", "dflash-qwen3-8b.yaml"])
def test_details_of_a_recipe(name, capsys):
    assert main(["recipes", name]) == 0
    text = capsys.readouterr().out
    assert "training   GPUs: 1 x 43 GB (measured)" in text
    assert "capture    GPUs: 1 x 40 GB (estimated)" in text
    assert "\n  specforge fit --config dflash-qwen3-8b.yaml\n" in text


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("eagel3.yaml", "eagle3.yaml"),
        ("dflash-smolm2", "dflash-smollm2.yaml"),
        ("debug/overfitt.yaml", "debug/overfit.yaml"),
    ],
)
@pytest.mark.parametrize("words", [["recipes"], ["recipes", "--copy"], ["fit", "--config"]])
def test_a_near_miss_is_answered_with_the_recipe_that_was_meant(words, name, close, capsys):
    assert main([*words, name]) == 2
    assert f"did you mean {close}?" in capsys.readouterr().err


def test_a_recipe_is_found_with_and_without_its_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(recipes()["eagle3.yaml"])
    assert resolve_recipes(["--config", "eagle3", "-c=eagle3.yaml"]) == ["--config", path, f"-c={path}"]
    (tmp_path / "eagle3.yaml").write_text("model: {}\n")
    assert resolve_recipes(["--config", "eagle3.yaml"]) == ["--config", "eagle3.yaml"]


def test_a_copy_never_replaces_a_file(tmp_path, capsys):
    assert main(["recipes", "--copy", "eagle3", "--to", str(tmp_path)]) == 0
    assert (tmp_path / "eagle3.yaml").read_bytes() == recipes()["eagle3.yaml"].read_bytes()
    assert main(["recipes", "--copy", "eagle3", "--to", str(tmp_path)]) == 2
    assert "already exists" in capsys.readouterr().err
