"""The columns of a table that hold image, question and answer, and how they are read."""

from __future__ import annotations

import ast
import json
import math
import re
import string
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from schedule_finder.errors import InputError
from schedule_finder.samples.dialogs import DIALOG_COLUMNS, read_dialog, without_placeholders
from schedule_finder.samples.entries import BadSample

IMAGE_COLUMNS = (
    "image",
    "images",
    "image_path",
    "img",
    "picture",
    "image_bytes",
    "jpg",
    "jpeg",
    "png",
    "webp",
)
VIDEO_COLUMNS = ("video", "videos", "video_path", "frames", "clip", "mp4")
QUESTION_COLUMNS = ("question", "query", "prompt", "instruction", "text")
ANSWER_COLUMNS = ("answer", "answers", "label", "target", "response")
CHOICE_COLUMNS = ("choices", "options")
"""Lists of choices; with one, and no template, the question is followed by them and the answer is a letter."""
TYPE_COLUMNS = ("question_type", "category", "task", "type")
MOST_CHARACTERS = 20_000
"""Longer questions are skipped: no benchmark has them, and one would fill the context."""

_ASK_FOR_LETTER = ":letters}\nAnswer with the option's letter from the given choices directly."

AnswerForm = Literal["text", "most_common", "letter", "choice"]
"""How an answer is read: unchanged (the first of a list), the most common of a list, or a number as a letter
from A, or as the letter of the choice that it names."""


class Template:
    """Text over the columns of a row: ``{question}\\nOptions: {options}``.

    ``{options:letters}`` spells a list as lines ``A. ...``. A line is left out where all columns that it names
    are empty.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._lines = [list(string.Formatter().parse(line)) for line in text.split("\n")]
        except ValueError as error:
            raise InputError(f"template {text!r}: {error}; write braces that are text as {{{{ }}}}") from None
        for line in self._lines:
            for _, name, form, _ in line:
                if name == "" or (form not in (None, "", "letters")):
                    raise InputError(f"template {text!r}: a field is {{COLUMN}} or {{COLUMN:letters}}")

    @property
    def columns(self) -> list[str]:
        """Columns that it names."""
        return [name for line in self._lines for _, name, _, _ in line if name]

    def cell(self, row: Mapping[str, Any]) -> Any:
        """The cell of a row as it is where the template is one column and nothing else, else its text."""
        if self.text == "{" + "".join(self.columns) + "}":
            return row[self.columns[0]]
        return self.fill(row)

    def fill(self, row: Mapping[str, Any]) -> str:
        """The text of one row."""
        lines = []
        for line in self._lines:
            values = [_text(row[name], form == "letters") for _, name, form, _ in line if name is not None]
            if not values or any(values):
                fields = iter(values)
                lines.append(
                    "".join(
                        literal + (next(fields) if name is not None else "") for literal, name, _, _ in line
                    )
                )
        return "\n".join(lines).strip()


@dataclass(frozen=True)
class Columns:
    """Columns of the parts of a sample; ``images`` and ``videos`` are columns or templates of paths.

    ``dialog``: column of turns that question, answer and, without other columns, media are read from. ``choices``:
    column of the choices that the answer is one of.
    """

    images: tuple[Template, ...]
    videos: tuple[Template, ...]
    question: Template
    answer: str | None
    answer_form: AnswerForm
    question_type: str | None
    dialog: str | None = None
    choices: str | None = None

    @property
    def media(self) -> list[str]:
        """Columns with images, videos, or parts of their paths."""
        return _once(name for template in (*self.images, *self.videos) for name in template.columns)

    @property
    def text(self) -> list[str]:
        """Columns with the question, the answer and the question's type."""
        named = (*self.question.columns, self.answer, self.question_type, self.dialog, self.choices)
        return _once(name for name in named if name)

    def question_text(self, row: Mapping[str, Any]) -> str:
        """The question of a row as it is, without marks of media."""
        if self.dialog:
            return read_dialog(row[self.dialog]).question
        return without_placeholders(self.question.fill(row))

    def images_of(self, row: Mapping[str, Any]) -> list[Any]:
        """Cells with images: of the columns, else of the dialog."""
        if not self.images and not self.videos and self.dialog:
            return list(read_dialog(row[self.dialog]).images)
        return [template.cell(row) for template in self.images]

    def videos_of(self, row: Mapping[str, Any]) -> list[Any]:
        """Cells with videos: of the columns, else of the dialog."""
        if not self.images and not self.videos and self.dialog:
            return list(read_dialog(row[self.dialog]).videos)
        return [template.cell(row) for template in self.videos]

    def question_of(self, row: Mapping[str, Any]) -> str:
        """The question of a row. Raises `BadSample` where it is empty or too long."""
        question = self.question_text(row)
        # The fixed text of a template is not a question: a question column must have text.
        asked = [name for name in self.question.columns if name in QUESTION_COLUMNS] or self.question.columns
        if not question or (asked and not any(_text(row[name]) for name in asked)):
            raise BadSample("the question is empty")
        if len(question) > MOST_CHARACTERS:
            raise BadSample(f"the question has {len(question):,} characters, more than {MOST_CHARACTERS:,}")
        return question

    def answer_of(self, row: Mapping[str, Any]) -> str | None:
        """The answer of a row, None if unknown."""
        if self.dialog and not self.answer:
            return read_dialog(row[self.dialog]).answer
        value = row[self.answer] if self.answer else None
        if self.answer_form == "choice" and self.choices:
            return _letter_of(value, as_list(row[self.choices]))
        if (given := _several(value)) is not None:
            if not given:
                return None
            return Counter(given).most_common(1)[0][0] if self.answer_form == "most_common" else given[0]
        if self.answer_form == "letter" and isinstance(value, str) and value.strip().isdecimal():
            value = int(value)  # a CSV file has text only
        if self.answer_form == "letter" and isinstance(value, int) and 0 <= value < 26:
            return string.ascii_uppercase[value]
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a column of whole numbers with gaps is read as decimals
        return _text(value) or None

    def references_of(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """All reference answers of a row that lists several, in its order; else none: `answer_of` is the only one."""
        given = _several(row[self.answer]) if self.answer and self.answer_form != "choice" else None
        return tuple(given) if given and len(given) > 1 else ()

    def type_of(self, row: Mapping[str, Any]) -> str:
        """The question type of a row."""
        return (_text(row[self.question_type]) if self.question_type else "") or "all"


def find_columns(
    names: Sequence[str],
    source: str,
    *,
    image: str | None = None,
    video: str | None = None,
    question: str | None = None,
    question_template: str | None = None,
    answer: str | None = None,
    answer_form: AnswerForm = "text",
    question_type: str | None = None,
) -> Columns:
    """The columns of a table: those that were chosen, guesses for the rest. Raises `InputError`."""
    dialog = _guess(DIALOG_COLUMNS, names)
    if question or question_template or _guess(QUESTION_COLUMNS, names):
        dialog = None
    images = _media(image, names, "--image-column", source)
    videos = _media(video, names, "--video-column", source)
    if not images and not videos:
        guess = _guess(IMAGE_COLUMNS, names)
        # Several images in columns of their own: image_1, image_2, ...
        numbered = sorted((n for n in names if re.fullmatch(r"image_?\d+", n)), key=lambda n: (len(n), n))
        images = [guess] if guess else numbered
        if not images:
            guess = _guess(VIDEO_COLUMNS, names)
            videos = [guess] if guess else []
    if not images and not videos and not dialog:
        raise _unknown(source, names, (*IMAGE_COLUMNS, *VIDEO_COLUMNS), "--image-column or --video-column")
    choices = _guess(CHOICE_COLUMNS, names) if question_template is None and question is None else None
    if dialog:
        asked, choices = Template(""), None
    elif question_template is None:
        question = question or _guess(QUESTION_COLUMNS, names)
        if question is None:
            raise _unknown(source, names, QUESTION_COLUMNS, "--question-column")
        _check([question], names, "--question-column", source)
        asked = Template("{" + question + "}")
        if choices:
            asked, answer_form = Template("{" + question + "}\n{" + choices + _ASK_FOR_LETTER), "choice"
    else:
        asked = Template(question_template)
        _check(asked.columns, names, "--question-template", source)
    if answer is not None:
        _check([answer], names, "--answer-column", source)
    return Columns(
        tuple(map(path_template, images)),
        tuple(map(path_template, videos)),
        asked,
        answer or (None if dialog else _guess(ANSWER_COLUMNS, names)),
        answer_form,
        question_type if question_type in names else _guess(TYPE_COLUMNS, names),
        dialog,
        choices,
    )


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _media(chosen: str | None, names: Sequence[str], option: str, source: str) -> list[str]:
    """A column, several with commas between, or a template of a path."""
    if chosen is None:
        return []
    parts = [chosen] if chosen in names else [part.strip() for part in chosen.split(",")]
    _check([name for part in parts for name in path_template(part).columns], names, option, source)
    return parts


def path_template(text: str) -> Template:
    """A column's name, or a path over columns (``videos/{id}.mp4``), as a template."""
    return Template(text if "{" in text else "{" + text + "}")


def _check(chosen: Sequence[str], names: Collection[str], option: str, source: str) -> None:
    for name in chosen:
        if name not in names:
            raise InputError(f"{option} {name!r}: data set {source!r} has the columns {', '.join(names)}")


def _guess(guesses: Sequence[str], names: Collection[str]) -> str | None:
    return next((name for name in guesses if name in names), None)


def _unknown(source: str, names: Sequence[str], guesses: Sequence[str], option: str) -> InputError:
    return InputError(
        f"data set {source!r} has the columns {', '.join(names)}; none of {', '.join(guesses)} is among them, so "
        f"name it with {option}"
    )


def as_list(value: Any) -> Any:
    """A list of choices, also from Python text (MMMU) and from lists of labels and texts; else the value."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return ast.literal_eval(value)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        return value["text"]
    return value


def _several(value: Any) -> list[str] | None:
    """The texts of a list of answers, also of a JSON list of texts; None for any other cell.

    An answer may be a dictionary with the text in ``answer``, as VQA v2 and VizWiz publish them.
    """
    if isinstance(value, str) and value.startswith('["'):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, (list, tuple)):
        return None
    texts = (_text(item.get("answer") if isinstance(item, Mapping) else item) for item in value)
    return [text for text in texts if text]


def _letter_of(answer: Any, choices: Any) -> str | None:
    """The letter of the choice that an answer names: by its number from 0, its letter, or its text."""
    if not isinstance(choices, (list, tuple)):
        return _text(answer) or None
    if isinstance(answer, int) and not isinstance(answer, bool):
        return string.ascii_uppercase[answer] if 0 <= answer < min(26, len(choices)) else None
    text, texts = _text(answer), [_text(choice) for choice in choices]
    if text in texts[:26]:
        return string.ascii_uppercase[texts.index(text)]
    if isinstance(answer, str) and text.isdecimal() and int(text) < min(26, len(choices)):
        return string.ascii_uppercase[int(text)]  # a number in a CSV file
    return text or None


def _text(value: Any, letters: bool = False) -> str:
    """A cell as text; empty for missing values (None, NaN)."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if letters:
        value = as_list(value)
    if isinstance(value, (list, tuple)):
        texts = [_text(item) for item in value]
        if letters:
            return "\n".join(
                f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, texts, strict=False)
            )
        return ", ".join(texts)
    text = str(value).strip()
    return "" if text == "nan" else text
