"""Entry point of ``adaptinfer-profile``; names the extra to install if a package is missing."""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = {
    "typer": "typer",
    "rich": "rich",
    "datasets": "datasets",
    "ruptures": "ruptures",
    "pandas": "pandas",
    "pyarrow": "pyarrow",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
}
"""Module to the package that brings it."""


def main() -> None:
    """Run the command line, or name the extra to install."""
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f"adaptinfer-profile needs {', '.join(missing)}; install the extra: pip install 'adaptinfer[profile]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from schedule_finder.cli.commands import app

    app()


if __name__ == "__main__":
    main()
