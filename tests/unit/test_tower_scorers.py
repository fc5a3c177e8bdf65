"""Rules that read the vision tower: equal slow references on random images, and the properties that RULES states."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from pruning_runtime.merging import join_dropped
from pruning_runtime.scorers import SCORERS, TowerScorer, TowerTokens, VisionTokens, make_scorer
from pruning_runtime.selection import select_kept
from tests.support import tower_rule_references as references
from tests.support.tower_rule_references import Image

NAMES = ("deep", "middle", "shallow", "deep_received", "middle_received")
RULES = sorted(name for name, rule in SCORERS.items() if issubclass(rule, TowerScorer))
CASES = 200


def draw(seed: int, rows: int | None = None, columns: int | None = None) -> tuple[Image, int]:
    """An image and a number of tokens to keep; some images hold equal tokens, zero rows and equal saliency."""
    rng = np.random.default_rng(seed)
    rows, columns = rows or int(rng.integers(1, 13)), columns or int(rng.integers(1, 13))
    number = rows * columns
    saliency = {name: rng.random(number).astype(np.float32) for name in NAMES}
    vectors = [rng.standard_normal((number, 6)).astype(np.float32) for _ in range(3)]
    if seed % 4 == 1:
        for values in saliency.values():
            values[:] = np.round(values * 4) / 4
    if seed % 4 == 2:
        for matrix in vectors:
            matrix[rng.random(number) < 0.2] = 0
    keep = int(rng.choice([0, 1, number, number + 3, *rng.integers(1, number + 1, 8)]))
    return Image(rows, columns, saliency, *vectors, has_cls=bool(seed % 2)), keep


def tokens_of(images: list[Image], keeps: list[int]) -> VisionTokens:
    """The images as groups, padded to one width, each with a row of its own."""
    slots = max(image.number for image in images)

    def padded(parts: list[np.ndarray]) -> Tensor:
        out = torch.zeros(len(parts), slots, *parts[0].shape[1:], dtype=torch.as_tensor(parts[0]).dtype)
        for group, part in enumerate(parts):
            out[group, : len(part)] = torch.as_tensor(part)
        return out

    number = [np.arange(image.number) for image in images]
    is_token = padded([np.ones(image.number, dtype=bool) for image in images])
    tower = TowerTokens(
        saliency={name: padded([image.saliency[name] for image in images]) for name in NAMES},
        has_patch=is_token,
        states=padded([image.states for image in images]),
        keys=padded([image.keys for image in images]),
        row=padded([n // image.columns for n, image in zip(number, images, strict=True)]),
        column=padded([n % image.columns for n, image in zip(number, images, strict=True)]),
        rows=padded([np.full(image.number, image.rows) for image in images]),
        columns=padded([np.full(image.number, image.columns) for image in images]),
        image=padded([np.full(image.number, group) for group, image in enumerate(images)]),
        has_cls=images[0].has_cls,
    )
    keep = torch.tensor([min(k, image.number) for k, image in zip(keeps, images, strict=True)])
    return VisionTokens(
        features=padded([image.features for image in images]),
        is_token=is_token,
        keep=keep,
        most_kept=int(keep.max()),
        groups_per_row=1,
        text=torch.zeros(len(images), 0, 6),
        is_text=torch.zeros(len(images), 0, dtype=torch.bool),
        tower=tower,
    )


def kept_mask(scorer: TowerScorer, tokens: VisionTokens) -> Tensor:
    scores = scorer.score(tokens)
    index, valid = select_kept(
        scores, tokens.is_token, tokens.is_token, tokens.keep, tokens.is_token.shape[1]
    )
    return torch.zeros_like(tokens.is_token).scatter_(1, index, valid)


def kept_of(name: str, image: Image, keep: int, **options: object) -> list[int]:
    scorer = make_scorer(name, options)
    assert isinstance(scorer, TowerScorer)
    return kept_mask(scorer, tokens_of([image], [keep]))[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("name", RULES)
def test_kept_tokens_equal_the_reference(name: str) -> None:
    rule = getattr(references, name)
    # With equal saliency, two tokens that cover each other gain equally in SCOPE, and rounding decides between them.
    seeds = [seed for seed in range(2 * CASES) if name != "scope" or seed % 4 != 1][:CASES]
    for seed in seeds:
        image, keep = draw(seed)
        expected = rule(image, keep)
        expected = expected[0] if isinstance(expected, tuple) else expected
        found = kept_of(name, image, keep)
        assert found == expected, (seed, image.rows, image.columns, keep)
        assert len(found) == min(keep, image.number)


@pytest.mark.parametrize("name", ["visionzip", "vscan"])
def test_merged_features_equal_the_reference(name: str) -> None:
    for seed in range(CASES):
        image, keep = draw(seed)
        kept, joins = getattr(references, name)(image, keep)
        scorer, tokens = make_scorer(name), tokens_of([image], [keep])
        assert isinstance(scorer, TowerScorer)
        mask = kept_mask(scorer, tokens)
        merged = join_dropped(tokens.features, mask, scorer.join(tokens, mask), scorer.joins)[0]
        for token in kept:
            own = image.features[token].astype(np.float64)
            others = [image.features[o].astype(np.float64) for o, target in joins.items() if target == token]
            expected = own
            if others:
                mean = np.mean(others, 0)
                expected = own + mean if name == "visionzip" else np.mean([own, *others], 0)
            np.testing.assert_allclose(
                merged[token], expected, rtol=1e-5, atol=1e-6, err_msg=f"{seed} {token}"
            )


@pytest.mark.parametrize("name", RULES)
def test_a_batch_of_images_gives_what_each_gives_alone(name: str) -> None:
    pairs = [draw(seed) for seed in range(3, 60, 4)]
    scorer = make_scorer(name)
    assert isinstance(scorer, TowerScorer)
    together = kept_mask(scorer, tokens_of([image for image, _ in pairs], [keep for _, keep in pairs]))
    for row, (image, keep) in zip(together, pairs, strict=True):
        assert row.nonzero().flatten().tolist() == kept_of(name, image, keep)


@pytest.mark.parametrize("name", ["fastervlm", "scope"])
def test_more_tokens_contain_fewer(name: str) -> None:
    image, _ = draw(0, 6, 7)
    kept = [set(kept_of(name, image, keep)) for keep in range(image.number + 1)]
    assert all(fewer < more for fewer, more in pairwise(kept))


@pytest.mark.parametrize("name", ["fastervlm", "scope"])
def test_permuting_tokens_permutes_the_result(name: str) -> None:
    image, _ = draw(0, 6, 7)
    order = np.random.default_rng(3).permutation(image.number)
    moved = replace(
        image,
        saliency={key: values[order] for key, values in image.saliency.items()},
        states=image.states[order],
    )
    assert sorted(order[kept_of(name, moved, 9)].tolist()) == kept_of(name, image, 9)


@pytest.mark.parametrize("name", RULES)
def test_positive_factors_do_not_matter(name: str) -> None:
    image, _ = draw(0, 8, 9)
    factors = np.random.default_rng(4).uniform(0.5, 3, (image.number, 1)).astype(np.float32)
    scaled = replace(
        image,
        saliency={key: values * np.float32(8) for key, values in image.saliency.items()},
        states=image.states * factors,
        keys=image.keys * factors,
        features=image.features * factors,
    )
    assert kept_of(name, scaled, 20) == kept_of(name, image, 20)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("keep", [0, 1, 5, 42])
def test_equal_tokens_are_kept_once_each(name: str, keep: int) -> None:
    image, _ = draw(0, 6, 7)
    same = replace(
        image,
        saliency={key: np.ones_like(values) for key, values in image.saliency.items()},
        states=np.ones_like(image.states),
        keys=np.zeros_like(image.keys),
        features=np.ones_like(image.features),
    )
    assert len(kept_of(name, same, keep)) == keep


@pytest.mark.parametrize("name", RULES)
def test_tokens_without_a_patch_come_last_and_change_nothing(name: str) -> None:
    image, _ = draw(2, 5, 6)
    alone = kept_of(name, image, 11)
    tokens = tokens_of([image], [11])
    assert tokens.tower is not None

    def longer(values: Tensor) -> Tensor:
        return torch.cat([values[:, :7], torch.zeros_like(values[:, :1]), values[:, 7:]], 1)

    tower = replace(
        tokens.tower,
        saliency={key: longer(values) for key, values in tokens.tower.saliency.items()},
        **{
            part: longer(getattr(tokens.tower, part))
            for part in ("states", "keys", "row", "column", "rows", "columns", "image", "has_patch")
        },
    )
    with_newline = replace(
        tokens,
        tower=tower,
        features=longer(tokens.features),
        is_token=torch.ones(1, image.number + 1, dtype=torch.bool),
    )
    scorer = make_scorer(name)
    assert isinstance(scorer, TowerScorer)
    kept = kept_mask(scorer, with_newline)[0].nonzero().flatten().tolist()
    assert kept == [token + (token >= 7) for token in alone]
    everything = replace(with_newline, keep=torch.tensor([image.number]), most_kept=image.number)
    assert not kept_mask(scorer, everything)[0, 7]


def test_published_numbers_of_anchors_and_contextual_tokens() -> None:
    # HiPrune: 4, 3 and 1 anchors of 192, 128 and 64; none up to 25. VisionZip: 30, 20 and 10 contextual tokens.
    image, _ = draw(0, 24, 24)
    middle = image.saliency["middle_received"]
    for keep, anchors, contextual in ((192, 4, 30), (128, 3, 20), (64, 1, 10), (25, 0, 4)):
        *expected, following = references.best(middle, list(range(576)), anchors + 1)
        # The deep block would take none of them.
        deep = image.saliency["deep_received"].copy()
        deep[[*expected, following]] = -1
        kept = kept_of("hiprune", replace(image, saliency=image.saliency | {"deep_received": deep}), keep)
        assert set(expected) <= set(kept)
        assert following not in kept
        dominant = references.best(image.saliency["deep"], list(range(576)), keep - contextual)
        assert set(dominant) <= set(kept_of("visionzip", image, keep))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hiprune", {"alpha": -1}),
        ("visionzip", {"contextual": 2}),
        ("scope", {"alpha": -1}),
        ("vscan", {"window": 0}),
        ("fastervlm", {"scope": "row"}),
        ("divprune", {"scope": "tile"}),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"scorer '{name}' does not take the options"):
        make_scorer(name, options)
