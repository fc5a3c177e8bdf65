"""What is measured beside the schedule, and what each baseline shows."""

from __future__ import annotations

from dataclasses import dataclass

from pruning_runtime import Schedule, Stage
from pruning_runtime.costs import kept_per_layer
from pruning_runtime.schedule import ScorerChoice

UNPRUNED, SCHEDULE = "unpruned", "schedule"
UNPRUNED_FAST, SCHEDULE_FAST = "unpruned, fast", "schedule, fast"


@dataclass(frozen=True)
class Baseline:
    """One way to run the same prompt.

    ``schedule`` None: the model as it is, outside `pruned`. ``eager_stages``: stage layers run `eager_stages`.
    ``fast``: the decoder's prefill takes `pruned`'s fast path.
    """

    name: str
    what: str
    schedule: Schedule | None = None
    eager_stages: bool = False
    fast: bool = False

    @property
    def baseline(self) -> str:
        """The name of the unpruned baseline on the same path."""
        return UNPRUNED_FAST if self.fast else UNPRUNED


def baselines(schedule: Schedule, num_vision: int, *, fast: bool = False) -> list[Baseline]:
    """The unpruned model, the schedule and its baselines; those of equal cost process equally many whole tokens.

    Args:
        schedule: what the others are compared with.
        num_vision: vision tokens of the prompt.
        fast: add the schedule and the model with nothing dropped on the fast path of `pruned`.
    """
    layers = schedule.backbone.num_layers
    kept = [(stage.layer, stage.kept(num_vision)) for stage in schedule.stages]
    processed = sum(kept_per_layer(kept, num_vision, layers)) / (layers * num_vision)
    strided = ScorerChoice(name="strided")
    found = [
        Baseline(UNPRUNED, "the model as it is, outside `pruned`"),
        Baseline(SCHEDULE, f"the schedule, scorer {schedule.scorer.name}", schedule),
        Baseline(
            "no-scoring bound",
            "same stages and kept counts, evenly spaced tokens: no attention is read, selection and gathering are unchanged",
            schedule.with_scorer(strided),
        ),
        Baseline(
            "eager, syncs",
            "same stages and kept counts; stage layers run eager attention and return whole maps, which are scored row "
            "by row on the host; the tokens that are dropped are evenly spaced ones",
            schedule.with_scorer(strided),
            eager_stages=True,
        ),
    ]
    last = min(1, layers - 2)
    for layer in range(last, -1, -1):
        ratio = (processed * layers - (layer + 1)) / (layers - layer - 1)
        if ratio >= 0:
            stages = (Stage(layer=layer, keep_ratio=ratio),)
            what = f"FastV's rule: the last token's attention, one stage after layer {layer}, as many tokens processed"
            fastv = {"stages": stages, "scorer": ScorerChoice(name="last_token"), "dropped_tokens": "discard"}
            found.append(Baseline("FastV-like", what, schedule.model_copy(update=fastv)))
            break
    before = {
        "stages": (Stage(layer=-1, keep_ratio=processed),),
        "scorer": strided,
        "dropped_tokens": "discard",
    }
    what = "evenly spaced tokens, dropped before the decoder, as many tokens processed"
    found.append(Baseline("before decoder", what, schedule.model_copy(update=before)))
    if fast:
        # A scorer without attention, so that no layer is hooked.
        whole = {"stages": (), "scorer": strided, "positions": "original", "dropped_tokens": "discard"}
        what = "nothing dropped, prefill on the fast path: the baseline of `schedule, fast`"
        found += [
            Baseline(UNPRUNED_FAST, what, schedule.model_copy(update=whole), fast=True),
            Baseline(SCHEDULE_FAST, "the schedule, prefill on the fast path", schedule, fast=True),
        ]
    return found
