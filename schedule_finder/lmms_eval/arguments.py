"""The plug-in's own model arguments, taken out before the wrapped model sees the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schedule_finder.errors import InputError

if TYPE_CHECKING:
    from pruning_runtime import Schedule
    from pruning_runtime.backbone import Backbone

FULL, SMALLER_IMAGES = "full", "smaller-images"
OWN = ("base", "schedule", "baseline", "record", "full")


@dataclass(frozen=True)
class PruningArguments:
    """What the plug-in does with the wrapped model.

    Attributes:
        base: name of a chat model of lmms-eval.
        schedule: file or preset; None: nothing is pruned, and ``baseline`` must be ``full``.
        baseline: None: the schedule itself; ``full``: nothing is pruned; ``smaller-images``: images down-sampled to the
            schedule's processed tokens; a scorer's name: the same stages with that scorer.
        record: JSON file for costs and answers of each task.
        full: ``record`` of the unpruned model, to count equal answers.
    """

    base: str
    schedule: str | None = None
    baseline: str | None = None
    record: Path | None = None
    full: Path | None = None

    @classmethod
    def take(cls, given: Mapping[str, Any]) -> tuple[PruningArguments, dict[str, Any]]:
        """The plug-in's arguments and the others. Raises `InputError`."""
        from pruning_runtime.scorers import SCORERS

        own = {name: str(given[name]) for name in OWN if given.get(name) not in (None, "")}
        others = {name: value for name, value in given.items() if name not in OWN}
        if "base" not in own:
            raise InputError(
                "--model_args: no base; name the chat model to wrap, for example base=llava_hf, base=qwen2_5_vl"
            )
        baselines = (FULL, SMALLER_IMAGES, *SCORERS)
        if own.get("baseline", FULL) not in baselines:
            raise InputError(f"--model_args: baseline={own['baseline']}; choose {', '.join(baselines)}")
        if "schedule" not in own and own.get("baseline") != FULL:
            raise InputError(
                f"--model_args: no schedule; give schedule=FILE or a preset, or baseline={FULL} for the unpruned model"
            )
        record, full = own.pop("record", None), own.pop("full", None)
        mine = cls(
            **own, record=None if record is None else Path(record), full=None if full is None else Path(full)
        )
        return mine, others

    def applied(self, backbone: Backbone) -> tuple[Schedule, float]:
        """The schedule to apply, and the factor by which images are scaled.

        Raises:
            ScheduleError: the schedule cannot be read or is for another backbone.
        """
        from schedule_finder.evaluation.methods import scored_by

        if self.schedule is None:
            return _nothing(backbone), 1.0
        schedule = load_schedule(self.schedule)
        schedule.check_backbone(backbone)
        if self.baseline is None:
            return schedule, 1.0
        if self.baseline in (FULL, SMALLER_IMAGES):
            scale = _scale(schedule) if self.baseline == SMALLER_IMAGES else 1.0
            return schedule.model_copy(update={"stages": ()}), scale
        return scored_by(schedule, self.baseline), 1.0


def load_schedule(given: str) -> Schedule:
    """A schedule file, or a published preset by name. Raises `ScheduleError`."""
    from pruning_runtime import Schedule

    return Schedule.preset(given) if given in Schedule.presets() else Schedule.load(given)


def _scale(schedule: Schedule) -> float:
    """Side of an image with as many tokens as the schedule processes, as a share of the side."""
    from pruning_runtime.costs import processed_ratios

    ratios = processed_ratios(schedule.stages, schedule.backbone.num_layers)
    return (schedule.budget.processed if schedule.budget else sum(ratios) / len(ratios)) ** 0.5


def _nothing(backbone: Backbone) -> Schedule:
    """A schedule without stages, under which the model is bit-identical to the unpruned one."""
    from pruning_runtime import Schedule
    from pruning_runtime.schedule import BackboneIdentity, ScorerChoice

    return Schedule(
        backbone=BackboneIdentity(
            name=backbone.name, model_type=backbone.model_type, num_layers=backbone.shape.num_layers
        ),
        stages=(),
        scorer=ScorerChoice(name="text_guided"),
    )
