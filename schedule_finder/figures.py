"""Step 6: the figures of a run, each as PDF and PNG beside the table it was drawn from.

The only module that imports matplotlib. It reads the run's files and nothing else. Sizes are those of a
two-column paper; colours are Okabe and Ito's, and whatever differs in colour differs in line or marker too.

Layers are cells, and what happens between two of them stands on the edge: a change point ``l`` at
``l - 0.5``, a stage whose tokens leave after layer ``l`` at ``l + 0.5``.
"""

from __future__ import annotations

import json
import textwrap
from functools import cached_property
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from PIL import Image

from pruning_runtime.accounting import processed_ratios, published_ratios
from pruning_runtime.schedule import Schedule, Stage
from schedule_finder.errors import InputError
from schedule_finder.evaluate import CONTROLS, wilson_interval
from schedule_finder.signals import Band, band, layer_shift, vision_distribution

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from schedule_finder.profile_store import Profile
    from schedule_finder.run_folder import Run

SINGLE, DOUBLE = 3.3, 6.9
"""Widths of one and of two columns, inches."""

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
GREY = "#666666"

# Colour, marker, line of the schedule and of its controls.
_LOOKS = {
    "schedule": (BLUE, "o", "-"),
    "last_token": (VERMILLION, "s", (0, (4, 1.5))),
    "uniform_text": (GREEN, "^", (0, (4, 1, 1, 1))),
    "text_guided": (PURPLE, "D", (0, (2, 1))),
    "strided": (ORANGE, "v", (0, (6, 1, 1, 1, 1, 1))),
    "random": (BLACK, "X", (0, (1, 1))),
}
_SPARE_LOOKS = ((SKY, "P", "-"), (GREY, "*", "--"), (YELLOW, "h", "-."))

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.0,
    "legend.columnspacing": 1.0,
    "legend.labelspacing": 0.3,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "text.parse_math": False,  # a question may hold dollar signs
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
    "figure.constrained_layout.h_pad": 0.02,
    "figure.constrained_layout.w_pad": 0.02,
}
_MAP_ROWS = 64
_OVERLAY_PIXELS, _OVERLAY_COLOURS = 160, 96

_Drawing = tuple[Figure, pd.DataFrame]


def make_figures(run: Run) -> list[Path]:
    """Draw every figure that the run has data for into ``run.figures``; returns the files written.

    Each is a PDF and a PNG, and beside them the table (CSV) that it was drawn from. A figure whose data is
    missing is left out.

    Raises:
        InputError: data that is there but cannot be used; the message says which file and why.
    """
    data = _RunData(run)
    written: list[Path] = []
    with matplotlib.rc_context(_STYLE):
        for name, draw in _FIGURES.items():
            drawing = draw(data)
            if drawing is not None:
                written += _save(run.figures / name, *drawing)
    return written


def _save(stem: Path, figure: Figure, table: pd.DataFrame) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("pdf", "png", "csv")]
    # Nothing of the day or the machine, so that the same data gives the same bytes.
    figure.savefig(paths[0], metadata={"CreationDate": None})
    figure.savefig(paths[1], metadata={"Software": None})
    table.to_csv(paths[2], index=False, float_format="%.6g")
    return paths


class _RunData:
    """What a run folder holds; None for what is not there (yet)."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def profile(self) -> Profile | None:
        begun = any(self.run.profile.folder.glob("part-*.parquet"))
        return self.run.profile.read() if begun else None

    @cached_property
    def schedule(self) -> Schedule | None:
        return Schedule.load(self.run.schedule) if self.run.schedule.exists() else None

    @cached_property
    def detections(self) -> dict[str, Any] | None:
        path = self.run.change_points
        if not path.exists():
            return None
        document = _read_json(path, "detect again")
        _need(document, ("default", "detectors"), path, "detect again")
        if document["default"] not in document["detectors"]:
            raise InputError(f"{path}: no detector {document['default']!r} in it; detect again")
        return document

    @cached_property
    def evaluation(self) -> pd.DataFrame | None:
        return _read_evaluation(self.run.evaluation) if self.run.evaluation.exists() else None

    @cached_property
    def example(self) -> tuple[dict[str, Any], Image.Image] | None:
        described, pictured = self.run.folder / "5_example.json", self.run.folder / "5_example.png"
        if not (described.exists() and pictured.exists()):
            return None
        try:
            with Image.open(pictured) as image:
                return _read_example(described), image.convert("RGB")
        except OSError as error:
            raise InputError(f"{pictured}: not a readable image ({error}); evaluate again") from error

    @property
    def change_points(self) -> list[int]:
        """The default detector's, none where none was run."""
        if self.detections is None:
            return []
        return list(self.detections["detectors"][self.detections["default"]]["change_points"])

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.schedule.stages if self.schedule else ()


# --- 1 and 2: what the profile shows -------------------------------------------------------------


def _attention_map(data: _RunData) -> _Drawing | None:
    """Layer x token, tokens ranked within each sample by total attention, mean over samples.

    Each layer is divided by its mean over tokens, so that 1 is what every token would get if attention
    were even, in layers that look at the image much or little.
    """
    profile = data.profile
    if profile is None:
        return None
    layers, edges = profile.meta["layers"], _rank_edges(round(profile.mean_vision))
    values = _ranked_attention(profile.maps, edges)
    table = pd.DataFrame(
        {
            "layer": np.repeat(layers, len(edges) - 1),
            "first_rank": np.tile(edges[:-1] + 1, len(layers)),
            "last_rank": np.tile(edges[1:], len(layers)),
            "attention_over_even": values.ravel(),
        }
    )
    # Layers without attention (hybrid backbones) stay empty columns.
    columns = np.full((profile.num_layers, values.shape[1]), np.nan)
    columns[layers] = values

    figure = Figure(figsize=(SINGLE, 2.3), layout="constrained")
    axes = figure.subplots()
    low, high = np.nanquantile(values, [0.02, 0.998])
    low = max(low, high / 1e3)
    mesh = axes.pcolormesh(
        np.arange(profile.num_layers + 1) - 0.5,
        edges + 0.5,
        np.ma.masked_invalid(columns.T),
        norm=LogNorm(low, high, clip=True),
        cmap="Blues",
        rasterized=True,
    )
    axes.set_yscale("log")
    axes.invert_yaxis()
    decades = [10**n for n in range(6) if 10**n <= edges[-1] / 2]
    axes.set_yticks([*decades, edges[-1]], [str(rank) for rank in (*decades, edges[-1])])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("Vision token, by attention rank")
    bar = figure.colorbar(mesh, ax=axes, aspect=25, pad=0.02)
    bar.set_label("Attention / even share")
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0)))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.outline.set_linewidth(0.6)
    _layer_axis(axes, profile.num_layers)
    _mark(figure, [axes], data)
    return figure, table


def _rank_edges(num_vision: int) -> np.ndarray:
    """Edges of at most `_MAP_ROWS` bins of ranks, single ranks first, then ever wider ones."""
    edges = np.unique(np.geomspace(1, num_vision, _MAP_ROWS).round().astype(int))
    return np.concatenate([[0], edges])


def _ranked_attention(maps: Sequence[np.ndarray], edges: np.ndarray) -> np.ndarray:
    """Mean over samples of each layer's attention per bin of ranks, over an even share.

    Returns ``[layers, bins]``. Samples of other lengths are stretched to the edges' number of tokens.
    """
    total, known = 0.0, 0.0
    for sample in maps:
        ranked = sample[:, np.argsort(-sample.sum(axis=0), kind="stable")].astype(np.float64)
        mass = np.pad(np.cumsum(vision_distribution(ranked), axis=1), ((0, 0), (1, 0)))
        places = edges / edges[-1] * ranked.shape[1]
        below = np.stack([np.interp(places, np.arange(mass.shape[1]), row) for row in mass])
        share = np.diff(below, axis=1) / (np.diff(edges) / edges[-1])
        total, known = total + np.nan_to_num(share), known + ~np.isnan(share)
    with np.errstate(invalid="ignore"):  # a layer that no sample knows is NaN
        return np.asarray(total / known)


def _shift(data: _RunData) -> _Drawing | None:
    """Change of the vision distribution from layer to layer; below it vision mass and entropy."""
    profile = data.profile
    if profile is None:
        return None
    layers = np.array(profile.meta["layers"])
    shift = band(layer_shift(profile.maps))
    largest = np.log2(np.maximum(profile.counts["num_vision"], 2))[:, None]
    mass = band(profile.curves["vision_mass"])
    entropy = band(profile.curves["vision_entropy"] / largest)

    figure = Figure(figsize=(SINGLE, 2.9), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(1.25, 1))
    # A gap stands between its two layers.
    _curve(above, (layers[1:] + layers[:-1]) / 2, shift, BLUE, "o", "-")
    above.set_ylabel("JS divergence (bits)")
    above.set_ylim(bottom=0)
    _curve(below, layers, mass, GREEN, "s", "-", "Vision mass")
    _curve(below, layers, entropy, PURPLE, "^", (0, (3, 1)), "Vision entropy / largest")
    below.set_ylabel("Share")
    below.set_ylim(0, 1.02)
    _layer_axis(below, profile.num_layers)
    _mark(figure, [above, below], data, [*below.get_lines()[:2]])

    table = pd.DataFrame({"layer": layers})
    nothing = np.full(1, np.nan)  # the first layer has none before it
    for name, curve, before in (
        ("js_bits_from_layer_before", shift, nothing),
        ("vision_mass", mass, ()),
        ("vision_entropy_share", entropy, ()),
    ):
        for part in ("mean", "low", "high"):
            table[f"{name}_{part}"] = np.concatenate([before, getattr(curve, part)])
    table["vision_entropy_bits_mean"] = profile.curves["vision_entropy"].mean(axis=0)
    return figure, table


def _curve(
    axes: Axes, x: np.ndarray, curve: Band, colour: str, marker: str, line: Any, label: str | None = None
) -> None:
    axes.fill_between(x, curve.low, curve.high, color=colour, alpha=0.25, linewidth=0)
    size = 3.0 if len(x) <= 16 else 2.0
    axes.plot(x, curve.mean, color=colour, marker=marker, markersize=size, linestyle=line, label=label)


# --- 3: change points ----------------------------------------------------------------------------


def _change_points(data: _RunData) -> _Drawing | None:
    """Where the tokens' cumulative curves break, beside what no shift at all would give."""
    if data.detections is None:
        return None
    path, detectors = data.run.change_points, data.detections["detectors"]
    evidence = detectors.get("token_curve", {}).get("evidence", {})
    if not evidence or "reason" in evidence:  # not run, or too few layers for it
        return None
    _need(evidence, ("histogram", "straight_ramp", "num_curves"), path, "detect again")
    layers = data.detections.get("layers") or list(range(len(evidence["histogram"])))
    # Entry i counts breaks after the i-th layer: the new regime begins with the next one.
    first = np.array(layers[1:])

    def percent(counts: Sequence[float]) -> np.ndarray:
        if len(counts) != len(layers):
            raise InputError(f"{path}: {len(counts)} numbers for {len(layers)} layers; detect again")
        return np.asarray(100 * np.array(counts[:-1], dtype=float) / evidence["num_curves"])

    table = pd.DataFrame(
        {"first_layer_of_new_regime": first, "breaks_percent": percent(evidence["histogram"])}
    )
    table["straight_ramp_percent"] = percent(evidence["straight_ramp"])
    if "shuffled_layers" in evidence:
        table["shuffled_layers_percent"] = percent(evidence["shuffled_layers"])
        table["threshold_percent"] = table.shuffled_layers_percent + 100 * evidence["excess_threshold"]
    for name, detection in detectors.items():
        table[name] = np.isin(first, detection["change_points"]).astype(int)

    figure = Figure(figsize=(SINGLE, 2.3), layout="constrained")
    axes = figure.subplots()
    axes.bar(first, table.breaks_percent, 0.75, color=SKY, label="Token-curve breaks")
    if "shuffled_layers_percent" in table:
        axes.plot(first, table.shuffled_layers_percent, color=BLACK, marker=".", label="Layers shuffled")
        axes.plot(
            first,
            table.threshold_percent,
            color=BLACK,
            linewidth=0.8,
            linestyle=":",
            label=f"Shuffled, {evidence.get('level', 0.95):.0%} limit",
        )
    top = 1.18 * max(axes.get_ylim()[1] / 1.05, 1)
    axes.set_ylim(0, top)
    for layer in first[table.straight_ramp_percent > 0]:
        axes.axvline(layer, color="#BBBBBB", linewidth=4, zorder=0, label="Straight ramp")
    found = detectors.get("distribution_shift", {}).get("change_points", [])
    for layer in found:
        axes.plot(
            [layer, layer],
            [0, top],
            color=VERMILLION,
            marker="v",
            markevery=[1],
            markersize=5,
            linestyle=(0, (3, 1.5)),
            clip_on=False,
            label="Distribution shift",
        )
    own = table[table.token_curve == 1]
    axes.plot(
        own.first_layer_of_new_regime,
        own.breaks_percent + 0.04 * top,
        "*",
        color=BLACK,
        markersize=6,
        markeredgewidth=0,
        label="Token-curve change points",
    )
    axes.set_ylabel("Tokens' curves (%)")
    _layer_axis(axes, int(max(layers)) + 1, "First decoder layer of the new regime")
    _legend(figure, axes.get_legend_handles_labels(), columns=2)
    return figure, table


# --- 4 and 5: the schedule and what it costs -----------------------------------------------------


def _staircase(data: _RunData) -> _Drawing | None:
    """Vision tokens layer by layer, by both counts."""
    schedule = data.schedule
    if schedule is None:
        return None
    num_layers = schedule.backbone.num_layers
    num_vision = _typical_vision(data)
    unit, whole = ("", num_vision) if num_vision else (" %", 100.0)
    table = pd.DataFrame({"layer": range(num_layers)})
    for name, ratios in (("processed", processed_ratios), ("published", published_ratios)):
        table[f"{name}_ratio"] = ratios(schedule.stages, num_layers)
        if num_vision:
            table[f"{name}_tokens"] = table[f"{name}_ratio"] * num_vision
    processed, published = whole * table.processed_ratio, whole * table.published_ratio

    def mean(values: pd.Series) -> str:
        share = f" ({values.mean() / whole:.1%})" if num_vision else ""
        return f"mean {values.mean():.1f}{unit}{share}"

    figure = Figure(figsize=(SINGLE, 2.2), layout="constrained")
    axes = figure.subplots()
    edges = np.arange(num_layers + 1) - 0.5
    axes.stairs(processed, edges, fill=True, color=SKY, alpha=0.35)
    axes.stairs(
        processed, edges, baseline=None, color=BLUE, linewidth=1.4, label=f"Processed, {mean(processed)}"
    )
    axes.stairs(
        published,
        edges,
        baseline=None,
        color=BLACK,
        linestyle=(0, (2, 1)),
        label=f"Published, {mean(published)}",
    )
    steps = [(-0.5, 1.0), *((stage.layer + 0.5, stage.keep_ratio) for stage in schedule.stages)]
    ends = [*steps[1:], (num_layers - 0.5, 0.0)]
    for (start, ratio), (end, lower) in zip(steps, ends, strict=True):
        # Room for the number: a long step, or one that falls far.
        if end - start >= 0.09 * num_layers or ratio - lower >= 0.12:
            axes.annotate(
                f"{whole * ratio:.0f}{unit}",
                (start, whole * ratio),
                xytext=(3, 2),
                textcoords="offset points",
                fontsize=7,
            )
    axes.set_ylabel("Vision tokens kept" + (" (%)" if not num_vision else ""))
    axes.set_ylim(0, 1.12 * whole)
    _layer_axis(axes, num_layers)
    _legend(figure, axes.get_legend_handles_labels(), columns=1)
    return figure, table


def _typical_vision(data: _RunData) -> float | None:
    """Vision tokens of a typical sample, None where neither profile nor schedule tells."""
    if data.profile is not None:
        return data.profile.mean_vision
    evidence = data.schedule.evidence if data.schedule else {}
    vision_tokens: float | None = evidence.get("typical_prompt", {}).get("vision_tokens")
    return vision_tokens


def _accuracy(data: _RunData) -> _Drawing | None:
    """Accuracy against what is really processed; agreement where the data set has no answers.

    Points of different methods at the same budget are drawn a little apart (the table has no such shift).
    """
    if data.evaluation is None:
        return None
    table = data.evaluation.copy()
    label, centre = "Exact match (%)", "exact_match"
    if table.exact_match.isna().all():
        label, centre = "Agreement with full model (%)", "agreement"
        bounds = [
            wilson_interval(round(a * n), int(n)) for a, n in zip(table.agreement, table.n, strict=True)
        ]
        table[["ci_low", "ci_high"]] = bounds
    table = table.rename(columns={centre: "value"})[
        ["method", "budget", "n", "processed", "value", "ci_low", "ci_high"]
    ].assign(measure=centre)

    figure = Figure(figsize=(SINGLE, 2.6), layout="constrained")
    axes = figure.subplots()
    full = table[table.method == "full"].iloc[0]
    axes.axhspan(100 * full.ci_low, 100 * full.ci_high, color=GREY, alpha=0.18, linewidth=0)
    axes.axhline(100 * full.value, color=GREY, linewidth=1, label="Full model")
    names = _methods_in_order(table)
    used = 100 * table.processed[table.method != "full"]
    span = max(used.max() - used.min(), 10.0)
    spare = iter(_SPARE_LOOKS * len(names))
    for place, name in enumerate(names):
        rows = table[table.method == name].sort_values("processed")
        colour, marker, line = _LOOKS.get(name) or next(spare)
        axes.errorbar(
            100 * rows.processed + 0.01 * span * (place - (len(names) - 1) / 2),
            100 * rows.value,
            100 * np.maximum([rows.value - rows.ci_low, rows.ci_high - rows.value], 0),
            color=colour,
            marker=marker,
            markeredgecolor="white",
            markeredgewidth=0.3,
            markersize=4.5,
            linestyle=line,
            elinewidth=0.7,
            zorder=4 if name == "schedule" else 3,
            label=_method_label(name, data.schedule),
        )
    axes.set_xlabel("Vision tokens processed (% of full model)")
    axes.set_ylabel(label)
    if names:
        middle = (used.max() + used.min()) / 2
        axes.set_xlim(middle - 0.57 * span, middle + 0.57 * span)
    axes.yaxis.grid(True, color="#DDDDDD", linewidth=0.5)
    axes.set_axisbelow(True)
    _legend(figure, axes.get_legend_handles_labels(), columns=3)
    return figure, table


def _methods_in_order(table: pd.DataFrame) -> list[str]:
    """All but the full model: the schedule, its controls in their order, then whatever else there is."""
    there = [name for name in table.method.unique() if name != "full"]
    known = [name for name in ("schedule", *CONTROLS) if name in there]
    return known + [name for name in there if name not in known]


def _method_label(name: str, schedule: Schedule | None) -> str:
    if name == "schedule" and schedule is not None:
        return f"Schedule ({_words(schedule.scorer.name)})"
    return _words(name).capitalize()


def _words(name: str) -> str:
    return name.replace("_", " ")


def _read_evaluation(path: Path) -> pd.DataFrame:
    """The rows over all question types, checked. Raises `InputError`."""
    again = "evaluate again"
    try:
        table = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable table ({error}); {again}") from error
    shares = ("exact_match", "ci_low", "ci_high", "agreement", "processed")
    _need(table, ("method", "budget", "question_type", "n", *shares), path, again)
    for column in ("budget", "n", *shares):
        try:
            table[column] = pd.to_numeric(table[column])
        except ValueError as error:
            raise InputError(f"{path}: column {column!r} must hold numbers ({error}); {again}") from error
    for column in shares:
        wrong = table[(table[column] < 0) | (table[column] > 1)]
        if len(wrong):
            row = wrong.iloc[0]
            raise InputError(
                f"{path}: {column} of {row.method!r} is {row[column]:g}, need a share from 0 to 1; {again}"
            )
    table = table[table.question_type == "all"]
    if not (table.method == "full").any():
        raise InputError(f"{path}: no row with method 'full' and question_type 'all'; {again}")
    if table[["n", "agreement", "processed"]].isna().any(axis=None):
        raise InputError(f"{path}: n, agreement and processed must be there in every row; {again}")
    return table


# --- 6: one picture ------------------------------------------------------------------------------


def _overlay(data: _RunData) -> _Drawing | None:
    """One sample's image, whole and as each stage leaves it: dropped tokens fade."""
    if data.example is None:
        return None
    example, image = data.example
    rows, columns = example["grid"]
    table = pd.DataFrame({"token": range(rows * columns)})
    table["row"], table["column"] = table.token // columns, table.token % columns
    table["needed"] = table.token.isin(example["regions"]).astype(int)
    panels = [(f"Image: {rows * columns} tokens", np.ones((rows, columns), dtype=bool))]
    for stage in example["stages"]:
        kept = table.token.isin(stage["kept"])
        table[f"kept_after_layer_{stage['layer']}"] = kept.astype(int)
        where = "Before the decoder" if stage["layer"] < 0 else f"After layer {stage['layer']}"
        panels.append((f"{where}: {kept.sum()} left", kept.to_numpy().reshape(rows, columns)))

    pixels = _light(image, rows, columns, len(panels))
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    gap, line, rim = 0.06, 0.15, 0.01  # inches
    side = min((DOUBLE - 2 * rim - gap * (across - 1)) / across, 1.7)
    high = side * image.height / image.width
    width = side * across + gap * (across - 1) + 2 * rim
    caption = _caption(example, most=int(17 * width))
    height = (high + line + gap) * down + 0.128 * len(caption) + 0.06
    figure = Figure(figsize=(width, height))
    for place, (label, kept) in enumerate(panels):
        left = (place % across) * (side + gap) + rim
        bottom = height - (place // across + 1) * (high + line + gap) + line + gap - rim
        axes = figure.add_axes((left / width, bottom / height, side / width, high / height))
        _draw_tokens(axes, pixels, kept, example["regions"])
        figure.text((left + side / 2) / width, (bottom - 0.03) / height, label, ha="center", va="top")
    figure.text(0.5, 0.03 / height, "\n".join(caption), ha="center", va="bottom")
    return figure, table


def _light(image: Image.Image, rows: int, columns: int, copies: int) -> np.ndarray:
    """Pixels ``[height, width, 3]``, the same whole number per token; photographs get few colours.

    A PDF packs an image of few colours well, and no other kind; ``copies`` of it have to fit.
    """
    most = int(_OVERLAY_PIXELS * min(1.0, (4 / copies) ** 0.5))
    per_token = [
        max(1, min(pixels, most) // tokens)
        for pixels, tokens in zip(image.size, (columns, rows), strict=True)
    ]
    size = (per_token[0] * columns, per_token[1] * rows)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS).quantize(_OVERLAY_COLOURS).convert("RGB")
    return np.asarray(image)


def _draw_tokens(axes: Axes, pixels: np.ndarray, kept: np.ndarray, regions: Sequence[int]) -> None:
    rows, columns = kept.shape
    faded = (255 - 0.15 * (255 - pixels.astype(float))).astype(np.uint8)
    here = np.kron(kept, np.ones((pixels.shape[0] // rows, pixels.shape[1] // columns), dtype=bool))
    # One token is one unit; "none" keeps the pixels as they are in the PDF.
    axes.imshow(
        np.where(here[..., None], pixels, faded),
        extent=(0, columns, rows, 0),
        interpolation="none",
        aspect="auto",
    )
    axes.set_axis_off()

    def outline(tokens: Sequence[int], **look: Any) -> None:
        corners = [(token % columns, token // columns) for token in tokens]
        squares = [[(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)] for x, y in corners]
        axes.add_collection(PolyCollection(squares, facecolors="none", clip_on=False, **look))

    if not kept.all():
        outline(np.flatnonzero(kept).tolist(), edgecolors=GREY, linewidths=0.4)
    outline(regions, edgecolors="white", linewidths=2.2)
    outline(regions, edgecolors=VERMILLION, linewidths=1.2)
    axes.add_patch(Rectangle((0, 0), columns, rows, fill=False, edgecolor=GREY, linewidth=0.5, clip_on=False))


def _caption(example: dict[str, Any], most: int) -> list[str]:
    """Question and answers in lines of at most ``most`` characters."""
    parts = [f"full model: {example['full_answer']}", f"pruned: {example['pruned_answer'] or '(nothing)'}"]
    if example["answer"] is not None:
        parts.insert(0, f"right answer: {example['answer']}")
    if example["regions"]:
        parts.append("outlined: what the answer needs")
    question = textwrap.wrap(f"“{example['question']}”", most, max_lines=3, placeholder=" …")
    lines: list[str] = []
    for part in (text if len(text) <= most else f"{text[: most - 2]} …" for text in parts):
        if lines and len(lines[-1]) + len(part) + 5 <= most:
            lines[-1] += f"  ·  {part}"
        else:
            lines.append(part)
    return question + lines


def _read_example(path: Path) -> dict[str, Any]:
    """``5_example.json``, checked. Raises `InputError`."""
    example = _read_json(path, "evaluate again")
    fields = ("question", "answer", "full_answer", "pruned_answer", "grid", "stages", "regions")
    _need(example, fields, path, "evaluate again")
    rows, columns = example["grid"]
    for tokens in (example["regions"], *(stage["kept"] for stage in example["stages"])):
        if tokens and not 0 <= min(tokens) <= max(tokens) < rows * columns:
            raise InputError(
                f"{path}: token {min(tokens) if min(tokens) < 0 else max(tokens)} is outside the grid of "
                f"{rows} x {columns}; evaluate again"
            )
    return example


# --- shared --------------------------------------------------------------------------------------


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not readable ({error}); {remedy}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds no JSON object; {remedy}")
    return document


def _need(there: Any, names: Sequence[str], path: Path, remedy: str) -> None:
    missing = [name for name in names if name not in there]
    if missing:
        raise InputError(f"{path}: no {', '.join(missing)} in it; {remedy}")


def _layer_axis(axes: Axes, num_layers: int, label: str = "Decoder layer") -> None:
    axes.set_xlim(-0.5, num_layers - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, steps=[1, 2, 4, 5, 10]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def _mark(figure: Figure, panels: Sequence[Axes], data: _RunData, more: Sequence[Any] = ()) -> None:
    """Change points as dashed lines, stages as triangles on the lower edge; a legend above."""
    handles = list(more)
    for axes in panels:
        for layer in data.change_points:
            axes.axvline(layer - 0.5, color=VERMILLION, linestyle=(0, (3, 1.5)), linewidth=1.1)
    for stage in data.stages:
        panels[-1].plot(
            stage.layer + 0.5,
            0,
            marker="^",
            color=BLACK,
            markersize=5,
            clip_on=False,
            zorder=5,
            transform=panels[-1].get_xaxis_transform(),
        )
    if data.change_points:
        handles.append(
            Line2D([], [], color=VERMILLION, linestyle=(0, (3, 1.5)), linewidth=1.1, label="Change point")
        )
    if data.stages:
        handles.append(
            Line2D([], [], color=BLACK, marker="^", markersize=5, linestyle="", label="Tokens leave")
        )
    if handles:
        _legend(figure, (handles, [str(handle.get_label()) for handle in handles]), columns=2)


def _legend(figure: Figure, entries: tuple[list[Any], list[Any]], columns: int) -> None:
    """One legend above the panels, each label once."""
    once = dict(zip(entries[1], entries[0], strict=True))
    figure.legend(list(once.values()), list(once), loc="outside upper center", ncols=columns)


_FIGURES: dict[str, Callable[[_RunData], _Drawing | None]] = {
    "1_attention_map": _attention_map,
    "2_shift": _shift,
    "3_change_points": _change_points,
    "4_schedule": _staircase,
    "5_accuracy": _accuracy,
    "6_overlay": _overlay,
}
