"""One image, and the tokens that every stage keeps."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from schedule_finder.figures.style import DOUBLE, GREY, VERMILLION, Drawing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from schedule_finder.figures.run_data import Example, RunData

_OVERLAY_PIXELS, _OVERLAY_COLOURS = 150, 96


def overlay(data: RunData) -> Drawing | None:
    """The image of one sample, whole and after each stage; dropped tokens are faded."""
    if data.example is None:
        return None
    example, image = data.example
    rows, columns = example.grid
    table = pd.DataFrame({"token": range(rows * columns)})
    table["row"], table["column"] = table.token // columns, table.token % columns
    table["needed"] = table.token.isin(example.regions).astype(int)
    panels = [(f"Image: {rows * columns} tokens", np.ones((rows, columns), dtype=bool))]
    for stage in example.stages:
        kept = table.token.isin(stage.kept)
        table[f"kept_after_layer_{stage.layer}"] = kept.astype(int)
        where = "Before the decoder" if stage.layer < 0 else f"After layer {stage.layer}"
        panels.append((f"{where}: {kept.sum()} tokens", kept.to_numpy().reshape(rows, columns)))

    pixels = light_pixels(image, rows, columns, len(panels))
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    gap, line, rim = 0.06, 0.15, 0.01  # inches
    side = min((DOUBLE - 2 * rim - gap * (across - 1)) / across, 1.7)
    high = side * image.height / image.width
    width = side * across + gap * (across - 1) + 2 * rim
    caption = _caption(example, most=int(17 * width))
    height = (high + line + gap) * down + 0.128 * len(caption) + 0.06
    figure = Figure(figsize=(width, height))
    for index, (label, kept) in enumerate(panels):
        left = (index % across) * (side + gap) + rim
        bottom = height - (index // across + 1) * (high + line + gap) + line + gap - rim
        axes = figure.add_axes((left / width, bottom / height, side / width, high / height))
        draw_tokens(axes, pixels, kept, example.regions)
        figure.text((left + side / 2) / width, (bottom - 0.03) / height, label, ha="center", va="top")
    figure.text(0.5, 0.03 / height, "\n".join(caption), ha="center", va="bottom")
    return figure, table


def light_pixels(image: Image.Image, rows: int, columns: int, copies: int) -> np.ndarray:
    """Pixels ``[height, width, 3]``, the same whole number per token; photographs get few colours.

    A PDF compresses only images of few colours well; it holds ``copies`` of this one.
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


def draw_tokens(axes: Axes, pixels: np.ndarray, kept: np.ndarray, regions: Sequence[int]) -> None:
    """Draw the picture with tokens that are not ``kept`` (bool ``[rows, columns]``) faded, and ``regions`` outlined."""
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

    def outline(tokens: Sequence[int], **style: Any) -> None:
        corners = [(token % columns, token // columns) for token in tokens]
        squares = [[(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)] for x, y in corners]
        axes.add_collection(PolyCollection(squares, facecolors="none", clip_on=False, **style))

    if not kept.all():
        outline(np.flatnonzero(kept).tolist(), edgecolors=GREY, linewidths=0.4)
    outline(regions, edgecolors="white", linewidths=2.2)
    outline(regions, edgecolors=VERMILLION, linewidths=1.2)
    axes.add_patch(Rectangle((0, 0), columns, rows, fill=False, edgecolor=GREY, linewidth=0.5, clip_on=False))


def _caption(example: Example, most: int) -> list[str]:
    """Question and answers in lines of at most ``most`` characters."""
    parts = [f"full model: {example.full_answer}", f"pruned: {example.pruned_answer or '(empty)'}"]
    if example.answer is not None:
        parts.insert(0, f"reference: {example.answer}")
    if example.regions:
        parts.append("outlined: the tokens that the answer depends on")
    question = textwrap.wrap(f"“{example.question}”", most, max_lines=3, placeholder=" …")
    lines: list[str] = []
    for part in (text if len(text) <= most else f"{text[: most - 2]} …" for text in parts):
        if lines and len(lines[-1]) + len(part) + 5 <= most:
            lines[-1] += f"  ·  {part}"
        else:
            lines.append(part)
    return question + lines
