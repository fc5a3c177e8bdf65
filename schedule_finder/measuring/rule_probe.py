"""Which scorers are worth a search: a few single stages of every rule, on few samples first, the best on more.

Successive halving: every rule is measured on the first samples, the best of them on all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import numpy as np

from pruning_runtime import PruningError, ScheduleError, UnsupportedBackbone
from pruning_runtime.schedule import DroppedTokens, Stage
from pruning_runtime.scorers import SCORERS, FeatureScorer
from schedule_finder.evidence import RuleProbe, RuleResult
from schedule_finder.intervals import rounded_mean
from schedule_finder.measuring.answer_change import answer_change
from schedule_finder.measuring.token_policy import CONTROLS, TokenPolicy

if TYPE_CHECKING:
    from schedule_finder.measuring.answer_kl import AnswerKL

FIRST_SAMPLES = 8
"""Samples on which all rules are measured (whole batches of them)."""
FINALISTS = 3
"""Rules of each place that are measured on all samples; the controls come on top."""
PRE_DECODER_RATIOS = (0.4, 0.15)
DEPTHS, DECODER_RATIO = (0.1, 0.4), 0.2
"""In the decoder, one keep ratio at two depths of the first half, where rules differ."""


def applicable_scorers(layer: int) -> list[str]:
    """Scorers that have a meaning at a stage's layer; of the controls, which come last, all."""
    usable = [
        name
        for name, rule in SCORERS.items()
        if not (layer == -1 and issubclass(rule, FeatureScorer) and rule.needs_layer)
    ]
    return sorted(usable, key=lambda name: name in CONTROLS)


def probe_rules(
    answer_kl: AnswerKL,
    layers: Sequence[int],
    dropped_tokens: Sequence[DroppedTokens] = get_args(DroppedTokens),
) -> RuleProbe:
    """Measure every rule before the decoder (where ``layers`` holds -1) and inside it.

    All rules with the first dropped-token setting, the best of them with every setting.

    Args:
        answer_kl: the samples.
        layers: of the sensitivity table, rising.
        dropped_tokens: settings to compare, on the best rules.
    """
    inside = [layer for layer in layers if layer >= 0]
    places: dict[str, list[Stage]] = {
        "decoder": [
            Stage(layer=inside[int(depth * len(inside))], keep_ratio=DECODER_RATIO) for depth in DEPTHS
        ]
    }
    if layers[0] == -1:
        places["pre_decoder"] = [Stage(layer=-1, keep_ratio=ratio) for ratio in PRE_DECODER_RATIOS]
    results: list[RuleResult] = []
    refused: dict[str, str] = {}
    for place, stages in places.items():
        names = applicable_scorers(-1 if place == "pre_decoder" else 0)
        policies = [TokenPolicy(name, dropped_tokens[0]) for name in names]
        first = _measure(answer_kl, place, stages, policies, FIRST_SAMPLES, refused)
        best = [result.scorer for result in sorted(first, key=lambda result: result.loss)][:FINALISTS]
        finalists = [TokenPolicy(name, dropped_tokens[0]) for name in names if name in (*best, *CONTROLS)]
        # Merging can change which rule is best, and some rules do not allow it.
        finalists += [TokenPolicy(name, other) for name in best for other in dropped_tokens[1:]]
        results += [result for result in first if result.scorer not in {one.scorer for one in finalists}]
        results += _measure(answer_kl, place, stages, finalists, None, refused)
    return RuleProbe(samples=len(answer_kl), results=results, refused=refused)


def _measure(
    answer_kl: AnswerKL,
    place: str,
    stages: Sequence[Stage],
    policies: Sequence[TokenPolicy],
    samples: int | None,
    refused: dict[str, str],
) -> list[RuleResult]:
    """Mean answer change and KL of each policy over ``stages``; those that the backbone refuses go to ``refused``."""
    found = []
    for policy in policies:
        try:
            values = [answer_kl.measure([stage], policy, samples) for stage in stages]
        except (UnsupportedBackbone, ScheduleError, PruningError) as error:
            refused[str(policy)] = str(error)
            continue
        found.append(
            RuleResult(
                place=place,
                scorer=policy.scorer,
                dropped_tokens=policy.dropped_tokens,
                kl=rounded_mean(np.mean(values, axis=0)),
                change=rounded_mean(answer_change(np.array(values))),
                samples=len(values[0]),
            )
        )
    return found
