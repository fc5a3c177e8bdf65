"""The documentation: commands parse, the site builds without a warning, and its links lead somewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
import typer

from schedule_finder.cli.commands import app
from tests.support.documented import ROOT, Command, commands

GROUP: Any = typer.main.get_command(app)


@pytest.mark.parametrize("command", commands(), ids=str)
def test_a_documented_command_has_known_options(command: Command) -> None:
    name, *words = command.words
    assert name in GROUP.commands
    GROUP.commands[name].make_context(name, list(words))


def test_there_are_commands_on_many_pages() -> None:
    assert len({command.page for command in commands()}) >= 6
    assert len(commands()) > 20


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("href", "src") and value]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "scripts/docs/mkdocs.yml", "-d", str(out)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return out


def test_every_link_of_the_site_leads_to_a_file(site: Path) -> None:
    checked = 0
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its links are absolute
            continue
        links = _Links()
        links.feed(page.read_text(encoding="utf-8"))
        for link in links.found:
            if link.startswith(("http", "data:", "#", "mailto:")):
                continue
            checked += 1
            assert (page.parent / unquote(urlparse(link).path)).exists(), f"{page.name}: {link}"
    assert checked > 300


def test_the_command_line_reference_has_every_command_and_option(site: Path) -> None:
    text = (site / "command_line.html").read_text(encoding="utf-8")
    for name, command in GROUP.commands.items():
        assert f'<h2 id="{name}">' in text
        for option in command.params:
            if option.param_type_name == "option" and not option.hidden:
                assert option.opts[0] in text, f"{name} {option.opts[0]}"


def test_notebooks_are_pages_of_the_site(site: Path) -> None:
    for name in ("quickstart", "new_scorer"):
        text = (site / "notebooks" / f"{name}.html").read_text(encoding="utf-8")
        cells = json.loads((ROOT / "docs" / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))[
            "cells"
        ]
        assert text.count('class="highlight"') >= sum(cell["cell_type"] == "code" for cell in cells)
        assert f'href="{name}.ipynb"' in text
        assert f'href="notebooks/{name}.html"' in (site / "index.html").read_text(encoding="utf-8")


def test_the_python_reference_shows_docstrings(site: Path) -> None:
    text = (site / "python.html").read_text(encoding="utf-8")
    for words in (
        "find_schedule",
        "push_to_hub",
        "AppliedSchedule",
        "Steps 1 to 4: profile, detect change points",
    ):
        assert words in text
