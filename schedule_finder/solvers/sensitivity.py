"""Stages of least predicted answer change: measured on the model, allocated by dynamic programming."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pruning_runtime.costs import processed_ratios
from pruning_runtime.schedule import Stage
from schedule_finder.errors import InputError
from schedule_finder.evidence import Alternative, Confidence, SolverEvidence
from schedule_finder.intervals import bootstrap_weights
from schedule_finder.measuring.sensitivity_table import SensitivityTable
from schedule_finder.solvers.allocation import allocate
from schedule_finder.solvers.base import Problem, Solution, Solver
from schedule_finder.solvers.budget import BudgetTarget
from schedule_finder.solvers.policy_choice import NEGLIGIBLE
from schedule_finder.solvers.whole_schedules import Candidate, Stages, WholeSchedules, respent

MAX_STAGES = 4
LEAST_GAIN = 0.05
"""Share of the predicted answer change that one more stage must save; every stage costs a scoring pass."""
RATIO_GRID = np.array(
    [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35, 0.28, 0.22, 0.17, 0.13, 0.1, 0.07, 0.04, 0.02, 0]
)
RESAMPLES = 20
MOST_CANDIDATES = 8
UNNEEDED = 0.02
"""Answer change up to which vision tokens count as not needed any more: one answer in fifty."""


class Sensitivity(Solver):
    """Layer-wise sensitivity, measured as answer change, and an exact allocation.

    The answer KL of every single stage (layer, keep ratio) is measured on a few samples (`SensitivityTable`). The
    differences of the answer change (`answer_change`) between layers add up to a prediction for any schedule, and
    dynamic programming finds the best schedule within the budget. The first stage may be before the decoder where
    that was measured; the budget then pays for scoring with layer 0.

    With a model, whole schedules are measured on other samples, on a few of them first: the best predicted stages
    (one choice per number of stages, and those that resampled samples lead to), the first of them under every policy
    that may be chosen, and two schedules with every rule that did well before the decoder: all tokens that the budget
    pays for leave there, or fewer leave there and all others where the decoder stops needing them. Then the
    neighbours of the best, and the best stages under all policies and with tokens that are strided or random
    (`choose_policy`). Among schedules that do not differ significantly from the best, the one with the fewest stages
    is chosen.

    The measure is that of VTW (arXiv 2405.05803), which drops everything at one layer only. The nearest prior art is
    DOP (arXiv 2507.02909), which also adds up output KL that was measured one parameter at a time.
    """

    name = "sensitivity"
    needs_sensitivity = True
    before_decoder = True
    measures = True

    def solve(self, problem: Problem) -> Solution:
        """See `Solver.solve`; evidence holds predictions, measurements and confidence."""
        table = problem.sensitivity
        if table is None:
            raise InputError(
                "solver sensitivity: nothing is measured yet; run it where the backbone can be loaded"
            )
        budget = problem.budget.under(table.policy)
        budget.deepest_layer(table.earliest)  # refuses what no stages can meet
        options = _options(table, budget)
        first = _worthwhile(options)
        resampled, confidence = _resampled(table, budget)
        evidence = SolverEvidence(
            solver=self.name,
            objective="answer change: mean over samples of 1 - exp(-answer KL)",
            measured_samples=len(table.sample_ids),
            by_number_of_stages={
                str(number): Alternative(stages=list(stages), predicted_change=round(loss, 5))
                for number, (loss, stages) in sorted(options.items())
            },
            predicted_change=round(options[len(first)][0], 5),
            placed_by="measured sensitivity",
            confidence=confidence,
            compared_rules=[] if problem.rules is None else problem.rules.results,
            refused_rules={} if problem.rules is None else problem.rules.refused,
        )
        if problem.answer_kl is None:
            return Solution(first, table.policy, evidence)
        placed = _distinct([first, *(stages for _, stages in options.values()), *resampled])
        schedules = WholeSchedules(problem, problem.answer_kl, table.earliest)
        best, facts = schedules.choose(_candidates(problem, table, placed))
        facts["predicted_change"] = round(predict(table, problem.budget, best.stages), 5)
        return Solution(best.stages, best.policy, evidence.model_copy(update=facts))


def _candidates(problem: Problem, table: SensitivityTable, placed: Sequence[Stages]) -> list[Candidate]:
    """Whole schedules to measure: predicted stages; under all policies the first of them, and those before the decoder."""
    policy = table.policy
    found = [Candidate(stages, policy.used_by(stages)) for stages in placed]
    policies = [policy, *problem.alternatives, *(problem.controls if problem.may_change else ())]
    end = table.last_needed(UNNEEDED)
    for other in policies:
        budget = problem.budget.under(other)
        spent = [respent(placed[0], budget), budget.spend_rest([-1], ())]
        spent += [budget.spend_first(-1, end)] if end is not None else []
        found += [Candidate(stages, other.used_by(stages)) for stages in spent if stages is not None]
    # Ratios are rounded to tokens: on a typical prompt, two ways to spend a budget are often the same schedule.
    tokens = round(problem.profile.mean_vision)
    different: dict[Any, Candidate] = {}
    for one in found:
        kept = tuple((stage.layer, stage.kept(tokens)) for stage in one.stages)
        different.setdefault((kept, one.policy), one)
    return list(different.values())


def predict(table: SensitivityTable, budget: BudgetTarget, stages: Sequence[Stage]) -> float:
    """Predicted answer change of a whole schedule: the sum over layers of `SensitivityTable.layer_loss`."""
    layers = budget.shape.num_layers
    ratios = np.array(processed_ratios(stages, layers))
    loss = table.layer_loss(layers, ratios)
    return float(loss.diagonal().sum())


def _options(
    table: SensitivityTable, budget: BudgetTarget, weights: np.ndarray | None = None
) -> dict[int, tuple[float, tuple[Stage, ...]]]:
    loss = table.layer_loss(budget.shape.num_layers, RATIO_GRID, weights)
    found = allocate(loss, RATIO_GRID, budget, MAX_STAGES)
    if found:
        return found
    # So little is left that no point of the grid fits: the deepest stage that does.
    layer = budget.deepest_layer(table.earliest)
    stages = budget.spend_rest([layer], ()) or (Stage(layer=layer, keep_ratio=0.0),)
    return {1: (predict(table, budget, stages), stages)}


def _worthwhile(options: dict[int, tuple[float, tuple[Stage, ...]]]) -> tuple[Stage, ...]:
    """The smallest number of stages after which one more saves less than `LEAST_GAIN`."""
    chosen = min(options)
    for number in sorted(options):
        least = max(LEAST_GAIN * options[chosen][0], NEGLIGIBLE)
        if options[number][0] < options[chosen][0] - least:
            chosen = number
    return options[chosen][1]


def _resampled(table: SensitivityTable, budget: BudgetTarget) -> tuple[list[tuple[Stage, ...]], Confidence]:
    """Solutions for resampled samples, most frequent first, and how far they agree layer by layer."""
    found = [
        _worthwhile(_options(table, budget, weights))
        for weights in bootstrap_weights(len(table.sample_ids), RESAMPLES, seed=0)
    ]
    ratios = np.array([processed_ratios(stages, budget.shape.num_layers) for stages in found])
    low, high = np.quantile(ratios, [0.05, 0.95], axis=0)
    often = Counter(tuple(stage.layer for stage in stages) for stages in found)
    confidence = Confidence(
        resamples=RESAMPLES,
        level=0.9,
        ratio_low=[round(float(value), 4) for value in low],
        ratio_high=[round(float(value), 4) for value in high],
        layers={",".join(map(str, layers)): count for layers, count in often.most_common(5)},
        variation={
            name: list(_worthwhile(_options(table, budget, weights)))
            for name, weights in _parts(table.sample_ids).items()
        },
    )
    found.sort(key=lambda stages: -often[tuple(stage.layer for stage in stages)])
    return found, confidence


def _parts(sample_ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Weights that select a part of the samples: either half, and all data sets but one."""
    first = np.arange(len(sample_ids)) < len(sample_ids) / 2
    parts = {"first half": first, "second half": ~first}
    # Ids of a mixture begin with the name of their data set.
    sources = np.array([name.rpartition("@")[0] for name in sample_ids])
    if len(set(sources)) > 1:
        parts |= {f"without {source}": sources != source for source in sorted(set(sources))}
    return {name: part.astype(float) for name, part in parts.items() if part.any()}


def _distinct(candidates: Sequence[tuple[Stage, ...]]) -> list[tuple[Stage, ...]]:
    """Up to `MOST_CANDIDATES`, each with other layers than those before it."""
    by_layers: dict[tuple[int, ...], tuple[Stage, ...]] = {}
    for stages in candidates:
        by_layers.setdefault(tuple(stage.layer for stage in stages), stages)
    return list(by_layers.values())[:MOST_CANDIDATES]
