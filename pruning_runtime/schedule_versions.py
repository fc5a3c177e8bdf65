"""Reading of schedule files of earlier versions, and the one line about a wrong file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pruning_runtime.errors import ScheduleError

if TYPE_CHECKING:
    from pydantic import ValidationError

_RENAMED = {"residual": "dropped_tokens", "separators": "image_newlines"}
_RENAMED_VALUES = {"residual": {"none": "discard", "merged": "merge"}}


def upgraded(document: dict[str, Any], source: str, version: int) -> dict[str, Any]:
    """Convert a version 1 document to version 2. Raises `ScheduleError`."""
    changed = dict(document, version=version)
    for old, new in _RENAMED.items():
        if new in changed:
            raise ScheduleError(f"{source}: field `{new}` belongs to version 2, this file says version 1")
        if old in changed:
            value = changed.pop(old)
            known = _RENAMED_VALUES.get(old)
            if known is not None and value not in known:
                raise ScheduleError(
                    f"{source}: field `{old}` is {value!r}; version 1 knows {', '.join(known)}"
                )
            changed[new] = value if known is None else known[value]
    stages = changed.get("stages")
    if isinstance(stages, list) and any(isinstance(stage, dict) and "scorer" in stage for stage in stages):
        raise ScheduleError(f"{source}: field `stages.scorer` belongs to version 2, this file says version 1")
    return changed


def first_problem(error: ValidationError) -> str:
    """One line for the first finding: field, value, what is allowed."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(" ".join(str(part).split()) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    where = f"field `{field}`: " if field else ""
    value = problem["input"]
    shown = f" (found {value!r})" if isinstance(value, (str, int, float, bool, type(None))) else ""
    return f"{where}{message}{shown}"
