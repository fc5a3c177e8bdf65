"""Tables of a run as Markdown and LaTeX, for papers and pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from schedule_finder.files import write_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from schedule_finder.run.folder import Run


def write_tables(run: Run) -> list[Path]:
    """Write every table of the run into ``6_figures/tables``; returns the files.

    That is the table of each figure, all columns of the evaluation and the front over budgets.
    """
    written = []
    for name, table in _tables(run):
        stem = run.figures / "tables" / name
        for suffix, text in (("md", to_markdown(table)), ("tex", to_latex(table))):
            path = stem.with_name(f"{name}.{suffix}")
            write_text(path, text)
            written.append(path)
    return written


def _tables(run: Run) -> Iterator[tuple[str, pd.DataFrame]]:
    paths = [*sorted(run.figures.glob("*.csv")), run.evaluation, run.pareto]
    done = set()
    for path in paths:
        if path.exists() and path.stem not in done:
            done.add(path.stem)
            yield path.stem, pd.read_csv(path)


def to_markdown(table: pd.DataFrame) -> str:
    """A table with a head; missing values are empty."""
    lines = [list(table.columns), ["---"] * len(table.columns), *_cells(table)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def to_latex(table: pd.DataFrame) -> str:
    """A ``tabular`` with the rules of the package booktabs; text is escaped."""
    texts = pd.DataFrame(_cells(table), columns=[str(column) for column in table.columns])
    numeric = "".join("r" if pd.api.types.is_numeric_dtype(table[name]) else "l" for name in table.columns)
    return texts.to_latex(index=False, escape=True, column_format=numeric)


def _cells(table: pd.DataFrame) -> list[list[str]]:
    return [[_cell(value) for value in row] for row in table.itertuples(index=False)]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return str(value)
