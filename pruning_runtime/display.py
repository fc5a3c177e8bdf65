"""Short text and HTML of schedules and records, for a terminal and for notebooks. Pure standard library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """An HTML table with escaped text."""
    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    below = f"<p>{escape(note)}</p>" if note else ""
    caption = f"<caption style='text-align:left'><b>{escape(title)}</b></caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


def stage_name(layer: int) -> str:
    """Where a stage is, in words."""
    return "before the decoder" if layer < 0 else f"after layer {layer}"


def percent(share: float) -> str:
    """A share in percent, without a useless decimal."""
    return f"{100 * share:.3g} %"
