"""Local tasks in lmms-eval's format over the demo's scenes, for tests and for a first look at the plug-in.

    python -m schedule_finder.lmms_eval.demo_tasks FOLDER --items 100
    lmms_eval --include_path FOLDER --tasks adaptinfer_demo ...

They have the task types of the usual benchmarks, not their content: questions are those that the demo backbone knows,
answers are one word. It knows no letters, so the multiple-choice task takes an option's text as its letter. A caption
is that of one cell: the backbone answers with one word of "red star", which ROUGE-L scores with .63.
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from schedule_finder.demo.draws import Split
from schedule_finder.demo.scenes import (
    COLOUR_NAMES,
    COLUMN_NAMES,
    COUNT_NAMES,
    QUESTION_TYPES,
    ROW_NAMES,
    SHAPE_NAMES,
    DemoSample,
    ask,
    demo_samples,
    render_scene,
    scene_with_question,
)
from schedule_finder.evaluation.metrics import METRICS

GROUP = "adaptinfer_demo"
SPLIT = "test"
SCENES: Split = "held_out"
TEN, SURE = 10, 8
"""References of open questions, and how many of those are right."""
OPTIONS = 4
_WORDS = (COLOUR_NAMES, SHAPE_NAMES, ROW_NAMES, COLUMN_NAMES, COUNT_NAMES, ("yes", "no"))


@dataclass(frozen=True)
class DemoTask:
    """One task.

    Attributes:
        metric: of `METRICS`.
        question_types: of the demo's questions.
        like: benchmarks with this kind of task.
        pairs: every image has two questions, one with the answer yes and one with the answer no.
        tokens: longest answer.
    """

    metric: str
    question_types: tuple[str, ...]
    like: str
    pairs: bool = False
    tokens: int = 2


TASKS = {
    f"{GROUP}_open": DemoTask("vqa_accuracy", ("colour", "shape", "at"), "TextVQA, VizWiz, VQA v2"),
    f"{GROUP}_yes_no": DemoTask("yes_no", ("exists",), "POPE"),
    f"{GROUP}_pairs": DemoTask("yes_no", ("exists",), "MME", pairs=True),
    f"{GROUP}_choice": DemoTask(
        "multiple_choice",
        ("relation_colour", "relation_shape"),
        "MMBench, SEED-Bench, ScienceQA, MMMU, MMStar",
    ),
    f"{GROUP}_counting": DemoTask("relaxed_accuracy", ("count_colour", "count_shape"), "ChartQA"),
    f"{GROUP}_reading": DemoTask("anls", ("where",), "DocVQA, InfoVQA"),
    f"{GROUP}_contains": DemoTask("contains", ("at", "where"), "OCRBench"),
    f"{GROUP}_exact": DemoTask("exact_match", QUESTION_TYPES, "GQA, RealWorldQA"),
    f"{GROUP}_caption": DemoTask("rouge_l", ("at",), "COCO captions, NoCaps, Flickr30k"),
}


def write_tasks(folder: Path, items: int, seed: int = 0) -> list[str]:
    """Write every task with its data into ``folder``, and the group `GROUP`; returns the tasks' names.

    Scenes are held out: the demo backbone was not trained on them.
    """
    documents = {name: _documents(task, items, seed) for name, task in TASKS.items()}
    return save_tasks(folder, GROUP, TASKS, documents)


def save_tasks(
    folder: Path,
    group: str,
    tasks: Mapping[str, DemoTask],
    documents: Mapping[str, Iterable[dict[str, Any]]],
) -> list[str]:
    """Write tasks with their documents, and the ``group`` of all of them; returns the tasks' names."""
    import datasets

    datasets.disable_progress_bars()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    text = datasets.Value("string")
    features = datasets.Features(
        dict.fromkeys(("question_id", "question", "answer", "question_type", "metric", "pair"), text)
        | {"image": datasets.Image(), "references": datasets.List(text), "options": datasets.List(text)}
    )
    for name, task in tasks.items():
        table = datasets.Dataset.from_list(list(documents[name]), features=features)
        datasets.DatasetDict({SPLIT: table}).save_to_disk(str(folder / "data" / name))
        (folder / f"{name}.yaml").write_text(_yaml(name, task, folder / "data" / name), encoding="utf-8")
    listed = f"group: {group}\ntask:\n" + "".join(f"  - {name}\n" for name in tasks)
    (folder / f"{group}.yaml").write_text(listed, encoding="utf-8")
    names = "accuracy_plus, precision, question, recall, results, f1, visuals, yes_share"
    (folder / "utils.py").write_text(
        f"from schedule_finder.lmms_eval.task_functions import {names}  # noqa: F401\n", encoding="utf-8"
    )
    return list(tasks)


def _documents(task: DemoTask, items: int, seed: int) -> Iterator[dict[str, Any]]:
    samples = (
        _pairs(items, seed)
        if task.pairs
        else demo_samples(items, split=SCENES, seed=seed, question_types=task.question_types)
    )
    for number, sample in enumerate(samples):
        options: list[str] = []
        references = [sample.answer]
        rng = np.random.default_rng([seed, number])
        if task.metric == "multiple_choice":
            options = _options(sample, rng)
            references = [string.ascii_uppercase[options.index(sample.answer)]]
        elif task.metric == "vqa_accuracy":
            wrong = _others(sample.answer)
            unsure = [wrong[int(index)] for index in rng.integers(len(wrong), size=TEN - SURE)]
            references = [sample.answer] * SURE + unsure
        elif task.metric == "rouge_l":
            references = _captions(sample, seed)
        yield {
            "question_id": sample.id,
            "image": sample.image,
            "question": sample.question,
            "answer": sample.answer,
            "question_type": sample.question_type,
            "metric": task.metric,
            "pair": sample.id if task.pairs else None,
            "references": references,
            "options": options,
        }


def _pairs(items: int, seed: int) -> Iterator[DemoSample]:
    """Two questions about every image, one with the answer yes and one with the answer no; they share their id."""
    for number in range(0, items, 2):
        scene, first, rng = scene_with_question(number, "exists", split=SCENES, seed=seed)
        image = Image.fromarray(render_scene(scene, rng))
        second = first
        while second.answer == first.answer:
            second = ask(scene, "exists", rng) or first
        for question in (first, second)[: items - number]:
            name = f"{SCENES}-{seed}-pair-{number // 2:06d}"
            yield DemoSample(name, image, question.text, question.answer, question.question_type, ())


def _captions(sample: DemoSample, seed: int) -> list[str]:
    """What a person might write about the cell that the question asks for."""
    number = int(sample.id.rpartition("-")[2])
    scene, _, _ = scene_with_question(number, sample.question_type, split=SCENES, seed=seed)
    (one,) = (shown for shown in scene.objects if shown.region in sample.regions)
    short = f"{COLOUR_NAMES[one.colour]} {SHAPE_NAMES[one.shape]}"
    return [short, f"a {short}", f"a {short} at {ROW_NAMES[one.row]} {COLUMN_NAMES[one.column]}"]


def _others(answer: str) -> list[str]:
    """Words of the same kind."""
    return [word for words in _WORDS if answer in words for word in words if word != answer]


def _options(sample: DemoSample, rng: np.random.Generator) -> list[str]:
    """The answer among words of its kind, in random order."""
    wrong = rng.permutation(_others(sample.answer))[: OPTIONS - 1]
    return [str(word) for word in rng.permutation([sample.answer, *wrong])]


def _yaml(name: str, task: DemoTask, data: Path) -> str:
    """The task as lmms-eval reads it; a JSON string is a YAML string."""
    details = [*METRICS[task.metric].details([], []), *(["accuracy_plus"] if task.pairs else [])]
    metrics = [f"  - metric: {task.metric}\n    aggregation: mean\n    higher_is_better: true\n"]
    metrics += [
        f"  - metric: {detail}\n    aggregation: !function utils.{detail}\n    higher_is_better: true\n"
        for detail in details
    ]
    return (
        f"# Task type of {task.like}.\n"
        f"task: {name}\n"
        f"dataset_path: {json.dumps(str(data))}\n"
        "dataset_kwargs:\n  load_from_disk: true\n"
        f"test_split: {SPLIT}\n"
        "output_type: generate_until\n"
        "doc_to_visual: !function utils.visuals\n"
        "doc_to_text: !function utils.question\n"
        "doc_to_target: answer\n"
        "process_results: !function utils.results\n"
        f"generation_kwargs:\n  max_new_tokens: {task.tokens}\n  temperature: 0\n  do_sample: false\n"
        f"metric_list:\n{''.join(metrics)}"
        "metadata:\n  version: 1.0\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the tasks are written")
    parser.add_argument("--items", type=int, default=100, help="questions of each task")
    parser.add_argument("--seed", type=int, default=0, help="draws the scenes")
    given = parser.parse_args(arguments)
    for name in write_tasks(given.folder, given.items, given.seed):
        print(f"{name}: {given.items} items, {TASKS[name].metric}, as {TASKS[name].like}")


if __name__ == "__main__":
    main()
