"""The commands of ``adaptinfer-profile``: one module per group, imported in the order of the help."""

# isort: off
from schedule_finder.cli.commands import (
    run,
    schedule,
    results,
    report,
    benchmark,
    serve_check,
    merge,
    bench,
    backbones,
)

# isort: on
from schedule_finder.cli.runner import app

__all__ = [
    "app",
    "backbones",
    "bench",
    "benchmark",
    "merge",
    "report",
    "results",
    "run",
    "schedule",
    "serve_check",
]
