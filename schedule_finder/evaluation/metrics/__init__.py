"""Metrics by name, one file each. Light modules: nothing here imports pandas or torch.

None comes from a library that the project keeps: Hugging Face's `evaluate` downloads each metric as a script when it
is used, and has neither VQA accuracy, ANLS, relaxed accuracy nor POPE's reading of an answer. `pycocoevalcap`, which has
the ROUGE-L of COCO, comes with lmms-eval only; tests/lmms compares ours with it.
"""

from __future__ import annotations

from schedule_finder.evaluation.metrics.anls import ANLS
from schedule_finder.evaluation.metrics.base import Metric
from schedule_finder.evaluation.metrics.contains import Contains
from schedule_finder.evaluation.metrics.exact_match import ExactMatch, same_answer
from schedule_finder.evaluation.metrics.multiple_choice import MultipleChoice
from schedule_finder.evaluation.metrics.relaxed_accuracy import RelaxedAccuracy
from schedule_finder.evaluation.metrics.rouge_l import RougeL
from schedule_finder.evaluation.metrics.vqa_accuracy import VQAAccuracy
from schedule_finder.evaluation.metrics.yes_no import YesNo

__all__ = ["DEFAULT_METRIC", "METRICS", "Metric", "metric_label", "same_answer"]

METRICS: dict[str, Metric] = {
    kind.name: kind()
    for kind in (ExactMatch, VQAAccuracy, MultipleChoice, YesNo, ANLS, RelaxedAccuracy, Contains, RougeL)
}
"""The metrics, which keep no state."""
DEFAULT_METRIC = ExactMatch.name


def metric_label(name: str | None) -> str:
    """How headings call a metric; ``mixed`` where samples have several, None in files of earlier releases."""
    return METRICS[name or DEFAULT_METRIC].label if name in (*METRICS, None) else f"score ({name})"
