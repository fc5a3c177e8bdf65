"""Errors that are the input's fault: one line, exit code 2."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where and what to do."""


class OutOfReach(InputError):
    """No stages can meet the budget on this backbone."""
