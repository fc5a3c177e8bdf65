"""The sensitivity table: answer KL of single stages, at every layer and a few ratios; measured once for all budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import pandas as pd

from pruning_runtime import UnsupportedBackbone
from pruning_runtime.schedule import DroppedTokens, Stage
from schedule_finder.errors import InputError
from schedule_finder.files import replacing
from schedule_finder.measuring.answer_change import answer_change
from schedule_finder.measuring.token_policy import TokenPolicy

if TYPE_CHECKING:
    from schedule_finder.measuring.answer_kl import AnswerKL

RATIOS = (0.5, 0.25, 0.1, 0.03, 0.0)
"""Measured at every layer; a geometric grid, since answer KL changes most where few tokens are left."""
PROBED_DEPTHS, PROBED_RATIO = (0.0, 0.15, 0.3, 0.45), 0.2
"""Single stages on which discarding and merging are compared: in the first half of the depth, where they differ."""

_OLD_WORDS = {"none": "discard", "merged": "merge"}
"""Of tables beside schedule files of version 1."""


@dataclass(frozen=True)
class SensitivityTable:
    """Answer KL when a single stage (layer, ratio) prunes.

    Attributes:
        policy: scorer and handling of dropped tokens that were measured.
        layers: rising; -1, before the decoder, may be among them.
        ratios: falling; 1 is not among them, its answer KL is 0.
        sample_ids: the calibration samples.
        kl: nats, ``[layers, ratios, samples]``.
        answer_tokens: longest answer that was measured, in tokens.
    """

    policy: TokenPolicy
    layers: tuple[int, ...]
    ratios: tuple[float, ...]
    sample_ids: tuple[str, ...]
    kl: np.ndarray
    answer_tokens: int = 1

    @property
    def earliest(self) -> int:
        """The first layer that a stage may have: -1 where that was measured, or else 0."""
        return min(self.layers[0], 0)

    def last_needed(self, most: float) -> int | None:
        """The first measured layer after which dropping all vision tokens changes at most this share of the answers.

        None where dropping them always changes more, or where a stage before the decoder already changes so few.
        """
        if 0.0 not in self.ratios:
            return None
        change = _falling(answer_change(self.kl[:, self.ratios.index(0.0)]).mean(axis=1))
        unneeded = [layer for layer, lost in zip(self.layers, change, strict=True) if lost <= most]
        return unneeded[0] if unneeded and unneeded[0] >= 0 else None

    def layer_loss(
        self, num_layers: int, ratios: np.ndarray, weights: np.ndarray | None = None
    ) -> np.ndarray:
        """Answer change that is due to each layer when it computes only that share of the tokens, ``[num_layers, ratios]``.

        A stage after layer ``l`` removes tokens from all later layers, so the loss of layer ``l + 1`` is the answer
        change of a stage after ``l`` minus that of a stage after ``l + 1``. Measured means are first made to fall with
        depth: apart from noise and attention sinks, dropping later does not hurt more. Unmeasured layers and ratios
        are interpolated linearly. Where no stage before the decoder was measured, the loss of the first layer at
        fewer tokens is infinite.

        Args:
            num_layers: of the backbone.
            ratios: in [0, 1].
            weights: how often each sample counts; None: once.
        """
        mean = np.average(answer_change(self.kl), axis=2, weights=weights)
        falling = np.stack([_falling(column) for column in mean.T], 1)
        known = np.concatenate([np.zeros((len(self.layers), 1)), falling], 1)[:, ::-1]
        at_ratios = np.stack([np.interp(ratios, (1.0, *self.ratios)[::-1], row) for row in known])
        # A stage after the last layer changes nothing.
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

    def to_pandas(self) -> pd.DataFrame:
        """One row per layer, ratio and sample, with the answer KL in nats and what was measured."""
        index = pd.MultiIndex.from_product(
            [self.layers, self.ratios, self.sample_ids], names=["layer", "keep_ratio", "id"]
        )
        table = pd.DataFrame({"kl": self.kl.ravel()}, index=index).reset_index()
        table.insert(0, "scorer", self.policy.scorer)
        table.insert(1, "dropped_tokens", self.policy.dropped_tokens)
        table.insert(2, "pre_decoder_scorer", self.policy.before_decoder)
        table.insert(3, "answer_tokens", self.answer_tokens)
        return table

    def save(self, path: Path) -> None:
        """Write `to_pandas` as a Parquet file."""
        table = self.to_pandas()
        with replacing(path) as partial:
            table.to_parquet(partial, index=False)

    @classmethod
    def load(cls, path: Path) -> SensitivityTable:
        """Read what `save` wrote. Raises `InputError`."""
        try:
            table = pd.read_parquet(path).rename(columns={"residual": "dropped_tokens"})
            table = table.replace({"dropped_tokens": _OLD_WORDS})
            layers = tuple(int(layer) for layer in table.layer.unique())
            ratios = tuple(float(ratio) for ratio in table.keep_ratio.unique())
            ids = tuple(table.id.unique())
            kl = table.kl.to_numpy().reshape(len(layers), len(ratios), len(ids))
            policy = TokenPolicy(str(table.scorer.iloc[0]), table.dropped_tokens.iloc[0])
            if "pre_decoder_scorer" in table and table.pre_decoder_scorer.iloc[0] != policy.scorer:
                policy = replace(policy, pre_decoder=str(table.pre_decoder_scorer.iloc[0]))
            # Earlier releases measured the first token alone.
            answer_tokens = int(table.answer_tokens.iloc[0]) if "answer_tokens" in table else 1
            return cls(policy, layers, ratios, ids, kl, answer_tokens)
        except (OSError, ValueError, AttributeError, IndexError) as error:
            raise InputError(f"{path}: not readable ({error}); remove it and measure again") from error


def measure_sensitivity(
    answer_kl: AnswerKL,
    policy: TokenPolicy,
    layers: Sequence[int],
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    ratios: Sequence[float] = RATIOS,
) -> SensitivityTable:
    """Measure every (layer, ratio) on the samples of ``answer_kl``; ``progress`` is called with layers done and all."""
    layers = sorted(layers)
    found = {}
    for layer, kl in answer_kl.measure_single(layers, ratios, policy):
        found[layer] = kl
        progress(len(found), len(layers))
    return SensitivityTable(
        policy,
        tuple(layers),
        tuple(ratios),
        tuple(answer_kl.sample_ids),
        np.stack([found[layer] for layer in layers]),
        answer_kl.answer_tokens,
    )


def better_dropped_tokens(answer_kl: AnswerKL, scorer: str, layers: Sequence[int]) -> DroppedTokens:
    """Whether discarding or merging dropped tokens changes fewer answers, from a few single stages of both."""
    means = {}
    for dropped_tokens in get_args(DroppedTokens):
        policy = TokenPolicy(scorer, dropped_tokens)
        stages = [
            Stage(layer=layers[int(depth * len(layers))], keep_ratio=PROBED_RATIO) for depth in PROBED_DEPTHS
        ]
        try:
            means[dropped_tokens] = np.mean(
                [answer_change(answer_kl.measure((stage,), policy)) for stage in stages]
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
