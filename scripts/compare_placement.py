"""Are stages at change points better than evenly spaced ones or random ones? Answer change at equal budgets.

All placements have the same number of stages, the same scorer, and keep ratios that fall by the same factor from stage
to stage; the factor spends the budget exactly. Only the layers differ. Needs a run with a profile and change points:

    python -m scripts.compare_placement outputs/demo
    python -m scripts.compare_placement outputs/photo --detector token_curve --scorer random

The last line of stdout is one compact JSON document.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pruning_runtime.schedule import Stage
from schedule_finder.change_points import DETECTORS, candidate_layers
from schedule_finder.cli.session import load_again, open_run
from schedule_finder.intervals import mean_interval
from schedule_finder.measuring.answer_change import answer_change
from schedule_finder.measuring.answer_kl import AnswerKL, TokenPolicy
from schedule_finder.run.reader import read_change_points
from schedule_finder.samples import read_entries
from schedule_finder.search import Search

if TYPE_CHECKING:
    from collections.abc import Sequence

    from schedule_finder.solvers.budget import BudgetTarget


def main() -> None:
    """Print a table, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--samples", type=int, default=128, help="samples to measure on")
    parser.add_argument("--random", type=int, default=20, help="random placements")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.35, 0.5])
    parser.add_argument("--scorer", default="text_guided")
    parser.add_argument(
        "--detector", choices=DETECTORS, help="whose change points; default: those that schedules follow"
    )
    options = parser.parse_args()
    run = open_run(options.run)
    loaded, data = load_again(run, "auto", "auto", None)
    found = read_change_points(run.change_points)
    entries = {entry.id: entry for entry in read_entries(run.samples)}
    names = run.profile.ids()[: options.samples]
    answer_kl = AnswerKL.for_samples(
        loaded, [data.load(entries[name]) for name in names], 32, answer_tokens=1
    )
    policy = TokenPolicy(options.scorer)
    search = Search(run)
    change_points = found.of(options.detector)
    if not change_points:
        raise SystemExit(
            f"{options.run}: {options.detector or found.default} has no change points that schedules follow, so nothing to "
            "place stages at"
        )
    rows = []
    for share in options.budgets:
        budget = search.target(share, "processed")
        usable = [layer for layer in budget.stage_layers() if layer not in found.isolated]
        own = list(candidate_layers(change_points, budget.shape.num_layers, found.isolated))
        placements = {"change points": own, "even spacing": even_layers(usable, len(own))}
        rng = np.random.default_rng(0)
        for draw in range(options.random):
            chosen = rng.choice(usable, len(own), replace=False)
            placements[f"random {draw}"] = sorted(int(layer) for layer in chosen)
        for name, layers in placements.items():
            stages = equal_factor_stages(budget, layers)
            if stages is not None:
                change = answer_change(answer_kl.measure(stages, policy))
                rows.append({"budget": share, "placement": name, "layers": layers, "change": change.tolist()})
        print_budget(share, [row for row in rows if row["budget"] == share])
    summary = [row | {"change": float(np.mean(row["change"]))} for row in rows]
    print(json.dumps(summary, separators=(",", ":")))


def even_layers(usable: Sequence[int], number: int) -> list[int]:
    """``number`` of the layers, evenly spaced."""
    places = np.linspace(0, len(usable), number + 2)[1:-1]
    return sorted({usable[int(place)] for place in places})


def equal_factor_stages(budget: BudgetTarget, layers: Sequence[int]) -> tuple[Stage, ...] | None:
    """Stages at ``layers`` whose ratios fall by one factor that spends the budget; None if it is out of reach."""

    def stages(factor: float) -> tuple[Stage, ...]:
        return tuple(Stage(layer=layer, keep_ratio=factor ** (i + 1)) for i, layer in enumerate(layers))

    low, high = 0.0, 1.0
    if not layers or budget.cost(stages(low)) > budget.target:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if budget.cost(stages(middle)) > budget.target else (middle, high)
    return stages(low)


def print_budget(share: float, rows: Sequence[dict[str, object]]) -> None:
    """Mean answer change of each placement, and the paired differences of the others from the change points."""
    named = {str(row["placement"]): row for row in rows}
    random = np.array([row["change"] for name, row in named.items() if name.startswith("random")])
    print(f"budget {share:.0%} processed")
    own = named.get("change points")
    for name in ("change points", "even spacing"):
        if name in named:
            change = np.array(named[name]["change"])
            low, high = mean_interval(change)
            print(
                f"  {name:14} layers {named[name]['layers']}: {change.mean():.3f} ({low:.3f} to {high:.3f})"
            )
    if len(random):
        means = random.mean(axis=1)
        print(f"  {len(means)} random: mean {means.mean():.3f}, {means.min():.3f} to {means.max():.3f}")
    if own is None:
        print("  stages at the change points cannot meet this budget")
        return
    change = np.array(own["change"])
    if "even spacing" in named:
        low, high = mean_interval(np.array(named["even spacing"]["change"]) - change)
        print(f"  even spacing less change points: {low:+.3f} to {high:+.3f} (95 %)")
    if len(random):
        print(
            f"  change points are better than {np.mean(random.mean(axis=1) > change.mean()):.0%} of the random ones"
        )


if __name__ == "__main__":
    main()
