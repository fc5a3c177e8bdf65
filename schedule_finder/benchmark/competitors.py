"""What is measured beside the schedule, and why each is a fair rival."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pruning_runtime import Schedule, Stage
from pruning_runtime.schedule import ScorerChoice


@dataclass(frozen=True)
class Competitor:
    """One way to run the same prompt; ``schedule`` None: the model as it is."""

    name: str
    what: str
    schedule: Schedule | None = None
    eager_stages: bool = False


def competitors(schedule: Schedule, num_vision: int) -> list[Competitor]:
    """Ours and what it is held against; those at the same cost keep as many tokens as whole tokens allow.

    Args:
        schedule: ours.
        num_vision: vision tokens of the prompt.
    """
    layers = schedule.backbone.num_layers
    processed = sum(kept_per_layer(schedule.stages, num_vision, layers)) / (layers * num_vision)
    strided = ScorerChoice(name="strided")
    found = [
        Competitor("unpruned", "the model as it is, outside `pruned`"),
        Competitor("schedule", f"the schedule, scorer {schedule.scorer.name}", schedule),
        Competitor(
            "oracle",
            "same stages and kept counts, evenly strided tokens: no attention is read, selection and gathering are ours",
            schedule.model_copy(update={"scorer": strided}),
        ),
        Competitor(
            "eager, syncs",
            "same stages and kept counts; stage layers run eager attention and return whole maps, which are scored row "
            "by row, read to the host and made into lists of positions there; the tokens that leave are strided ones",
            schedule.model_copy(update={"scorer": strided}),
            eager_stages=True,
        ),
    ]
    last = min(1, layers - 2)
    for layer in range(last, -1, -1):
        ratio = (processed * layers - (layer + 1)) / (layers - layer - 1)
        if ratio >= 0:
            stages = (Stage(layer=layer, keep_ratio=ratio),)
            what = f"FastV's rule: the last token's attention, one stage after layer {layer}, as many tokens processed"
            fastv = {"stages": stages, "scorer": ScorerChoice(name="last_token")}
            found.append(Competitor("FastV-like", what, schedule.model_copy(update=fastv)))
            break
    before = {"stages": (Stage(layer=-1, keep_ratio=processed),), "scorer": strided}
    what = "strided tokens dropped before the decoder, as many tokens processed"
    found.append(Competitor("before decoder", what, schedule.model_copy(update=before)))
    return found


def kept_per_layer(stages: Sequence[Stage], num_vision: int, num_layers: int) -> list[int]:
    """Vision tokens that each layer computes."""
    counts = []
    for layer in range(num_layers):
        done = [stage.kept(num_vision) for stage in stages if stage.layer < layer]
        counts.append(done[-1] if done else num_vision)
    return counts
