"""Data sets as people have them: columns, images, splits, and what is wrong with them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from schedule_finder.errors import InputError
from schedule_finder.samples import (
    BadSample,
    DemoData,
    SampleEntry,
    TableData,
    choose_samples,
    open_data,
    read_entries,
    write_entries,
)


def pixels(seed: int = 0, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def jsonl(folder: Path, lines: list[dict]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def entry(row: int) -> SampleEntry:
    return SampleEntry(id=str(row), source="x", row=row, use="discovery")


def test_json_lines_with_images_beside_them(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    pixels(1).save(tmp_path / "pics" / "a.png")
    pixels(2).save(tmp_path / "pics" / "b.png")
    path = jsonl(
        tmp_path,
        [
            {"image": "pics/a.png", "question": "what ?", "answer": "red"},
            {"image": "pics/b.png", "question": "where ?", "answer": None},
        ],
    )
    data = TableData(str(path))
    first, second = data.load(entry(0)), data.load(entry(1))
    assert (first.question, first.answer, first.question_type) == ("what ?", "red", "all")
    assert np.array_equal(np.asarray(first.images[0]), np.asarray(pixels(1)))
    assert second.answer is None


def test_parquet_with_encoded_images_and_lists_of_them(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict(
        {
            "image": [[pixels(1), pixels(2)], [pixels(3)]],
            "query": ["two ?", "one ?"],
            "answers": [["yes", "yeah"], ["no"]],
            "category": ["many", "few"],
        },
        features=datasets.Features(
            {
                "image": datasets.List(datasets.Image()),
                "query": datasets.Value("string"),
                "answers": datasets.List(datasets.Value("string")),
                "category": datasets.Value("string"),
            }
        ),
    )
    table.to_parquet(tmp_path / "data.parquet")
    data = TableData(str(tmp_path / "data.parquet"))
    sample = data.load(entry(0))
    assert len(sample.images) == 2
    assert (sample.question, sample.answer, sample.question_type) == ("two ?", "yes", "many")
    assert np.array_equal(np.asarray(sample.images[1]), np.asarray(pixels(2)))


def test_one_unreadable_image_spoils_one_row_only(tmp_path: Path) -> None:
    good, broken = png(pixels(1)), png(pixels(2))[:40]
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": good, "path": None}, {"bytes": broken, "path": None}], "question": ["a", "b"]},
        features=datasets.Features({"image": datasets.Image(), "question": datasets.Value("string")}),
    )
    table.to_parquet(tmp_path / "data.parquet")
    data = TableData(str(tmp_path / "data.parquet"))
    assert data.load(entry(0)).images[0].size == (6, 4)
    with pytest.raises(BadSample, match="cannot be read"):
        data.load(entry(1))


def test_a_folder_of_images_with_metadata(tmp_path: Path) -> None:
    pixels(1).save(tmp_path / "a.png")
    pixels(2).save(tmp_path / "b.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "question": "what ?", "answer": "x"}\n'
        '{"file_name": "b.png", "question": "who ?", "answer": "y"}\n'
    )
    data = TableData(str(tmp_path))
    questions = {data.load(entry(row)).question for row in range(data.size("discovery"))}
    assert questions == {"what ?", "who ?"}


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_image_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.new("I;16", (6, 4), 500) if mode == "I;16" else pixels(1).convert(mode)
    name = "a.tif" if mode in ("CMYK", "LA") else "a.png"
    image.save(tmp_path / name)
    data = TableData(str(jsonl(tmp_path, [{"image": name, "question": "?"}])))
    (found,) = data.load(entry(0)).images
    assert found.mode == "RGB"
    assert found.size == (6, 4)


def test_rotation_in_the_metadata_is_applied(tmp_path: Path) -> None:
    image = pixels(1)
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    image.save(tmp_path / "a.png", exif=exif)
    data = TableData(str(jsonl(tmp_path, [{"image": "a.png", "question": "?"}])))
    assert data.load(entry(0)).images[0].size == (4, 6)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"image": "gone.png", "question": "?"}, "gone.png.*does not exist"),
        ({"image": "https://example.org/a.png", "question": "?"}, "URL; download"),
        ({"image": "", "question": "?"}, "no image"),
        ({"image": "a.png", "question": "  "}, "question is empty"),
        ({"image": "text.png", "question": "?"}, "cannot be read"),
    ],
)
def test_bad_samples_say_why(tmp_path: Path, line: dict, reason: str) -> None:
    pixels().save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image at all")
    data = TableData(str(jsonl(tmp_path, [line])))
    with pytest.raises(BadSample, match=reason):
        data.load(entry(0))


def test_bad_data_sets_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_data(str(tmp_path / "none.jsonl"))
    (tmp_path / "data.xlsx").write_text("x")
    with pytest.raises(InputError, match=r"'\.xlsx' is none of"):
        open_data(str(tmp_path / "data.xlsx"))
    path = jsonl(tmp_path, [{"picture_of": "a.png", "question": "?"}])
    with pytest.raises(InputError, match="picture_of.*--image-column"):
        open_data(str(path))
    with pytest.raises(InputError, match="--image-column 'photo'.*picture_of, question"):
        open_data(str(path), image_column="photo")
    truncated = tmp_path / "cut.parquet"
    datasets.Dataset.from_dict({"a": [1]}).to_parquet(truncated)
    truncated.write_bytes(truncated.read_bytes()[:-20])
    with pytest.raises(InputError, match="cut.parquet' cannot be read"):
        open_data(str(truncated))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="empty.jsonl"):
        open_data(str(tmp_path / "empty.jsonl"))
    with pytest.raises(InputError, match="cannot be read"):
        open_data("nobody/no-such-data-set")


def test_discovery_never_meets_evaluation(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"image": "a.png", "question": str(i)} for i in range(50)])
    data = open_data(str(path))
    entries = choose_samples(data, 30, 15, seed=1)
    by_use = {use: {e.row for e in entries if e.use == use} for use in ("discovery", "held_out")}
    assert {use: len(rows) for use, rows in by_use.items()} == {"discovery": 30, "held_out": 15}
    assert not by_use["discovery"] & by_use["held_out"]
    assert choose_samples(data, 30, 15, seed=1) == entries
    assert choose_samples(data, 30, 15, seed=2) != entries
    # Too few rows for both: a fifth is held out, and no row is used twice.
    small = choose_samples(data, 64, 450, seed=1)
    assert [e.use for e in small].count("held_out") == 10
    assert len({e.id for e in small}) == len(small) == 50
    with pytest.raises(InputError, match="two are the least"):
        choose_samples(open_data(str(jsonl(tmp_path, [{"image": "a", "question": "b"}]))), 1, 1, 0)


def test_demo_samples_are_what_their_entries_say() -> None:
    data = DemoData(seed=3)
    entries = choose_samples(data, 5, 4, seed=3)
    for some in entries:
        sample = data.load(some)
        assert sample.id == some.id
        assert sample.answer
    assert len({some.id for some in entries}) == 9
    # Order of loading does not matter: a resumed run draws the same samples.
    again = DemoData(seed=3)
    assert again.load(entries[4]).question == data.load(entries[4]).question


def test_entries_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "1_samples.jsonl"
    entries = [entry(0), SampleEntry("é", "x", 1, "held_out", "wo?", "ü", "t", "skipped", "because")]
    write_entries(path, entries)
    assert read_entries(path) == entries
    path.write_text(path.read_text()[:-9])
    with pytest.raises(InputError, match="not readable"):
        read_entries(path)
    with pytest.raises(InputError, match="no samples chosen"):
        read_entries(tmp_path / "none.jsonl")
