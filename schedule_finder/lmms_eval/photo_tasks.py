"""Local tasks in lmms-eval's format over the photo scenes, for the photo backbone.

    python -m schedule_finder.lmms_eval.photo_tasks FOLDER --items 60
    lmms_eval --include_path FOLDER --tasks adaptinfer_photo ...

The photographs must have been fetched, as for `--dataset photo`. Captions name the objects of a row from left to right.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from schedule_finder.lmms_eval.demo_tasks import DemoTask, save_tasks
from schedule_finder.samples.photo_assets import PhotoAssets, load_photographs
from schedule_finder.samples.photo_questions import ask
from schedule_finder.samples.photo_scenes import draw_scene, render_scene, scene_generator

GROUP = "adaptinfer_photo"
TASKS = {
    f"{GROUP}_caption": DemoTask("rouge_l", ("row",), "COCO captions, NoCaps, Flickr30k", tokens=24),
    f"{GROUP}_exact": DemoTask("exact_match", ("at", "left", "below", "two_hop"), "GQA", tokens=8),
    f"{GROUP}_yes_no": DemoTask("yes_no", ("exists",), "POPE", tokens=4),
}


def write_photo_tasks(
    folder: Path, items: int, seed: int = 0, assets: PhotoAssets | None = None
) -> list[str]:
    """Write every task with its data into ``folder``, and the group `GROUP`; returns the tasks' names.

    Scenes are held out: the photo backbone was not trained on their backgrounds and pairs of object and position.

    Raises:
        InputError: the photographs were not fetched.
    """
    assets = assets or load_photographs()
    documents = {name: _documents(task, items, seed, assets) for name, task in TASKS.items()}
    return save_tasks(folder, GROUP, TASKS, documents)


def _documents(task: DemoTask, items: int, seed: int, assets: PhotoAssets) -> Iterator[dict[str, Any]]:
    """One question about each scene, the question types in turn; scenes that do not allow the type are left out."""
    written, number = 0, 0
    while written < items:
        kind = task.question_types[written % len(task.question_types)]
        rng = scene_generator("held_out", seed, number)
        scene = draw_scene(rng, "held_out")
        picture = render_scene(scene, assets, rng)
        question = ask(scene, kind, rng)
        number += 1
        if question is None:
            continue
        written += 1
        yield {
            "question_id": f"held_out-{seed}-{number - 1:06d}",
            "image": picture,
            "question": question.text,
            "answer": question.answer,
            "question_type": kind,
            "metric": task.metric,
            "pair": None,
            "references": [question.answer],
            "options": [],
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the tasks are written")
    parser.add_argument("--items", type=int, default=60, help="questions of each task")
    parser.add_argument("--seed", type=int, default=0, help="draws the scenes")
    given = parser.parse_args(arguments)
    for name in write_photo_tasks(given.folder, given.items, given.seed):
        print(f"{name}: {given.items} items, {TASKS[name].metric}, as {TASKS[name].like}")


if __name__ == "__main__":
    main()
