"""Python code run as if some packages were not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FINDER_ONLY = ("datasets", "ruptures", "pandas", "pyarrow", "matplotlib", "typer", "rich", "PIL")

# The named packages look as if they were not installed, to `import` and to `find_spec` alike (transformers
# asks the latter before it imports an optional package). torchvision is hidden too: the runtime does not
# use it, and beside a CPU build of torch it does not import.
HIDE = """
import sys

HIDDEN = {"torchvision", "schedule_finder", *sys.argv[1].split()}

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


def run_with_hidden(code: str, hidden: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own, to which the ``hidden`` packages are not installed."""
    return subprocess.run(
        [sys.executable, "-c", HIDE + code, " ".join(hidden)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
