"""Cells as they were written, rows that are still the same, and held-out samples that are no copies."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from schedule_finder.errors import InputError
from schedule_finder.samples import SampleEntry, TableData, choose_samples, describe, open_data

ROWS = 40


def table_of(folder: Path, rows: list[dict[str, Any]], name: str = "data.jsonl") -> Path:
    """A JSON-lines file of the rows, and an image file for each name in them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(dict.fromkeys(row["image"] for row in rows)):
        if not (folder / image).exists():
            Image.new("RGB", (8, 8), (index % 256, index // 256, 7)).save(folder / image)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(count: int = ROWS) -> list[dict[str, Any]]:
    return [
        {"image": f"{index}.png", "question": f"what is in picture {index}?", "answer": str(index)}
        for index in range(count)
    ]


# ---- CSV


@pytest.mark.parametrize(("suffix", "mark"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("gap", [False, True])
def test_cells_of_a_csv_file_stay_as_they_are_written(
    tmp_path: Path, suffix: str, mark: str, gap: bool
) -> None:
    answers = ["" if gap else "1", "007", "1.50", "1e3", "true", "NA", "None", "null", "2"]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [mark.join(("image", "question", "answer"))]
    lines += [mark.join(("a.png", f"what is {index}?", answer)) for index, answer in enumerate(answers)]
    path = tmp_path / f"data{suffix}"
    path.write_text("\n".join(lines) + "\n")
    data = TableData(str(path))
    found = [
        data.load(SampleEntry(str(row), data.source, row, "calibration")).answer
        for row in range(len(answers))
    ]
    assert found == [answer or None for answer in answers]


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [("[1.0, 2.0, 3.0]", "2.0", "B"), ("['red', 'blue']", "1", "B"), ("['red', 'blue']", "red", "A")],
)
def test_an_answer_in_a_csv_file_names_its_choice(
    tmp_path: Path, choices: str, answer: str, letter: str
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "data.csv"
    path.write_text(f'image,question,choices,answer\na.png,which?,"{choices}",{answer}\n')
    data = TableData(str(path))
    assert data.load(SampleEntry("0", data.source, 0, "calibration")).answer == letter


def test_whole_numbers_with_gaps_are_whole(tmp_path: Path) -> None:
    """Readers of other files make decimals of a column of whole numbers where one is missing."""
    rows = [{"image": "a.png", "question": f"how many {index}?", "answer": 2.0} for index in range(3)]
    data = TableData(str(table_of(tmp_path, [*rows, {**rows[0], "answer": None}])))
    assert data.load(SampleEntry("0", data.source, 0, "calibration")).answer == "2"


def test_a_separator_that_is_no_comma_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("image;question;answer\na.png;what?;red\n")
    with pytest.raises(InputError, match="separated by ';'; save it with commas"):
        TableData(str(path))


def test_a_folder_may_be_given_by_way_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table_of(tmp_path / "data", [{**row, "file_name": row["image"]} for row in rows_of(3)], "metadata.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    data = TableData("../data")
    assert data.load(SampleEntry("0", data.source, 0, "calibration")).images
    table_of(tmp_path / "out", [{**rows_of(1)[0], "image": "../data/0.png"}] * 2)
    outside = TableData("../out/data.jsonl")
    with pytest.raises(InputError, match="lies outside"):
        outside.load(SampleEntry("0", outside.source, 0, "calibration"))


# ---- the same rows


def chosen(path: Path) -> list[SampleEntry]:
    return choose_samples(TableData(str(path)), 20, 20, seed=0)


def load_all(path: Path, entries: list[SampleEntry]) -> list[SampleEntry]:
    data = TableData(str(path))
    return [describe(entry, data.load(entry)) for entry in entries]


def test_held_out_questions_are_known_before_they_are_read(tmp_path: Path) -> None:
    path = table_of(tmp_path, rows_of())
    entries = chosen(path)
    assert {entry.use for entry in entries} == {"calibration", "held_out"}
    assert all(entry.question == f"what is in picture {entry.row}?" for entry in entries)
    assert all(entry.answer == str(entry.row) and entry.media is None for entry in entries)
    described = load_all(path, entries)
    assert load_all(path, described) == described
    assert all(entry.media for entry in described)


@pytest.mark.parametrize("change", ["answer", "question", "order"])
def test_texts_that_changed_anywhere_are_noticed(tmp_path: Path, change: str) -> None:
    """Also in a sample that was never loaded, and behind the first rows."""
    rows = rows_of()
    path = table_of(tmp_path, rows)
    entries = chosen(path)
    if change == "order":
        later = rows[20:]
        random.Random(0).shuffle(later)
        rows[20:] = later
    else:
        rows[33] = {**rows[33], change: "another"}
    table_of(tmp_path, rows)
    with pytest.raises(InputError, match=r"has changed: question or answer of sample \S+ is not what it was"):
        load_all(path, entries)


def test_an_image_that_changed_is_noticed(tmp_path: Path) -> None:
    path = table_of(tmp_path, rows_of())
    described = load_all(path, chosen(path))
    Image.new("RGB", (8, 8), (200, 200, 200)).save(tmp_path / "33.png")
    with pytest.raises(InputError, match=r"has changed: an image of sample \S+000033 "):
        load_all(path, described)


def test_an_image_that_changed_in_its_middle_is_noticed(tmp_path: Path) -> None:
    rows = [{"image": f"{index}.bmp", "question": "is it red?", "answer": "yes"} for index in range(6)]
    pictures = [Image.new("RGB", (400, 400), "white") for _ in rows]
    for index, picture in enumerate(pictures):
        picture.paste((index * 40, 0, 0), (150, 150, 250, 250))
        picture.save(tmp_path / f"{index}.bmp")
    path = table_of(tmp_path, rows)
    entries = choose_samples(TableData(str(path)), 2, 4, seed=0)
    assert len(entries) == 6  # none is a copy of another
    described = load_all(path, entries)
    pictures[1].paste((0, 99, 0), (150, 150, 250, 250))
    pictures[1].save(tmp_path / "1.bmp")
    with pytest.raises(InputError, match="an image of sample"):
        load_all(path, described)


def test_frames_that_are_not_taken_may_be_missing(tmp_path: Path) -> None:
    names = [f"{index}.png" for index in range(20)]
    for name in names[1:]:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"video": names, "question": "what?", "answer": "this"}) + "\n")
    data = TableData(str(path))
    (video,) = data.load(SampleEntry("0", data.source, 0, "calibration")).videos
    assert len(video) == 8


def test_lists_of_samples_without_descriptions_are_not_refused(tmp_path: Path) -> None:
    path = table_of(tmp_path, rows_of())
    source = TableData(str(path)).source
    load_all(path, [SampleEntry(f"{source}:000001", source, 1, "held_out")])


# ---- copies


def test_no_held_out_sample_is_a_copy(tmp_path: Path) -> None:
    path = table_of(tmp_path, rows_of() * 3)
    entries = choose_samples(TableData(str(path)), 15, 30, seed=0)
    calibration = {entry.question for entry in entries if entry.use == "calibration"}
    held_out = [entry.question for entry in entries if entry.use == "held_out"]
    assert not calibration & set(held_out)
    assert len(held_out) == len(set(held_out))
    assert len(calibration) + len(held_out) == ROWS


def test_one_question_about_several_images_is_no_copy(tmp_path: Path) -> None:
    rows = [{"image": f"{index}.png", "question": "is it red?", "answer": "yes"} for index in range(ROWS)]
    entries = choose_samples(TableData(str(table_of(tmp_path, rows))), 20, 20, seed=0)
    assert len(entries) == ROWS


def test_copies_in_another_part_of_a_mixture_are_left_out(tmp_path: Path) -> None:
    one = table_of(tmp_path / "one", rows_of(4))
    two = table_of(tmp_path / "two", [*rows_of(4), {"image": "9.png", "question": "new?", "answer": "yes"}])
    for index in range(4):
        (tmp_path / "two" / f"{index}.png").write_bytes((tmp_path / "one" / f"{index}.png").read_bytes())
    for seed in range(5):
        entries = choose_samples(open_data([str(one), str(two)]), 4, 4, seed=seed)
        calibration = {entry.question for entry in entries if entry.use == "calibration"}
        assert not calibration & {entry.question for entry in entries if entry.use == "held_out"}


def test_a_data_set_of_copies_is_not_searched_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table_of(tmp_path, rows_of(5) * 1000)
    looked: list[int] = []
    described = TableData.described
    monkeypatch.setattr(
        TableData, "described", lambda self, entry: (looked.append(entry.row), described(self, entry))[1]
    )
    choose_samples(TableData(str(path)), 10, 10, seed=0)
    assert len(looked) < 2200
