"""Stages of least predicted answer KL: measured on the model, allocated by dynamic programming."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pruning_runtime.costs import processed_ratios
from pruning_runtime.schedule import Stage
from schedule_finder.errors import InputError
from schedule_finder.evidence import Alternative, Confidence, PolicyChoice, PolicyResult, SolverEvidence
from schedule_finder.intervals import bootstrap_weights, mean_interval
from schedule_finder.measuring.sensitivity_table import SensitivityTable
from schedule_finder.measuring.token_policy import TokenPolicy
from schedule_finder.solvers.allocation import allocate
from schedule_finder.solvers.base import Problem, Solution, Solver
from schedule_finder.solvers.budget import BudgetTarget

if TYPE_CHECKING:
    from schedule_finder.measuring.answer_kl import AnswerKL

MAX_STAGES = 4
LEAST_GAIN = 0.05
"""Share of the predicted answer KL that one more stage must save; every stage costs a scoring pass."""
NEGLIGIBLE = 1e-3
"""Nats: smaller differences do not change answers."""
RATIO_GRID = np.array(
    [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35, 0.28, 0.22, 0.17, 0.13, 0.1, 0.07, 0.04, 0.02, 0]
)
RESAMPLES = 20
MOST_CANDIDATES = 8
REFINEMENTS = 2
"""Rounds of trying the best stages' neighbours on the model."""


class Sensitivity(Solver):
    """Layer-wise sensitivity, measured as answer KL, and an exact allocation.

    The answer KL of every single stage (layer, keep ratio) is measured on a few samples (`SensitivityTable`). Its
    differences between layers add up to a prediction for any schedule, and dynamic programming finds the best
    schedule within the budget. The first stage may be before the decoder where that was measured; the budget then
    pays for scoring with layer 0.

    With a model, the best predicted stages (one choice per number of stages, and those that resampled samples lead
    to) and their neighbours are measured as whole schedules on other samples, and the best stages with every policy
    that may be chosen (`choose_policy`). Among schedules that do not differ significantly from the best, the one
    with the fewest stages is chosen.

    The measure is that of VTW (arXiv 2405.05803), which drops everything at one layer only. The nearest prior art is
    DOP (arXiv 2507.02909), which also adds up output KL that was measured one parameter at a time.
    """

    name = "sensitivity"
    needs_sensitivity = True
    before_decoder = True
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
        resampled, confidence = _resampled(table, budget)
        evidence = SolverEvidence(
            solver=self.name,
            objective="answer KL in nats, mean over samples",
            measured_samples=len(table.sample_ids),
            by_number_of_stages={
                str(number): Alternative(stages=list(stages), predicted_kl=round(loss, 5))
                for number, (loss, stages) in sorted(options.items())
            },
            predicted_kl=round(options[len(first)][0], 5),
            placed_by="measured sensitivity",
            confidence=confidence,
        )
        if problem.answer_kl is None:
            return Solution(first, table.policy, evidence)
        candidates = _distinct([first, *(stages for _, stages in options.values()), *resampled])
        return _measure(problem, problem.answer_kl, table, candidates, evidence)


def predict(table: SensitivityTable, budget: BudgetTarget, stages: Sequence[Stage]) -> float:
    """Predicted answer KL of a whole schedule in nats: the sum over layers of `SensitivityTable.layer_loss`."""
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


def _measure(
    problem: Problem,
    answer_kl: AnswerKL,
    table: SensitivityTable,
    candidates: Sequence[tuple[Stage, ...]],
    evidence: SolverEvidence,
) -> Solution:
    """The stages and the policy with the least measured answer KL."""
    measured: dict[tuple[Stage, ...], np.ndarray] = {}

    def best_of(some: Sequence[tuple[Stage, ...]]) -> tuple[Stage, ...]:
        for stages in some:
            if stages not in measured:
                measured[stages] = answer_kl.measure(stages, table.policy)
        return min(measured, key=lambda stages: measured[stages].mean())

    best = best_of(candidates)
    for _ in range(REFINEMENTS):
        before, best = best, best_of(neighbours(best, problem.budget, table.earliest))
        if best == before:
            break
    best = min(
        (stages for stages in measured if _comparable(measured[stages], measured[best])),
        key=lambda stages: (len(stages), measured[stages].mean()),
    )
    by_policy = {table.policy: measured[best]}
    by_policy |= {
        other: answer_kl.measure(best, other) for other in problem.alternatives if other != table.policy
    }
    chosen, reason = choose_policy(by_policy, table.policy)
    facts: dict[str, Any] = {
        "predicted_kl": round(predict(table, problem.budget, best), 5),
        "measured_kl": _rounded_mean(by_policy[chosen]),
        "chosen_on_samples": len(answer_kl),
        "measured_schedules": len(measured) + len(by_policy) - 1,
        "candidates": [
            Alternative(stages=list(stages), measured_kl=_rounded_mean(measured[stages]))
            for stages in candidates
        ],
        "policies": {
            str(policy): _policy_result(values, by_policy[chosen]) for policy, values in by_policy.items()
        },
    }
    if len(by_policy) > 1:
        facts["policy_choice"] = reason
    return Solution(best, chosen, evidence.model_copy(update=facts))


def choose_policy(
    measured: Mapping[TokenPolicy, np.ndarray], preferred: TokenPolicy
) -> tuple[TokenPolicy, PolicyChoice]:
    """The policy to use, and why.

    A policy whose advantage over the preferred one has a 95 % interval that excludes zero is chosen, the best of
    several. Otherwise the preferred one is kept if it is comparable with the best, and the best is chosen if not.

    Args:
        measured: answer KL in nats of each policy, ``[samples]``, on the same samples.
        preferred: one of the keys.
    """
    own = measured[preferred]
    best = min(measured, key=lambda policy: measured[policy].mean())
    several = len(own) > 1  # one sample has no interval
    better = [policy for policy, values in measured.items() if several and mean_interval(own - values)[0] > 0]
    rule: Literal[
        "preferred is best", "preferred within tolerance", "significantly better", "beyond tolerance"
    ]
    if better:
        chosen, rule = min(better, key=lambda policy: measured[policy].mean()), "significantly better"
    elif _comparable(own, measured[best]):
        chosen = preferred
        rule = "preferred within tolerance" if own.mean() > measured[best].mean() else "preferred is best"
    else:
        chosen, rule = best, "beyond tolerance"
    compared = best if chosen == preferred else chosen
    low, high = mean_interval(own - measured[compared])
    return chosen, PolicyChoice(
        preferred=str(preferred),
        best=str(preferred if rule == "preferred is best" else best),
        chosen=str(chosen),
        rule=rule,
        compared=str(preferred if rule == "preferred is best" else compared),
        difference=round(float((own - measured[compared]).mean()), 5),
        interval=(round(low, 5), round(high, 5)),
        tolerance=round(_tolerance(own - measured[compared]), 5),
        samples=len(own),
    )


def _policy_result(values: np.ndarray, chosen: np.ndarray) -> PolicyResult:
    low, high = mean_interval(values - chosen)
    return PolicyResult(measured_kl=_rounded_mean(values), worse_by=(round(low, 5), round(high, 5)))


def _rounded_mean(values: np.ndarray) -> float:
    return round(float(values.mean()), 5)


def _comparable(some: np.ndarray, best: np.ndarray) -> bool:
    """Whether the mean of ``some`` is within one standard error of the best, or within `NEGLIGIBLE`.

    Both are ``[samples]``, on the same samples.
    """
    worse = some - best
    return bool(worse.mean() <= _tolerance(worse))


def _tolerance(differences: np.ndarray) -> float:
    """One standard error of the mean difference, or `NEGLIGIBLE` where that is more, in nats."""
    return max(float(differences.std()) / len(differences) ** 0.5, NEGLIGIBLE)


def neighbours(stages: Sequence[Stage], budget: BudgetTarget, earliest: int) -> list[tuple[Stage, ...]]:
    """Schedules one step away within the same budget, no stage before ``earliest``.

    One layer earlier or later, one ratio a quarter higher or a fifth lower, or one stage less.
    """
    layers = [stage.layer for stage in stages]
    ratios = [stage.keep_ratio for stage in stages[:-1]]
    moved = [
        ([*layers[:index], layers[index] + step, *layers[index + 1 :]], ratios)
        for index in range(len(layers))
        for step in (-1, 1)
    ]
    moved += [
        (layers, [*ratios[:index], ratios[index] * factor, *ratios[index + 1 :]])
        for index in range(len(ratios))
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
    for index in range(len(layers) - 1, -1, -1):
        fewer = [*layers[:index], *layers[index + 1 :]]
        if fewer:
            left = [*ratios[:index], *ratios[index + 1 :]][: len(fewer) - 1]
            spent = budget.spend_rest(fewer, left)
            if spent is not None:
                found.append(spent)
    return found
