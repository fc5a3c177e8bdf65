"""`detect` and `schedule`: from a profile to change points and a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schedule_finder.cli import options as opt
from schedule_finder.cli import parsing
from schedule_finder.cli.names import AUTO, BUDGET_KINDS, DETECTOR_NAMES, SERVING_ENGINES, SOLVER_NAMES
from schedule_finder.cli.progress import note
from schedule_finder.cli.runner import command
from schedule_finder.cli.session import load_again, open_run, open_search
from schedule_finder.cli.steps import note_stale
from schedule_finder.cli.terminal import screen
from schedule_finder.cli.terminal.schedule import show_detections, show_pareto, show_schedule
from schedule_finder.errors import InputError
from schedule_finder.files import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from schedule_finder.run.folder import Run
    from schedule_finder.run.schedules import NamedSchedule


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
    answer_tokens: opt.AnswerTokens = None,
    name: opt.ScheduleName = None,
    out: opt.ScheduleCopy = None,
    select: opt.Select = None,
    pareto: opt.Pareto = False,
    served_by: opt.ServedBy = None,
    model: opt.Model = True,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    batch_size: opt.BatchSize = 32,
    threads: opt.Threads = None,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> dict[str, Any]:
    """Step 4: a schedule for any budget, from the profile and from measurements on the backbone.

    adaptinfer-profile schedule outputs/demo --budget 25%

    adaptinfer-profile schedule outputs/demo --budget 15% --solver retained

    adaptinfer-profile schedule outputs/demo --budget 25% --for vllm

    adaptinfer-profile schedule outputs/demo --pareto --no-model

    adaptinfer-profile schedule outputs/demo --select 25pct-processed-sensitivity
    """
    current = open_run(folder)
    if select is not None:
        return _select(current, select)
    kind = parsing.budget_kind(budget_kind)
    parsing.check_budget(budget, kind)
    asked = parsing.solver_options(solver, scorer, dropped_tokens)
    _check_names(current, name, out, pareto)
    _check_serving(served_by, pareto, model, asked)
    from schedule_finder import pipeline
    from schedule_finder.solvers import SOLVERS

    measures = model and (SOLVERS[asked["solver"]].measures or kind == "latency" or served_by is not None)
    backbone = load_again(current, device, dtype, threads, trust_remote_code) if measures else None
    with open_search(current, backbone, batch_size, answer_tokens, served=served_by is not None) as search:
        if pareto:
            table = pipeline.pareto_step(current, search, kind=kind, **asked)
        else:
            fraction = parsing.budget_fraction(budget, search)
            found = pipeline.schedule_step(current, search, budget=fraction, kind=kind, name=name, **asked)
    if not pareto:
        if out is not None:
            write_text(out, found.schedule.to_json())
        show_schedule(found.schedule)
        return _result(current, found)
    return _show_front(current, table)


def _select(current: Run, name: str) -> dict[str, Any]:
    """Make a kept schedule the run's own and show it."""
    with current.step("select", schedule=name):
        chosen = current.schedules.select(name)
    show_schedule(chosen.schedule)
    return _result(current, chosen)


def _show_front(current: Run, table: Any) -> dict[str, Any]:
    """Print the front over budgets and draw its figure."""
    from schedule_finder import figures

    show_pareto(table, current)
    drawn = figures.make_figures(current, ["4_pareto"], note)
    for path in drawn:
        screen.print(f"figure: {path}", soft_wrap=True)
    return {
        "run": str(current.folder),
        "pareto": table.to_dict(orient="records"),
        "figures": [str(path) for path in drawn],
    }


def _check_serving(served_by: str | None, pareto: bool, model: bool, asked: dict[str, Any]) -> None:
    """Refuse before the search what ``--for`` cannot be combined with. Raises `InputError`."""
    if served_by is None:
        return
    from schedule_finder.served_search import servable

    parsing.choice("--for", served_by, SERVING_ENGINES)
    if pareto or not model:
        other = "--pareto" if pareto else "--no-model"
        raise InputError(f"--for {served_by}: measures one budget on the backbone; leave {other} away")
    servable(asked["scorer"], asked["dropped_tokens"])


def _check_names(run: Run, name: str | None, out: Path | None, pareto: bool) -> None:
    """Refuse before the search what would overwrite a result. Raises `InputError`."""
    if pareto and (name or out):
        raise InputError("--pareto writes a table and no schedule; leave --name and --out away")
    if name is not None and parsing.schedule_name(name) in run.schedules.names():
        raise InputError(
            f"--name {name!r}: {run.schedules.path(name)} exists; choose another name, or use it with --select {name}"
        )
    if out is not None and out.exists():
        raise InputError(f"--out {out}: exists; choose another file, or remove it")


def _result(run: Run, found: NamedSchedule) -> dict[str, Any]:
    """Show and return where the schedule is and what it costs."""
    kept = run.schedules.path(found.name)
    screen.print(f"schedule: {run.schedule} (selected: {found.name}, kept as {kept})", soft_wrap=True)
    return {
        "run": str(run.folder),
        "schedule": str(run.schedule),
        "name": found.name,
        "kept": str(kept),
        "budget": found.schedule.model_dump()["budget"],
        "stale": note_stale(run),
    }
