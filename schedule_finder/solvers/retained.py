"""Keep the attention that still moves: replay on the profile what each stage would keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pruning_runtime.schedule import Stage
from schedule_finder.change_points.placement import candidate_layers, without_isolated
from schedule_finder.evidence import Alternative, SolverEvidence
from schedule_finder.profiling.store import Profile
from schedule_finder.signals import layer_shift, spread
from schedule_finder.solvers.base import Problem, Solution, Solver
from schedule_finder.solvers.budget import BudgetTarget

MAX_STAGES = 3
REPLAYED_SAMPLES = 64
"""Samples that the search replays, spread over the profile."""
RATIO_GRID = (0.8, 0.6, 0.45, 0.3, 0.2, 0.12, 0.06, 0.03)
"""Ratios tried at every stage but the last, which spends what the budget leaves."""
LEAST_GAIN = 0.002
"""What one stage more must add to the share that is retained, as every stage costs a scoring pass; and what a stage
inside a regime must retain more than one at the end of a regime."""
BEAM = 3
"""Choices of layers that are carried over to one stage more."""


class RetainedEvidence(SolverEvidence):
    """What each profiled layer counted, how many samples the search replayed, and the best stages at regimes' ends."""

    layer_weights: list[float]
    replayed_samples: int
    at_regime_ends: Alternative | None = None


class Retained(Solver):
    """Spend the budget where it keeps most of the attention that later layers pay to vision tokens.

    The stages are replayed on the profile: which tokens would be kept, and what share of each layer's
    text query -> vision attention they carry. A layer counts for half by being a layer and for half by how
    far its attention has moved from the layer before (Jensen-Shannon divergence): attention that only
    repeats itself brings the text little that is new. On the demo backbone that second half is what
    tells layers that need vision from layers that do not (docs/log.md); without a change point there is
    nothing that moves, all layers count the same, and the budget alone places the stages.

    With change points, the same search also runs over the ends of regimes alone (`candidate_layers`), and its stages
    are taken where no other layers retain `LEAST_GAIN` more. An end need not win: its scores are those of the regime
    that ends, and where the next one attends to other tokens the replay counts them as lost.

    Layers are searched by a beam: every single layer, then one layer more beside the best choices so
    far; for each choice every falling sequence of ratios on a grid, the last ratio spending the rest of
    the budget exactly. Tokens are kept by the scorer's stored scores; those come from the unpruned
    model, which is what makes this a replay and not a measurement.
    """

    name = "retained"

    def solve(self, problem: Problem) -> Solution:
        """See `Solver.solve`; evidence holds the objective and the best choice per number of stages."""
        profile, change_points, budget = problem.profile, problem.change_points, problem.budget
        deepest = budget.deepest_layer()
        candidates = _regular(problem, deepest)
        replay = Replay(profile, problem.policy.scorer, layer_weights(profile, moving=bool(change_points)))
        best = _search(budget, replay, candidates, deepest)
        value, stages = _cheapest_of_the_best(best)
        ends = _regime_ends(problem, candidates)
        at_ends = _search(budget, replay, ends, deepest) if ends and ends[0] <= deepest else {}
        placed_by = "attention shifts" if change_points else "budget"
        if at_ends:
            end_value, end_stages = _cheapest_of_the_best(at_ends)
            if end_value >= value - LEAST_GAIN:
                value, stages, placed_by = end_value, end_stages, "ends of regimes"
        return Solution(
            stages,
            problem.policy,
            RetainedEvidence(
                solver=self.name,
                objective="share of text query -> vision attention on the tokens that layers compute, "
                "layers weighted half evenly and half by how far their attention moves",
                retained=value,
                by_number_of_stages={
                    str(number): _alternative(found_value, chosen)
                    for number, (found_value, chosen) in sorted(best.items())
                },
                layer_weights=[round(float(weight), 5) for weight in replay.weights],
                placed_by=placed_by,
                at_regime_ends=_alternative(*_cheapest_of_the_best(at_ends)) if at_ends else None,
                replayed_samples=replay.num_samples,
            ),
        )


def _regular(problem: Problem, deepest: int) -> list[int]:
    """Layers that are not isolated; all usable ones where the budget is met by isolated layers only."""
    usable = problem.budget.stage_layers()
    regular = without_isolated(usable, problem.isolated)
    return regular if any(layer <= deepest for layer in regular) else usable


def _regime_ends(problem: Problem, candidates: Sequence[int]) -> list[int]:
    """The last of the ``candidates`` in every regime but the last; none without change points."""
    depth = problem.budget.shape.num_layers
    others = set(range(depth)) - set(candidates)
    return candidate_layers(problem.change_points, depth, others)


def _search(
    budget: BudgetTarget, replay: Replay, candidates: Sequence[int], deepest: int
) -> dict[int, tuple[float, tuple[Stage, ...]]]:
    """Share retained and stages of the best choice of each number of the ``candidates``."""
    best: dict[int, tuple[float, tuple[Stage, ...]]] = {}
    choices: list[tuple[int, ...]] = [(layer,) for layer in candidates if layer <= deepest]
    for number in range(1, MAX_STAGES + 1):
        found = sorted(_best_spendings(budget, replay, choices), key=lambda one: -one[0])
        if not found:
            break
        best[number] = found[0]
        kept = [tuple(stage.layer for stage in stages) for _, stages in found[:BEAM]]
        longer = {tuple(sorted({*layers, layer})) for layers in kept for layer in candidates}
        choices = [layers for layers in sorted(longer) if len(layers) > number and layers[0] <= deepest]
    return best


def _cheapest_of_the_best(
    best: dict[int, tuple[float, tuple[Stage, ...]]],
) -> tuple[float, tuple[Stage, ...]]:
    """The fewest stages to which no further one adds `LEAST_GAIN`."""
    value, stages = best[1]
    for one_more in list(best.values())[1:]:
        if one_more[0] > value + LEAST_GAIN:
            value, stages = one_more
    return value, stages


def _alternative(retained: float, stages: tuple[Stage, ...]) -> Alternative:
    return Alternative(stages=list(stages), retained=retained)


def layer_weights(profile: Profile, *, moving: bool) -> np.ndarray:
    """How much each profiled layer counts, summing to 1; even where nothing is ``moving``."""
    layers = len(profile.layers)
    even = np.full(layers, 1 / layers)
    if not moving:
        return even
    # The first layer's move is unknown; it is always computed in full, so its weight changes no choice.
    moved = np.concatenate([[0.0], layer_shift(spread(profile.maps)).mean(0)])
    return (even + moved / moved.sum()) / 2


def _best_spendings(
    budget: BudgetTarget, replay: Replay, choices: Sequence[tuple[int, ...]]
) -> Iterator[tuple[float, tuple[Stage, ...]]]:
    """For each choice of layers the ratios that retain most; choices that cannot spend the budget yield none."""
    for layers in choices:
        best: tuple[float, tuple[Stage, ...]] | None = None
        for ratios in combinations(RATIO_GRID, len(layers) - 1):
            stages = budget.spend_rest(layers, ratios)
            if stages is None:
                continue
            value = replay.retained(stages)
            if best is None or value > best[0]:
                best = value, stages
        if best is not None:
            yield best


@dataclass(frozen=True)
class _State:
    """A replay up to some layer: who is left, and what the layers so far have carried."""

    alive: np.ndarray
    carried: np.ndarray
    first: int


class Replay:
    """Which tokens stages would keep in the profiled samples, and the attention those carry.

    ``weights`` (one per profiled layer, summing to 1) say what a layer's attention counts. Samples are
    padded to the longest: a token that does not exist scores lowest and carries nothing.
    """

    def __init__(
        self, profile: Profile, scorer: str, weights: np.ndarray, samples: int = REPLAYED_SAMPLES
    ) -> None:
        places = np.unique(np.linspace(0, len(profile) - 1, min(samples, len(profile))).astype(int))
        part = profile.subset(places)
        self.num_samples = len(part)
        self._layers: list[int] = part.layers
        self._num_vision = part.counts["num_vision"]
        self.weights = weights
        attention = _padded(part.maps, 0.0)
        totals = np.maximum(attention.sum(2, keepdims=True), np.finfo(np.float32).tiny)
        attention = attention / totals * weights[:, None].astype(np.float32)
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
        order = self._order(max(stage.layer, 0))  # before the decoder layer 0 scores as well
        in_order = np.take_along_axis(state.alive, order, 1)
        stays = in_order & (in_order.cumsum(1) <= count[:, None])
        alive = np.zeros_like(state.alive)
        np.put_along_axis(alive, order, stays, 1)
        return _State(alive, carried, following)

    def finish(self, state: _State) -> float:
        """Run the remaining layers; mean over samples of the weighted share that was carried, in [0, 1]."""
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
