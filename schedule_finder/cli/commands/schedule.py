"""`detect` and `schedule`: from a profile to change points and a schedule."""

from __future__ import annotations

from typing import Any

from schedule_finder.cli import options as opt
from schedule_finder.cli import parsing
from schedule_finder.cli.names import AUTO, BUDGET_KINDS, DETECTOR_NAMES, SOLVER_NAMES
from schedule_finder.cli.runner import command
from schedule_finder.cli.session import load_again, open_run, open_search
from schedule_finder.cli.terminal import screen
from schedule_finder.cli.terminal.schedule import show_detections, show_pareto, show_schedule


@command
def detect(folder: opt.RunArgument, detector: opt.Detector = None) -> dict[str, Any]:
    """Step 3: change points of a run's profile, by every detector."""
    detector = detector and parsing.choice("--detector", detector, DETECTOR_NAMES)
    current = open_run(folder)
    from schedule_finder import pipeline

    document = pipeline.detect_step(current, detector)
    show_detections(document)
    found = {name: entry["change_points"] for name, entry in document["detectors"].items()}
    return {"run": str(folder), "default": document["default"], "change_points": found}


@command
def schedule(
    folder: opt.RunArgument,
    budget: opt.Budget = opt.DEFAULT_BUDGET,
    budget_kind: opt.BudgetKindOption = BUDGET_KINDS[0],
    solver: opt.Solver = SOLVER_NAMES[0],
    scorer: opt.Scorer = AUTO,
    dropped_tokens: opt.DroppedTokensOption = AUTO,
    pareto: opt.Pareto = False,
    model: opt.Model = True,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    batch_size: opt.BatchSize = 32,
    threads: opt.Threads = None,
) -> dict[str, Any]:
    """Step 4: a schedule for any budget, from the profile and from measurements on the backbone.

    adaptinfer-profile schedule outputs/demo --budget 25%

    adaptinfer-profile schedule outputs/demo --budget 15% --solver retained

    adaptinfer-profile schedule outputs/demo --pareto --no-model
    """
    current = open_run(folder)
    kind = parsing.budget_kind(budget_kind)
    parsing.check_budget(budget, kind)
    asked = parsing.solver_options(solver, scorer, dropped_tokens)
    from schedule_finder import figures, pipeline
    from schedule_finder.solvers import SOLVERS

    measures = model and (SOLVERS[asked["solver"]].measures or kind == "latency")
    backbone = load_again(current, device, dtype, threads) if measures else None
    with open_search(current, backbone, batch_size) as search:
        if pareto:
            table = pipeline.pareto_step(current, search, kind=kind, **asked)
        else:
            fraction = parsing.budget_fraction(budget, search)
            found = pipeline.schedule_step(current, search, budget=fraction, kind=kind, **asked)
    if not pareto:
        show_schedule(found)
        screen.print(f"schedule: {current.schedule}")
        return {
            "run": str(folder),
            "schedule": str(current.schedule),
            "budget": found.model_dump()["budget"],
        }
    show_pareto(table, current)
    drawn = figures.make_figures(current, ["4_pareto"])
    for path in drawn:
        screen.print(f"figure: {path}", soft_wrap=True)
    return {
        "run": str(folder),
        "pareto": table.to_dict(orient="records"),
        "figures": [str(path) for path in drawn],
    }
