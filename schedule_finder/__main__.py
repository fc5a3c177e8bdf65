"""Entry point of ``adaptinfer-profile``: says which extra is missing instead of a traceback."""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = ("typer", "rich", "datasets", "ruptures", "pandas", "pyarrow", "matplotlib", "PIL")


def main() -> None:
    """Run the command line, or name the extra to install."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"adaptinfer-profile needs {', '.join(missing)}; install the extra: pip install 'adaptinfer[profile]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from schedule_finder.cli import app

    app()


if __name__ == "__main__":
    main()
