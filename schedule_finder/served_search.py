"""Step 4c for a serving engine: the best schedule that vLLM can run, and what the restriction costs in changed answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pruning_runtime import Schedule
from pruning_runtime.schedule import BackboneIdentity, BudgetKind, Stage
from pruning_runtime.scorers import make_scorer
from pruning_runtime.vllm.setting import servable_scorers, why_scorer_not_served
from schedule_finder.errors import InputError, OutOfReach
from schedule_finder.evidence import Asked, PolicyResult, Serving, SolverEvidence
from schedule_finder.intervals import rounded_mean
from schedule_finder.measuring.answer_change import answer_change
from schedule_finder.measuring.token_policy import CONTROLS, TokenPolicy
from schedule_finder.search import AUTO, Search
from schedule_finder.solvers import DEFAULT_SOLVER
from schedule_finder.solvers.policy_choice import choose_policy, policy_result, worse_by

if TYPE_CHECKING:
    from schedule_finder.measuring.answer_kl import AnswerKL

ENGINE = "vllm"
Stages = tuple[Stage, ...]


class ServedSearch(Search):
    """Searches what vLLM can run: one stage before the decoder, dropped tokens discarded, scored by the image alone.

    The budget leaves one keep ratio for each scorer. All are measured, and the choice among them is that of other
    solvers (`choose_policy`). The search without the restriction runs too, and its schedule is measured on the same
    samples: the difference is what serving in vLLM costs.
    """

    def solve(
        self,
        budget: float,
        kind: BudgetKind,
        *,
        solver: str = DEFAULT_SOLVER,
        scorer: str = AUTO,
        dropped_tokens: str = AUTO,
    ) -> Schedule:
        """As `Search.solve`; ``solver`` is that of the search without the restriction. Raises `InputError`."""
        names = servable(scorer, dropped_tokens)
        answer_kl = self._choice_answer_kl()
        if answer_kl is None:
            raise InputError(f"--for {ENGINE}: measures on the backbone; run without --no-model")
        measured = self._measured(answer_kl, budget, kind, names)
        values = {policy: found for policy, (_, found) in measured.items()}
        changes = {policy: answer_change(kl) for policy, kl in values.items()}
        controls = [policy for policy in values if policy.scorer in CONTROLS and len(values) > 1]
        preferred = next((policy for policy in values if policy not in controls), next(iter(values)))
        policy, reason = choose_policy(changes, preferred, controls)
        own = values[policy]
        free = super().solve(budget, kind, solver=solver)
        unrestricted = answer_kl.measure(free.stages, _policy_of(free))
        evidence = self._evidence(
            Asked(solver=solver, scorer=scorer, dropped_tokens=dropped_tokens),
            self.detections.default,
            self.detections.of(self.detections.default),
            SolverEvidence(
                solver="one stage before the decoder",
                answer_tokens=self.answer_tokens,
                measured_change=rounded_mean(changes[policy]),
                measured_kl=rounded_mean(own),
                chosen_on_samples=len(answer_kl),
                measured_schedules=len(values),
                policies=_results(values, own),
                policy_choice=reason if len(values) > 1 else None,
            ),
        ).model_copy(update={"serving": _serving(own, unrestricted, free)})
        stages = measured[policy][0]
        return Schedule(
            backbone=BackboneIdentity(**self.profile.meta["backbone"]),
            stages=self._with_counts(stages),
            scorer=policy.choice,
            budget=self.target(budget, kind).under(policy).account(stages),
            evidence=evidence.model_dump(mode="json", exclude_unset=True),
            provenance=self._provenance(),
        )

    def _measured(
        self, answer_kl: AnswerKL, budget: float, kind: BudgetKind, names: list[str]
    ) -> dict[TokenPolicy, tuple[Stages, np.ndarray]]:
        """Stages that spend the budget under each scorer, and their answer KL. Raises `InputError`."""
        found = {}
        for name in names:
            policy = TokenPolicy(name)
            stages = self.target(budget, kind).under(policy).spend_rest([-1], ())
            if stages is not None:
                found[policy] = (stages, answer_kl.measure(stages, policy))
        if not found:
            raise OutOfReach(
                f"--budget {budget:.4g}: no single stage before the decoder costs so little; ask for more"
            )
        return found


def servable(scorer: str, dropped_tokens: str) -> list[str]:
    """The scorers to measure where these were asked for. Raises `InputError` for what vLLM cannot run."""
    if dropped_tokens == "merge":
        raise InputError(f"--dropped-tokens merge: {ENGINE} cannot merge; leave it out with --for {ENGINE}")
    if scorer == AUTO:
        return servable_scorers()
    if (reason := why_scorer_not_served(make_scorer(scorer))) is not None:
        raise InputError(f"--scorer {scorer}: {reason}; choose {', '.join(servable_scorers())}")
    return [scorer]


def _policy_of(schedule: Schedule) -> TokenPolicy:
    """The policy that gives a schedule of the search its scorers."""
    first = next((stage.scorer for stage in schedule.stages if stage.layer < 0), None)
    return TokenPolicy(
        schedule.scorer.name,
        schedule.dropped_tokens,
        schedule.scorer.options.get("seed"),
        None if first is None else first.name,
    )


def _results(values: dict[TokenPolicy, np.ndarray], own: np.ndarray) -> dict[str, PolicyResult]:
    return {str(policy): policy_result(found, own) for policy, found in values.items()}


def _serving(own: np.ndarray, unrestricted: np.ndarray, free: Schedule) -> Serving:
    return Serving(
        engine=ENGINE,
        measured_change=rounded_mean(answer_change(own)),
        unrestricted_change=rounded_mean(answer_change(unrestricted)),
        worse_by=worse_by(own, unrestricted),
        samples=len(own),
        unrestricted_stages=list(free.stages),
        unrestricted_policy=str(_policy_of(free).used_by(free.stages)),
    )
