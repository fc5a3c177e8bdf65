"""DOP's idea: divergences that were measured one parameter at a time add up; search coordinate by coordinate."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pruning_runtime.schedule import Stage
from schedule_finder.errors import InputError
from schedule_finder.evidence import Alternative, SolverEvidence
from schedule_finder.intervals import rounded_mean
from schedule_finder.measuring.answer_change import answer_change
from schedule_finder.measuring.sensitivity_table import SensitivityTable
from schedule_finder.solvers.base import Problem, Solution, Solver
from schedule_finder.solvers.budget import BudgetTarget

MOST_STAGES = 3
RATIO_GRID = (0.9, 0.75, 0.6, 0.5, 0.42, 0.35, 0.28, 0.22, 0.17, 0.13, 0.1, 0.07, 0.04, 0.02)
"""Ratios tried at every stage but the last, which spends what the budget leaves."""
STARTS = 3
"""Layers of a stage more from which the search goes on."""

Stages = tuple[Stage, ...]


class Dop(Solver):
    """Least sum of separately measured divergences within the budget, by coordinate descent; a baseline.

    After DOP (arXiv 2507.02909): the output KL of a small set is measured while one parameter varies at a time, the
    divergences are added, and the sum is searched one coordinate at a time under a budget. The public description
    leaves open what follows, which is ours: parameters are the layer and the keep ratio of up to `MOST_STAGES` stages;
    their divergences are those of the sensitivity table, linear between its ratios, without any smoothing; the last
    ratio spends the budget; a stage is added where it does most, and coordinates are tried in turn until none helps.

    Adding whole stages counts twice what two of them damage alike. `sensitivity` adds differences between layers
    instead, and measures whole schedules before it chooses.
    """

    name = "dop"
    needs_sensitivity = True
    before_decoder = True
    measures = True

    def solve(self, problem: Problem) -> Solution:
        """See `Solver.solve`; evidence holds the predicted sum and, with a model, the measured answer KL."""
        table = problem.sensitivity
        if table is None:
            raise InputError("solver dop: nothing is measured yet; run it where the backbone can be loaded")
        additive = _Additive(table, problem.budget.under(table.policy))
        best = additive.descend(additive.single())
        found = {len(best): best}
        for _ in range(MOST_STAGES - 1):
            longer = [additive.descend(stages) for stages in additive.with_one_more(best)]
            if not longer:
                break
            best = min(longer, key=additive.loss)
            found[len(best)] = best
        best = min(found.values(), key=lambda stages: (additive.loss(stages), len(stages)))
        evidence = SolverEvidence(
            solver=self.name,
            source="after DOP, arXiv 2507.02909",
            objective="answer KL in nats of single stages, summed",
            placed_by="coordinate descent",
            measured_samples=len(table.sample_ids),
            predicted_kl=round(additive.loss(best), 5),
            by_number_of_stages={
                str(number): Alternative(stages=list(stages), predicted_kl=round(additive.loss(stages), 5))
                for number, stages in found.items()
            },
        )
        policy = table.policy.used_by(best)
        if problem.answer_kl is not None:
            measured = problem.answer_kl.measure(best, policy)
            facts = {
                "measured_change": rounded_mean(answer_change(measured)),
                "measured_kl": rounded_mean(measured),
                "chosen_on_samples": len(measured),
                "measured_schedules": 1,
            }
            evidence = evidence.model_copy(update=facts)
        return Solution(best, policy, evidence)


@dataclass(frozen=True)
class _Additive:
    """The sum of the divergences of single stages, and moves that spend the budget."""

    table: SensitivityTable
    budget: BudgetTarget

    def loss(self, stages: Stages) -> float:
        """The divergences of all stages, each as if it were the only one, in nats."""
        ratios = (1.0, *self.table.ratios)[::-1]
        mean = self.table.kl.mean(2)
        total = 0.0
        for stage in stages:
            row = mean[self.table.layers.index(stage.layer)]
            total += float(np.interp(stage.keep_ratio, ratios, (0.0, *row)[::-1]))
        return total

    @property
    def layers(self) -> list[int]:
        """Measured layers at which a stage can be."""
        return [
            layer for layer in self.budget.stage_layers(self.table.earliest) if layer in self.table.layers
        ]

    def single(self) -> Stages:
        """The best single stage. Raises `InputError` where the budget is out of reach."""
        self.budget.deepest_layer(self.table.earliest)
        found = [stages for layer in self.layers if (stages := self.budget.spend_rest([layer], ()))]
        if not found:
            raise InputError(
                f"solver dop: no single stage at a measured layer spends a budget of {self.budget.target:.3g}; "
                "ask for more"
            )
        return min(found, key=self.loss)

    def with_one_more(self, stages: Stages) -> list[Stages]:
        """A stage more at the layers where it does most, `STARTS` of them; the other ratios stay."""
        taken = [stage.layer for stage in stages]
        given = [stage.keep_ratio for stage in stages[:-1]]
        found = []
        for layer in self.layers:
            if layer not in taken:
                # Behind all others, the new stage spends the budget, and the ratio is that of the stage before it.
                place = min(sum(one < layer for one in taken), len(given))
                ratios = [[*given[:place], ratio, *given[place:]] for ratio in RATIO_GRID]
                tried = list(self._spent(sorted((*taken, layer)), ratios))
                found += [min(tried, key=self.loss)] if tried else []
        return sorted(found, key=self.loss)[:STARTS]

    def descend(self, stages: Stages) -> Stages:
        """Change one layer or one ratio at a time, as long as the sum falls."""
        while True:
            best = min((stages, *self._neighbours(stages)), key=self.loss)
            if self.loss(best) >= self.loss(stages):
                return stages
            stages = best

    def _neighbours(self, stages: Stages) -> Iterator[Stages]:
        layers = [stage.layer for stage in stages]
        ratios = [stage.keep_ratio for stage in stages[:-1]]
        for place in range(len(layers)):
            others = ([*layers[:place], layer, *layers[place + 1 :]] for layer in self.layers)
            for other in others:
                if sorted(set(other)) == other:
                    yield from self._spent(other, [ratios])
        for place in range(len(ratios)):
            changed = [[*ratios[:place], ratio, *ratios[place + 1 :]] for ratio in RATIO_GRID]
            yield from self._spent(layers, changed)

    def _spent(self, layers: Sequence[int], ratios: Iterable[Sequence[float]]) -> Iterator[Stages]:
        """Stages at ``layers`` for each choice of ratios that falls and lets the last one spend the budget."""
        for given in ratios:
            falling = all(first > second for first, second in itertools.pairwise((1.0, *given)))
            stages = self.budget.spend_rest(layers, given) if falling else None
            if stages is not None:
                yield stages
