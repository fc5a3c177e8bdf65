"""What `bench` measured: where the time to the first token goes, and for how many new tokens pruning pays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from schedule_finder.benchmark import PREFILL_PARTS, faster_text
from schedule_finder.figures import _save
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
    words,
)

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

_PART_LOOKS = {
    "vision_tower": (GREY, "//"),
    "projector": (YELLOW, ""),
    "decoder": (SKY, ""),
    "scoring": (VERMILLION, ""),
    "dropping": (PURPLE, ""),
    "lm_head": (GREEN, "\\\\"),
    "other": ("#DDDDDD", ".."),
}
_LINE_LOOKS = (
    (BLACK, "o", "-"),
    (BLUE, "s", "-"),
    (GREEN, "^", (0, (4, 1.5))),
    (VERMILLION, "X", (0, (1, 1))),
    (ORANGE, "v", (0, (4, 1, 1, 1))),
    (PURPLE, "D", (0, (2, 1))),
)


def draw_benchmark(document: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what `bench` measured into ``folder`` as ``latency.pdf``, ``.png`` and ``.csv``; returns them."""
    with matplotlib.rc_context(STYLE):
        return _save(folder / "latency", *latency(document))


def latency(document: dict[str, Any]) -> Drawing:
    """For each batch size the stacked parts of the time to the first token, and totals over new tokens."""
    batches = list(dict.fromkeys(result["batch"] for result in document["results"]))
    figure = Figure(figsize=(DOUBLE, 0.6 + 1.9 * len(batches)), layout="constrained")
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
    environment = document["environment"]
    place = environment["device_name"] or environment["device"]
    said = [document["backbone"]["name"], environment["dtype"], place, document["note"] or ""]
    figure.suptitle(", ".join(filter(None, said)), fontsize=7.5)
    return figure, pd.DataFrame(rows)


def _stacked_parts(axes: Axes, results: list[dict[str, Any]]) -> None:
    names = [result["competitor"] for result in results]
    start = [0.0] * len(results)
    for part in PREFILL_PARTS:
        colour, hatch = _PART_LOOKS[part]
        length = [result["prefill"][part]["median"] for result in results]
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
    for place, result in enumerate(results):
        # The decoder's bound starts where its bar does.
        before = sum(result["prefill"][part]["median"] for part in PREFILL_PARTS[:2])
        bound = before + result["roofline_ms"]
        axes.plot(
            [bound, bound], [place - 0.4, place + 0.4], color=BLACK, label="roofline" if not place else None
        )
    axes.invert_yaxis()
    axes.set_xlabel("Time to the first token (ms)")


def _totals(axes: Axes, results: list[dict[str, Any]], lengths: list[int]) -> None:
    for result, (colour, marker, line) in zip(results, _LINE_LOOKS, strict=False):
        total = [result["total_ms"][str(length)]["median"] for length in lengths]
        faster = faster_text(result["faster"])
        label = result["competitor"] + (f" (faster: {faster})" if faster else "")
        axes.plot(lengths, total, color=colour, marker=marker, linestyle=line, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("New tokens")
    axes.set_ylabel("Total (ms)")
    axes.legend(fontsize=6)


def _row(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "batch": result["batch"],
        "competitor": result["competitor"],
        **{f"{part}_ms": result["prefill"][part]["median"] for part in PREFILL_PARTS},
        "roofline_ms": result["roofline_ms"],
        **{f"total_ms_{length}": spread["median"] for length, spread in result["total_ms"].items()},
        "faster": faster_text(result["faster"]),
    }
