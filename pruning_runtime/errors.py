"""Every error that the runtime raises on purpose."""

from __future__ import annotations


class ScheduleError(ValueError):
    """A schedule that cannot be used. The message names the field, its value and what is allowed."""


class UnsupportedBackbone(ValueError):
    """A model, or a set-up of it, that cannot be profiled or pruned. The message names the part and the reason."""


class PruningError(RuntimeError):
    """A call that a pruned model cannot serve. The message says what to do instead."""
