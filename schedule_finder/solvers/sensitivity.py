"""Spend the budget where the answer changes least: measured on the model, allocated by dynamic programming."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pruning_runtime.costs import processed_ratios
from pruning_runtime.schedule import Stage
from schedule_finder.errors import InputError
from schedule_finder.measuring.answer_kl import TokenPolicy
from schedule_finder.measuring.sensitivity_table import SensitivityTable
from schedule_finder.signals import bootstrap_weights
from schedule_finder.solvers.allocation import allocate
from schedule_finder.solvers.base import BudgetTarget, Problem, Solution, Solver

MAX_STAGES = 4
LEAST_GAIN = 0.05
"""Share of the predicted loss that one stage more must save; every stage costs a scoring pass."""
NEGLIGIBLE = 1e-3
"""Nats: differences below it say nothing about answers."""
RATIO_GRID = np.array(
    [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35, 0.28, 0.22, 0.17, 0.13, 0.1, 0.07, 0.04, 0.02, 0]
)
RESAMPLES = 20
MOST_CANDIDATES = 8
REFINEMENTS = 2
"""Rounds of trying the best stages' neighbours on the model."""


class Sensitivity(Solver):
    """Layer-wise sensitivity, measured as KL divergence of the answer token, and an exact allocation.

    What a stage after layer ``l`` with ratio ``r`` alone does to the answer is measured on a few samples
    (`SensitivityTable`); taken apart into what each layer loses, it adds up to a prediction for any schedule,
    and dynamic programming finds the best within the budget. A stage may stand before the decoder where that was
    measured; the look at layer 0 that scores its tokens is paid from the budget.

    Where the model is at hand, the best of the predicted stages (one choice per number of stages, and those that
    resampled samples lead to) and their neighbours are measured as whole schedules on samples that the table has not
    seen, and the winner's stages with every rule that may be chosen. Of schedules that cannot be told from the best
    the one with the fewest stages wins.

    The measure is that of VTW (arXiv 2405.05803), which looks at dropping everything at one layer only.
    """

    name = "sensitivity"
    needs_sensitivity = True
    measures = True

    def solve(self, problem: Problem) -> Solution:
        """See `Solver.solve`; evidence holds predictions, measurements and confidence."""
        table, budget = problem.sensitivity, problem.budget
        if table is None:
            raise InputError(
                "solver sensitivity: nothing is measured yet; run it where the backbone can be loaded"
            )
        budget.deepest_layer(table.earliest)  # refuses what no stages can meet
        options = _options(table, budget)
        first = _worthwhile(options)
        resampled, bands = _resampled(table, budget)
        evidence: dict[str, Any] = {
            "solver": self.name,
            "objective": "KL divergence of the answer token in nats, mean over samples",
            "measured_samples": len(table.sample_ids),
            "by_number_of_stages": {
                str(number): {"predicted_kl": round(loss, 5), "stages": _plain(stages)}
                for number, (loss, stages) in sorted(options.items())
            },
            "predicted_kl": round(options[len(first)][0], 5),
            "placed_by": "measured sensitivity",
            "confidence": bands,
        }
        if problem.answer_kl is None:
            return Solution(first, table.rule, evidence)
        candidates = _distinct([first, *(stages for _, stages in options.values()), *resampled])
        stages, rule, measured = _measure(problem, candidates, table.rule)
        evidence["predicted_kl"] = round(predict(table, budget, stages), 5)
        return Solution(stages, rule, evidence | measured)


def predict(table: SensitivityTable, budget: BudgetTarget, stages: Sequence[Stage]) -> float:
    """Predicted KL divergence of a whole schedule: what its layers lose, summed."""
    layers = budget.shape.num_layers
    ratios = np.array(processed_ratios(stages, layers))
    loss = table.layer_loss(layers, ratios)
    return float(loss.diagonal().sum())


def _options(
    table: SensitivityTable, budget: BudgetTarget, weights: np.ndarray | None = None
) -> dict[int, tuple[float, tuple[Stage, ...]]]:
    loss = table.layer_loss(budget.shape.num_layers, RATIO_GRID, weights)
    return allocate(loss, RATIO_GRID, budget, MAX_STAGES)


def _worthwhile(options: dict[int, tuple[float, tuple[Stage, ...]]]) -> tuple[Stage, ...]:
    """The fewest stages of which one more would not save enough."""
    chosen = min(options)
    for number in sorted(options):
        least = max(LEAST_GAIN * options[chosen][0], NEGLIGIBLE)
        if options[number][0] < options[chosen][0] - least:
            chosen = number
    return options[chosen][1]


def _resampled(
    table: SensitivityTable, budget: BudgetTarget
) -> tuple[list[tuple[Stage, ...]], dict[str, Any]]:
    """Solutions for resampled samples, most frequent first, and how far they agree layer by layer."""
    found = [
        _worthwhile(_options(table, budget, weights))
        for weights in bootstrap_weights(len(table.sample_ids), RESAMPLES, seed=0)
    ]
    ratios = np.array([processed_ratios(stages, budget.shape.num_layers) for stages in found])
    low, high = np.quantile(ratios, [0.05, 0.95], axis=0)
    often = Counter(tuple(stage.layer for stage in stages) for stages in found)
    bands = {
        "resamples": RESAMPLES,
        "level": 0.9,
        "ratio_low": [round(float(value), 4) for value in low],
        "ratio_high": [round(float(value), 4) for value in high],
        "layers": {",".join(map(str, layers)): count for layers, count in often.most_common(5)},
        "parts": {
            name: _plain(_worthwhile(_options(table, budget, weights)))
            for name, weights in _parts(table.sample_ids).items()
        },
    }
    found.sort(key=lambda stages: -often[tuple(stage.layer for stage in stages)])
    return found, bands


def _parts(sample_ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Weights of the samples that are left, by what is left: either half, and all data sets but one."""
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


def _measure(
    problem: Problem, candidates: Sequence[tuple[Stage, ...]], rule: TokenPolicy
) -> tuple[tuple[Stage, ...], TokenPolicy, dict[str, Any]]:
    """The schedule and the rule with the least measured divergence, and the evidence."""
    answer_kl, table = problem.answer_kl, problem.sensitivity
    assert answer_kl is not None
    assert table is not None
    measured: dict[tuple[Stage, ...], np.ndarray] = {}

    def best_of(some: Sequence[tuple[Stage, ...]]) -> tuple[Stage, ...]:
        for stages in some:
            if stages not in measured:
                measured[stages] = answer_kl.measure(stages, rule)
        return min(measured, key=lambda stages: measured[stages].mean())

    best = best_of(candidates)
    for _ in range(REFINEMENTS):
        before, best = best, best_of(neighbours(best, problem.budget, table.earliest))
        if best == before:
            break
    best = min(
        (stages for stages in measured if _level(measured[stages], measured[best])),
        key=lambda stages: (len(stages), measured[stages].mean()),
    )
    by_rule = {rule: measured[best]}
    by_rule |= {rival: answer_kl.measure(best, rival) for rival in problem.alternatives if rival != rule}
    winner = min(by_rule, key=lambda rival: by_rule[rival].mean())
    if _level(by_rule[rule], by_rule[winner]):
        winner = rule
    weights = bootstrap_weights(len(answer_kl), 1000, seed=0) / len(answer_kl)
    return (
        best,
        winner,
        {
            "measured_kl": round(float(by_rule[winner].mean()), 5),
            "chosen_on_samples": len(answer_kl),
            "measured_schedules": len(measured) + len(by_rule) - 1,
            "candidates": [
                {"stages": _plain(stages), "measured_kl": round(float(measured[stages].mean()), 5)}
                for stages in candidates
            ],
            "rules": {
                str(rival): {
                    "measured_kl": round(float(values.mean()), 5),
                    "worse_by": [
                        round(float(edge), 5)
                        for edge in np.quantile(weights @ (values - by_rule[winner]), [0.025, 0.975])
                    ],
                }
                for rival, values in by_rule.items()
            },
        },
    )


def _level(some: np.ndarray, best: np.ndarray) -> bool:
    """Whether ``some`` cannot be told from the best on the same samples, ``[samples]`` both.

    By the one-standard-error rule, or because the difference is negligible.
    """
    worse = some - best
    return bool(worse.mean() <= max(worse.std() / len(worse) ** 0.5, NEGLIGIBLE))


def neighbours(stages: Sequence[Stage], budget: BudgetTarget, earliest: int) -> list[tuple[Stage, ...]]:
    """Schedules one step away within the same budget, no stage before ``earliest``.

    A layer earlier or later, a ratio a quarter up or down, a stage less.
    """
    layers = [stage.layer for stage in stages]
    ratios = [stage.keep_ratio for stage in stages[:-1]]
    moved = [
        ([*layers[:place], layers[place] + step, *layers[place + 1 :]], ratios)
        for place in range(len(layers))
        for step in (-1, 1)
    ]
    moved += [
        (layers, [*ratios[:place], ratios[place] * factor, *ratios[place + 1 :]])
        for place in range(len(ratios))
        for factor in (0.8, 1.25)
    ]
    found = []
    for some_layers, some_ratios in moved:
        falling = all(a >= b for a, b in itertools.pairwise([1.0, *some_ratios]))
        within = [earliest - 1, *some_layers, budget.shape.num_layers - 1]
        rising = all(a < b for a, b in itertools.pairwise(within))
        spent = budget.spend_rest(some_layers, some_ratios) if falling and rising else None
        if spent is not None:
            found.append(spent)
    # One stage less, its tokens given to the others.
    for place in range(len(layers) - 1, -1, -1):
        fewer = [*layers[:place], *layers[place + 1 :]]
        spent = (
            budget.spend_rest(fewer, [*ratios[:place], *ratios[place + 1 :]][: len(fewer) - 1])
            if fewer
            else None
        )
        if spent is not None:
            found.append(spent)
    return found


def _plain(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    return [stage.model_dump(exclude_none=True) for stage in stages]
