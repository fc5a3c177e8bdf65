"""Comparison of benchmark files: rows are matched by what they are, and lower is better."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import compare_bench


def document(slower: float = 1.0, order: int = 1) -> dict[str, Any]:
    rows = [
        {"way": "plain", "text": 40, "seconds": 1.0, "peak_mb": 10.0},
        {"way": "profile", "text": 40, "seconds": 1.2 * slower, "times_plain": 1.2 * slower, "peak_mb": 11.0},
    ]
    runtime = {
        "results": [
            {"baseline": "fastv", "batch": 1, "decoder_ms": {"median": 5.0, "q1": 4.0, "rounds": [4, 5, 9]}}
        ]
    }
    return {
        "benchmarks": {"profile": {"options": {"repeats": 3}, "results": rows[::order]}, "runtime": runtime}
    }


def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Any, after: Any, *options: str) -> int:
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, content in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["compare_bench", *map(str, paths), *options])
    return compare_bench.main()


def test_what_became_slower_is_shown_with_its_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path, monkeypatch, document(), document(slower=1.5, order=-1)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("1.50 x  profile results way=profile" in line for line in lines[:2])
    assert lines[-1] == "6 numbers compared, 2 shown, 0 in one file only"


def test_faster_or_level_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(tmp_path, monkeypatch, document(), document(slower=0.5)) == 0
    assert compare(tmp_path, monkeypatch, document(), document(slower=1.1)) == 0
    assert compare(tmp_path, monkeypatch, document(), document(slower=1.1), "--tolerance", "0.05") == 1


def test_repeated_measurements_count_once_with_their_median() -> None:
    found = dict(compare_bench.numbers(document()["benchmarks"]["runtime"]))
    assert found == {"results baseline=fastv batch=1 decoder_ms": 5.0}
