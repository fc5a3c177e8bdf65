"""Which token policy is chosen: planted answer KL, with known differences."""

from __future__ import annotations

import numpy as np

from schedule_finder.measuring.answer_kl import TokenPolicy
from schedule_finder.solvers.policy_choice import NEGLIGIBLE, choose_policy

PREFERRED, OTHER, THIRD = TokenPolicy("text_guided"), TokenPolicy("last_token"), TokenPolicy("uniform_text")
SAMPLES = 64
BASE = np.random.default_rng(0).exponential(0.2, SAMPLES) + 1
ALTERNATING = np.where(np.arange(SAMPLES) % 2, 1.0, -1.0)


def test_a_policy_that_is_better_with_an_interval_that_excludes_zero_is_chosen_however_small_the_difference() -> (
    None
):
    for advantage in (0.1, NEGLIGIBLE / 2):
        chosen, why = choose_policy({PREFERRED: BASE, OTHER: BASE - advantage}, PREFERRED)
        assert chosen == OTHER
        assert why.rule == "significantly better"
        assert why.interval[0] > 0
        assert (why.preferred, why.best, why.chosen) == ("text_guided", "last_token", "last_token")
    assert why.difference < why.tolerance


def test_the_preferred_policy_is_kept_within_the_tolerance_and_the_evidence_says_so() -> None:
    noisy = BASE - 0.001 + 0.5 * ALTERNATING
    chosen, why = choose_policy({PREFERRED: BASE, OTHER: noisy}, PREFERRED)
    assert chosen == PREFERRED
    assert why.rule == "preferred within tolerance"
    assert (why.best, why.chosen, why.compared) == ("last_token", "text_guided", "last_token")
    assert 0 < why.difference <= why.tolerance
    assert why.interval[0] < 0 < why.interval[1]


def test_the_best_is_chosen_beyond_the_tolerance() -> None:
    noise = 0.5 * ALTERNATING  # one standard error is 0.0625
    chosen, why = choose_policy({PREFERRED: BASE, OTHER: BASE - 0.09 + noise}, PREFERRED)
    assert (chosen, why.rule) == (OTHER, "beyond tolerance")
    assert why.tolerance < why.difference
    assert why.interval[0] < 0


def test_of_several_the_significant_one_is_chosen() -> None:
    """The policy of least KL varies too much between samples to differ significantly from the preferred one."""
    measured = {PREFERRED: BASE, OTHER: BASE - 0.06 + 0.5 * ALTERNATING, THIRD: BASE - 0.05}
    chosen, why = choose_policy(measured, PREFERRED)
    assert (chosen, why.rule, why.best) == (THIRD, "significantly better", "last_token")


def test_a_preferred_policy_of_least_kl_needs_no_tolerance() -> None:
    chosen, why = choose_policy({PREFERRED: BASE, OTHER: BASE + 0.1}, PREFERRED)
    assert (chosen, why.rule, why.best) == (PREFERRED, "preferred is best", "text_guided")


def test_one_sample_has_no_interval() -> None:
    chosen, why = choose_policy({PREFERRED: np.array([1.0]), OTHER: np.array([0.9999])}, PREFERRED)
    assert (chosen, why.rule) == (PREFERRED, "preferred within tolerance")
