"""What one stage alone does to the answer, at every layer and a few ratios: measured once, good for any budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd

from pruning_runtime import UnsupportedBackbone
from pruning_runtime.schedule import DroppedTokens, Stage
from schedule_finder.errors import InputError
from schedule_finder.measuring.answer_kl import AnswerKL, TokenPolicy

RATIOS = (0.6, 0.35, 0.2, 0.1, 0.04, 0.015, 0.0)
"""Measured at every layer; a geometric grid, as most of what matters happens where few tokens are left."""


PROBED_PLACES, PROBED_RATIO = (0.0, 0.15, 0.3, 0.45), 0.2
"""Where kinds of residual are compared: in the first half of the depth, where they can matter."""


@dataclass(frozen=True)
class SensitivityTable:
    """KL divergence of the answer token when a single stage (layer, ratio) prunes.

    Attributes:
        rule: whose choice of tokens was measured, and what the others left behind.
        layers: rising; -1, before the decoder, may be among them.
        ratios: falling; 1 is not among them, its divergence is 0.
        sample_ids: what it was measured on.
        divergence: nats, ``[layers, ratios, samples]``.
    """

    rule: TokenPolicy
    layers: tuple[int, ...]
    ratios: tuple[float, ...]
    sample_ids: tuple[str, ...]
    divergence: np.ndarray

    @property
    def earliest(self) -> int:
        """The first place for a stage: -1 where that was measured, or else 0."""
        return min(self.layers[0], 0)

    def layer_loss(
        self, num_layers: int, ratios: np.ndarray, weights: np.ndarray | None = None
    ) -> np.ndarray:
        """What each layer loses when it computes only that share of the tokens, ``[num_layers, ratios]``.

        Dropping after layer ``l`` denies tokens to all layers behind it, so the loss of layer ``l + 1`` is what
        a stage after ``l`` costs more than one after ``l + 1``. Dropping later never hurts more, but for noise
        and for attention that loses its resting place: the measured means are first made to fall with depth.
        Unmeasured layers and ratios lie on straight lines between measured ones; but where no stage before the
        decoder was measured, the first layer has to see everything: at fewer tokens its loss is infinite.

        Args:
            num_layers: of the backbone.
            ratios: in [0, 1].
            weights: how often each sample counts; None: once.
        """
        mean = np.average(self.divergence, axis=2, weights=weights)
        falling = np.stack([_falling(column) for column in mean.T], 1)
        known = np.concatenate([np.zeros((len(self.layers), 1)), falling], 1)[:, ::-1]
        at_ratios = np.stack([np.interp(ratios, (1.0, *self.ratios)[::-1], row) for row in known])
        # After the last layer nothing is left to lose.
        after = np.stack(
            [
                np.interp(np.arange(-1, num_layers), (*self.layers, num_layers - 1), (*column, 0.0))
                for column in at_ratios.T
            ],
            1,
        )
        loss = after[:-1] - after[1:]
        if self.earliest == 0:
            loss[0] = np.where(np.asarray(ratios) < 1, np.inf, 0.0)
        return loss

    def save(self, path: Path) -> None:
        """Write a Parquet file, one row per layer, ratio and sample."""
        index = pd.MultiIndex.from_product(
            [self.layers, self.ratios, self.sample_ids], names=["layer", "keep_ratio", "id"]
        )
        table = pd.DataFrame({"kl": self.divergence.ravel()}, index=index).reset_index()
        table.insert(0, "scorer", self.rule.scorer)
        table.insert(1, "dropped_tokens", self.rule.dropped_tokens)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        table.to_parquet(partial, index=False)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> SensitivityTable:
        """Read what `save` wrote. Raises `InputError`."""
        try:
            table = pd.read_parquet(path)
            layers = tuple(int(layer) for layer in table.layer.unique())
            ratios = tuple(float(ratio) for ratio in table.keep_ratio.unique())
            ids = tuple(table.id.unique())
            divergence = table.kl.to_numpy().reshape(len(layers), len(ratios), len(ids))
            rule = TokenPolicy(str(table.scorer.iloc[0]), table.dropped_tokens.iloc[0])
            return cls(rule, layers, ratios, ids, divergence)
        except (OSError, ValueError, AttributeError, IndexError) as error:
            raise InputError(f"{path}: not readable ({error}); remove it and measure again") from error


def measure_sensitivity(
    answer_kl: AnswerKL,
    rule: TokenPolicy,
    layers: Sequence[int],
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    ratios: Sequence[float] = RATIOS,
) -> SensitivityTable:
    """Measure every (layer, ratio) on the meter's samples."""
    layers = sorted(layers)
    found = {}
    for layer, divergence in answer_kl.measure_single(layers, ratios, rule):
        found[layer] = divergence
        progress(len(found), len(layers))
    return SensitivityTable(
        rule,
        tuple(layers),
        tuple(ratios),
        tuple(answer_kl.sample_ids),
        np.stack([found[layer] for layer in layers]),
    )


def better_dropped_tokens(answer_kl: AnswerKL, scorer: str, layers: Sequence[int]) -> DroppedTokens:
    """What dropped tokens had better leave behind on this backbone, from a few single stages of both kinds."""
    means = {}
    for dropped_tokens in get_args(DroppedTokens):
        rule = TokenPolicy(scorer, dropped_tokens)
        try:
            means[dropped_tokens] = np.mean(
                [
                    answer_kl.measure(
                        (Stage(layer=layers[int(place * len(layers))], keep_ratio=PROBED_RATIO),), rule
                    )
                    for place in PROBED_PLACES
                ]
            )
        except UnsupportedBackbone:
            continue  # this backbone cannot merge
    return min(means, key=means.__getitem__)


def _falling(values: np.ndarray) -> np.ndarray:
    """The closest non-increasing sequence in least squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-1][0] > blocks[-2][0]:
            (high, many), (low, few) = blocks.pop(), blocks.pop()
            blocks.append(((high * many + low * few) / (many + few), many + few))
    return np.concatenate([np.full(count, value) for value, count in blocks])
