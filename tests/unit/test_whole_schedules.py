"""Search over rules with a planted answer KL: the best rule wins, controls win where they are not worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pruning_runtime import ScheduleError
from pruning_runtime.costs import processed_ratios
from pruning_runtime.schedule import Stage
from schedule_finder.evidence import RuleProbe, RuleResult
from schedule_finder.measuring.answer_change import answer_change
from schedule_finder.measuring.rule_probe import FINALISTS, applicable_scorers, probe_rules
from schedule_finder.measuring.token_policy import CONTROLS, TokenPolicy
from schedule_finder.search import _alternatives
from schedule_finder.solvers import SOLVERS, Problem, Solution
from schedule_finder.solvers.sensitivity import _candidates
from schedule_finder.solvers.whole_schedules import ROUNDS, Candidate, WholeSchedules
from tests.support.planted_tables import LAYERS, POLICY, table_from, target_of
from tests.support.solver_profiles import random_profile

SAMPLES = 192
Rule = Callable[[Stage, TokenPolicy], float]


class PlantedKL:
    """Answer KL in which every stage loses ``factor(stage, policy)`` times the tokens that it drops.

    Each sample's KL is the mean times a factor of its own, so that paired differences have a sign.
    """

    def __init__(self, factor: Rule, samples: int = SAMPLES) -> None:
        self.factor, self.samples = factor, samples
        self.calls: list[tuple[tuple[Stage, ...], TokenPolicy, int]] = []
        self.spread = np.random.default_rng(0).uniform(0.9, 1.1, samples)

    def __len__(self) -> int:
        return self.samples

    def measure(self, stages: Sequence[Stage], policy: TokenPolicy, samples: int | None = None) -> np.ndarray:
        count = min(samples or self.samples, self.samples)
        self.calls.append((tuple(stages), policy, count))
        before, loss = 1.0, 0.0
        for stage in stages:
            loss += self.factor(stage, policy) * (before - stage.keep_ratio)
            before = stage.keep_ratio
        return (loss * self.spread[:count]).astype(np.float32)


def scorer_at(stage: Stage, policy: TokenPolicy) -> str:
    return policy.before_decoder if stage.layer == -1 else policy.scorer


def solve(planted: PlantedKL, **changes: Any) -> Solution:
    table = table_from(np.full(LAYERS, 0.5), earliest=-1)
    alternatives = [replace(POLICY, pre_decoder="divprune"), replace(POLICY, scorer="uniform_text")]
    problem = Problem(
        random_profile(LAYERS, 0),
        (),
        target_of(0.4),
        POLICY,
        sensitivity=table,
        answer_kl=planted,  # type: ignore[arg-type]
        alternatives=alternatives,
        controls=[TokenPolicy(name) for name in CONTROLS],
    )
    return SOLVERS["sensitivity"]().solve(replace(problem, **changes))


def test_a_better_rule_before_the_decoder_is_found_although_the_table_was_measured_with_another() -> None:
    def factor(stage: Stage, policy: TokenPolicy) -> float:
        return 0.01 if scorer_at(stage, policy) == "divprune" else 1.0

    solution = solve(PlantedKL(factor))
    assert solution.policy.scorer == "divprune" or solution.policy.pre_decoder == "divprune"
    assert [stage.layer for stage in solution.stages] == [-1]
    budget = target_of(0.4).under(solution.policy)
    assert budget.cost(solution.stages) == pytest.approx(0.4, abs=1e-6)


def test_a_rule_before_the_decoder_is_combined_with_one_inside_it() -> None:
    """DivPrune loses nothing down to a fifth of the tokens, text_guided nothing inside the decoder, others all."""

    class Combined(PlantedKL):
        def measure(
            self, stages: Sequence[Stage], policy: TokenPolicy, samples: int | None = None
        ) -> np.ndarray:
            count = min(samples or self.samples, self.samples)
            good = {("divprune", True), ("text_guided", False)}
            lost = sum(
                (scorer_at(stage, policy), stage.layer == -1) not in good
                or (stage.layer == -1 and stage.keep_ratio < 0.2)
                for stage in stages
            )
            return (lost * self.spread[:count]).astype(np.float32)

    need = np.array([0.5] * 3 + [0.0] * 7)
    solution = solve(
        Combined(lambda _stage, _policy: 0.0),
        budget=target_of(0.08),
        sensitivity=replace(table_from(need, earliest=-1), policy=replace(POLICY, pre_decoder="divprune")),
    )
    assert solution.policy.pre_decoder == "divprune"
    assert solution.policy.scorer == "text_guided"
    assert solution.stages[0].layer == -1
    assert len(solution.stages) > 1
    assert solution.evidence.measured_kl == 0


def test_tokens_that_leave_twice_are_tried_with_every_rule() -> None:
    """Layers 0 to 5 lose with the square of what they miss, so an even share is best; random tokens lose least."""

    class TwoParts(PlantedKL):
        def measure(
            self, stages: Sequence[Stage], policy: TokenPolicy, samples: int | None = None
        ) -> np.ndarray:
            count = min(samples or self.samples, self.samples)
            ratios = np.array(processed_ratios(stages, LAYERS))[:6]
            rule = 0.5 if {scorer_at(stage, policy) for stage in stages} == {"random"} else 1.0
            return (rule * ((1 - ratios) ** 2).mean() * self.spread[:count]).astype(np.float32)

    need = np.array([3.0] * 6 + [0.0] * 4)
    solution = solve(TwoParts(lambda _stage, _policy: 0.0), sensitivity=table_from(need, earliest=-1))
    assert solution.policy == TokenPolicy("random")
    assert [stage.layer for stage in solution.stages] == [-1, 5]
    assert solution.stages[-1].keep_ratio == 0


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_that_is_not_worse_is_chosen_and_the_evidence_says_so(control: str) -> None:
    def factor(stage: Stage, policy: TokenPolicy) -> float:
        return 0.999 if scorer_at(stage, policy) == control else 1.0

    solution = solve(PlantedKL(factor))
    assert solution.policy == TokenPolicy(control)
    assert solution.evidence.policy_choice is not None
    assert solution.evidence.policy_choice.chosen == control


def test_a_scorer_that_the_user_asked_for_stays_but_the_control_is_reported() -> None:
    def factor(stage: Stage, policy: TokenPolicy) -> float:
        return 0.1 if scorer_at(stage, policy) == "strided" else 1.0

    solution = solve(PlantedKL(factor), alternatives=[], may_change=False)
    assert solution.policy.scorer == "text_guided"
    worse_by = solution.evidence.policies["strided"].worse_by
    assert worse_by[1] < 0


def test_a_control_that_is_clearly_worse_leaves_early_and_the_evidence_says_on_how_many_samples() -> None:
    factors = {"strided": 3.0, "random": 1.0001}
    planted = PlantedKL(lambda stage, policy: factors.get(scorer_at(stage, policy), 1.0))
    solution = solve(planted)
    own = answer_change(planted.measure(solution.stages, solution.policy))
    for name in CONTROLS:
        result = solution.evidence.policies[name]
        count = ROUNDS[1][0] if name == "strided" else SAMPLES
        on_control = [samples for _, policy, samples in planted.calls if policy == TokenPolicy(name)]
        assert result.samples == max(on_control) == count
        worse = answer_change(planted.measure(solution.stages, TokenPolicy(name), count)) - own[:count]
        assert result.worse_by[0] <= worse.mean() + 1e-5
        assert result.worse_by[1] >= worse.mean() - 1e-5
    assert solution.evidence.policies["strided"].worse_by[0] > 0


def test_the_best_of_all_that_was_measured_is_never_left_for_something_worse() -> None:
    rng = np.random.default_rng(3)
    names = ("text_guided", "uniform_text", "divprune", *CONTROLS)
    factors = {(name, layer): rng.uniform(0.1, 1) for name in names for layer in range(-1, LAYERS)}
    planted = PlantedKL(lambda stage, policy: factors[scorer_at(stage, policy), stage.layer])
    solution = solve(planted)
    own = planted.measure(solution.stages, solution.policy).mean()
    for name in CONTROLS:
        same_stages = planted.measure(solution.stages, TokenPolicy(name)).mean()
        assert own <= same_stages + 1e-3


def test_only_the_best_candidates_are_measured_on_all_samples() -> None:
    planted = PlantedKL(lambda stage, policy: 1.0 + stage.layer / 100)
    solution = solve(planted)
    first = {(stages, policy) for stages, policy, count in planted.calls if count == ROUNDS[0][0]}
    last = {(stages, policy) for stages, policy, count in planted.calls if count == SAMPLES}
    assert len(first - last) > 0
    few = [one for one in solution.evidence.candidates if one.samples == ROUNDS[0][0]]
    assert all(one.worse_by is None for one in few)
    assert all(one.worse_by is not None for one in solution.evidence.candidates if one.samples == SAMPLES)


def test_no_candidate_keeps_the_same_tokens_as_another_one_by_the_same_rule() -> None:
    """Ways to spend a budget differ in the fourth digit of a ratio and keep the same tokens."""
    table = table_from(np.full(LAYERS, 0.5), earliest=-1)
    profile = random_profile(LAYERS, 0)
    problem = Problem(profile, [], target_of(0.3), POLICY, sensitivity=table)
    tokens = round(profile.mean_vision)
    stage = Stage(layer=3, keep_ratio=5 / tokens)
    near, other = Stage(layer=3, keep_ratio=5.01 / tokens), Stage(layer=3, keep_ratio=6 / tokens)
    found = [one.stages for one in _candidates(problem, table, [(stage,), (near,), (other,)])]
    assert found[:2] == [(stage,), (other,)]
    assert (near,) not in found


# ---- the comparison of rules on single stages


class Refusing(PlantedKL):
    def measure(self, stages: Sequence[Stage], policy: TokenPolicy, samples: int | None = None) -> np.ndarray:
        if policy.scorer == "mmtok":
            raise ScheduleError("no text")
        return super().measure(stages, policy, samples)


def test_every_rule_is_compared_and_the_best_and_the_controls_on_all_samples() -> None:
    order = {name: rank for rank, name in enumerate(sorted(applicable_scorers(0)))}
    planted = Refusing(lambda stage, policy: 1.0 + order[scorer_at(stage, policy)], samples=32)
    probe = probe_rules(planted, [-1, *range(LAYERS - 1)], ("discard",))  # type: ignore[arg-type]
    assert probe.refused["mmtok"] == "no text"
    for place, layer in (("pre_decoder", -1), ("decoder", 0)):
        usable = [name for name in sorted(applicable_scorers(layer)) if name != "mmtok"]
        assert {one.scorer for one in probe.results if one.place == place} == set(usable)
        ranked = [one.scorer for one in probe.ranked(place)]
        assert ranked[:FINALISTS] == usable[:FINALISTS]
        assert set(ranked) >= set(CONTROLS)
    assert "dart" in applicable_scorers(0)
    assert "dart" not in applicable_scorers(-1)


def test_the_comparison_survives_its_file(tmp_path: Path) -> None:
    result = RuleResult(place="decoder", scorer="dart", kl=0.25, samples=32)
    RuleProbe(samples=32, results=[result], refused={"mmtok": "no text"}).save(tmp_path / "rules.json")
    again = RuleProbe.load(tmp_path / "rules.json")
    assert again is not None
    assert again.results == [result]
    assert again.refused == {"mmtok": "no text"}


def test_alternatives_differ_from_the_policy_in_one_choice() -> None:
    policy = TokenPolicy("text_guided", "merge", pre_decoder="divprune")
    results = [
        RuleResult(place=place, scorer=scorer, kl=1.0, samples=32)
        for place, scorer in (
            ("decoder", "text_guided"),
            ("decoder", "last_token"),
            ("pre_decoder", "divprune"),
            ("pre_decoder", "strided"),
        )
    ]
    found = _alternatives(policy, "auto", "auto", RuleProbe(samples=32, results=results), [])
    assert found == [
        TokenPolicy("last_token", "merge", pre_decoder="divprune"),
        TokenPolicy("text_guided", "merge", pre_decoder="strided"),
        TokenPolicy("text_guided", "discard", pre_decoder="divprune"),
    ]
    assert _alternatives(policy, "text_guided", "merge", None, ["text_guided"]) == []


def test_a_stage_that_keeps_nothing_needs_no_scorer() -> None:
    """Or schedules that do the same would be measured under several names."""
    twice = (Stage(layer=-1, keep_ratio=0.3), Stage(layer=5, keep_ratio=0.0))
    policy = TokenPolicy("text_guided", "merge", pre_decoder="divprune")
    assert policy.used_by(twice) == TokenPolicy("divprune", "merge")
    assert policy.used_by(twice[1:]) == TokenPolicy("text_guided", "merge")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((-1,), TokenPolicy("divprune", "merge")),
        ((3,), TokenPolicy("text_guided", "merge")),
        ((-1, 3), TokenPolicy("text_guided", "merge", pre_decoder="divprune")),
    ],
)
def test_a_policy_is_told_by_what_its_stages_use(layers: tuple[int, ...], expected: TokenPolicy) -> None:
    stages = [Stage(layer=layer, keep_ratio=0.5 / (index + 1)) for index, layer in enumerate(layers)]
    policy = TokenPolicy("text_guided", "merge", pre_decoder="divprune")
    assert policy.used_by(stages) == expected
    once = policy.apply(stages)
    assert policy.apply(once) == once
    own = [None if stage.scorer is None else stage.scorer.name for stage in once]
    assert own == ["divprune" if layer == -1 else None for layer in layers]


@pytest.mark.parametrize("better_by", [0.004, 0.05])
def test_a_neighbour_is_taken_only_if_it_is_better_by_more_than_chance(better_by: float) -> None:
    """Schedules at even layers change other answers than those at odd ones; one layer changes fewer on average.

    One standard error of the difference is .0072.
    """

    class Noisy(PlantedKL):
        def measure(
            self, stages: Sequence[Stage], policy: TokenPolicy, samples: int | None = None
        ) -> np.ndarray:
            count = min(samples or self.samples, self.samples)
            layers = [stage.layer for stage in stages]
            change = 0.2 + 0.05 * (-1.0) ** (sum(layers) % 2 + np.arange(self.samples))
            if layers == [2]:
                change -= better_by
            return -np.log1p(-change[:count])

    planted = Noisy(lambda _stage, _policy: 0.0)
    schedules = WholeSchedules(
        Problem(random_profile(LAYERS, 0), (), target_of(0.4), POLICY),
        planted,  # type: ignore[arg-type]
        earliest=0,
    )
    first = Candidate(target_of(0.4).spend_rest([3], ()) or (), POLICY)
    best, _ = schedules.choose([first])
    assert [stage.layer for stage in best.stages] == ([2] if better_by > 0.01 else [3])


def test_one_answer_that_is_lost_by_far_does_not_decide() -> None:
    """Half of the answers lost by 3 nats are worse than one that is lost by 200, although its KL has the higher mean."""

    class Outlier(PlantedKL):
        def measure(
            self, stages: Sequence[Stage], policy: TokenPolicy, samples: int | None = None
        ) -> np.ndarray:
            count = min(samples or self.samples, self.samples)
            scorers = {scorer_at(stage, policy) for stage in stages}
            if scorers == {"divprune"}:
                return np.where(np.arange(count) == 40, 200.0, 0.0)
            return np.where(np.arange(count) % 2, 3.0, 0.0)

    solution = solve(Outlier(lambda _stage, _policy: 0.0))
    assert solution.policy.used_by(solution.stages) == TokenPolicy("divprune", "merge")
    assert solution.evidence.measured_change == pytest.approx(1 / SAMPLES, abs=1e-5)
    assert solution.evidence.measured_kl == pytest.approx(200 / SAMPLES, abs=1e-5)
