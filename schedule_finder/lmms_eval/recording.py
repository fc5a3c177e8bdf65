"""Costs and answers of each task, and the JSON file that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from schedule_finder.errors import InputError
from schedule_finder.evaluation.metrics import same_answer
from schedule_finder.files import write_json

FORMAT, VERSION = "adaptinfer-lmms-eval", 1


@dataclass(frozen=True)
class PromptCosts:
    """One prompt; shares are taken later, against the unpruned model's record.

    Attributes:
        vision_tokens: of the prompt, before pruning.
        other_tokens: of the prompt, text and special tokens.
        computed: vision tokens that the layers computed, mean over layers, scoring included.
        flops: of the decoder's prefill.
        kv_bytes: of the cache when the answer was complete.
        prefill_ms: milliseconds of the decoder's prefill.
    """

    vision_tokens: int
    other_tokens: int
    computed: float
    flops: float
    kv_bytes: float
    prefill_ms: float


@dataclass
class TaskRecord:
    """One task: the costs of its prompts, in the order in which they ran, and its answers by document."""

    prompts: list[PromptCosts] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)

    def add_answer(self, document: Any, answer: str) -> None:
        """Keep an answer; a document that is asked several times has one for each."""
        name, number = str(document), 1
        while name in self.answers:
            number += 1
            name = f"{document}#{number}"
        self.answers[name] = answer

    def means(self) -> dict[str, float]:
        """Mean of each cost over the prompts; empty without any."""
        count = len(self.prompts)
        names = [each.name for each in fields(PromptCosts)] if count else []
        return {name: sum(getattr(prompt, name) for prompt in self.prompts) / count for name in names}

    def to_json(self) -> dict[str, Any]:
        """For the file."""
        return {
            "means": self.means(),
            "prompts": [asdict(one) for one in self.prompts],
            "answers": self.answers,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TaskRecord:
        """What `to_json` wrote."""
        return cls([PromptCosts(**one) for one in document["prompts"]], dict(document["answers"]))


def agreement(ours: TaskRecord, full: TaskRecord) -> float | None:
    """Share of the documents in both whose answers are the same; None without any."""
    common = [name for name in ours.answers if name in full.answers]
    same = sum(same_answer(ours.answers[name], full.answers[name]) for name in common)
    return same / len(common) if common else None


def write_records(path: Path, tasks: Mapping[str, TaskRecord], facts: Mapping[str, Any]) -> None:
    """Write all tasks so far in one step; ``facts`` say what was run."""
    document = {name: task.to_json() for name, task in tasks.items()}
    write_json(path, {"format": FORMAT, "version": VERSION, **facts, "tasks": document})


def read_records(path: Path) -> dict[str, TaskRecord]:
    """The tasks of a file. Raises `InputError`."""
    return read_record(path)[0]


def read_record(path: Path) -> tuple[dict[str, TaskRecord], dict[str, Any]]:
    """The tasks of a file, and the facts about what was run. Raises `InputError`."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document.pop("format"), document.pop("version")
        if found != (FORMAT, VERSION):
            raise ValueError(f"format {found[0]!r} {found[1]!r}")
        tasks = {name: TaskRecord.from_json(task) for name, task in document.pop("tasks").items()}
        return tasks, document
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); run with record={path} first"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no record of this plug-in ({error}); run with record= again") from error


def summary_lines(tasks: Mapping[str, TaskRecord], full: Mapping[str, TaskRecord]) -> Sequence[str]:
    """One line per task; shares of the unpruned model and equal answers where ``full`` has the task."""
    lines = []
    for name, task in tasks.items():
        if not (means := task.means()):
            continue
        parts = [f"{means['computed']:.1f} of {means['vision_tokens']:.1f} vision tokens per layer"]
        parts += [f"{means['flops'] / 1e9:.3g} GFLOPs", f"{means['kv_bytes'] / 2**20:.3g} MiB"]
        parts.append(f"prefill {means['prefill_ms']:.1f} ms")
        if name in full and (whole := full[name].means()):
            parts.append(f"{100 * means['flops'] / whole['flops']:.0f} % of the full model's FLOPs")
            if (same := agreement(task, full[name])) is not None:
                parts.append(f"{100 * same:.1f} % equal answers")
        lines.append(f"{name}: {', '.join(parts)}")
    return lines
