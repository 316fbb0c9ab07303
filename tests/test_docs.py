"""Commands, options, links, YAML and error messages in the documentation exist, and commands fit each other."""

from __future__ import annotations

import ast
import pkgutil
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from specforge.cli.main import COMMANDS, main
from specforge.cli.recipes import read_recipe, recipes
from tests.tiny import recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MARKDOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
MARKDOWN += sorted(DOCS.glob("*.md"))
PAGES = [*MARKDOWN, *recipes().values(), ROOT / "Makefile"]
# Commands whose `--help` does not list every option.
LIGHTNING = ("fit", "launch", "validate")
FROM_LIBRARIES = ("database or disk is full",)
INCLUDED = re.compile(r'--8<-- "(.+)"')


def commands(page: Path) -> list[list[str]]:
    text = page.read_text().replace("\\\n", " ").replace("$(SPECFORGE)", "specforge")
    lines = re.findall(r"^[#\s]*(specforge [^#`|\n]*)", text, re.MULTILINE)
    return [shlex.split(line)[1:] for line in lines]


def command_name(words: list[str]) -> str:
    return " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_their_options_exist(page, capsys):
    for words in commands(page):
        name = command_name(words)
        assert name in COMMANDS, words
        if name in LIGHTNING:
            continue
        engine = ["--engine.help", words[words.index("--engine") + 1]] if "--engine" in words else []
        for question in filter(None, (["--help"], engine)):
            with pytest.raises(SystemExit):
                main([*name.split(), *question])
        known = capsys.readouterr().out
        for option in (word for word in words if word.startswith("--")):
            assert option in known, (name, option)


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda p: p.name)
def test_commands_named_in_a_sentence_exist(page):
    for code in re.findall(r"`specforge ([^`]+)`", page.read_text()):
        assert command_name(code.split()) in COMMANDS, code


def documented_trainings() -> list[list[str]]:
    found = [words for page in MARKDOWN for words in commands(page) if words[0] in LIGHTNING]
    shipped = set(recipes())
    return [words for words in found if {b for a, b in pairwise(words) if a == "--config"} <= shipped]


@pytest.mark.parametrize("words", documented_trainings(), ids=" ".join)
def test_training_commands_are_accepted(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print_config"])
    assert ended.value.code in (0, None), capsys.readouterr().err


def option(words: list[str], name: str, default: str) -> str:
    return words[words.index(name) + 1] if name in words else default


def servers_and_trainings() -> list[tuple[list[str], list[str]]]:
    """Commands that start a server with fixed layers, each with the first training that follows it."""
    found = []
    for page in MARKDOWN:
        following = commands(page)
        while following:
            words, *following = following
            trained = next((later for later in following if later[0] == "fit"), None)
            if words[:2] == ["target", "serve"] and "--engine" in words and "--plan" not in words and trained:
                found.append((words, trained))
    assert len(found) == 3
    return found


@pytest.mark.parametrize(("served", "trained"), servers_and_trainings())
def test_documented_servers_capture_what_the_training_reads(served, trained):
    content = read_recipe(option(trained, "--config", ""))
    layers = content["model"]["init_args"].get("layer_ids")
    assert yaml.safe_load(option(served, "--layer_ids", "null")) == layers
    dtype = content["data"]["init_args"].get("dtype", "bfloat16")
    assert option(served, "--dtype", "bfloat16") == option(trained, "--data.dtype", dtype)
    assert option(served, "--target", "") == content["model"]["init_args"]["target"]


def trainer_snippets() -> list[str]:
    blocks = re.findall(r"^```yaml\n(trainer:.*?)^```$", (DOCS / "user-guide.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    return blocks


@pytest.mark.parametrize("snippet", trainer_snippets())
def test_trainer_snippets_of_the_guide_work(snippet, target, features, tmp_path, monkeypatch, capsys):
    """Parsed if they need a package that is not installed, otherwise trained with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snippet.yaml").write_text(snippet)
    path = recipe(target, features, tmp_path, trainer__max_steps=2)
    words = ["fit", "--config", str(path), "--config", str(tmp_path / "snippet.yaml")]
    if "WandbLogger" not in snippet:
        assert main(words) == 0
        assert bool(list(tmp_path.glob("runs/**/metrics.csv"))) == ("CSVLogger" in snippet)
        return
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print_config"])
    assert ended.value.code in (0, None), capsys.readouterr().err


def test_the_python_page_runs(target, features, prompts, tmp_path, monkeypatch, capsys):
    """On the tiny target, in a folder in which the quickstart seems to have run."""
    run = tmp_path / "runs" / "quickstart"
    assert main(["fit", "--config", str(recipe(target, features, tmp_path, trainer__default_root_dir=str(run)))]) == 0
    for name, folder in (("prompts", prompts), ("features", features)):
        (run / name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    capture, evaluate, train = (
        next(block for block in python_blocks("python-api.md") if word in block)
        for word in ("specforge.capture(", "specforge.evaluate(", "trainer.fit(")
    )
    exec(evaluate, {})
    assert "eagle3: tau" in capsys.readouterr().out
    exec("import specforge\n" + capture.replace("Qwen/Qwen3-8B", str(target)).replace("data/prompts", str(prompts)), {})
    assert (tmp_path / "data" / "features" / "train").is_dir()
    train = train.replace("models/SmolLM2-135M-Instruct", str(target)).replace(", layer_ids=[14, 22, 28]", "")
    exec(train.replace("max_steps=100", "max_steps=2, accelerator='cpu'"), {})


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    text = page.read_text()
    for name in INCLUDED.findall(text):
        text += (ROOT / name).read_text()
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda p: p.name)
def test_links_are_not_broken(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in slugs(target), link


def test_recipes_named_in_the_documentation_are_shipped():
    for page in MARKDOWN:
        named = set(re.findall(r"`((?:debug/)?[\w.-]+\.yaml)`", page.read_text()))
        assert named - {"toy.yaml", "config.yaml", "producer.yaml", "NAME-smollm2.yaml"} <= set(recipes()), page.name


def test_files_named_in_the_documentation_exist():
    folders = "specforge|lightning_modules|datamodules|configs|tests|benchmarks|docs|examples"
    for page in MARKDOWN:
        for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text()):
            assert (ROOT / name).exists(), (page.name, name)


def test_the_reference_names_what_exists():
    for name in re.findall(r"^::: ([\w.]+)$", (DOCS / "reference.md").read_text(), re.MULTILINE):
        pkgutil.resolve_name(name)


def test_the_site_has_every_page():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)
    text = (ROOT / "mkdocs.yml").read_text()
    in_nav = re.findall(r": ([\w-]+\.md)$", text, re.MULTILINE)
    assert yaml.load(text, Loader)["nav"]
    assert sorted(in_nav) == sorted(page.name for page in DOCS.glob("*.md"))


def message_parts() -> str:
    """Every string in the source, f-strings with their expressions cut out, one per line."""
    parts: list[str] = []
    for package in ("specforge", "lightning_modules", "datamodules"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts.append("\0".join(p.value for p in node.values if isinstance(p, ast.Constant)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    parts.append(node.value)
    return "\n".join(parts)


@pytest.mark.parametrize("page", ["user-guide.md", "disaggregated.md"])
def test_the_documented_error_messages_are_in_the_source(page):
    source, table = message_parts(), (DOCS / page).read_text().partition("## Error messages")[2]
    messages = [
        m for line in re.findall(r"^\| (`.+?) \| ", table, re.MULTILINE) for m in re.findall(r"`([^`]+)`", line)
    ]
    assert len(messages) > 15
    for message in messages:
        for part in re.split(r"\.\.\.+|\bN\b", message):
            assert part.strip(" :.;") in source or part in FROM_LIBRARIES, (message, part)
