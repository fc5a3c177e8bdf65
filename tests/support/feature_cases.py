"""Random inputs for feature scorers, and what `tests.support.rule_references` would keep of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pruning_runtime.scorers import FeatureScorer, VisionTokens
from pruning_runtime.selection import select_kept
from tests.support import rule_references as reference
from tests.support.rule_references import Array, Objective

EPS = float(np.finfo(np.float32).eps)
KINDS = ("independent", "one direction", "falling scales", "few dimensions")
"""How features are correlated; in few dimensions, most tokens are nearly combinations of others."""


@dataclass(frozen=True)
class Case:
    """One group of tokens; all arrays hold float32 values in float64."""

    features: Array
    text: Array
    keys: Array
    text_keys: Array
    previous: Array
    keep: int
    frame: int = 1
    kind: str = KINDS[0]

    @property
    def kept(self) -> int:
        """What is really kept."""
        return min(self.keep, len(self.features))

    def permuted(self, order: Sequence[int]) -> Case:
        """The same tokens in another order."""
        index = list(order)
        return replace(
            self, features=self.features[index], keys=self.keys[index], previous=self.previous[index]
        )

    def nudged(self, seed: int) -> Case:
        """Entries off by a few last places, as float32 arithmetic makes them."""
        generator = np.random.default_rng(seed)

        def nudge(values: Array) -> Array:
            return values * (1 + 8 * EPS * generator.choice([-1, 1], values.shape))

        return replace(self, features=nudge(self.features), text=nudge(self.text), keys=nudge(self.keys))


def float32(values: Array) -> Array:
    """Values that float32 can hold."""
    return values.astype(np.float32).astype(np.float64)


def random_case(
    generator: np.random.Generator, *, width: int, kind: str = KINDS[0], frame: int = 1, n: int | None = None
) -> Case:
    """Between 2 and 64 tokens (whole frames of ``frame``), of which some are kept, and 1 to 11 text tokens."""
    n = n or int(generator.integers(2, 64 // frame + 1)) * frame
    text = int(generator.integers(1, 12))
    features = generator.normal(size=(n, width))
    if kind == "one direction":
        features = features + 4 * generator.normal(size=width)
    elif kind == "falling scales":
        features = features * np.geomspace(1, 0.01, width)
    elif kind == "few dimensions":
        few = max(width // 4, 1)
        features = 0.01 * features + generator.normal(size=(n, few)) @ generator.normal(size=(few, width))
    return Case(
        features=float32(features),
        text=float32(generator.normal(size=(text, width))),
        keys=float32(generator.normal(size=(n, 6))),
        text_keys=float32(generator.normal(size=(text, 6))),
        previous=float32(generator.normal(size=(n, width))),
        keep=int(generator.integers(1, n + 1)),
        frame=frame,
        kind=kind,
    )


def vision_tokens(cases: Sequence[Case], *, groups_per_row: int = 1) -> VisionTokens:
    """One group per case, padded with zeros to the largest; the width of all must be the same."""

    def padded(values: Sequence[Array]) -> Tensor:
        return pad_sequence([torch.from_numpy(one).float() for one in values], batch_first=True)

    def flags(values: Sequence[Array]) -> Tensor:
        return pad_sequence([torch.ones(len(one), dtype=torch.bool) for one in values], batch_first=True)

    features = [case.features for case in cases]
    return VisionTokens(
        features=padded(features),
        is_token=flags(features),
        keep=torch.tensor([case.kept for case in cases]),
        most_kept=max(case.kept for case in cases),
        groups_per_row=groups_per_row,
        text=padded([case.text for case in cases]),
        is_text=flags([case.text for case in cases]),
        previous=padded([case.previous for case in cases]),
        key_norms=padded([np.abs(case.keys).sum(1) for case in cases]),
        text_key_norms=padded([np.abs(case.text_keys).sum(1) for case in cases]),
        images=torch.tensor([len(case.features) // case.frame for case in cases]),
    )


def kept_by(scorer: FeatureScorer, cases: Sequence[Case], **options: int) -> list[list[int]]:
    """What the runtime keeps of each case by the scorer's scores, in order of index."""
    tokens = vision_tokens(cases, **options)
    scores = scorer.score(tokens)
    assert scores.shape == tokens.is_token.shape
    assert scores.dtype == torch.float32
    assert scores[tokens.is_token].isfinite().all()
    width = max(case.kept for case in cases)
    index, valid = select_kept(scores, tokens.is_token, tokens.is_token, tokens.keep, width)
    return [row[real].tolist() for row, real in zip(index, valid, strict=True)]


def choices_of(scorer: FeatureScorer, case: Case) -> list[int]:
    """The tokens that a greedy rule keeps, in the order of its choices."""
    scores = scorer.score(vision_tokens([case]))[0]
    return scores.argsort(descending=True, stable=True)[: case.kept].tolist()


# ---- what the references keep


def _cdpruner(case: Case) -> list[int]:
    return sorted(reference.cdpruner(case.features, case.text, case.keep)[0])


REFERENCES: dict[str, Callable[[Case], list[int]]] = {
    "divprune": lambda case: sorted(
        reference.greedy(reference.divprune(case.features), len(case.features), case.keep)
    ),
    "cdpruner": _cdpruner,
    "mmtok": lambda case: sorted(
        reference.greedy(reference.mmtok(case.features, case.text), len(case.features), case.keep)
    ),
    "dart": lambda case: reference.dart(case.features, case.text, case.keys, case.text_keys, case.keep),
    "v2drop": lambda case: reference.best(reference.v2drop(case.previous, case.features), case.keep),
    "evs": lambda case: reference.best(reference.evs(case.features, case.frame), case.keep),
    "vidcom2": lambda case: reference.vidcom2(case.features, case.frame, case.keep),
}
"""The reference's set by rule, as sorted indices."""


def greedy_objective(name: str, case: Case) -> tuple[Objective, int, float]:
    """A greedy rule's objective, how many choices it decides, and what float32 can miss of it.

    Cosines are off by a few last places of float32. MMTok divides them by its temperature .02 and exponentiates, so
    that its shares are off by 50 times as much. CDPruner takes as 0 what its elimination cannot tell from 0.
    """
    if name == "divprune":
        return reference.divprune(case.features), case.kept, 16 * EPS
    if name == "mmtok":
        rows = reference.mmtok_rows(case.features, case.text)
        return reference.mmtok(case.features, case.text), case.kept, 50 * 16 * EPS * float(rows.sum(0).max())
    cosines = reference.cdpruner_cosines(case.features, case.text)
    quality = reference.cdpruner_quality(cosines, float(cosines.min()), float(cosines.max()))
    decided = reference.cdpruner(case.features, case.text, case.keep)[1]
    bound = 3 * EPS * max(case.kept, 8) * float((quality**2).max())
    return reference.cdpruner_residuals(case.features, quality), decided, bound
