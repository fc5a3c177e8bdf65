"""The notebooks of the documentation run from top to bottom on the demo backbone."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("altair", reason="the extra `report` is not installed")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.slow


def text_of(notebook: object) -> str:
    """Everything that the cells printed or showed."""
    shown = []
    for cell in notebook.cells:  # type: ignore[attr-defined]
        for output in cell.get("outputs", []):
            shown.append(output.get("text", ""))
            shown.append(str(output.get("data", {}).get("text/html", "")))
            shown.append(str(output.get("data", {}).get("text/plain", "")))
    return "\n".join(shown)


# A user's environment has no torchvision; beside a CPU build of torch, that of the tests does not import.
HIDE = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] == "torchvision"
        return None if hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    shown = text_of(notebook)
    if path.stem == "quickstart":
        assert "Schedule for demo" in shown
        assert re.search(r"-> \w+ \| reference: \w+", shown)
        assert re.search(r"report\.html \d\.\d MB", shown)
    else:
        assert "far_from_mean" in shown
        assert "Record of the latest prefill" in shown


def test_both_notebooks_are_here_without_stored_outputs() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["new_scorer", "quickstart"]
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        assert all(not cell.get("outputs") for cell in cells)
