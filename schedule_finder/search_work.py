"""How many forward passes a search needs, before it begins. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from schedule_finder.measuring import rule_probe
from schedule_finder.measuring.sensitivity_table import RATIOS
from schedule_finder.measuring.token_policy import CONTROLS
from schedule_finder.search import CHOICE_BATCH, CHOICE_SAMPLES, TABLE_BATCH, TABLE_SAMPLES
from schedule_finder.solvers import SOLVERS, whole_schedules
from schedule_finder.solvers.sensitivity import MAX_STAGES, MOST_CANDIDATES

_RULES = rule_probe.FINALISTS + len(CONTROLS)
"""Rules of each place that a search may choose from."""
_POLICIES = 2 * _RULES + 1 + len(CONTROLS)
"""Policies measured on the chosen stages: rules of both places, the other dropped-token setting, the controls."""
_NEIGHBOURS = 2 * MAX_STAGES + 2 * (MAX_STAGES - 1) + MAX_STAGES
"""Most neighbours of a schedule: a layer earlier or later, a ratio up or down, a stage less."""


def search_forwards(
    solver: str,
    layers: Sequence[int],
    depth: int,
    samples: int,
    *,
    vision_share: float,
    budget: float | None = None,
) -> float | None:
    """Upper bound on the unpruned forward passes of one sample that a solver needs.

    Args:
        solver: its name.
        layers: layers of single stages that are measured; see `measured_layers`.
        depth: decoder layers.
        samples: calibration samples.
        vision_share: share of a typical prompt's tokens that are vision tokens.
        budget: of the whole schedules, in vision tokens processed; None: not known, they count as unpruned.

    Returns:
        None where it is not known before the search: ``grid`` measures all schedules that spend the budget.
    """
    if not SOLVERS[solver].measures:
        return 0.0
    if not SOLVERS[solver].needs_sensitivity:
        return None
    table, choice = _measured_samples(samples)

    def cost(ratio: float) -> float:
        """Of a layer that computes this share of the vision tokens, over an unpruned one."""
        return 1 - vision_share * (1 - ratio)

    # A single stage starts from stored states at its own layer, which runs whole (or scores before the decoder);
    # later layers run on the kept tokens.
    single = sum(
        (1 + cost(ratio) * (depth - 1 - max(layer, -1))) / depth for layer in layers for ratio in RATIOS
    )
    one = 1 if budget is None else cost(budget)
    left, before, candidates = MOST_CANDIDATES + 3 * (1 + _POLICIES), 0, 0
    for count, most in (*whole_schedules.ROUNDS, (choice, 0)):
        reached = min(choice, -(-count // CHOICE_BATCH) * CHOICE_BATCH)
        candidates += left * max(reached - before, 0)
        left, before = most, max(reached, before)
    refined = choice * (whole_schedules.REFINEMENTS * _NEIGHBOURS + _POLICIES)
    return table * (2 + single) + _probe(table, depth, cost) + choice + one * (candidates + refined)


def search_answers(solver: str, samples: int, answer_tokens: int) -> int:
    """Answers of the unpruned model that a search generates before it measures.

    Args:
        solver: its name.
        samples: calibration samples.
        answer_tokens: longest answer; the first token alone needs no answer.
    """
    if not SOLVERS[solver].measures or answer_tokens == 1:
        return 0
    table, choice = _measured_samples(samples)
    return table + choice if SOLVERS[solver].needs_sensitivity else choice


def _measured_samples(samples: int) -> tuple[int, int]:
    """Samples of the sensitivity table, and of the choice among whole schedules."""
    if samples >= TABLE_SAMPLES + CHOICE_SAMPLES:
        return TABLE_SAMPLES, CHOICE_SAMPLES
    table = min(TABLE_SAMPLES, max(1, samples // 2))
    return table, min(CHOICE_SAMPLES, max(1, samples - table))


def _probe(samples: int, depth: int, cost: Callable[[float], float]) -> float:
    """Forward passes of `probe_rules`; ``cost`` as in `search_forwards`."""
    first = min(samples, max(rule_probe.FIRST_SAMPLES, TABLE_BATCH))
    inside = sum(at + (1 - at) * cost(rule_probe.DECODER_RATIO) for at in rule_probe.DEPTHS)
    before = sum(1 / depth + cost(ratio) for ratio in rule_probe.PRE_DECODER_RATIOS)
    return sum(
        one * (first * len(rule_probe.applicable_scorers(layer)) + samples * (_RULES + rule_probe.FINALISTS))
        for layer, one in ((-1, before), (0, inside))
    )
