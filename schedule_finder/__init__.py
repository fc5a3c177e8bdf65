"""Find pruning schedules for vision-language backbones: profile, detect, solve, evaluate, plot, report.

```python
from schedule_finder import find_schedule, load_run

schedule = find_schedule("demo", out="outputs/mine", samples=200, eval_samples=100, budget=0.25)
run = load_run("outputs/mine")
run.evaluate()
run.report()
```

- `find_schedule`: all steps from samples to a schedule; `profile`: the first two.
- `load_run`: open a run folder as a `Run`, with its steps as methods and its files as tables.

Names are loaded on first use. `adaptinfer-profile` offers the same steps as commands.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from schedule_finder.interface import Run, find_schedule, load_run, profile

__all__ = ["Run", "find_schedule", "load_run", "profile"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.interface"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
