"""How good are the schedules that search finds? Solvers, published recipes and baselines on held-out questions.

For each backbone: a profile of 1000 calibration samples, a schedule from every solver for every budget, and on
held-out questions the share of answers whose first word is right, with paired bootstrap intervals of the
difference to the default solver. Then: does a solver's own objective predict that share over random schedules?

Resumable: what stands in the CSV files is not done again. Run from the repository root:

    python -m scripts.study_discovery demo
    python -m scripts.study_discovery demo outputs/backbones/depth8 outputs/backbones/depth16 --questions 2250
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from pruning_runtime.schedule import DroppedTokens, Stage
from schedule_finder.errors import InputError
from schedule_finder.figures.study import methods_figure, predictions_figure
from schedule_finder.intervals import mean_interval, wilson_interval
from schedule_finder.measuring.answer_kl import AnswerKL, TokenPolicy
from schedule_finder.models.loading import LoadedBackbone, load_backbone
from schedule_finder.run.folder import Run
from schedule_finder.samples import choose_samples, open_data
from schedule_finder.search import AUTO, Search
from schedule_finder.solvers import BudgetTarget
from schedule_finder.solvers.retained import Replay, layer_weights
from schedule_finder.solvers.sensitivity import predict
from schedule_finder.solvers.shapes import random_stages, scaled_to_budget

BUDGETS = (0.5, 0.25, 0.15, 0.1)
DEFAULT = "sensitivity"
SCORERS = ("text_guided", "uniform_text", "last_token", "strided", "random")
RANDOM_DRAWS = 5
RANDOM_SCHEDULES = 80
RANDOM_QUESTIONS = 450
BATCH = 64
_MERGING: tuple[tuple[str, DroppedTokens], ...] = (("", "discard"), (", merged", "merge"))
"""End of a method's name, and what happens to its dropped tokens."""

Stages = tuple[Stage, ...]
Chosen = tuple[Stages, TokenPolicy]
Solve = Callable[[Chosen | None], Chosen]


@dataclass
class Study:
    """One backbone with its run and its held-out questions."""

    name: str
    loaded: LoadedBackbone
    run: Run
    search: Search
    plain: Search
    """The same run, for what is measured without merging."""
    answer_kl: AnswerKL
    expected: np.ndarray
    folder: Path

    def right(
        self, stages: Stages, policy: TokenPolicy, questions: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Whether each question's first word is right, and its answer KL in nats, ``[questions]`` both."""
        kl, tokens = self.answer_kl.measure_with_tokens(stages, policy, questions)
        return tokens == self.expected[: len(tokens)], kl


def main() -> None:
    """Run the study for each backbone named, then print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbones", nargs="+", help="`demo` or folders that train_demo_backbone.py wrote")
    parser.add_argument("--questions", type=int, default=2250, help="held-out questions")
    parser.add_argument("--out", type=Path, default=Path("outputs/study"))
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for backbone in arguments.backbones:
        study = _prepare(backbone, arguments.questions, arguments.out)
        _methods(study, arguments.budgets)
        _predictions(study)
    _report(arguments.out)


def _prepare(backbone: str, questions: int, out: Path) -> Study:
    name = Path(backbone).name
    run = Run(out / name / "run")
    common = [sys.executable, "-m", "schedule_finder"]
    options = ["--dataset", "demo", "--samples", "1000", "--eval-samples", "0", "--threads", "1"]
    profile = [*common, "profile", backbone, *options, "--out", str(run.folder)]
    for command in (profile, [*common, "detect", str(run.folder)]):
        subprocess.run(command, check=True)
    plain = out / name / "run_not_merged"
    if not plain.exists():
        shutil.copytree(run.folder, plain)
    loaded = load_backbone(backbone, device="cpu")
    data = open_data("demo")
    entries = [entry for entry in choose_samples(data, 2, questions, seed=0) if entry.use == "held_out"]
    samples = [data.load(entry) for entry in entries]
    words = loaded.processor.tokenizer([sample.answer for sample in samples], add_special_tokens=False)
    return Study(
        name,
        loaded,
        run,
        Search(run, (loaded, data)),
        Search(Run(plain), (loaded, data)),
        AnswerKL.for_samples(loaded, samples, BATCH, answer_tokens=1),
        np.array([ids[0] for ids in words["input_ids"]]),
        out / name,
    )


# ---- what is compared


def _methods(study: Study, budgets: Sequence[float]) -> None:
    """``methods.csv``: a row per method and budget; ``right.parquet``: each question's outcome."""
    path, outcomes = study.folder / "methods.csv", study.folder / "right.parquet"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    right = pd.read_parquet(outcomes) if outcomes.exists() else pd.DataFrame()
    if not rows:
        judged, kl = study.right((), TokenPolicy("strided"))
        rows.append(_row(study, "full", 1.0, (), TokenPolicy("strided"), judged, kl, 0.0))
        right["full"] = judged
    done = {(row["method"], row["budget"]): row for row in rows}
    for budget in budgets:
        chosen: Chosen | None = None
        for method, solve in _contenders(study, budget):
            if (row := done.get((method, budget))) is not None:
                if method == DEFAULT:
                    chosen = _parse(row["stages"]), TokenPolicy(row["scorer"], row["dropped_tokens"])
                continue
            begun = time.perf_counter()
            try:
                stages, policy = solve(chosen)
            except InputError as error:
                print(f"{study.name}, {method} at {budget:.0%}: {error}")
                continue
            seconds = time.perf_counter() - begun
            if method == DEFAULT:
                chosen = stages, policy
            judged, kl = study.right(stages, policy)
            rows.append(_row(study, method, budget, stages, policy, judged, kl, seconds))
            right[f"{method} {budget}"] = judged
            print(f"{study.name} {budget:.0%} {method}: {judged.mean():.3f}, KL {kl.mean():.3f}", flush=True)
            pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")
            right.to_parquet(outcomes)


def _contenders(study: Study, budget: float) -> Iterator[tuple[str, Solve]]:
    """Methods, and what gives their stages and policy, some from what the default solver chose."""
    target = study.search.target(budget, "processed")
    earliest = study.search.profile.earliest_stage

    def solved(solver: str, dropped_tokens: str = AUTO) -> Solve:
        def solve(_chosen: Chosen | None) -> Chosen:
            search = study.plain if dropped_tokens == "discard" else study.search
            found = search.solve(budget, "processed", solver=solver, dropped_tokens=dropped_tokens)
            return found.stages, TokenPolicy(found.scorer.name, found.dropped_tokens)

        return solve

    def as_yardstick(chosen: Chosen | None) -> Chosen:
        """Brute force under the policy that the default solver chose."""
        if chosen is None:
            raise InputError("the default solver found no schedule to compare with")
        return solved("grid", chosen[1].dropped_tokens)(None)

    def its_stages(**changes: str) -> Solve:
        def take(chosen: Chosen | None) -> Chosen:
            if chosen is None:
                raise InputError("the default solver found no schedule to compare with")
            return chosen[0], replace(chosen[1], **changes)

        return take

    def drawn(draw: int) -> Callable[[], Stages]:
        return lambda: random_stages(target, np.random.default_rng(draw), earliest)

    def with_rule(stages: Callable[[], Stages], scorer: str, dropped_tokens: DroppedTokens) -> Solve:
        return lambda _chosen: (stages(), TokenPolicy(scorer, dropped_tokens))

    yield DEFAULT, solved(DEFAULT)
    yield f"{DEFAULT}, not merged", solved(DEFAULT, "discard")
    yield "grid", as_yardstick
    for solver in ("retained", "paper", "pyramid", "fitprune"):
        yield solver, solved(solver, "discard")
    yield "paper, merged", solved("paper", "merge")
    yield "pyramid, merged", solved("pyramid", "merge")
    for scorer in SCORERS:
        yield f"its stages, {scorer}", its_stages(scorer=scorer)
    yield "its stages, not merged", its_stages(dropped_tokens="discard")
    last = (Stage(layer=target.deepest_layer(), keep_ratio=0.0),)
    yield "vtw", with_rule(lambda: last, "text_guided", "discard")
    for suffix, dropped in _MERGING:
        yield f"fastv{suffix}", with_rule(lambda: _one_stage(target, 1), "last_token", dropped)
        yield f"sparsevlm{suffix}", with_rule(lambda: _sparsevlm(target), "uniform_text", dropped)
    for draw in range(RANDOM_DRAWS):
        for suffix, dropped in _MERGING:
            yield f"random layers {draw}{suffix}", with_rule(drawn(draw), "text_guided", dropped)


def _one_stage(target: BudgetTarget, layer: int) -> Stages:
    """FastV: one stage after its published layer, or after the first where the budget forbids that."""
    return target.spend_rest([layer], ()) or target.spend_rest([min(layer, target.deepest_layer())], ()) or ()


def _sparsevlm(target: BudgetTarget) -> Stages:
    return scaled_to_budget([3 / 32, 7 / 32, 16 / 32], [303 / 576, 110 / 576, 36 / 576], target)


def _row(
    study: Study,
    method: str,
    budget: float,
    stages: Stages,
    policy: TokenPolicy,
    judged: np.ndarray,
    kl: np.ndarray,
    seconds: float,
) -> dict[str, object]:
    low, high = wilson_interval(int(judged.sum()), len(judged))
    cost = study.search.target(budget, "processed").under(policy).account(stages)
    return {
        "backbone": study.name,
        "method": method,
        "budget": budget,
        "questions": len(judged),
        "right": judged.mean(),
        "ci_low": low,
        "ci_high": high,
        "kl": kl.mean(),
        "processed": cost.processed,
        "flops": cost.flops,
        "scorer": policy.scorer,
        "dropped_tokens": policy.dropped_tokens,
        "stages": " ".join(f"{stage.layer}:{stage.keep_ratio:.6f}" for stage in stages),
        "solve_seconds": seconds,
    }


def _parse(text: str) -> Stages:
    pairs = (part.split(":") for part in text.split())
    return tuple(Stage(layer=int(layer), keep_ratio=float(ratio)) for layer, ratio in pairs)


# ---- does the objective predict?


def _predictions(study: Study) -> None:
    """``predictions.csv``: random schedules, what solvers say of them, and what they do."""
    path = study.folder / "predictions.csv"
    if path.exists():
        return
    profile, detections = study.search.profile, study.search.detections
    moving = bool(detections.of())
    replay = Replay(profile, "text_guided", layer_weights(profile, moving=moving))
    table = study.search.sensitivity_table()
    policy, earliest = table.policy, profile.earliest_stage
    rng, rows = np.random.default_rng(0), []
    for number in range(RANDOM_SCHEDULES):
        least = study.search.target(1.0, "processed").cost((Stage(layer=earliest, keep_ratio=0.0),))
        target = study.search.target(float(rng.uniform(least + 0.01, 0.6)), "processed")
        stages = random_stages(target, rng, earliest)
        judged, kl = study.right(stages, policy, RANDOM_QUESTIONS)
        rows.append(
            {
                "backbone": study.name,
                "processed": target.target,
                "stages": " ".join(f"{stage.layer}:{stage.keep_ratio:.4f}" for stage in stages),
                "right": judged.mean(),
                "kl": kl.mean(),
                "predicted_change": predict(table, target, stages),
                "retained": replay.retained(stages),
            }
        )
        print(f"{study.name} prediction {number + 1}/{RANDOM_SCHEDULES}", end="\r", flush=True)
    pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")


# ---- tables


def _report(out: Path) -> None:
    """Print, and write for all backbones together: methods, differences to the default, rank correlations."""
    methods = pd.concat([pd.read_csv(path) for path in sorted(out.glob("*/methods.csv"))])
    differences = pd.concat([_differences(path.parent) for path in sorted(out.glob("*/right.parquet"))])
    methods = methods.merge(differences, on=["backbone", "method", "budget"], how="left")
    methods.to_csv(out / "methods.csv", index=False, float_format="%.6g")
    predictions = pd.concat([pd.read_csv(path) for path in sorted(out.glob("*/predictions.csv"))])
    predictions.to_csv(out / "predictions.csv", index=False, float_format="%.6g")
    for name, figure in (
        ("methods", methods_figure(methods)),
        ("predictions", predictions_figure(predictions)),
    ):
        for suffix in ("pdf", "png"):
            figure.savefig(out / f"{name}.{suffix}", dpi=200)
    for name, some in methods.groupby("backbone"):
        shown = some.assign(right=(100 * some.right).round(1)).pivot_table(
            index="method", columns="budget", values="right", sort=False
        )
        print(f"\n{name}: first word right, %\n{shown.to_string()}")
        spread = some[some.method != "full"].assign(
            against=lambda t: [
                f"{100 * d:+.1f} ({100 * low:+.1f} {100 * high:+.1f})"
                for d, low, high in zip(t.difference, t.difference_low, t.difference_high, strict=True)
            ]
        )
        print(f"{name}: difference to {DEFAULT} in points, 95 % paired bootstrap")
        print(spread.pivot(index="method", columns="budget", values="against").to_string())
    for name, some in predictions.groupby("backbone"):
        for objective, sign in (("predicted_change", -1), ("retained", 1), ("kl", -1)):
            rho = spearmanr(sign * some[objective], some.right).statistic
            print(f"{name}: Spearman of {objective} with right over {len(some)} random schedules: {rho:.2f}")


def _differences(folder: Path) -> pd.DataFrame:
    """Each method's difference to the default solver at the same budget, with its interval."""
    right = pd.read_parquet(folder / "right.parquet").astype(float)
    rows = []
    for column in right.columns:
        method, _, budget = column.rpartition(" ")
        if not method or f"{DEFAULT} {budget}" not in right:
            continue
        difference = (right[column] - right[f"{DEFAULT} {budget}"]).to_numpy()
        low, high = mean_interval(difference, resamples=2000)
        rows.append(
            {
                "backbone": folder.name,
                "method": method,
                "budget": float(budget),
                "difference": difference.mean(),
                "difference_low": low,
                "difference_high": high,
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
