"""Ratios of two files of `scripts.bench_all`: what became slower, what faster.

    python -m scripts.compare_bench outputs/bench/before.json outputs/bench/cpu.json
    python -m scripts.compare_bench before.json cpu.json --all

Prints the numbers whose ratio is beyond ``--tolerance`` (15 %), the largest change first; the exit code is 1 if one of them
is higher. All numbers that are compared are times, memory or ratios to a plain run: lower is better. One busy file makes
everything in it slower; look at the ratios to a plain run (`times_plain`, `ratio`) first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEASURES = ("ms", "seconds", "mb", "mib", "times_plain", "ratio", "share")
"""Last words of the names of numbers that are compared."""
IDENTITY = ("baseline", "scorer", "way", "batch", "tokens", "keep", "kv_share", "text")
"""Fields that say which row of a list this is."""


def main() -> int:
    """Print the changes; the exit code is 1 if something is slower by more than the tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.15)
    parser.add_argument("--all", action="store_true", help="print all numbers")
    asked = parser.parse_args()
    before, after = (
        dict(numbers(json.loads(path.read_text())["benchmarks"])) for path in (asked.before, asked.after)
    )
    ratios = {name: after[name] / before[name] for name in before.keys() & after.keys() if before[name] > 0}
    shown = [name for name, ratio in ratios.items() if asked.all or abs(ratio - 1) > asked.tolerance]
    for name in sorted(shown, key=lambda name: -abs(ratios[name] - 1)):
        print(f"{before[name]:12.4g} {after[name]:12.4g} {ratios[name]:8.2f} x  {name}")
    only = len(before.keys() ^ after.keys())
    print(f"{len(ratios)} numbers compared, {len(shown)} shown, {only} in one file only")
    return int(any(ratio > 1 + asked.tolerance for ratio in ratios.values()))


def numbers(document: Any, path: tuple[str, ...] = (), measured: bool = False) -> Iterator[tuple[str, float]]:
    """Name and value of every number that is compared; of repeated measurements the median."""
    if isinstance(document, dict):
        if measured and isinstance(document.get("median"), int | float):
            yield " ".join(path), float(document["median"])
            return
        for key, value in document.items():
            unit = key.lower().replace("_", " ").split(" ")[-1]
            yield from numbers(value, (*path, key), measured or unit in MEASURES or key in MEASURES)
    elif isinstance(document, list):
        for index, value in enumerate(document):
            fields = value if isinstance(value, dict) else {}
            known = [f"{name}={fields[name]}" for name in IDENTITY if name in fields]
            yield from numbers(value, (*path, " ".join(known) or str(index)), measured and bool(known))
    elif measured and isinstance(document, int | float) and not isinstance(document, bool):
        yield " ".join(path), float(document)


if __name__ == "__main__":
    sys.exit(main())
