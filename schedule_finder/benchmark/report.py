"""The result as files and text."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from schedule_finder.benchmark.summary import faster_text
from schedule_finder.files import write_text


def table(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row per batch size and baseline: medians, with quartiles as ``..._q1`` and ``..._q3``, and parts."""
    return [_flat(result) for result in document["results"]]


def _flat(result: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in result.items():
        name = f"{prefix}{key}"
        if key == "faster":
            row[name] = faster_text(value)
        elif isinstance(value, dict) and "median" in value:
            row |= {name: value["median"], f"{name}_q1": value["q1"], f"{name}_q3": value["q3"]}
        elif isinstance(value, dict):
            row |= _flat(value, f"{name}_")
        elif not isinstance(value, list):
            row[name] = value
    return row


def ran_on(document: dict[str, Any]) -> str:
    """The name of the device, or the kind and the number of threads."""
    environment = document["environment"]
    if environment["device_name"]:
        return str(environment["device_name"])
    threads = environment["threads"]
    return f"{environment['device']}, {threads} thread{'' if threads == 1 else 's'}"


def write_benchmark(document: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``bench.json`` (everything, every round) and ``bench.csv`` (`table`) into ``folder``."""
    rows, text = table(document), io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    paths = [folder / "bench.json", folder / "bench.csv"]
    write_text(paths[0], json.dumps(document, indent=1) + "\n")
    write_text(paths[1], text.getvalue())
    return paths
