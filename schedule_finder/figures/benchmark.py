"""The results of `bench`: parts of the time to the first token, and total times by number of new tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from schedule_finder.benchmark import PREFILL_PARTS, faster_text, ran_on
from schedule_finder.figures import save_figure
from schedule_finder.figures.style import (
    BLACK,
    BLUE,
    DOUBLE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILLION,
    YELLOW,
    Drawing,
    legend_above,
    words,
)

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

_PART_STYLES = {
    "vision_tower": (GREY, "//"),
    "projector": (YELLOW, ""),
    "decoder": (SKY, ""),
    "scoring": (VERMILLION, ""),
    "dropping": (PURPLE, ""),
    "lm_head": (GREEN, "\\\\"),
    "other": ("#DDDDDD", ".."),
}
# Colour, marker, line; the fast path has open markers.
_LINE_STYLES: dict[str, tuple[str, str, Any]] = {
    "unpruned": (BLACK, "o", "-"),
    "schedule": (BLUE, "s", "-"),
    "no-scoring bound": (GREEN, "^", (0, (4, 1.5))),
    "eager, syncs": (VERMILLION, "X", (0, (1, 1))),
    "FastV-like": (ORANGE, "v", (0, (4, 1, 1, 1))),
    "before decoder": (PURPLE, "D", (0, (2, 1))),
    "unpruned, fast": (BLACK, "o", (0, (5, 1))),
    "schedule, fast": (BLUE, "s", (0, (5, 1))),
}


def draw_benchmark(document: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the results into ``folder`` as ``latency.pdf``, ``.png`` and ``.csv``; returns these files."""
    with matplotlib.rc_context(STYLE):
        return save_figure(folder / "latency", *latency(document))


def latency(document: dict[str, Any]) -> Drawing:
    """Per batch size, the stacked parts of the time to the first token, and total times in % of unpruned."""
    batches = list(dict.fromkeys(result["batch"] for result in document["results"]))
    most = max(sum(result["batch"] == batch for result in document["results"]) for batch in batches)
    figure = Figure(figsize=(DOUBLE, 0.6 + (0.7 + 0.2 * most) * len(batches)), layout="constrained")
    panels: Any = figure.subplots(len(batches), 2, squeeze=False)
    rows: list[dict[str, Any]] = []
    for (left, right), batch in zip(panels, batches, strict=True):
        results = [result for result in document["results"] if result["batch"] == batch]
        _stacked_parts(left, results)
        _totals(right, results, document["lengths"])
        left.set_title(f"Batch {batch}", loc="left", fontsize=7.5)
        rows += [_row(result) for result in results]
    bars, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(bars, labels, loc="outside lower center", ncols=len(labels))
    described = [
        document["backbone"]["name"],
        document["environment"]["dtype"],
        ran_on(document),
        document["note"],
    ]
    lines = [handle for right in panels[:, 1] for handle in right.get_legend_handles_labels()[0]]
    legend_above(figure, lines, columns=-(-most // 2), title=", ".join(filter(None, described)))
    return figure, pd.DataFrame(rows)


def _stacked_parts(axes: Axes, results: list[dict[str, Any]]) -> None:
    names = [result["baseline"] for result in results]
    start = [0.0] * len(results)
    for part in PREFILL_PARTS:
        colour, hatch = _PART_STYLES[part]
        length = [result["prefill"][part] or 0.0 for result in results]
        axes.barh(
            names,
            length,
            left=start,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.3,
            label=words(part),
        )
        start = [before + more for before, more in zip(start, length, strict=True)]
    for index, result in enumerate(results):
        # The bound of the decoder starts where the bar of the decoder does.
        before = sum(result["prefill"][part] for part in PREFILL_PARTS[:2])
        bound = before + result["roofline_ms"]
        axes.plot(
            [bound, bound], [index - 0.4, index + 0.4], color=BLACK, label="roofline" if not index else None
        )
        if result["prefill"]["scoring"] is None and result["processed"] < 1:
            axes.annotate(
                " scoring, dropping\n in the decoder", (start[index], index), fontsize=5.5, va="center"
            )
    axes.invert_yaxis()
    axes.set_xlabel("Time to the first token (ms)")


def _totals(axes: Axes, results: list[dict[str, Any]], lengths: list[int]) -> None:
    unpruned = next(result["total_ms"] for result in results if result["baseline"] == "unpruned")
    for result in results:
        colour, marker, line = _LINE_STYLES[result["baseline"]]
        share = [
            100 * result["total_ms"][str(length)]["median"] / unpruned[str(length)]["median"]
            for length in lengths
        ]
        axes.plot(
            lengths,
            share,
            color=colour,
            marker=marker,
            markerfacecolor="white" if result["fast"] else colour,
            linestyle=line,
            label=result["baseline"],
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("New tokens")
    axes.set_ylabel("Total (% of unpruned)")


def _row(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "batch": result["batch"],
        "baseline": result["baseline"],
        **{f"{part}_ms": result["prefill"][part] for part in PREFILL_PARTS},
        "roofline_ms": result["roofline_ms"],
        **{f"total_ms_{length}": spread["median"] for length, spread in result["total_ms"].items()},
        "faster": faster_text(result["faster"]),
    }
