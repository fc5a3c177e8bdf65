"""Put runs into one HTML file: everything is inside it, nothing is loaded when it is opened."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd
import vl_convert

from pruning_runtime import __version__
from schedule_finder.errors import InputError
from schedule_finder.figures.held_out import held_out_results
from schedule_finder.figures.run_data import RunData
from schedule_finder.report.charts import CHARTS, accuracy_of
from schedule_finder.report.facts import (
    Cell,
    Finding,
    Table,
    methods_table,
    question_types_table,
    schedules_table,
    stages_table,
    verdict,
    warnings,
)
from schedule_finder.report.viewer import Viewer, current_viewer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from schedule_finder.run.folder import Run

NO_VIEWER = "The viewer is left out: {reason}."


@dataclass(frozen=True)
class Chart:
    """A chart of the page; ``key`` finds its specification."""

    key: str
    title: str
    caption: str


@dataclass(frozen=True)
class Section:
    """Everything about one run.

    Attributes:
        key: prefix of ids.
        name: heading.
        facts: label and value of the options and versions.
        findings, warnings: see `schedule_finder.report.facts`.
        charts: by name.
        tables: by name; None where the run lacks the data.
        viewer: key of the viewer's data; None without one.
        viewer_note: why there is none.
    """

    key: str
    name: str
    facts: tuple[tuple[str, str], ...]
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]
    charts: dict[str, Chart]
    tables: dict[str, Table | None]
    viewer: str | None
    viewer_note: str | None


def render(runs: Sequence[Run], reasons: Sequence[str | None]) -> str:
    """The HTML of a report.

    Args:
        runs: one or several; several are compared.
        reasons: for each run, why it has no viewer where it could not be recorded.

    Raises:
        InputError: a file of a run cannot be used.
    """
    specs: dict[str, Any] = {}
    viewers: dict[str, Any] = {}
    sections, datas = [], [RunData(run) for run in runs]
    for number, (data, reason) in enumerate(zip(datas, reasons, strict=True)):
        sections.append(_section(f"r{number}", data, reason, specs, viewers))
    comparison = _comparison(sections, datas, specs) if len(runs) > 1 else None
    environment = jinja2.Environment(
        loader=jinja2.BaseLoader(), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.from_string(_asset("report.html.j2")).render(
        title=sections[0].name if len(runs) == 1 else f"Comparison of {len(runs)} runs",
        sections=sections,
        comparison=comparison,
        comparison_chart="comparison" if "comparison" in specs else None,
        data={"charts": specs, "viewers": viewers},
        style=_asset("report.css"),
        script=_asset("report.js"),
        vega=_vega(),
        version=__version__,
    )


def _section(
    key: str, data: RunData, reason: str | None, specs: dict[str, Any], viewers: dict[str, Any]
) -> Section:
    run = data.run
    charts = {}
    for name, (title, caption, make) in CHARTS.items():
        spec = make(data)
        if spec is not None:
            specs[f"{key}-{name}"] = spec
            charts[name] = Chart(f"{key}-{name}", title, caption)
    viewer = _viewer(data)
    if viewer is not None and viewer.samples:
        viewers[key] = viewer.model_dump(exclude={"schedule", "answers"})
    note = None if key in viewers else NO_VIEWER.format(reason=reason or "no samples were recorded")
    return Section(
        key=key,
        name=run.folder.resolve().name,
        facts=tuple(_facts(data)),
        findings=tuple(verdict(data)),
        warnings=tuple(warnings(run, data)),
        charts=charts,
        tables={
            "stages": stages_table(data),
            "methods": methods_table(data),
            "types": question_types_table(run, data),
            "schedules": schedules_table(run),
        },
        viewer=key if key in viewers else None,
        viewer_note=note,
    )


def _viewer(data: RunData) -> Viewer | None:
    return None if data.digest is None else current_viewer(data.run, data.digest)


def _samples(data: RunData, options: dict[str, Any]) -> str:
    """How many samples were asked for, and how many the stored evaluation is of."""
    asked = f"{options.get('samples')} profiled, {options.get('eval_samples')} held out (asked for)"
    table = data.evaluation
    return asked if table is None or table.empty else f"{asked}, {int(table.n.max())} evaluated"


def _facts(data: RunData) -> list[tuple[str, str]]:
    """Options and origin of a run."""
    document = data.run.document()
    options, made = document["options"], document.get("provenance", {})
    dataset = options.get("dataset", "")
    found = [
        ("Backbone", str(options.get("backbone", ""))),
        ("Data set", dataset if isinstance(dataset, str) else " + ".join(dataset)),
        ("Samples", _samples(data, options)),
    ]
    if data.num_layers is not None:
        found.append(("Decoder layers", str(data.num_layers)))
    if data.mean_vision is not None:
        found.append(("Vision tokens", f"{data.mean_vision:.0f} per sample"))
    if data.schedule is not None:
        schedule = data.schedule
        scorers = dict.fromkeys((stage.scorer or schedule.scorer).name for stage in schedule.stages)
        number = len(schedule.stages)
        stages = "1 stage" if number == 1 else f"{number} stages"
        found.append(("Schedule", f"{stages}, {', '.join(scorers) or 'no scorer'}"))
        if schedule.budget is not None:
            found.append(("Budget", f"{schedule.budget.target:.0%} ({schedule.budget.kind})"))
    if data.detections is not None:
        points = ", ".join(map(str, data.change_points)) or "none"
        found.append(("Change points", f"{points} ({data.detections.default})"))
    versions = made.get("versions", {})
    shown = ", ".join(
        f"{name} {versions[name]}" for name in ("adaptinfer", "torch", "transformers") if name in versions
    )
    found += [("Command", str(document.get("command", ""))), ("Made", str(made.get("created", "")))]
    return [*found, ("Versions", shown)]


# ---- several runs


def _comparison(sections: Sequence[Section], datas: Sequence[RunData], specs: dict[str, Any]) -> Table:
    """One row per run; adds the chart of all schedules to ``specs``."""
    rows, points, labels = [], [], []
    for section, data in zip(sections, datas, strict=True):
        row = dict(section.facts)
        ours = _own_row(data)
        cells = [Cell(section.name, section.name)]
        cells += [
            Cell(row.get(name, "-"), row.get(name, "")) for name in ("Backbone", "Data set", "Schedule")
        ]
        for value in ours[:3]:
            cells.append(
                Cell("-" if value is None else f"{100 * value:.1f}", -1e9 if value is None else value)
            )
        cells.append(Cell(section.findings[0].text, section.findings[0].level))
        rows.append(tuple(cells))
        results = held_out_results(data)
        if results is not None:
            labels.append(results.label)
            points.append(_points(section.name, results.table))
    if points and len(set(labels)) == 1:
        specs["comparison"] = accuracy_of(pd.concat(points), labels[0])
    columns = (
        "Run",
        "Backbone",
        "Data set",
        "Schedule",
        "Processed (%)",
        "Score (%)",
        "Full model (%)",
        "Verdict",
    )
    return Table("Runs", columns, tuple(rows), "Runs may differ in samples and metric; compare with care.")


def _points(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """Full model and schedule of a run in percent."""
    some = table[table.method.isin(["full", "schedule"])]
    numbers = {column: 100 * some[column] for column in ("processed", "value", "ci_low", "ci_high")}
    return some.assign(label=[f"{name}: {method}" for method in some.method], variant="", **numbers)


def _own_row(data: RunData) -> tuple[float | None, float | None, float | None]:
    """Processed tokens and score of the schedule, and score of the full model."""
    results = held_out_results(data)
    if results is None:
        return None, None, None
    own = results.table[results.table.method == "schedule"]
    if own.empty:
        return None, None, float(results.full.value)
    return float(own.processed.iloc[0]), float(own.value.iloc[0]), float(results.full.value)


# ---- files


def _asset(name: str) -> str:
    return (resources.files("schedule_finder.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that can stand inside an HTML page."""
    try:
        make: Any = vl_convert.javascript_bundle  # its types ask for an argument that it does not need
        bundle: str = make()
    except Exception as error:  # the package raises its own and ValueError
        raise InputError(
            f"the plotting library cannot be bundled ({error}); reinstall vl-convert-python"
        ) from error
    return bundle.replace("</script", "<\\/script")
