"""Measures whole schedules on the model and chooses among them: candidates, neighbours, policies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pruning_runtime import PruningError, ScheduleError, UnsupportedBackbone
from pruning_runtime.schedule import Stage
from schedule_finder.evidence import Alternative
from schedule_finder.intervals import rounded_mean
from schedule_finder.measuring.answer_change import answer_change
from schedule_finder.measuring.token_policy import TokenPolicy
from schedule_finder.solvers.base import Problem
from schedule_finder.solvers.budget import BudgetTarget
from schedule_finder.solvers.policy_choice import (
    NEGLIGIBLE,
    choose_policy,
    comparable,
    policy_result,
    worse_by,
)

if TYPE_CHECKING:
    from schedule_finder.measuring.answer_kl import AnswerKL

ROUNDS = ((16, 12), (32, 8), (64, 5), (128, 3))
"""Successive halving: samples of a round (whole batches of them), and candidates that it leaves. The last ones are
measured on all samples."""
WORSE = 2.0
"""Standard errors of the paired difference from the best so far, above which a policy is not measured further."""
REFINEMENTS = 2
"""Rounds of trying the best stages' neighbours on the model."""

Stages = tuple[Stage, ...]


@dataclass(frozen=True)
class Candidate:
    """A whole schedule: stages without scorers of their own, and the policy that gives them."""

    stages: Stages
    policy: TokenPolicy


@dataclass
class WholeSchedules:
    """Answer KL of whole schedules, measured as needed; they are compared by answer change.

    Attributes:
        problem: with the budget and the policies that may be chosen.
        answer_kl: measures them.
        earliest: the first layer that a stage may have.
    """

    problem: Problem
    answer_kl: AnswerKL
    earliest: int
    measured: dict[Candidate, np.ndarray] = field(default_factory=dict)
    dropped: dict[Candidate, np.ndarray] = field(default_factory=dict)
    """Of candidates that left the comparison early, on the samples up to there."""

    def choose(self, candidates: Sequence[Candidate]) -> tuple[Candidate, dict[str, Any]]:
        """The best candidate after refinement under the best policy, and the fields of its evidence."""
        self._halve(candidates)
        best = self._refine(self._best())
        changes = {one: answer_change(kl) for one, kl in self.measured.items()}
        simpler = [one for one in changes if len(one.stages) < len(best.stages)]
        simpler = [one for one in simpler if comparable(changes[one], changes[best])]
        best = min(simpler, key=lambda one: (len(one.stages), changes[one].mean()), default=best)
        by_policy, left_early = self._policies_on(best)
        values = {policy: self.measured[one] for policy, one in by_policy.items()}
        controls = [policy for policy in by_policy if policy in self.problem.controls]
        eligible = {policy: answer_change(kl) for policy, kl in values.items()}
        if not self.problem.may_change:
            eligible = {policy: change for policy, change in eligible.items() if policy not in controls}
            controls = []
        policy, reason = choose_policy(eligible, best.policy.used_by(best.stages), controls)
        chosen = by_policy[policy]
        own = self.measured[chosen]
        facts: dict[str, Any] = {
            "measured_change": rounded_mean(answer_change(own)),
            "measured_kl": rounded_mean(own),
            "chosen_on_samples": len(self.answer_kl),
            "measured_schedules": len(self.measured) + len(self.dropped),
            "candidates": [self._evidence(candidate, own) for candidate in candidates],
            "policies": {str(policy): policy_result(kl, own) for policy, kl in (values | left_early).items()},
        }
        if len(eligible) > 1:
            facts["policy_choice"] = reason
        return chosen, facts

    def _halve(self, candidates: Sequence[Candidate]) -> None:
        """Measure all candidates on few samples, fewer and fewer of them on more, and the last ones on all."""
        left = list(candidates)
        for samples, most in ROUNDS:
            found = {one: kl for one in left if (kl := self._measure(one, samples)) is not None}
            ranked = sorted(found, key=lambda one: _loss(found[one]))
            left = ranked[:most]
            self.dropped |= {one: found[one] for one in ranked[most:]}
        for candidate in left:
            self._need(candidate)

    def _measure(self, candidate: Candidate, samples: int | None = None) -> np.ndarray | None:
        """Answer KL ``[samples]``; None where the backbone refuses the policy."""
        try:
            return self.answer_kl.measure(candidate.stages, candidate.policy, samples)
        except (UnsupportedBackbone, ScheduleError, PruningError):
            return None

    def _need(self, candidate: Candidate) -> None:
        if candidate not in self.measured and (values := self._measure(candidate)) is not None:
            self.measured[candidate] = values

    def _need_unless(
        self, candidate: Candidate, best: Candidate, leaves: Callable[[np.ndarray], bool]
    ) -> None:
        """Measure on more and more samples until ``leaves`` says so of the answer change above that of ``best``."""
        # The first round is for a choice among many, not for a comparison of two.
        for samples, _ in ROUNDS[1:]:
            if candidate in self.measured or (kl := self._measure(candidate, samples)) is None:
                return
            if leaves(answer_change(kl) - answer_change(self.measured[best][: len(kl)])):
                self.dropped[candidate] = kl
                return
        self._need(candidate)

    def _best(self) -> Candidate:
        return min(self.measured, key=lambda one: _loss(self.measured[one]))

    def _refine(self, best: Candidate) -> Candidate:
        """Try the neighbours of the best stages under its policy until none is better by more than chance.

        The least of many noisy values is too low, so a neighbour has to be better by more than the tolerance.
        """
        for _ in range(REFINEMENTS):
            before, budget = best, self.problem.budget.under(best.policy)
            own = answer_change(self.measured[best])
            better = {}
            for stages in neighbours(best.stages, budget, self.earliest):
                one = Candidate(stages, best.policy)
                self._need_unless(one, best, lambda worse: worse.mean() > 0)
                if one in self.measured and not comparable(own, change := answer_change(self.measured[one])):
                    better[one] = change.mean()
            best = min(better, key=better.__getitem__, default=best)
            if best == before:
                break
        return best

    def _policies_on(
        self, best: Candidate
    ) -> tuple[dict[TokenPolicy, Candidate], dict[TokenPolicy, np.ndarray]]:
        """Policies on the best stages, with the stages that spend the budget.

        Returns:
            Every policy that may be chosen, measured on all samples; and of the controls that are clearly worse, the
            answer KL on the samples up to there.
        """
        found, left_early = {best.policy.used_by(best.stages): best}, {}
        for policy in (*self.problem.alternatives, *self.problem.controls):
            used = policy.used_by(best.stages)
            stages = respent(best.stages, self.problem.budget.under(policy))
            if used in found or stages is None:
                continue
            candidate = Candidate(stages, used)
            self._need_unless(candidate, best, clearly_worse)
            if candidate in self.measured:
                found[used] = candidate
            elif policy in self.problem.controls and candidate in self.dropped:
                left_early[used] = self.dropped[candidate]
        return found, left_early

    def _evidence(self, candidate: Candidate, chosen: np.ndarray) -> Alternative:
        values = self.measured.get(candidate)
        kl = self.dropped.get(candidate) if values is None else values
        return Alternative(
            stages=list(candidate.stages),
            policy=str(candidate.policy.used_by(candidate.stages)),
            measured_change=None if kl is None else rounded_mean(answer_change(kl)),
            measured_kl=None if kl is None else rounded_mean(kl),
            samples=None if kl is None else len(kl),
            worse_by=None if values is None else worse_by(values, chosen),
        )


def clearly_worse(worse: np.ndarray) -> bool:
    """Whether paired differences ``[samples]`` are above zero by more than `WORSE` standard errors and `NEGLIGIBLE`."""
    return bool(worse.mean() > max(WORSE * worse.std() / len(worse) ** 0.5, NEGLIGIBLE))


def _loss(kl: np.ndarray) -> float:
    """Mean answer change of answer KL ``[samples]``."""
    return float(answer_change(kl).mean())


def respent(stages: Sequence[Stage], budget: BudgetTarget) -> Stages | None:
    """``stages`` with the last ratio moved so that they spend the budget under its policy; None where none can."""
    return budget.spend_rest([stage.layer for stage in stages], [stage.keep_ratio for stage in stages[:-1]])


def neighbours(stages: Sequence[Stage], budget: BudgetTarget, earliest: int) -> list[Stages]:
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
