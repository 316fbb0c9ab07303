"""What the docs tell users to type exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from specforge.cli.main import COMMANDS, main
from specforge.cli.recipes import recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *recipes().values(), ROOT / "Makefile"]


def commands(page: Path) -> list[list[str]]:
    text = page.read_text().replace("\\\n", " ").replace("$(SPECFORGE)", "specforge")
    lines = re.findall(r"^[#\s]*(specforge [^#`|\n]*)", text, re.MULTILINE)
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_their_options_exist(page, capsys):
    for words in commands(page):
        name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
        assert name in COMMANDS, words
        if name in ("fit", "validate"):
            continue
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        known = capsys.readouterr().out
        for option in (word for word in words if word.startswith("--")):
            assert option in known, (name, option)


@pytest.mark.parametrize("page", [p for p in PAGES if p.suffix == ".md"], ids=lambda p: p.name)
def test_links_to_files_are_not_broken(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_recipes_named_in_the_readme_are_shipped():
    named = set(re.findall(r"`([\w.-]+\.yaml)`", (ROOT / "README.md").read_text()))
    assert named <= set(recipes())
