"""JSON of run folders: what cannot be written again is refused when it is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from schedule_finder.errors import InputError
from schedule_finder.files import parse_json, refuse_folders
from schedule_finder.run.folder import Run
from schedule_finder.run.reader import read_change_points

HALF = "\ud83d"
"""Half of a surrogate pair: JSON can escape it, UTF-8 cannot encode it."""


def test_json_comes_back() -> None:
    document = {"a": [1, 2.5, None, "é", "\U0001f600"]}
    assert parse_json(json.dumps(document)) == document


@pytest.mark.parametrize("document", [HALF, [HALF], {"a": {"b": HALF}}, {HALF: 1}])
def test_half_of_a_surrogate_pair_is_refused(document: object) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        parse_json(json.dumps(document))


def test_files_of_a_run_that_hold_one_are_an_error_that_names_them(tmp_path: Path) -> None:
    for name, read in {
        "run.json": lambda: Run(tmp_path).document(),
        "3_change_points.json": lambda: read_change_points(tmp_path / "3_change_points.json"),
    }.items():
        (tmp_path / name).write_text(json.dumps({"format": HALF}))
        with pytest.raises(InputError, match=f"{name}: not readable"):
            read()


def test_a_folder_in_the_place_of_a_result_is_refused_before_the_work(tmp_path: Path) -> None:
    refuse_folders(tmp_path / "not there", Path(__file__))
    with pytest.raises(InputError, match="is a folder, a result belongs there"):
        refuse_folders(Path(__file__), tmp_path)
