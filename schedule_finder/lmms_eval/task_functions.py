"""What the local tasks' YAML files call: prompts from a document, and scores from an answer."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from schedule_finder.evaluation.metrics import METRICS, same_answer
from schedule_finder.evaluation.metrics.multiple_choice import option_letter

Document = Mapping[str, Any]


def visuals(document: Document) -> list[Any]:
    """Images of a prompt, in order."""
    return [document["image"].convert("RGB")]


def question(document: Document) -> str:
    """Text of a prompt."""
    return str(document["question"])


def results(document: Document, answers: Sequence[str]) -> dict[str, Any]:
    """The metric's score, and what the aggregation of further numbers needs, under their names."""
    metric, references = METRICS[document["metric"]], list(document["references"])
    answer = chosen_letter(answers[0], document["options"]) if document["options"] else answers[0]
    judged = {"answer": answer, "references": references}
    details = metric.details([answer], [references])
    score = metric.score(answer, references)
    found = {metric.name: score} | dict.fromkeys(details, judged)
    return found | ({"accuracy_plus": (document["pair"], score)} if document.get("pair") else {})


def chosen_letter(answer: str, options: Sequence[str]) -> str:
    """The letter of the option whose text is the answer, else the letter that the answer names, else the answer."""
    for letter, option in zip(string.ascii_uppercase, options, strict=False):
        if same_answer(answer, option):
            return letter
    return option_letter(answer) or answer


def _aggregation(name: str) -> Callable[[Sequence[Mapping[str, Any]]], float]:
    def aggregate(judged: Sequence[Mapping[str, Any]]) -> float:
        answers, references = [one["answer"] for one in judged], [one["references"] for one in judged]
        return METRICS["yes_no"].details(answers, references)[name]

    return aggregate


precision, recall, f1, yes_share = map(_aggregation, ("precision", "recall", "f1", "yes_share"))


def accuracy_plus(judged: Sequence[tuple[str, float]]) -> float:
    """Share of the pairs of questions with both right, as in MME; a question without its pair is left out."""
    of_pair: dict[str, list[float]] = {}
    for pair, score in judged:
        of_pair.setdefault(pair, []).append(score)
    both = [min(scores) for scores in of_pair.values() if len(scores) == 2]
    return sum(both) / max(1, len(both))
