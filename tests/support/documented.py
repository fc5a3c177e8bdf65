"""Code blocks of README and docs: commands and Python."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in ("index.md", "guide.md", "new_family.md", "evidence.md", "benchmarks.md")
    ),
    *sorted((ROOT / "docs" / "tutorials").glob("*.md")),
]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A command of a page."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def commands() -> list[Command]:
    """Every `adaptinfer-profile` command in a block without a language, in order of the pages."""
    found = []
    for page in PAGES:
        for language, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
            if language not in ("", "bash", "sh"):
                continue
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                if line.startswith("adaptinfer-profile "):
                    words = shlex.split(line, comments=True)[1:]
                    found.append(Command(page.relative_to(ROOT).as_posix(), tuple(words)))
    return found


def python_blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block for language, block in _BLOCK.findall(text) if language == "python"]
