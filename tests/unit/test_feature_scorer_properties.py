"""What must hold for every feature scorer: counts, nesting, symmetry, duplicates, zero rows, and batches."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from pruning_runtime.scorers import SCORERS, FeatureScorer, FrameScorer, make_scorer
from tests.support.feature_cases import REFERENCES, Case, float32, kept_by, random_case

RULES = tuple(REFERENCES)
FRAMES = tuple(name for name in RULES if issubclass(SCORERS[name], FrameScorer))
GREEDY = ("divprune", "cdpruner", "mmtok")
SEEDS = range(10)


def scorer_of(name: str) -> FeatureScorer:
    scorer = make_scorer(name)
    assert isinstance(scorer, FeatureScorer)
    return scorer


def case_of(name: str, seed: int, *, n: int = 30) -> Case:
    generator = np.random.default_rng([seed, *name.encode()])
    return random_case(generator, width=32, frame=6 if name in FRAMES else 1, n=n)


def kept(name: str, case: Case) -> list[int]:
    return kept_by(scorer_of(name), [case])[0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RULES)
def test_exactly_as_many_distinct_tokens_as_asked(name: str, seed: int) -> None:
    case = case_of(name, seed)
    for keep in (0, 1, 2, 5, 29, 30, 35):
        found = kept(name, replace(case, keep=keep))
        assert len(set(found)) == min(keep, 30)
        assert found == sorted(found)


@pytest.mark.parametrize("name", [*GREEDY, "v2drop", "evs"])
def test_kept_tokens_nest(name: str) -> None:
    for seed in SEEDS:
        case = case_of(name, seed)
        sets = [set(kept(name, replace(case, keep=keep))) for keep in range(31)]
        assert all(fewer < more for fewer, more in pairwise(sets))


@pytest.mark.parametrize("name", [name for name in RULES if name not in FRAMES])
def test_permuted_tokens_are_kept_all_the_same(name: str) -> None:
    for seed in SEEDS:
        case = case_of(name, seed)
        order = np.random.default_rng(seed).permutation(30).tolist()
        found = kept(name, case.permuted(order))
        assert sorted(order[token] for token in found) == kept(name, case)


@pytest.mark.parametrize("name", [*GREEDY, "dart", "evs"])
def test_a_positive_factor_per_token_changes_nothing(name: str) -> None:
    """Powers of two, so that float32 rounds nothing."""
    for seed in SEEDS:
        case = case_of(name, seed)
        factors = 2.0 ** np.random.default_rng(seed).integers(-4, 5, (30, 1))
        assert kept(name, replace(case, features=case.features * factors)) == kept(name, case)


@pytest.mark.parametrize("name", RULES)
def test_duplicates_are_kept_once_each(name: str) -> None:
    """96 tokens of 12 kinds; rules that seek diversity take every kind before any second copy."""
    for seed in SEEDS:
        case = case_of(name, seed, n=96)
        kinds = np.random.default_rng(seed).permutation(np.arange(96) % 12)
        copies = replace(case.permuted(kinds.tolist()), keep=40)
        found = kept(name, copies)
        assert len(set(found)) == 40
        if name in GREEDY:
            few = kept(name, replace(copies, keep=12))
            assert {kinds[token] for token in few} == set(range(12))


@pytest.mark.parametrize("name", RULES)
def test_all_tokens_equal(name: str) -> None:
    """Ties go to the lowest index, however little float32 leaves of a distance of 0."""
    case = case_of(name, 0)
    equal = replace(case.permuted([0] * 30), keep=7)
    found = kept(name, equal)
    assert len(set(found)) == 7
    if name in ("cdpruner", "v2drop", "evs"):
        assert found == list(range(7))


@pytest.mark.parametrize("name", RULES)
def test_zero_rows_are_no_nan_and_have_cosine_0(name: str) -> None:
    for seed in SEEDS:
        case = case_of(name, seed)
        features = case.features.copy()
        features[::5] = 0
        text = case.text.copy()
        text[:1] = 0
        case = replace(case, features=features, text=text, keep=17)
        assert kept(name, case) == REFERENCES[name](case)
        nothing = replace(case, features=features * 0, text=text * 0, previous=case.previous * 0)
        assert len(set(kept(name, nothing))) == 17


@pytest.mark.parametrize("name", RULES)
def test_a_batch_keeps_what_each_group_keeps_alone(name: str) -> None:
    for seed in SEEDS:
        cases = [
            replace(case_of(name, 10 * seed + number, n=n), keep=keep)
            for number, (n, keep) in enumerate([(30, 7), (6, 6), (54, 2), (12, 0), (48, 41)])
        ]
        assert kept_by(scorer_of(name), cases) == [kept(name, case) for case in cases]


@pytest.mark.parametrize("name", RULES)
def test_a_group_without_tokens_disturbs_no_other(name: str) -> None:
    case = case_of(name, 0)
    empty = Case(
        case.features[:0], case.text[:0], case.keys[:0], case.text_keys[:0], case.previous[:0], 0, case.frame
    )
    assert kept_by(scorer_of(name), [case, empty]) == [kept(name, case), []]


def test_what_rounding_leaves_of_a_dependent_token_is_not_a_choice() -> None:
    """CDPruner in 24 dimensions: choices 25 to 40 go by relevance, also for nearly parallel tokens."""
    for seed in range(40):
        generator = np.random.default_rng(seed)
        case = random_case(generator, width=24, kind="one direction", n=60)
        case = replace(case, features=float32(case.features), keep=40)
        assert kept("cdpruner", case) == REFERENCES["cdpruner"](case)


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "8"])
def test_frame_tokens_must_be_a_number_of_tokens(name: str, value: object) -> None:
    with pytest.raises(ValueError, match="frame_tokens must be a whole number of tokens above 0"):
        make_scorer(name, {"frame_tokens": value})


@pytest.mark.parametrize("name", [*RULES, "sparsevlm"])
def test_an_unknown_option_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=f"scorer '{name}' does not take the options") as error:
        make_scorer(name, {"tau": 1})
    assert "\n" not in str(error.value)
