"""Which token policy a schedule uses, among those that were measured on its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from schedule_finder.evidence import PolicyChoice, PolicyResult
from schedule_finder.intervals import mean_interval, rounded_mean
from schedule_finder.measuring.answer_change import answer_change
from schedule_finder.measuring.token_policy import TokenPolicy

NEGLIGIBLE = 1e-3
"""Share of answers: smaller differences are not worth a scorer or a stage."""

Rule = Literal[
    "preferred is best",
    "preferred within tolerance",
    "significantly better",
    "beyond tolerance",
    "control is not worse",
]


def choose_policy(
    measured: Mapping[TokenPolicy, np.ndarray], preferred: TokenPolicy, controls: Sequence[TokenPolicy] = ()
) -> tuple[TokenPolicy, PolicyChoice]:
    """The policy to use, and why.

    A policy whose advantage over the preferred one has a 95 % interval that excludes zero is chosen, the best of
    several. Otherwise the preferred one is kept if it is comparable with the best, and the best is chosen if not. A
    control that changes no more answers than that choice takes its place: it costs nothing and reads nothing.

    Args:
        measured: answer change of each policy, ``[samples]``, on the same samples.
        preferred: one of the keys.
        controls: keys that stand for rules without any scoring.
    """
    own = measured[preferred]
    best = min(measured, key=lambda policy: measured[policy].mean())
    several = len(own) > 1  # one sample has no interval
    better = [policy for policy, values in measured.items() if several and mean_interval(own - values)[0] > 0]
    rule: Rule
    if better:
        chosen, rule = min(better, key=lambda policy: measured[policy].mean()), "significantly better"
    elif comparable(own, measured[best]):
        chosen = preferred
        rule = "preferred within tolerance" if own.mean() > measured[best].mean() else "preferred is best"
    else:
        chosen, rule = best, "beyond tolerance"
    as_good = [policy for policy in controls if measured[policy].mean() <= measured[chosen].mean()]
    if as_good and chosen not in controls:
        chosen = min(as_good, key=lambda policy: measured[policy].mean())
        rule = "control is not worse"
    return chosen, _explained(measured, preferred, best, chosen, rule)


def _explained(
    measured: Mapping[TokenPolicy, np.ndarray],
    preferred: TokenPolicy,
    best: TokenPolicy,
    chosen: TokenPolicy,
    rule: Rule,
) -> PolicyChoice:
    own = measured[preferred]
    compared = best if chosen == preferred else chosen
    low, high = mean_interval(own - measured[compared])
    return PolicyChoice(
        preferred=str(preferred),
        best=str(preferred if rule == "preferred is best" else best),
        chosen=str(chosen),
        rule=rule,
        compared=str(preferred if rule == "preferred is best" else compared),
        difference=round(float((own - measured[compared]).mean()), 5),
        interval=(round(low, 5), round(high, 5)),
        tolerance=round(tolerance(own - measured[compared]), 5),
        samples=len(own),
        measure="answer change",
    )


def policy_result(kl: np.ndarray, chosen: np.ndarray) -> PolicyResult:
    """What a policy changes, and how much more than the chosen one; both answer KL, ``[samples]``.

    A policy that was measured on the first samples only is compared on those.
    """
    change = answer_change(kl)
    return PolicyResult(
        measured_kl=rounded_mean(kl),
        measured_change=rounded_mean(change),
        worse_by=worse_by(kl, chosen[: len(kl)]),
        samples=len(kl),
    )


def worse_by(kl: np.ndarray, chosen: np.ndarray) -> tuple[float, float]:
    """95 % interval of the answer change less that of ``chosen``; both answer KL, ``[samples]``."""
    low, high = mean_interval(answer_change(kl) - answer_change(chosen))
    return round(low, 5), round(high, 5)


def comparable(some: np.ndarray, best: np.ndarray) -> bool:
    """Whether the mean of ``some`` is within one standard error of the best, or within `NEGLIGIBLE`.

    Both are ``[samples]``, on the same samples.
    """
    worse = some - best
    return bool(worse.mean() <= tolerance(worse))


def tolerance(differences: np.ndarray) -> float:
    """One standard error of the mean difference, or `NEGLIGIBLE` where that is more, in nats."""
    return max(float(differences.std()) / len(differences) ** 0.5, NEGLIGIBLE)
