"""Data sets as people have them: columns, images, splits, and what is wrong with them."""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from schedule_finder.errors import InputError
from schedule_finder.samples import (
    BadSample,
    DataSet,
    DemoData,
    Mixture,
    Sample,
    SampleEntry,
    TableData,
    choose_samples,
    describe,
    open_data,
    read_entries,
    write_entries,
)
from schedule_finder.samples.choose import shares
from schedule_finder.samples.columns import Template


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
    return SampleEntry(id=str(row), source="x", row=row, use="calibration")


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
    questions = {data.load(entry(row)).question for row in range(data.size("calibration"))}
    assert questions == {"what ?", "who ?"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"image": "gone.png", "question": "?"}, "gone.png.*does not exist"),
        ({"image": "https://example.org/a.png", "question": "?"}, "URL; download"),
        ({"image": "", "question": "?"}, "no image"),
        ({"image": "a.png", "question": "  "}, "question is empty"),
        ({"image": "text.png", "question": "?"}, "cannot be read"),
        ({"image": "zero.png", "question": "?"}, "zero.png' is an empty file"),
        ({"image": "a.png", "question": "x" * 1_000_000}, "1,000,000 characters, more than 20,000"),
    ],
)
def test_bad_samples_say_why(tmp_path: Path, line: dict, reason: str) -> None:
    pixels().save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image at all")
    (tmp_path / "zero.png").touch()
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
    with pytest.raises(InputError, match="is a URL; download it"):
        open_data("https://example.org/data.parquet")


def test_discovery_never_meets_evaluation(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"image": "a.png", "question": str(i)} for i in range(50)])
    data = open_data(str(path))
    entries = choose_samples(data, 30, 15, seed=1)
    by_use = {use: {e.row for e in entries if e.use == use} for use in ("calibration", "held_out")}
    assert {use: len(rows) for use, rows in by_use.items()} == {"calibration": 30, "held_out": 15}
    assert not by_use["calibration"] & by_use["held_out"]
    assert choose_samples(data, 30, 15, seed=1) == entries
    assert choose_samples(data, 30, 15, seed=2) != entries
    # Too few rows for both: a fifth is held out, and no row is used twice.
    small = choose_samples(data, 64, 450, seed=1)
    assert [e.use for e in small].count("held_out") == 10
    assert len({e.id for e in small}) == len(small) == 50
    with pytest.raises(InputError, match="at least two are needed"):
        choose_samples(open_data(str(jsonl(tmp_path, [{"image": "a", "question": "b"}]))), 1, 1, 0)


def test_a_data_set_that_changed_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    def samples(*rows: str) -> DataSet:
        return open_data(str(jsonl(tmp_path, [{"image": "a.png", "question": row} for row in rows])))

    first = choose_samples(samples("a", "b", "c"), 2, 1, seed=0)[0]
    for other in (samples("a", "b", "d"), Mixture([samples("a", "b", "d"), DemoData()])):
        with pytest.raises(InputError, match="begin a new run"):
            other.load(first)
    longer = SampleEntry(id="x", source="begun/long/ago.jsonl", row=3, use="calibration")
    with pytest.raises(InputError, match="begin a new run"):
        samples("a", "b", "c").load(longer)


def test_a_folder_of_videos_with_metadata(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10, width=32, height=32, pix_fmt="yuv420p")
        for shade in range(12):
            file.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32), (20 * shade,) * 3))))
        file.mux(stream.encode())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "question": "what ?", "answer": "x"}\n')
    (frames,) = open_data(str(tmp_path), frames=3).load(entry(0)).videos
    assert [round(float(np.asarray(frame).mean()) / 20) for frame in frames] == [2, 6, 10]


# ---- columns and templates


def test_a_templates_own_words_are_no_question(tmp_path: Path) -> None:
    pixels().save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": question, "hint": "look"} for question in ("", "what ?")]
    data = open_data(
        str(jsonl(tmp_path, lines)), question_template="{hint}\n{question}\nAnswer with one word."
    )
    with pytest.raises(BadSample, match="question is empty"):
        data.load(entry(0))
    assert data.load(entry(1)).question == "look\nwhat ?\nAnswer with one word."


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        ("{a}\nOptions: {b}", {"a": "why", "b": ["x", "y"]}, "why\nOptions: x, y"),
        ("{a}\n{b:letters}", {"a": "why", "b": ["x", "y"]}, "why\nA. x\nB. y"),
        ("{a}\n{b:letters}", {"a": "why", "b": "['x', 'y']"}, "why\nA. x\nB. y"),
        ("{a}\nHint: {b}\nend", {"a": "why", "b": None}, "why\nend"),
        ("{a} {b}\nend", {"a": "why", "b": float("nan")}, "why \nend"),
        ("{{{a}}}", {"a": 3, "b": 0}, "{3}"),
        ("what is it ?", {}, "what is it ?"),
    ],
)
def test_templates(template: str, row: dict, text: str) -> None:
    assert Template(template).fill(row) == text


@pytest.mark.parametrize("template", ["{", "a {}", "{a:>3}", "{a} }"])
def test_bad_templates(template: str) -> None:
    with pytest.raises(InputError, match="template"):
        Template(template)


def test_a_template_reaches_no_attributes(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"image": "a.png", "question": "?"}])
    with pytest.raises(InputError, match=r"--question-template 'question.__class__'"):
        open_data(str(path), question_template="{question.__class__}")


@given(st.text(max_size=40), st.text(max_size=40))
def test_a_template_writes_text_as_it_is(question: str, options: str) -> None:
    found = Template("Q {a} O {b} .").fill({"a": question, "b": options})
    kept = ["" if text.strip() == "nan" else text.strip() for text in (question, options)]
    assert found in (f"Q {kept[0]} O {kept[1]} .", "")


def test_a_question_for_all_images_and_columns_by_name(tmp_path: Path) -> None:
    pixels(1).save(tmp_path / "1.png")
    path = jsonl(tmp_path, [{"number": 1, "reply": None, "label": "no"}])
    data = open_data(
        str(path), image_column="{number}.png", question_template="what is it ?", answer_column="reply"
    )
    sample = data.load(entry(0))
    assert (sample.question, sample.answer) == ("what is it ?", None)
    assert sample.images[0].tobytes() == pixels(1).tobytes()


def test_several_images_in_columns_of_their_own(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        pixels(number).save(tmp_path / f"{number}.png")
    row = {"image_10": "10.png", "image_2": "2.png", "image_3": None, "image_1": "1.png", "question": "?"}
    path = str(jsonl(tmp_path, [row]))
    for chosen, numbers in ((None, [1, 2, 10]), ("image_3, image_10", [10])):
        images = open_data(path, image_column=chosen).load(entry(0)).images
        assert [image.tobytes() for image in images] == [pixels(number).tobytes() for number in numbers]


def test_videos_as_files_and_as_lists_of_frames(tmp_path: Path) -> None:
    shades = [Image.new("RGB", (6, 4), (20 * place,) * 3) for place in range(12)]
    for place, shade in enumerate(shades):
        shade.save(tmp_path / f"{place}.png")
    shades[0].save(tmp_path / "a.gif", save_all=True, append_images=shades[1:])
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10, width=32, height=32, pix_fmt="yuv420p")
        for shade in shades:
            file.mux(stream.encode(av.VideoFrame.from_image(shade.resize((32, 32)))))
        file.mux(stream.encode())
    for cell in ("a.gif", "a.mp4", [f"{place}.png" for place in range(12)]):
        path = jsonl(tmp_path, [{"video": cell, "question": "?"}])
        sample = open_data(str(path), frames=3).load(entry(0))
        assert sample.images == ()
        greys = [float(np.asarray(frame).mean()) / 20 for frame in sample.videos[0]]
        assert greys == pytest.approx([2, 6, 10], abs=0.2)
        assert len(open_data(str(path)).load(entry(0)).videos[0]) == 8
    path = jsonl(tmp_path, [{"videos": ["a.mp4", "a.gif"], "question": "?"}])
    assert [len(video) for video in open_data(str(path)).load(entry(0)).videos] == [8, 8]


def test_videos_that_are_not_there(tmp_path: Path) -> None:
    lines = [{"clip": cell, "question": "?"} for cell in ("no.mp4", "", None, "https://example.org/a.mp4")]
    data = open_data(str(jsonl(tmp_path, lines)))
    for row, reason in enumerate(["does not exist", "no video", "no video", "URL; download"]):
        with pytest.raises(BadSample, match=reason):
            data.load(entry(row))


def test_videos_inside_a_parquet_file(tmp_path: Path) -> None:
    shades = [Image.new("RGB", (6, 4), (20 * place,) * 3) for place in range(6)]
    shades[0].save(tmp_path / "a.gif", save_all=True, append_images=shades[1:])
    table = datasets.Dataset.from_dict(
        {"video": [{"bytes": (tmp_path / "a.gif").read_bytes(), "path": "a.gif"}], "question": ["?"]},
        features=datasets.Features({"video": datasets.Video(), "question": datasets.Value("string")}),
    )
    table.to_parquet(tmp_path / "data.parquet")
    data = open_data(str(tmp_path / "data.parquet"), frames=2)
    assert [frame.getpixel((0, 0))[0] for frame in data.load(entry(0)).videos[0]] == [20, 80]


def test_repairs_are_noted_on_the_entry(tmp_path: Path) -> None:
    pixels(1).convert("CMYK").save(tmp_path / "a.jpg")
    Image.new("I;16", (6, 4), 500).save(tmp_path / "b.png")
    data = TableData(str(jsonl(tmp_path, [{"image": ["a.jpg", "b.png", "a.jpg"], "question": "?"}])))
    noted = describe(entry(0), data.load(entry(0)))
    assert noted.reason == "repaired: CMYK image converted to RGB; 16-bit image scaled to 8 bits"


# ---- folders as the hub has them, and streams


def hub_folder(folder: Path, rows: int = 20) -> Path:
    """Two configs, one with two splits, as a data set's repository has them."""

    def table(config: str, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict(
            {
                "image": [pixels(row) for row in range(rows)],
                "question": [f"{config} {split} {row}" for row in range(rows)],
                "answer": ["yes"] * rows,
                "unused": [pixels(0)] * rows,
            },
            features=datasets.Features(
                {"image": datasets.Image(), "question": datasets.Value("string"),
                 "answer": datasets.ClassLabel(names=["yes", "no"]), "unused": datasets.Image()}
            ),
        )  # fmt: skip

    folder.mkdir()
    lines = []
    for config, splits in (("default", ("train", "test")), ("other", ("val",))):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            name = f"{config}-{split}"
            table(config, split).to_parquet(folder / f"{name}.parquet")
            lines += [f"  - split: {split}", f"    path: {name}.parquet"]
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(lines) + "\n---\n")
    return folder


@pytest.mark.parametrize(
    ("options", "question"),
    [
        ({}, "default test 3"),
        ({"split": "train"}, "default train 3"),
        ({"split": "train[10:]"}, "default train 13"),
        ({"config": "other"}, "other val 3"),
        ({"streaming": True}, "default test 3"),
        ({"config": "other", "split": "val", "streaming": True}, "other val 3"),
    ],
)
def test_configs_splits_and_streams(tmp_path: Path, options: dict, question: str) -> None:
    data = open_data(str(hub_folder(tmp_path / "set")), rows=4, **options)
    sample = data.load(entry(3))
    assert (sample.question, sample.answer) == (question, "yes")
    assert sample.images[0].tobytes() == pixels(13 if "[" in str(options) else 3).tobytes()
    assert data.size("calibration") == (16 if options.get("streaming") else 10 if "[" in str(options) else 20)


def test_a_stream_has_the_same_samples_as_the_whole(tmp_path: Path) -> None:
    folder = str(hub_folder(tmp_path / "set"))
    streamed, whole = open_data(folder, streaming=True, rows=4), open_data(folder)
    assert streamed.source == whole.source
    assert [streamed.load(entry(row)).question for row in range(16)] == [
        whole.load(entry(row)).question for row in range(16)
    ]


def test_a_stream_of_images_in_an_archive(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with zipfile.ZipFile(tmp_path / "set" / "train.zip", "w") as archive:
        archive.writestr("a.png", png(pixels(1)))
        archive.writestr("b.png", b"broken")
        archive.writestr(
            "metadata.csv", "file_name,question,answer\na.png,what ?,x\nb.png,who ?,y\n",
        )  # fmt: skip
    data = open_data(str(tmp_path / "set"), streaming=True)
    assert data.load(entry(0)).images[0].tobytes() == pixels(1).tobytes()
    with pytest.raises(BadSample, match=r"b\.png' cannot be read"):
        data.load(entry(1))


@pytest.mark.parametrize("form", ["jsonl", "folder"])
def test_a_stream_notices_that_its_files_changed(tmp_path: Path, form: str) -> None:
    pixels(1).save(tmp_path / "a.png")
    (tmp_path / "set").mkdir()
    for word in ("old", "new"):
        if form == "jsonl":
            path = jsonl(tmp_path, [{"image": "a.png", "question": word}] * 3)
        else:
            path = tmp_path / "set"
            datasets.Dataset.from_dict({"image": [png(pixels(1))] * 3, "question": [word] * 3}).to_parquet(
                path / "test.parquet"
            )
        assert open_data(str(path), streaming=True).load(entry(0)).question == word


def test_unknown_configs_and_splits_are_listed(tmp_path: Path) -> None:
    folder = str(hub_folder(tmp_path / "set"))
    with pytest.raises(InputError, match="configs default, other; choose one with --dataset-config"):
        open_data(folder, config="third")
    with pytest.raises(InputError, match="--split 'dev'.*train, test"):
        open_data(folder, split="dev")


@pytest.mark.parametrize("form", ["arrow", "csv", "tsv", "json", "saved", "saved with splits"])
def test_other_forms_of_local_files(tmp_path: Path, form: str) -> None:
    table = datasets.Dataset.from_dict(
        {"image": ["a.png"] * 3, "question": ["x", "y", "z"], "answer": [1, 2, 3]}
    )
    path = tmp_path / f"data.{form}"
    if form.startswith("saved"):
        path = tmp_path
        (datasets.DatasetDict({"train": table, "test": table}) if "splits" in form else table).save_to_disk(
            path
        )
    elif form == "arrow":
        table.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(path)
    elif form == "json":
        table.to_json(path)
    else:
        table.to_csv(path, sep="\t" if form == "tsv" else ",")
    pixels(1).save(tmp_path / "a.png")
    sample = open_data(str(path)).load(entry(1))
    assert (sample.question, sample.answer, len(sample.images)) == ("y", "2", 1)


# ---- mixtures and ids


def text_file(folder: Path, name: str, rows: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"image": "a.png", "question": f"{folder.name} {name} {row}"} for row in range(rows)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_mixture_takes_equal_shares_in_turn(tmp_path: Path) -> None:
    data = open_data([text_file(tmp_path, name, rows) for name, rows in (("a", 100), ("b", 10), ("c", 300))])
    entries = choose_samples(data, 90, 30, seed=1)
    counts = Counter((e.source[0], e.use) for e in entries)
    assert {key: counts[key] for key in counts if key[1] == "held_out"} == {
        ("a", "held_out"): 14, ("b", "held_out"): 2, ("c", "held_out"): 14,
    }  # fmt: skip
    assert [counts[source, "calibration"] for source in "abc"] == [41, 8, 41]
    assert [e.source[0] for e in entries[:20]].count("a") in (8, 9, 10)
    assert len({e.id for e in entries}) == 120
    assert choose_samples(data, 90, 30, seed=1) == entries
    assert choose_samples(data, 90, 30, seed=2) != entries
    assert data.size("calibration") == 410


def test_a_mixture_loads_from_the_source_of_each_entry(tmp_path: Path) -> None:
    pixels(1).save(tmp_path / "a.png")
    data = open_data(["demo", text_file(tmp_path, "a", 30)], seed=3)
    entries = choose_samples(data, 8, 4, seed=3)
    assert Counter(e.source == "demo" for e in entries) == {True: 6, False: 6}
    for some in entries:
        sample = data.load(some)
        assert sample.id == some.id
        assert sample.question.endswith(f" a {some.row}") == (some.source != "demo")


def test_ids_are_the_same_on_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for place in ("here/set", "somewhere/else/set"):
        folder = tmp_path / place
        data = open_data([text_file(folder, "a", 30), text_file(folder, "b", 30)])
        ids.append([(e.id, e.row) for e in choose_samples(data, 10, 4, seed=0)])
    monkeypatch.chdir(folder)
    ids.append([(e.id, e.row) for e in choose_samples(open_data(["a.jsonl", "./b.jsonl"]), 10, 4, seed=0)])
    assert ids[0] == ids[1] == ids[2]
    assert not any(str(tmp_path) in name for name, _ in ids[0])
    # Files that are called alike are told apart by their first questions.
    data = open_data([text_file(tmp_path / "x", "data", 30), text_file(tmp_path / "y", "data", 30)])
    assert len({e.source for e in choose_samples(data, 10, 4, seed=0)}) == 2
    with pytest.raises(InputError, match="given twice"):
        open_data([text_file(tmp_path, "a", 30)] * 2)


@given(st.integers(0, 400), st.lists(st.integers(0, 100), min_size=1, max_size=6))
def test_shares_are_equal_as_far_as_sizes_allow(count: int, sizes: list[int]) -> None:
    found = shares(count, sizes)
    assert sum(found) == min(count, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(found, sizes, strict=True))
    most = max(found)
    assert all(share >= most - 1 or share == size for share, size in zip(found, sizes, strict=True))


@given(st.integers(2, 60), st.integers(0, 30), st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_every_choice_is_whole_and_apart(count: int, held_out: int, sizes: list[int]) -> None:
    assume(sum(sizes) >= 2)
    data = Mixture([_Rows(f"s{place}", size) for place, size in enumerate(sizes)])
    entries = choose_samples(data, count, held_out, seed=0)
    assert len({(e.source, e.row) for e in entries}) == len(entries)
    counts = Counter(e.use for e in entries)
    if count + held_out <= sum(sizes):
        assert (counts["calibration"], counts["held_out"]) == (count, held_out)
    else:
        assert counts["held_out"] == min(held_out, max(1, sum(sizes) // 5))


class _Rows:
    def __init__(self, source: str, size: int) -> None:
        self.source = source
        self._size = size

    def size(self, use: str) -> int:
        return self._size

    def load(self, entry: SampleEntry) -> Sample:
        raise NotImplementedError


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


def test_lists_of_earlier_releases_name_calibration_samples_discovery(tmp_path: Path) -> None:
    path = tmp_path / "1_samples.jsonl"
    path.write_text(
        '{"id": "a", "source": "x", "row": 1, "use": "discovery", "status": "done"}\n'
        '{"id": "b", "source": "x", "row": 2, "use": "held_out"}\n'
    )
    (tmp_path / "1_samples.jsonl.updates").write_text(
        '{"id": "c", "source": "x", "row": 3, "use": "discovery"}\n'
    )
    assert [entry.use for entry in read_entries(path)] == ["calibration", "held_out", "calibration"]
    write_entries(path, read_entries(path))
    assert "discovery" not in path.read_text()


ROW = '{"question": "a"}'


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("null", "line 1 is null"),
        ("  null\n", "line 1 is null"),
        (f"null\n{ROW}\n", "line 1 is null"),
        (f"{ROW}\nnull\n", "line 2 is null"),
        (f"NaN\n{ROW}\n", "line 1 is NaN"),
        ("[null]", "entry 0 is None"),
        (f"[Infinity, {ROW}]", "entry 0 is inf"),
        (f"[{ROW}, 1]", "entry 1 is 1"),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_rows_that_crash_the_reader_of_json_are_refused(
    tmp_path: Path, content: str, where: str, suffix: str
) -> None:
    # pyarrow 26 ends the process with a segmentation fault where a block of JSON lines begins with null.
    path = tmp_path / f"data{suffix}"
    path.write_text(content)
    with pytest.raises(InputError, match=where):
        open_data(str(path))
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / path.name)
    with pytest.raises(InputError, match=where):
        open_data(str(folder))
