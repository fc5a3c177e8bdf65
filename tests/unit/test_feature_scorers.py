"""Feature scorers against independent float64 references, on random features in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from pruning_runtime.scorers import SCORERS, FeatureScorer, FrameScorer, make_scorer
from pruning_runtime.scorers.sparsevlm import SparseVLM
from tests.support import rule_references as reference
from tests.support.feature_cases import (
    KINDS,
    REFERENCES,
    Case,
    choices_of,
    greedy_objective,
    kept_by,
    random_case,
    vision_tokens,
)

GREEDY = ("divprune", "cdpruner", "mmtok")
BATCHES, GROUPS = 50, 4
WIDTHS = (4, 12, 48, 96)


def batches(name: str) -> Iterator[list[Case]]:
    """200 cases: 50 batches of 4 groups of unlike sizes; in many, fewer channels than tokens are kept."""
    for number in range(BATCHES):
        generator = np.random.default_rng([number, *name.encode()])
        kind, width = KINDS[number % len(KINDS)], WIDTHS[number // len(KINDS) % len(WIDTHS)]
        frame = int(generator.integers(2, 9)) if compares_frames(name) else 1
        yield [random_case(generator, width=width, kind=kind, frame=frame) for _ in range(GROUPS)]


def compares_frames(name: str) -> bool:
    return name in SCORERS and issubclass(SCORERS[name], FrameScorer)


def scorer_of(name: str) -> FeatureScorer:
    scorer = make_scorer(name)
    assert isinstance(scorer, FeatureScorer)
    return scorer


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_rules_keep_the_reference_s_set(name: str) -> None:
    """The same set, or choices that are as good as the best up to float32's rounding; the latter in few cases.

    Where features span few dimensions, many choices are nearly equal; elsewhere hardly any.
    """
    scorer, same, ordinary = scorer_of(name), 0, 0
    for cases in batches(name):
        for case, kept in zip(cases, kept_by(scorer, cases), strict=True):
            equal = kept == REFERENCES[name](case)
            if not equal:
                objective, decided, bound = greedy_objective(name, case)
                choices = choices_of(scorer, case)[:decided]
                assert max(reference.shortfalls(objective, len(case.features), choices)) <= bound
            if case.kind != "few dimensions":
                same, ordinary = same + equal, ordinary + 1
    assert ordinary >= 140
    assert same >= 0.98 * ordinary


@pytest.mark.parametrize("name", sorted(REFERENCES.keys() - set(GREEDY)))
def test_other_rules_keep_the_reference_s_set(name: str) -> None:
    """The same set, except where the reference's own set changes when inputs move by a few last places of float32."""
    scorer, same = scorer_of(name), 0
    for cases in batches(name):
        for case, kept in zip(cases, kept_by(scorer, cases), strict=True):
            expected = REFERENCES[name](case)
            same += kept == expected
            if kept != expected:
                assert any(REFERENCES[name](case.nudged(seed)) != expected for seed in range(20)), (
                    case,
                    kept,
                )
    assert same >= 0.98 * BATCHES * GROUPS


def test_relevance_is_scaled_over_all_images_of_a_row() -> None:
    """CDPruner's tiles share the lowest and the highest cosine; the next row does not."""
    generator = np.random.default_rng(3)
    text = random_case(generator, width=24).text
    differ = 0
    for _ in range(20):
        cases = [random_case(generator, width=24) for _ in range(4)]
        cases = [replace(case, text=text) for case in cases]
        found = kept_by(scorer_of("cdpruner"), cases, groups_per_row=2)
        for row in (cases[:2], cases[2:]):
            cosines = np.concatenate([reference.cdpruner_cosines(case.features, text) for case in row])
            span = float(cosines.min()), float(cosines.max())
            for case, kept in zip(row, found[:2] if row[0] is cases[0] else found[2:], strict=True):
                assert kept == sorted(reference.cdpruner(case.features, text, case.keep, span)[0])
                differ += kept != REFERENCES["cdpruner"](case)
    assert differ > 0


def test_sparsevlm_chooses_the_text_that_relates_to_the_image() -> None:
    scorer = SparseVLM()
    for cases in batches("sparsevlm"):
        chosen = scorer.choose_text(vision_tokens(cases))
        for case, row in zip(cases, chosen, strict=True):
            text, vision = case.text, case.features
            assert not row[len(text) :].any()
            share = np.mean([reference.softmax(text @ token) for token in vision], axis=0)
            clear = np.abs(share / share.mean() - 1) > 1e-4
            expected = np.isin(np.arange(len(text)), reference.sparsevlm_text(vision, text))
            if len(text) == 1:
                expected[:] = True  # none is above the mean of itself; then all count
            assert (row[: len(text)].numpy() == expected)[clear].all()
            assert row.any()


@pytest.mark.parametrize("number", range(1, 40))
def test_sparsevlm_takes_all_text_where_it_is_equal(number: int) -> None:
    """The mean of equal shares is rounded, and may come out above each of them."""
    generator = np.random.default_rng(number)
    case = random_case(generator, width=8)
    text = np.repeat(case.text[:1], number, 0)
    tokens = vision_tokens([replace(case, text=text, text_keys=text)])
    assert SparseVLM().choose_text(tokens).all()


def test_dart_numbers_of_pivots_are_options() -> None:
    generator = np.random.default_rng(5)
    for vision, text in ((1, 0), (0, 1), (2, 3), (7, 9)):
        scorer = make_scorer("dart", {"vision_pivots": vision, "text_pivots": text})
        for _ in range(20):
            case = random_case(generator, width=24)
            arguments = case.features, case.text, case.keys, case.text_keys, case.keep
            expected = reference.dart(*arguments, vision_pivots=vision, text_pivots=text)
            assert kept_by(scorer, [case]) == [expected]


def test_frames_by_their_length_or_by_the_number_of_images() -> None:
    generator = np.random.default_rng(6)
    for name in ("evs", "vidcom2"):
        cases = [random_case(generator, width=24, frame=6) for _ in range(4)]
        by_length = make_scorer(name, {"frame_tokens": 6})
        assert kept_by(by_length, cases) == kept_by(scorer_of(name), cases)
        assert kept_by(make_scorer(name, {"frame_tokens": 3}), cases) != kept_by(by_length, cases)


def test_vidcom2_gives_a_distinctive_frame_more_tokens() -> None:
    """Three equal frames and one of its own: the share of each is about the published quota, the sum exact."""
    generator = np.random.default_rng(7)
    one, other = generator.normal(size=(2, 1, 16)) + 0.1 * generator.normal(size=(2, 12, 16))
    case = random_case(generator, width=16, frame=12, n=48)
    features = np.concatenate([one, one, other, one])
    for keep in range(4, 48, 4):
        kept = kept_by(scorer_of("vidcom2"), [replace(case, features=features, keep=keep)])[0]
        per_frame = [sum(token // 12 == frame for token in kept) for frame in range(4)]
        assert sum(per_frame) == keep
        assert per_frame[2] == max(per_frame)
        if keep == 24:
            assert per_frame[2] > 6
