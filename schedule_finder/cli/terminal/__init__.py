"""Tables on the terminal, one module per subject; the only package that imports rich's tables."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

screen = Console()


def make_table(title: str, *columns: str) -> Table:
    """An empty table for 80 columns: no frame, and only its last column wraps."""
    heads = [Column(name, no_wrap=name != columns[-1], overflow="fold") for name in columns]
    return Table(
        *heads,
        title=escape(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )


def show_table(table: Table) -> None:
    """Print a table and an empty line."""
    screen.print(table)
    screen.print()
