"""The named benchmarks, each on a small local table with the columns that its documentation names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from schedule_finder.errors import InputError
from schedule_finder.samples import SampleEntry, TableData, open_data
from schedule_finder.samples.presets import presets

TEXT, LIST, NUMBER = (
    datasets.Value("string"),
    datasets.List(datasets.Value("string")),
    datasets.Value("int64"),
)
IMAGE = datasets.Image()
WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8))


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str, str]] = {
    # name: (features, a row, its question, its answer, its type)
    "mme": (
        {"question_id": TEXT, "image": IMAGE, "question": TEXT, "answer": TEXT, "category": TEXT},
        {
            "question_id": "code_reasoning/1.png", "image": picture(1), "answer": "Yes", "category": "code_reasoning",
            "question": "Is a python code shown? Please answer yes or no.",
        },
        "Is a python code shown? Please answer yes or no.", "Yes", "code_reasoning",
    ),
    "pope": (
        {
            "id": TEXT, "question_id": TEXT, "question": TEXT, "answer": TEXT, "image_source": TEXT, "image": IMAGE,
            "category": TEXT,
        },
        {
            "id": "0", "question_id": "1", "question": "Is there a dog?", "answer": "no", "image_source": "COCO_1",
            "image": picture(1), "category": "adversarial",
        },
        "Is there a dog?" + WORD, "no", "adversarial",
    ),
    "textvqa": (
        {
            "image_id": TEXT, "question_id": NUMBER, "question": TEXT, "question_tokens": LIST, "image": IMAGE,
            "image_width": NUMBER, "image_height": NUMBER, "answers": LIST, "image_classes": LIST, "set_name": TEXT,
            "ocr_tokens": LIST,
        },
        {
            "image_id": "a", "question_id": 1, "question": "what brand is it?", "question_tokens": ["what"],
            "image": picture(1), "image_width": 6, "image_height": 4, "answers": ["nokia", "toshiba", "nokia", ""],
            "image_classes": ["Phone"], "set_name": "val", "ocr_tokens": [],
        },
        "what brand is it?" + WORD, "nokia", "all",
    ),
    "mmbench": (
        {
            "index": NUMBER, "question": TEXT, "hint": TEXT, "answer": TEXT, "A": TEXT, "B": TEXT, "C": TEXT, "D": TEXT,
            "category": TEXT, "image": IMAGE, "source": TEXT, "L2-category": TEXT, "comment": TEXT, "split": TEXT,
        },
        {
            "index": 1, "question": "Which one?", "hint": "nan", "answer": "B", "A": "one", "B": "two", "C": "nan",
            "D": "nan", "category": "logic", "image": picture(1), "source": "x", "L2-category": "y", "comment": "nan",
            "split": "dev",
        },
        "Which one?\nA. one\nB. two" + LETTER, "B", "logic",
    ),
    "seed-bench": (
        {
            "answer": TEXT, "choice_a": TEXT, "choice_b": TEXT, "choice_c": TEXT, "choice_d": TEXT, "data_id": TEXT,
            "data_type": TEXT, "question": TEXT, "question_id": TEXT, "question_type_id": NUMBER,
            "image": datasets.List(IMAGE), "segment": datasets.List(NUMBER),
        },
        {
            "answer": "C", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "data_id": "a",
            "data_type": "video", "question": "How many?", "question_id": "1", "question_type_id": 5,
            "image": [picture(1), picture(2)], "segment": [0, 1],
        },
        "How many?\nA. 1\nB. 2\nC. 3\nD. 4" + LETTER, "C", "video",
    ),
    "vizwiz": (
        {"question_id": TEXT, "image": IMAGE, "question": TEXT, "answers": LIST, "category": TEXT},
        {
            "question_id": "1.jpg", "image": picture(1), "question": "What is this?",
            "answers": ["soup", "unanswerable", "unanswerable"], "category": "unanswerable",
        },
        "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + WORD,
        "unanswerable", "unanswerable",
    ),
    "scienceqa": (
        {
            "image": IMAGE, "question": TEXT, "choices": LIST, "answer": NUMBER, "hint": TEXT, "task": TEXT,
            "grade": TEXT, "subject": TEXT, "topic": TEXT, "category": TEXT, "skill": TEXT, "lecture": TEXT,
            "solution": TEXT,
        },
        {
            "image": picture(1), "question": "Which is solid?", "choices": ["air", "ice"], "answer": 1,
            "hint": "Look at the picture.", "task": "closed choice", "grade": "grade3", "subject": "natural science",
            "topic": "t", "category": "c", "skill": "s", "lecture": "l", "solution": "s",
        },
        "Look at the picture.\nWhich is solid?\nA. air\nB. ice" + LETTER, "B", "natural science",
    ),
    "mmmu": (
        {
            "id": TEXT, "question": TEXT, "options": TEXT, "explanation": TEXT,
            **{f"image_{place}": IMAGE for place in range(1, 8)},
            "img_type": TEXT, "answer": TEXT, "topic_difficulty": TEXT, "question_type": TEXT, "subfield": TEXT,
        },
        {
            "id": "validation_Art_1", "question": "Who made <image 1> and <image 2>?", "options": "['Klee', \"D'Or\"]",
            "explanation": "", "image_1": picture(1), "image_2": picture(2),
            **{f"image_{place}": None for place in range(3, 8)},
            "img_type": "['Paintings']", "answer": "A", "topic_difficulty": "Easy",
            "question_type": "multiple-choice", "subfield": "Drawing",
        },
        "Who made <image 1> and <image 2>?\nA. Klee\nB. D'Or", "A", "multiple-choice",
    ),
    "chartqa": (
        {"type": TEXT, "question": TEXT, "answer": TEXT, "image": IMAGE},
        {"type": "human_test", "question": "How many bars?", "answer": "14", "image": picture(1)},
        "How many bars?\nAnswer the question with a single word.", "14", "human_test",
    ),
    "docvqa": (
        {
            "questionId": TEXT, "question": TEXT, "question_types": LIST, "image": IMAGE, "docId": NUMBER,
            "ucsf_document_id": TEXT, "ucsf_document_page_no": TEXT, "answers": LIST, "data_split": TEXT,
        },
        {
            "questionId": "1", "question": "What is the date?", "question_types": ["form"], "image": picture(1),
            "docId": 1, "ucsf_document_id": "a", "ucsf_document_page_no": "1", "answers": ["1/8/93", "8 Jan"],
            "data_split": "val",
        },
        "What is the date?" + WORD, "1/8/93", "all",
    ),
}  # fmt: skip


def first(data: TableData) -> SampleEntry:
    return SampleEntry(id="x", source=data.source, row=0, use="calibration")


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_local_copy_is_read_as_the_preset_says(tmp_path: Path, name: str) -> None:
    features, row, question, answer, kind = CASES[name]
    table = datasets.Dataset.from_list([row], features=datasets.Features(features))
    table.to_parquet(tmp_path / "local.parquet")
    data = TableData(f"{name}={tmp_path / 'local.parquet'}")
    sample = data.load(first(data))
    assert (sample.question, sample.answer, sample.question_type) == (question, answer, kind)
    images = row["image"] if name == "seed-bench" else [row.get("image") or row["image_1"]]
    if name == "mmmu":
        images = [row["image_1"], row["image_2"]]
    assert [image.tobytes() for image in sample.images] == [image.tobytes() for image in images]
    assert data.source.startswith(f"{name}@")


def test_gqa_takes_its_images_from_another_config(tmp_path: Path) -> None:
    instructions = {"id": ["201307251"] * 2, "imageId": ["n2", "n9"], "question": ["Is it sunny?"] * 2,
                    "answer": ["yes", "no"], "fullAnswer": ["Yes."] * 2}  # fmt: skip
    images = datasets.Dataset.from_dict(
        {"id": ["n1", "n2"], "image": [picture(1), picture(2)]},
        features=datasets.Features({"id": TEXT, "image": IMAGE}),
    )
    folder = tmp_path / "GQA"
    for config, table in (
        ("testdev_balanced_instructions", datasets.Dataset.from_dict(instructions)), ("testdev_balanced_images", images),
    ):  # fmt: skip
        (folder / config).mkdir(parents=True)
        table.to_parquet(folder / config / "testdev-00000-of-00001.parquet")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: testdev\n    path: {name}/testdev-*\n"
        for name in ("testdev_balanced_images", "testdev_balanced_instructions")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    data = TableData(f"gqa={folder}")
    sample = data.load(first(data))
    assert (sample.question, sample.answer) == ("Is it sunny?" + WORD, "yes")
    assert sample.images[0].tobytes() == picture(2).tobytes()
    with pytest.raises(ValueError, match="no image 'n9'"):
        data.load(SampleEntry(id="x", source=data.source, row=1, use="calibration"))


@pytest.mark.parametrize(
    ("name", "row", "file"),
    [
        (
            "msvd",
            {"video": "clips/a.gif", "question": "who cooks?", "answer": "woman", "id": 1},
            "clips/a.gif",
        ),
        ("msrvtt", {"video_id": 6513, "question": "who cooks?", "answer": "woman", "id": 1}, "video6513.mp4"),
        (
            "tgif",
            {"gif_name": "tumblr_1", "question": "who cooks?", "answer": "woman", "type": "2"},
            "tumblr_1.gif",
        ),
    ],
)
def test_videos_lie_beside_the_local_copy(tmp_path: Path, name: str, row: dict[str, Any], file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    frames = [Image.new("RGB", (6, 4), (20 * place,) * 3) for place in range(9)]
    frames[0].save(tmp_path / file, "GIF", save_all=True, append_images=frames[1:])  # decoders look inside
    datasets.Dataset.from_list([row]).to_json(tmp_path / "qa.jsonl")
    data = open_data(f"{name}={tmp_path / 'qa.jsonl'}", frames=3)
    sample = data.load(first(data))
    assert (sample.question, sample.answer, sample.images) == ("who cooks?" + WORD, "woman", ())
    assert [frame.getpixel((0, 0))[0] for frame in sample.videos[0]] == [20, 80, 140]
    with pytest.raises(InputError, match=f"{name}=FILE, with the columns .*question, answer"):
        open_data(name)


def test_every_preset_is_covered_and_whole() -> None:
    assert set(presets()) == {*CASES, "gqa", "msvd", "msrvtt", "tgif"}
    for preset in presets().values():
        assert bool(preset.image) + bool(preset.video) + bool(preset.images_elsewhere) == 1
        assert {"question", preset.answer} <= set(preset.columns)
        assert (preset.hub is None) == (preset.split is None)


def test_options_come_before_a_preset(tmp_path: Path) -> None:
    features, row, *_ = CASES["pope"]
    renamed = {"photo" if name == "image" else name: kind for name, kind in features.items()}
    table = datasets.Dataset.from_list(
        [{"photo" if name == "image" else name: value for name, value in row.items()}],
        features=datasets.Features(renamed),
    )
    table.to_parquet(tmp_path / "local.parquet")
    given = f"POPE={tmp_path / 'local.parquet'}"
    with pytest.raises(InputError, match="'image'.*photo"):
        open_data(given)
    data = open_data(given, image_column="photo", question_template="{category}: {question}")
    assert data.load(first(data)).question == "adversarial: Is there a dog?"
    data = open_data(given, image_column="photo", question_column="answer")
    assert data.load(first(data)).question == "no"
    with pytest.raises(InputError, match="'pop' is no preset; choose .*pope"):
        open_data("pop=" + str(tmp_path / "local.parquet"))
