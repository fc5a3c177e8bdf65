"""Figures of the samples that the report's viewer holds: a gallery of kept tokens, and attention by layer on one picture."""

from __future__ import annotations

import base64
import io
import textwrap
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image

from schedule_finder.figures.overlay import draw_tokens, light_pixels
from schedule_finder.figures.style import DOUBLE, Drawing

if TYPE_CHECKING:
    from schedule_finder.figures.run_data import RunData
    from schedule_finder.report.viewer import ViewerSample

_GALLERY, _LAYERS, _ACROSS = 8, 8, 4
_RANGE = 0.25, 4.0
"""Attention over the layer's mean, ends of the colours."""


def gallery(data: RunData) -> Drawing | None:
    """Samples of the viewer, wrong answers first, with the tokens that are left after the last stage."""
    shown = [sample for sample in _single_pictures(data) if sample.stages][:_GALLERY]
    if not shown:
        return None
    down = -(-len(shown) // _ACROSS)
    figure = Figure(figsize=(DOUBLE, 2.4 * down), layout="constrained")
    panels = np.ravel(figure.subplots(down, _ACROSS, squeeze=False))
    rows = []
    for axes, sample in zip(panels, shown, strict=False):
        kept = _grid(sample, np.isin(np.arange(len(sample.places)), sample.stages[-1].kept))
        height, width = kept.shape
        pixels = light_pixels(_picture(sample), height, width, len(shown))
        draw_tokens(axes, pixels, kept, ())
        axes.set_aspect(pixels.shape[0] / pixels.shape[1] * width / height)
        question = textwrap.shorten(sample.question, 60, placeholder=" \u2026")
        lines = textwrap.wrap(question, 32)
        if sample.references:
            lines.append(f"reference: {sample.references[0][:24]}")
        lines += [f"full: {sample.full_answer[:24]}", f"pruned: {sample.pruned_answer[:24] or '(empty)'}"]
        axes.set_title("\n".join(lines), fontsize=6.5)
        rows.append((sample.id, sample.question, sample.full_answer, sample.pruned_answer, int(kept.sum())))
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    return figure, pd.DataFrame(rows, columns=["id", "question", "full_answer", "pruned_answer", "kept"])


def heatmaps(data: RunData) -> Drawing | None:
    """Attention of the text to each vision token of one sample in the full model, by layer."""
    sample = next((one for one in _single_pictures(data) if one.layers), None)
    if sample is None:
        return None
    levels = np.frombuffer(base64.b64decode(sample.attention), np.uint8).reshape(len(sample.layers), -1)
    relative = levels / 255 * np.array(sample.peaks)[:, None]
    chosen = np.unique(np.linspace(0, len(sample.layers) - 1, _LAYERS).round().astype(int))
    down = -(-len(chosen) // _ACROSS)
    figure = Figure(figsize=(DOUBLE, 1.85 * down + 0.35), layout="constrained")
    panels = np.ravel(figure.subplots(down, _ACROSS, squeeze=False))
    whole = _picture(sample)
    grey = np.asarray(whole.convert("L").resize((96, 96)))
    norm = LogNorm(*_RANGE, clip=True)
    for axes, index in zip(panels, chosen, strict=False):
        grid = _grid(sample, np.maximum(relative[index], 1e-3))
        extent = (0, grid.shape[1], grid.shape[0], 0)
        axes.imshow(grey, cmap="gray", extent=extent, aspect="auto")
        axes.imshow(
            grid, cmap="viridis", norm=norm, alpha=0.6, extent=extent, aspect="auto", interpolation="none"
        )
        axes.set_aspect(whole.height / whole.width * grid.shape[1] / grid.shape[0])
        axes.spines[["top", "right"]].set_visible(True)
        axes.set_title(f"Layer {sample.layers[index]}", fontsize=7, pad=3)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=list(panels), aspect=40, pad=0.01)
    bar.ax.set_yticks([0.25, 0.5, 1, 2, 4], ["\u2264 1/4", "1/2", "1", "2", "\u2265 4"])
    bar.ax.minorticks_off()
    bar.set_label("Attention / layer mean (log scale)")
    figure.suptitle(textwrap.shorten(sample.question, 100, placeholder=" \u2026"), fontsize=7.5)
    tokens = relative.shape[1]
    table = pd.DataFrame(
        {"layer": np.repeat(sample.layers, tokens), "token": np.tile(range(tokens), len(levels))}
    )
    return figure, table.assign(attention_over_mean=relative.ravel())


def _single_pictures(data: RunData) -> list[ViewerSample]:
    """Samples of one picture whose tokens are all placed."""
    viewer = data.viewer
    if viewer is None:
        return []
    return [sample for sample in viewer.samples if len(sample.panels) == 1 and None not in sample.places]


def _grid(sample: ViewerSample, values: np.ndarray) -> np.ndarray:
    panel = sample.panels[0]
    grid = np.zeros((panel.rows, panel.columns), values.dtype)
    for value, place in zip(values, sample.places, strict=True):
        assert place is not None
        grid[place[1], place[2]] = value
    return grid


def _picture(sample: ViewerSample) -> Image.Image:
    """The part of the picture that the grid covers."""
    panel = sample.panels[0]
    image = Image.open(io.BytesIO(base64.b64decode(panel.picture.partition(",")[2]))).convert("RGB")
    return image.crop((0, 0, round(image.width * panel.width), round(image.height * panel.height)))
