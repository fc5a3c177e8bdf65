"""What the site adds to `docs/`: command-line reference, notebooks as pages, files of the repository that pages link to."""

from __future__ import annotations

import json
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
NOTEBOOKS = "notebooks/"
LINK = re.compile(r"(\]\()(\.\.?/[^)#\s]+|[A-Za-z0-9_./-]+\.[a-z]+)((?:#[^)]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and the linked files."""
    from scripts.docs.cli_reference import reference

    files.append(File.generated(config, "command_line.md", content=reference()))
    for path in sorted((ROOT / "docs" / NOTEBOOKS).glob("*.ipynb")):
        page = f"{NOTEBOOKS}{path.stem}.md"
        files.append(File.generated(config, page, content=notebook_page(path)))
    linked = {
        target
        for file in files.documentation_pages()
        if file.abs_src_path is not None
        for target in _outside(Path(file.abs_src_path).read_text(encoding="utf-8"), file.src_uri)
    }
    for path in sorted(linked):
        files.append(File.generated(config, _copy_of(path), content=(ROOT / path).read_bytes()))
    return files


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text and code, with a link to the file; nothing is executed."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    title, _, rest = parts[0].partition("\n")
    return "\n\n".join([title, f"[Download this notebook]({path.name})", rest, *parts[1:]]) + "\n"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to files of the repository at their copies."""
    here = page.file.src_uri
    if not here.startswith(NOTEBOOKS):
        markdown = re.sub(rf"\]\(({NOTEBOOKS}[a-z_]+)\.ipynb\)", r"](\1.md)", markdown)

    def moved(match: re.Match[str]) -> str:
        path = _in_repository(match[2], here)
        if path is None:
            return match[0]
        target = posixpath.relpath(_copy_of(path), posixpath.dirname(here) or ".")
        return f"{match[1]}{target}{')' if path.endswith('.md') else match[3]}"

    return LINK.sub(moved, markdown)


def _outside(markdown: str, here: str) -> set[str]:
    found = (_in_repository(match[2], here) for match in LINK.finditer(markdown))
    return {path for path in found if path is not None}


def _in_repository(link: str, here: str) -> str | None:
    """The path in the repository of a link that leaves `docs/`; None for others."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(here), link))
    return path if not path.startswith("docs/") and (ROOT / path).is_file() else None


def _copy_of(path: str) -> str:
    """Where the site keeps the file; Markdown as plain text, so that it is no page."""
    return f"repository/{path}{'.txt' if path.endswith('.md') else ''}"
