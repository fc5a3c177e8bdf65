"""Selection rules of the field in float64 NumPy: slow, one step after the other, independent of the product.

Written from descriptions of the papers' rules. A greedy rule is a function that gives the objective of every
token after some choices, so that a test can both make the choices (`greedy`) and judge the choices of another
implementation one by one (`shortfalls`). All functions take the tokens of one image, ``[n, width]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Objective = Callable[[Sequence[int]], Array]
"""Objective of each token ``[n]`` after the choices so far; choices themselves are ignored by the callers."""

EXHAUSTED = 1e-12
"""CDPruner: residuals below this share of the largest kernel entry count as 0."""


def best(scores: Array | Sequence[float], k: int) -> list[int]:
    """The ``k`` highest scores, ties to the lowest index; sorted indices."""
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    return sorted(order[: max(k, 0)])


def greedy(objective: Objective, n: int, k: int) -> list[int]:
    """Choices in the order in which they are made: always the best token that is left, ties to the lowest index."""
    chosen: list[int] = []
    while len(chosen) < min(k, n):
        values = objective(chosen)
        left = [token for token in range(n) if token not in chosen]
        chosen.append(max(left, key=lambda token: (values[token], -token)))
    return chosen


def shortfalls(objective: Objective, n: int, choices: Sequence[int]) -> list[float]:
    """How far each of another implementation's choices is below the best that it could choose."""
    found = []
    for step, choice in enumerate(choices):
        values = objective(choices[:step])
        left = [token for token in range(n) if token not in choices[:step]]
        found.append(float(max(values[token] for token in left) - values[choice]))
    return found


def unit(rows: Array) -> Array:
    """Rows of length 1; a zero row stays zero, so that its cosine with anything is 0."""
    rows = np.asarray(rows, np.float64)
    lengths = np.sqrt((rows * rows).sum(-1, keepdims=True))
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def softmax(logits: Array) -> Array:
    """Softmax over the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def divprune(features: Array) -> Objective:
    """Distance (1 - cosine) to the nearest chosen token; for the first choice, to the nearest other token."""
    directions = unit(features)
    n = len(directions)
    distance = 1 - directions @ directions.T

    def objective(chosen: Sequence[int]) -> Array:
        values = np.zeros(n)
        for token in range(n):
            others = chosen if chosen else [other for other in range(n) if other != token]
            values[token] = min((distance[token, other] for other in others), default=0.0)
        return values

    return objective


def cdpruner_cosines(features: Array, text: Array) -> Array:
    """Cosine of each vision token with the mean of the text rows, ``[n]``."""
    return unit(features) @ unit(np.asarray(text, np.float64).mean(0))


def cdpruner_relevance(cosines: Array, lowest: float, highest: float) -> Array:
    """Relevance between about 0 and 1; ``lowest`` and ``highest`` are over all tiles together."""
    return (cosines - lowest + 1e-6) / (highest - lowest)


def cdpruner_quality(cosines: Array, lowest: float, highest: float, weight: float = 0.5) -> Array:
    """Quality of each token; 1 where relevance is equal."""
    if highest == lowest:
        return np.ones(len(cosines))
    return np.exp(weight / (2 * (1 - weight)) * cdpruner_relevance(cosines, lowest, highest))


def cdpruner_residuals(features: Array, quality: Array) -> Objective:
    """Squared length of ``quality * direction`` outside the span of the chosen ones: the determinant's factor."""
    vectors = unit(features) * quality[:, None]

    def objective(chosen: Sequence[int]) -> Array:
        rest = vectors.copy()
        for token in chosen:
            length = float(np.sqrt((rest[token] ** 2).sum()))
            if length**2 <= EXHAUSTED * float((vectors**2).sum(-1).max()):
                continue
            direction = rest[token] / length
            for _ in range(2):  # twice: Gram-Schmidt is only orthogonal to rounding after the second time
                rest = rest - np.outer(rest @ direction, direction)
        return (rest**2).sum(-1)

    return objective


def cdpruner(
    features: Array, text: Array, k: int, span: tuple[float, float] | None = None
) -> tuple[list[int], int]:
    """Choices in order, and how many of them the kernel determined; the rest are filled by relevance.

    Args:
        features: projected features of one image or tile.
        text: word embeddings of the instruction, ``[t, width]``.
        k: how many to choose.
        span: lowest and highest cosine over all tiles; None: of this one.
    """
    n = len(features)
    cosines = cdpruner_cosines(features, text)
    lowest, highest = span or (float(cosines.min()), float(cosines.max()))
    objective = cdpruner_residuals(features, cdpruner_quality(cosines, lowest, highest))
    largest = float(objective([]).max())
    chosen: list[int] = []
    while len(chosen) < min(k, n):
        values = objective(chosen)
        left = [token for token in range(n) if token not in chosen]
        choice = max(left, key=lambda token: (values[token], -token))
        if values[choice] <= EXHAUSTED * largest:
            break
        chosen.append(choice)
    determined = len(chosen)
    left = [token for token in range(n) if token not in chosen]
    chosen += sorted(left, key=lambda token: (-cosines[token], token))[: min(k, n) - determined]
    return chosen, determined


def mmtok_rows(
    features: Array,
    text: Array,
    *,
    text_temperature: float = 0.02,
    vision_temperature: float = 0.2,
    alpha: float = 0.5,
) -> Array:
    """What is to be covered, ``[t + n, n]``: text over vision, and vision over vision times ``alpha``."""
    vision = unit(features)
    rows = [softmax(vision @ row / text_temperature) / len(text) for row in unit(text)]
    rows += [alpha * softmax(vision @ row / vision_temperature) / len(vision) for row in vision]
    return np.array(rows)


def mmtok(features: Array, text: Array) -> Objective:
    """Coverage that a token adds, summed over the rows of `mmtok_rows`."""
    rows = mmtok_rows(features, text)

    def objective(chosen: Sequence[int]) -> Array:
        covered = np.zeros(len(rows))
        for token in chosen:
            covered = np.maximum(covered, rows[:, token])
        return np.maximum(rows - covered[:, None], 0).sum(0)

    return objective


def equal_shares(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` shares that differ by at most 1, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def pivots(keys: Array, count: int) -> list[int]:
    """Rows of largest L1 norm, largest first, ties to the lowest index."""
    norms = [sum(abs(float(value)) for value in row) for row in np.asarray(keys, np.float64)]
    return sorted(range(len(norms)), key=lambda row: (-norms[row], row))[:count]


def dart(
    states: Array,
    text_states: Array,
    keys: Array,
    text_keys: Array,
    k: int,
    *,
    vision_pivots: int = 4,
    text_pivots: int = 4,
) -> list[int]:
    """DART: pivots, and for each pivot its share of the tokens that are least similar to it.

    Pivots take their turns one after the other, those of vision first, each among the tokens that are still left.

    Args:
        states, text_states: hidden states of vision and text, ``[n, width]`` and ``[t, width]``.
        keys, text_keys: keys of the same tokens, all heads side by side.
        k: how many to keep, pivots included.
    """
    n = len(states)
    kept = pivots(keys, min(vision_pivots, k))
    vision, text = unit(states), unit(text_states)
    directions = [vision[token] for token in kept]
    directions += [text[token] for token in pivots(text_keys, text_pivots)]
    shares = equal_shares(min(k, n) - len(kept), len(directions)) if directions else []
    for direction, share in zip(directions, shares, strict=True):
        left = [token for token in range(n) if token not in kept]
        kept += sorted(left, key=lambda token: (float(vision[token] @ direction), token))[:share]
    return sorted(kept)


def v2drop(before: Array, after: Array) -> Array:
    """Euclidean length of each token's change by the layer, ``[n]``; the largest stay."""
    change = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    return np.sqrt((change**2).sum(-1))


def sparsevlm_text(vision: Array, text: Array) -> list[int]:
    """Text tokens that rate: those whose mean share of the vision tokens' softmax over text is above the mean."""
    vision, text = np.asarray(vision, np.float64), np.asarray(text, np.float64)
    share = np.mean([softmax(text @ row) for row in vision], axis=0)
    return [token for token in range(len(text)) if share[token] > share.mean()]


def evs(features: Array, frame_tokens: int) -> Array:
    """Scores ``[n]``: 1 - cosine with the same place of the frame before; infinite in the first frame."""
    directions = unit(features)
    scores = np.full(len(directions), np.inf)
    for token in range(frame_tokens, len(directions)):
        scores[token] = 1 - directions[token] @ directions[token - frame_tokens]
    return scores


def vidcom2_similarity(features: Array, frame_tokens: int) -> tuple[Array, Array]:
    """Similarity of each token to the mean of the video and to the mean of its frame, both ``[n]``."""
    features = np.asarray(features, np.float64)
    steady = best(-features.var(0), max(features.shape[1] // 2, 1))
    directions = unit(features[:, steady])

    def similarity(token: int, centre: Array) -> float:
        squared = float(((directions[token] - centre) ** 2).sum())
        return sum(float(np.exp(-squared / (2 * width))) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    tokens = range(len(directions))
    video = np.array([similarity(token, directions.mean(0)) for token in tokens])
    frame = np.zeros(len(directions))
    for token in tokens:
        start = token // frame_tokens * frame_tokens
        frame[token] = similarity(token, directions[start : start + frame_tokens].mean(0))
    return video, frame


def vidcom2_quotas(video: Array, frame_tokens: int, k: int) -> list[int]:
    """Tokens of each frame, before the total is made exact."""
    frames = len(video) // frame_tokens
    means = video.reshape(frames, frame_tokens).mean(1)
    share = softmax(-means / 0.01)
    ratio = k / len(video)
    return [
        max(1, round(frame_tokens * min(1.0, ratio * (1 + float(one) - float(share.mean())))))
        for one in share
    ]


def vidcom2(features: Array, frame_tokens: int, k: int) -> list[int]:
    """VidCom2 with exactly ``min(k, n)`` tokens: the most similar kept ones leave, or the least similar join."""
    n = len(features)
    k = min(k, n)
    video, frame = vidcom2_similarity(features, frame_tokens)
    total = video + frame
    kept: list[int] = []
    for number, quota in enumerate(vidcom2_quotas(video, frame_tokens, k)):
        tokens = range(number * frame_tokens, (number + 1) * frame_tokens)
        kept += sorted(tokens, key=lambda token: (total[token], token))[:quota]
    while len(kept) > k:
        kept.remove(max(kept, key=lambda token: (total[token], token)))
    while len(kept) < k:
        left = [token for token in range(n) if token not in kept]
        kept.append(min(left, key=lambda token: (total[token], token)))
    return sorted(kept)
