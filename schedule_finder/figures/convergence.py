"""Change points, stages and their precision against the number of samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from schedule_finder.figures.style import BLUE, GREY, SINGLE, VERMILLION, Drawing, legend_above
from schedule_finder.profiling.convergence import SHOWN_BUDGET, TOLERANCE

if TYPE_CHECKING:
    from schedule_finder.figures.run_data import RunData


def convergence(data: RunData) -> Drawing | None:
    """Change points and stages at each check; below them, the precision of the keep ratios."""
    checks = data.convergence
    if checks is None:
        return None
    rows = []
    for check in checks.itertuples():
        points = [int(point) for point in str(check.change_points).split()]
        rows += [{"samples": check.samples, "what": "change point", "layer": point} for point in points]
        for stage in str(check.stages).split():
            layer, ratio = stage.split(":")
            rows.append(
                {"samples": check.samples, "what": "stage", "layer": int(layer), "keep_ratio": float(ratio)}
            )
        rows.append({"samples": check.samples, "what": "ratio error", "value": check.ratio_error})
    table = pd.DataFrame(rows, columns=["samples", "what", "layer", "keep_ratio", "value"])

    figure = Figure(figsize=(SINGLE, 3.2), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(1.4, 1))
    stages = table[table.what == "stage"]
    above.scatter(
        stages.samples,
        stages.layer + 0.5,
        s=10 + 110 * stages.keep_ratio,
        color=BLUE,
        label=f"Stage at {SHOWN_BUDGET:.0%} (area: keep ratio)",
    )
    points = table[table.what == "change point"]
    if len(points):
        above.scatter(
            points.samples, points.layer - 0.5, marker="_", s=90, color=VERMILLION, label="Change point"
        )
    above.set_ylim(-0.5, (data.num_layers or int(table.layer.max()) + 2) - 0.5)
    above.set_ylabel("Decoder layer")
    above.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    below.plot(checks.samples, 100 * checks.ratio_error, color=BLUE, marker="o")
    below.axhline(100 * TOLERANCE, color=GREY, linestyle=(0, (3, 1.5)), label="Tolerance")
    below.set_ylim(0, max(130 * TOLERANCE, 110 * checks.ratio_error.max()))
    below.set_ylabel("Error of ratios (%)")
    below.set_xlabel("Samples")
    below.set_xscale("log", base=2)
    below.set_xticks(checks.samples, [str(count) for count in checks.samples])
    below.xaxis.set_minor_locator(NullLocator())
    below.set_xlim(checks.samples.min() / 1.5, 1.5 * checks.samples.max())
    handles = [*above.get_legend_handles_labels()[0], *below.get_legend_handles_labels()[0]]
    legend_above(figure, handles, columns=2)
    return figure, table
