"""Apply a vision-token pruning schedule to a stock Hugging Face vision-language model.

```python
from pruning_runtime import Schedule, pruned

schedule = Schedule.load("4_schedule.json")
with pruned(model, schedule) as record:
    model.generate(**inputs, max_new_tokens=32)
print(record)
```

- `pruned` applies a schedule inside a ``with``, `apply` until its handle's `remove`.
- `Schedule`, `Stage`: what is dropped after which layer; read from files, presets or the Hugging Face Hub, or made by hand.
- `Record`: what the latest prompt kept, computed and stored.
- `find_backbone`, `Backbone`: the parts of a stock model.
- `register_scorer`: add a rule of your own.
- `ScheduleError`, `UnsupportedBackbone`, `PruningError`: every error that is raised on purpose, except for pydantic's
  ``ValidationError`` where a `Schedule` or a `Stage` is made by hand from wrong values.

Names are loaded on first use: reading a schedule file does not import torch or transformers.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pruning_runtime.backbone import Backbone, find_backbone
    from pruning_runtime.errors import PruningError, ScheduleError, UnsupportedBackbone
    from pruning_runtime.pruned import AppliedSchedule, apply, pruned
    from pruning_runtime.record import Record
    from pruning_runtime.schedule import Schedule, Stage
    from pruning_runtime.scorers import register_scorer

_MODULE_OF = {
    "AppliedSchedule": "pruned",
    "Backbone": "backbone",
    "PruningError": "errors",
    "Record": "record",
    "Schedule": "schedule",
    "ScheduleError": "errors",
    "Stage": "schedule",
    "UnsupportedBackbone": "errors",
    "apply": "pruned",
    "find_backbone": "backbone",
    "pruned": "pruned",
    "register_scorer": "scorers",
}

__all__ = [
    "AppliedSchedule",
    "Backbone",
    "PruningError",
    "Record",
    "Schedule",
    "ScheduleError",
    "Stage",
    "UnsupportedBackbone",
    "apply",
    "find_backbone",
    "pruned",
    "register_scorer",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps `pruned` the function: importing the submodule of the same name would replace it by the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "pruned" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
