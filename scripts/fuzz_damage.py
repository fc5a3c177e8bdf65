"""Seeded damage to bytes, JSON documents, and data files of questions about images, for `scripts.fuzz_inputs`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

JUNK_TEXT = (
    "", " ", "nan", "inf", "-inf", "-1", "0", "1", "2", "1e9", "1e-9", "0.5", "150%", "0%", "100%", "%", "50", "ms", "-5ms",
    "1ms", "nanms", "abc", "none", "all", "auto", "demo", "..", "/", "/dev/null", "no/such/path", "é" * 300,
    "x" * 5000, "[red]x[/red]", "[/", "{", "}", "{question}", "{0}", "{missing:letters}", "a,b", ",", "1,,2", "1,8",
    "--json", "-", "\n", "\t", "cpu", "meta", "cuda:99",
    "float32", "int8", "True", "null", "random", "last_token", "text_guided",
    "sensitivity", "retained", "latency", "merge", "١٢", "1_000", "0x10", "9" * 400, "²",
)  # fmt: skip
"""Values of options."""
JUNK_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2.5, 1e308, -1e-300, 10**30, float("nan"), float("inf"), "", "x", "1", "x" * 3000, "[/]",
    "\x00",
    "é\ud83d", [], [[]], [None], {}, {"x": None}, {"": []}, [1, "a"], [0.5, 0.9], "random", -(2**63),
)  # fmt: skip


def damaged_bytes(rng: np.random.Generator, content: bytes) -> bytes:
    """``content`` cut off, with bytes flipped, inserted, removed or repeated, emptied, or replaced by noise."""
    if not content:
        return rng.bytes(rng.integers(1, 50))
    start, end = sorted(rng.integers(0, len(content) + 1, 2).tolist())
    how = rng.integers(7)
    if how == 0:
        return content[:start]
    if how == 1:
        changed = bytearray(content)
        for index in rng.integers(0, len(content), rng.integers(1, 8)):
            changed[index] ^= int(rng.integers(1, 256))
        return bytes(changed)
    if how == 2:
        return content[:start] + rng.bytes(rng.integers(1, 20)) + content[start:]
    if how == 3:
        return content[:start] + content[end:]
    if how == 4:
        return content[:end] + content[start:]
    return b"" if how == 5 else rng.bytes(rng.integers(1, 200))


def damaged_json(rng: np.random.Generator, document: Any) -> Any:
    """A copy with one to three values replaced, removed, repeated, renamed or added."""
    changed = copy.deepcopy(document)
    for _ in range(rng.integers(1, 4)):
        parent, key = _random_place(rng, changed)
        if parent is None:
            return _junk(rng)
        how = rng.integers(5)
        if how <= 1:
            parent[key] = _junk(rng)
        elif how == 2:
            del parent[key]
        elif isinstance(parent, dict):
            parent["unknown" if how == 3 else f"{key} "] = parent[key] if how == 3 else parent.pop(key)
        elif how == 3:
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = [parent[key]]
    return changed


def _random_place(rng: np.random.Generator, document: Any) -> tuple[Any, Any]:
    """A container and a key in it, at any depth; (None, None) for the document itself."""
    places: list[tuple[Any, Any]] = [(None, None)]
    pending = [document]
    while pending:
        found = pending.pop()
        keys = (
            list(found) if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()
        )
        places += [(found, key) for key in keys]
        pending += [found[key] for key in keys]
    return places[rng.integers(len(places))]


def _junk(rng: np.random.Generator) -> Any:
    return copy.deepcopy(JUNK_VALUES[rng.integers(len(JUNK_VALUES))])


def damaged_rows(rng: np.random.Generator, folder: Path, suffix: str) -> Path:
    """A data file of four questions with images beside it, damaged as rows or as bytes."""
    (folder / "images").mkdir()
    for index in range(3):
        Image.new("RGB", (32, 32), (80 * index, 10, 200)).save(folder / "images" / f"{index}.png")
    if rng.random() < 0.2:
        broken = folder / "images" / "1.png"
        broken.write_bytes(damaged_bytes(rng, broken.read_bytes()))
    rows: Any = [
        {
            "image": f"images/{index % 3}.png",
            "question": "what is here ?",
            "answer": "red",
            "question_type": "x",
        }
        for index in range(4)
    ]
    how = rng.random()
    if how < 0.7:
        rows = damaged_json(rng, rows)
    path = folder / f"data.{suffix}"
    path.write_bytes(_written(rows, suffix, path))
    if how > 0.6:
        path.write_bytes(damaged_bytes(rng, path.read_bytes()))
    return path


def _written(rows: Any, suffix: str, path: Path) -> bytes:
    """The rows in a format; as JSON text where they are no table any more."""
    if suffix == "json":
        return json.dumps(rows).encode()
    if suffix == "jsonl":
        lines = rows if isinstance(rows, list) else [rows]
        return "".join(json.dumps(row) + "\n" for row in lines).encode()
    try:
        table = pd.DataFrame(rows)
        if suffix == "parquet":
            table.to_parquet(path)
            return path.read_bytes()
        return table.to_csv(index=False, sep="\t" if suffix == "tsv" else ",").encode(
            "utf-8", "surrogatepass"
        )
    except Exception:  # rows that are no table, or values that the format cannot hold
        return json.dumps(rows).encode()
