"""Dialogs as data sets hold them: LLaVA's ``conversations``, and chat ``messages`` with or without images in them."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DIALOG_COLUMNS = ("conversations", "messages", "conversation")
_PLACEHOLDER = re.compile(r"<(?:image|video)>")
_USER, _ASSISTANT = ("human", "user"), ("gpt", "assistant", "model")


@dataclass(frozen=True)
class Dialog:
    """The first question of a dialog, its answer where there is one, and the media before the answer.

    ``images`` and ``videos`` are cells as in a column: paths, encoded bytes, or dictionaries of either.
    """

    question: str = ""
    answer: str | None = None
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()


def read_dialog(cell: Any) -> Dialog:
    """The first question and answer of a dialog; an empty question where the cell holds none.

    Args:
        cell: turns with ``from`` and ``value`` or ``role`` and ``content``, or their JSON text. A content is text, or a
            list of parts (``{"type": "image", ...}``, ``{"type": "text", "text": ...}``).
    """
    question = ""
    images: list[Any] = []
    videos: list[Any] = []
    for turn in _turns(cell):
        role = str(turn.get("from") or turn.get("role") or "")
        content = turn.get("value") if turn.get("value") is not None else turn.get("content")
        text, some_images, some_videos = _content(content)
        if role in _ASSISTANT and question:
            return Dialog(question, text or None, tuple(images), tuple(videos))
        if role in _USER:
            question = "\n".join(part for part in (question, text) if part)
            images += some_images
            videos += some_videos
    return Dialog(question, None, tuple(images), tuple(videos))


def without_placeholders(text: str) -> str:
    """A question without ``<image>`` and ``<video>``: the chat template marks where media are."""
    if not _PLACEHOLDER.search(text):
        return text
    lines = (re.sub(r"[ \t]{2,}", " ", _PLACEHOLDER.sub("", line)).strip() for line in text.split("\n"))
    return "\n".join(lines).strip()


def _turns(cell: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return ()
    return [turn for turn in cell if isinstance(turn, Mapping)] if isinstance(cell, list) else ()


def _content(content: Any) -> tuple[str, list[Any], list[Any]]:
    """Text, images and videos of a turn."""
    if isinstance(content, str):
        return without_placeholders(content), [], []
    texts, images, videos = [], [], []
    for part in content if isinstance(content, list) else ():
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping):
            if part.get("text"):
                texts.append(str(part["text"]))
            if (image := _media(part, ("image", "image_url"))) is not None:
                images.append(image)
            if (video := _media(part, ("video", "video_url"))) is not None:
                videos.append(video)
    return without_placeholders("\n".join(texts)), images, videos


def _media(part: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The image or video of a part: its value, or its path where the type names the kind."""
    values = [part.get(name) for name in names]
    if part.get("type") in names:
        values += [part.get(name) for name in ("path", "url")]
    found = next((value for value in values if value is not None), None)
    if isinstance(found, Mapping) and "url" in found:
        found = found["url"]
    if isinstance(found, str) and found.startswith("data:"):
        try:
            return base64.b64decode(found.partition(",")[2], validate=True)
        except (binascii.Error, ValueError):
            return found
    return found.removeprefix("file://") if isinstance(found, str) else found
