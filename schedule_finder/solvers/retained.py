"""Keep the attention still to come: replay on the profile what each stage would keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pruning_runtime.schedule import Stage
from schedule_finder.profile_store import Profile
from schedule_finder.solvers.base import BudgetTarget, Solution, Solver

MAX_STAGES = 3
REPLAYED_SAMPLES = 64
"""Samples that the search replays, spread over the profile."""
RATIO_GRID = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02)
"""Ratios tried at every stage but the last, which spends what the budget leaves."""


class Retained(Solver):
    """Spend the budget where it keeps most of the attention that later layers pay to vision tokens.

    Stages stand at change points: after the last layer of the old regime or after the first layer of
    the new one, whose attention says what that regime looks at. For every choice of at most
    `MAX_STAGES` of those layers and every falling sequence of ratios on a grid (the last ratio spends
    the rest of the budget exactly), the stages are replayed on the profile: which tokens would be
    kept, and what share of the rater -> vision attention of all layers they carry. Tokens are kept by
    the scorer's stored scores; those come from the unpruned model, which is what makes this a replay
    and not a measurement.
    """

    name = "retained"

    def solve(
        self, profile: Profile, change_points: Sequence[int], budget: BudgetTarget, *, scorer: str
    ) -> Solution:
        """See `Solver.solve`; evidence holds the objective and the best choice per number of stages."""
        deepest = budget.deepest_layer()
        profiled = profile.meta["layers"]
        beside = {layer for point in change_points for layer in (point - 1, point)}
        candidates = sorted(
            layer for layer in beside if layer in profiled and layer <= budget.shape.num_layers - 2
        )
        placed_by = "change points"
        if not candidates:
            # Nothing to go by but the budget: an even spread of layers to choose from.
            placed_by = "budget"
            spread = [eighth * (budget.shape.num_layers - 1) // 8 for eighth in (1, 2, 4, 6)]
            candidates = sorted({layer for layer in spread if layer in profiled})
        if not any(layer <= deepest for layer in candidates):
            # No change point early enough: the budget says where the first stage must stand.
            placed_by = "budget" if placed_by == "budget" else "budget and change points"
            first = max((layer for layer in profiled if layer <= deepest), default=deepest)
            candidates = sorted({first, *candidates})
        replay = Replay(profile, scorer)
        best: dict[int, tuple[float, tuple[Stage, ...]]] = {}
        for value, stages in _spendings(budget, replay, candidates, deepest, (), replay.start()):
            if len(stages) not in best or value > best[len(stages)][0]:
                best[len(stages)] = (value, stages)
        value, stages = max(best.values(), key=lambda found: found[0])
        return Solution(
            stages,
            {
                "solver": self.name,
                "objective": "share of rater -> vision attention carried by the tokens that layers compute",
                "retained": value,
                "by_number_of_stages": {
                    str(number): {
                        "retained": found,
                        "stages": [stage.model_dump(exclude_none=True) for stage in chosen],
                    }
                    for number, (found, chosen) in sorted(best.items())
                },
                "candidate_layers": candidates,
                "placed_by": placed_by,
                "replayed_samples": replay.num_samples,
            },
        )


def _spendings(
    budget: BudgetTarget,
    replay: Replay,
    candidates: Sequence[int],
    deepest: int,
    done: tuple[Stage, ...],
    state: _State,
) -> Iterator[tuple[float, tuple[Stage, ...]]]:
    """Every continuation of ``done`` that spends the budget exactly, with what it retains."""
    ratios = tuple(stage.keep_ratio for stage in done)
    for layer in candidates:
        if (done and layer <= done[-1].layer) or (not done and layer > deepest):
            continue
        layers = (*(stage.layer for stage in done), layer)
        stages = budget.spend_rest(layers, ratios)
        if stages is not None:
            yield replay.finish(replay.drop(state, stages[-1])), stages
        if len(layers) == MAX_STAGES:
            continue
        for ratio in RATIO_GRID:
            stage = Stage(layer=layer, keep_ratio=ratio)
            # Already over the budget even if the next layer dropped the rest: no continuation fits.
            affordable = budget.cost((*done, stage, *_all_gone_after(layer, budget))) <= budget.target
            if ratio < (ratios[-1] if ratios else 1.0) and affordable:
                yield from _spendings(
                    budget, replay, candidates, deepest, (*done, stage), replay.drop(state, stage)
                )


def _all_gone_after(layer: int, budget: BudgetTarget) -> tuple[Stage, ...]:
    following = layer + 1
    return (Stage(layer=following, keep_ratio=0.0),) if following <= budget.shape.num_layers - 2 else ()


@dataclass(frozen=True)
class _State:
    """A replay up to some layer: who is left, and what the layers so far have carried."""

    alive: np.ndarray
    carried: np.ndarray
    first: int


class Replay:
    """Which tokens stages would keep in the profiled samples, and the attention those carry.

    Samples are padded to the longest: a token that does not exist scores lowest and carries nothing.
    """

    def __init__(self, profile: Profile, scorer: str, samples: int = REPLAYED_SAMPLES) -> None:
        places = np.unique(np.linspace(0, len(profile) - 1, min(samples, len(profile))).astype(int))
        part = profile.subset(places)
        self.num_samples = len(part)
        self._layers: list[int] = list(part.meta["layers"])
        self._num_vision = part.counts["num_vision"]
        attention = _padded(part.maps, 0.0)
        # Attention that all layers from one on pay to a token: a run of layers is a difference of two.
        self._to_come = np.concatenate(
            [attention[:, ::-1].cumsum(1)[:, ::-1], np.zeros_like(attention[:, :1])], axis=1
        )
        self._total = self._to_come[:, 0].sum(1)
        self._scores = _padded(part.scores[scorer], -np.inf)
        self._orders: dict[int, np.ndarray] = {}

    def start(self) -> _State:
        """Nothing dropped, no layer run."""
        alive = np.arange(self._scores.shape[2]) < self._num_vision[:, None]
        return _State(alive, np.zeros(self.num_samples), 0)

    def drop(self, state: _State, stage: Stage) -> _State:
        """Run the layers up to the stage's own, then drop."""
        # The first profiled layer that no longer sees what the stage drops.
        following = sum(layer <= stage.layer for layer in self._layers)
        carried = state.carried + self._carried(state, following)
        count = np.floor(stage.keep_ratio * self._num_vision + 0.5)
        order = self._order(stage.layer)
        in_order = np.take_along_axis(state.alive, order, 1)
        stays = in_order & (in_order.cumsum(1) <= count[:, None])
        alive = np.zeros_like(state.alive)
        np.put_along_axis(alive, order, stays, 1)
        return _State(alive, carried, following)

    def finish(self, state: _State) -> float:
        """Run the remaining layers; mean share of rater -> vision attention that was carried, in [0, 1]."""
        carried = state.carried + self._carried(state, len(self._layers))
        return float((carried / self._total).mean())

    def retained(self, stages: Sequence[Stage]) -> float:
        """`finish` after all ``stages``."""
        state = self.start()
        for stage in stages:
            state = self.drop(state, stage)
        return self.finish(state)

    def _carried(self, state: _State, following: int) -> np.ndarray:
        run = self._to_come[:, state.first] - self._to_come[:, following]
        return np.einsum("st,st->s", run, state.alive)

    def _order(self, layer: int) -> np.ndarray:
        if layer not in self._orders:
            scores = self._scores[:, self._layers.index(layer)]
            self._orders[layer] = np.argsort(-scores, axis=1, kind="stable")
        return self._orders[layer]


def _padded(arrays: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """``[layers, tokens_i]`` arrays as one ``[samples, layers, most tokens]``."""
    most = max(array.shape[1] for array in arrays)
    padded = np.full((len(arrays), arrays[0].shape[0], most), fill, dtype=np.float32)
    for place, array in enumerate(arrays):
        padded[place, :, : array.shape[1]] = array
    return padded
