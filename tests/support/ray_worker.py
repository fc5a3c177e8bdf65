"""What a Ray worker of the tests does before anything else."""

from __future__ import annotations


def set_up() -> None:
    """Give it a torchvision that imports (tests/conftest.py)."""
    import tests.conftest  # noqa: F401
