"""Common benchmarks by name: hub location and columns."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from schedule_finder.samples.columns import AnswerForm, Template, path_template


@dataclass(frozen=True)
class ImagesElsewhere:
    """Images in another config of the data set: ``key`` of a row is ``id`` there."""

    config: str
    key: str
    id: str
    image: str


@dataclass(frozen=True)
class Preset:
    """One benchmark in ``presets.json``; the fields mean what the options of the same names mean.

    ``hub`` is None where no hub copy with questions and videos in one row is known. ``metric``: the benchmark's own,
    of `schedule_finder.evaluation.metrics`.
    """

    title: str
    hub: str | None
    config: str | None
    split: str | None
    question_template: str
    answer: str
    metric: str
    image: str | None = None
    video: str | None = None
    answer_form: AnswerForm = "text"
    question_type: str | None = None
    images_elsewhere: ImagesElsewhere | None = None

    @property
    def columns(self) -> list[str]:
        """Columns of a local copy that name the video, the question and the answer."""
        video = path_template(self.video).columns if self.video else []
        return [*video, *Template(self.question_template).columns, self.answer]


@functools.cache
def presets() -> dict[str, Preset]:
    """All presets by name."""
    text = resources.files("schedule_finder.samples").joinpath("presets.json").read_text(encoding="utf-8")
    return {name: _preset(fields) for name, fields in json.loads(text)["presets"].items()}


def _preset(fields: dict[str, Any]) -> Preset:
    elsewhere = fields.pop("images_elsewhere", None)
    return Preset(**fields, images_elsewhere=ImagesElsewhere(**elsewhere) if elsewhere else None)
