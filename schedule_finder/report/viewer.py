"""The samples of the report's viewer, ``7_viewer.json``: pictures, attention by layer, kept tokens, answers.

Imports neither torch nor pandas. `schedule_finder.report.recording` makes them.
"""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from schedule_finder.errors import InputError
from schedule_finder.files import write_text

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from schedule_finder.run.folder import Run


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ViewerPanel(_Part):
    """A picture as a JPEG data URI, and the grid of tokens on it; see `placement.Panel`."""

    picture: str
    rows: int
    columns: int
    width: float = 1.0
    height: float = 1.0


class StageTokens(_Part):
    """Vision tokens that are left after the stage at ``layer``, by number."""

    layer: int
    kept: list[int]


class ViewerSample(_Part):
    """One held-out sample.

    Attributes:
        id, question, question_type, references: of the sample.
        full_answer, pruned_answer: of the full model and of the schedule, from the evaluation.
        full_score, pruned_score: of these answers, in [0, 1]; None without references.
        kl: answer KL in nats.
        panels: pictures.
        places: panel, row and column of each vision token; None where unknown.
        layers: decoder layers with attention.
        attention: base64 of unsigned bytes ``[layers][tokens]``; 255 is the layer's largest value.
        peaks: the layer's largest attention over its mean, by layer.
        stages: tokens kept after each stage.
        note: what is missing or differs.
    """

    id: str
    question: str
    question_type: str
    references: list[str]
    full_answer: str
    pruned_answer: str
    full_score: float | None
    pruned_score: float | None
    kl: float
    panels: list[ViewerPanel]
    places: list[tuple[int, int, int] | None]
    layers: list[int]
    attention: str
    peaks: list[float]
    stages: list[StageTokens]
    note: str | None = None


class Viewer(_Part):
    """All samples, those with a wrong answer first.

    Attributes:
        schedule: digest of the schedule.
        answers: hash of the answers that the samples were chosen from.
        num_layers: decoder layers.
        samples: the samples.
    """

    schedule: str
    answers: str
    num_layers: int
    samples: list[ViewerSample]

    def save(self, path: Path) -> None:
        """Write the file in one step."""
        write_text(path, self.model_dump_json() + "\n")

    @classmethod
    def load(cls, path: Path) -> Viewer | None:
        """Read what `save` wrote; None where there is no such file. Raises `InputError`."""
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(
                f"{path}: `{where}`: {first['msg']}; delete this file and write the report again"
            ) from error


def as_bytes(attention: np.ndarray) -> tuple[str, list[float]]:
    """Attention ``[layers, tokens]`` as base64 of bytes, and each layer's largest value over its mean."""
    import numpy as np

    if not attention.size:
        return "", []
    mean, most = attention.mean(1), attention.max(1)
    peaks = np.divide(most, mean, out=np.zeros_like(most), where=mean > 0)
    scaled = np.divide(attention, most[:, None], out=np.zeros_like(attention), where=most[:, None] > 0)
    levels = np.round(255 * scaled).astype(np.uint8)
    return base64.b64encode(levels.tobytes()).decode(), [round(float(peak), 2) for peak in peaks]


def as_data_uri(picture: Image.Image, side: int) -> str:
    """The picture as a JPEG of at most ``side`` pixels."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    content = io.BytesIO()
    small.save(content, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def answers_digest(run: Run) -> str:
    """Hash of the answers of the evaluation. Raises `InputError` where there are none."""
    if not run.answers.exists():
        raise InputError(f"{run.answers}: not there; run `adaptinfer-profile evaluate {run.folder}` first")
    return hashlib.sha256(run.answers.read_bytes()).hexdigest()[:16]


def current_viewer(run: Run, schedule: str) -> Viewer | None:
    """The stored viewer if it is of the schedule with this digest and of the last evaluation; None otherwise."""
    stored = Viewer.load(run.viewer)
    if stored is None or stored.schedule != schedule or not run.answers.exists():
        return None
    return stored if stored.answers == answers_digest(run) else None
