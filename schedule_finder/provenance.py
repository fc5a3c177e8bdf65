"""Provenance of an artefact: versions, the state of this package's source, the machine."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("adaptinfer", "torch", "transformers", "datasets", "ruptures", "numpy", "pandas")


def provenance(**facts: Any) -> dict[str, Any]:
    """Provenance fields of every artefact, with ``facts`` (model revision, device, dtype, seed, ...) added."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": _source_revision(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **facts,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _source_revision() -> str | None:
    """Git commit of *this package's* source, with ``+changes`` where it was edited; None when installed."""
    folder = Path(__file__).resolve().parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        tracked = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", "..")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}{'+changes' if changed else ''}" if tracked else None


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *command], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
