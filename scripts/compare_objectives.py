"""Which objective ranks schedules as their answers do: of the first token or of the whole answer, KL or answer change?

Random schedules of several budgets and scorers are measured by both on calibration samples, and by the exact match of whole
answers on held-out samples. Finished schedules are kept in the table and not measured again:

    python -m scripts.compare_objectives PHOTO_BACKBONE photo --types row where --out outputs/objectives.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pruning_runtime import Schedule, pruned
from pruning_runtime.schedule import Stage
from schedule_finder.evaluation.metrics import same_answer
from schedule_finder.files import write_text
from schedule_finder.measuring.answer_change import answer_change
from schedule_finder.measuring.answer_kl import AnswerKL
from schedule_finder.measuring.token_policy import ANSWER_TOKENS, TokenPolicy
from schedule_finder.models.loading import LoadedBackbone, load_backbone
from schedule_finder.samples import Sample, choose_samples, open_data
from schedule_finder.solvers import BudgetTarget
from schedule_finder.solvers.shapes import random_stages

BUDGETS = (0.15, 0.25, 0.35, 0.5, 0.7)
SCORERS = ("text_guided", "mmtok", "strided", "random")
BATCH = 8
RESAMPLES = 2000
OBJECTIVES = {
    "first KL": "first token, KL",
    "whole KL": "whole answer, KL",
    "first change": "first token, answer change",
    "whole change": "whole answer, answer change",
}


def main() -> None:
    """Measure, then print a table for the documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone")
    parser.add_argument("dataset")
    parser.add_argument("--types", nargs="*", default=[], help="question types; default all")
    parser.add_argument("--schedules", type=int, default=30)
    parser.add_argument("--samples", type=int, default=16, help="calibration samples")
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True, help="table of the schedules, .csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_backbone(options.backbone)
    calibration, held_out = (
        _samples(options.dataset, use, count, options.types)
        for use, count in (("calibration", options.samples), ("held_out", options.held_out))
    )
    table = pd.read_csv(options.out) if options.out.exists() else pd.DataFrame()
    missing = [draw for draw in range(options.schedules) if draw >= len(table)]
    if missing:
        objectives = {
            name: AnswerKL.for_samples(loaded, calibration, BATCH, answer_tokens=tokens)
            for name, tokens in (("first", 1), ("whole", ANSWER_TOKENS))
        }
        full = _answers(loaded, held_out, None)
        print(
            f"full model: exact match {_share(full, held_out):.3f} on {len(held_out)} held-out samples",
            flush=True,
        )
        shape = _target(loaded, calibration)
        for draw in missing:
            stages, policy = _random_schedule(shape, draw)
            row = {"draw": draw, "scorer": policy.scorer, "stages": _text(stages)}
            for name, one in objectives.items():
                kl = one.measure(stages, policy)
                row |= {f"{name} KL": float(kl.mean()), f"{name} change": float(answer_change(kl).mean())}
            schedule = Schedule(backbone=loaded.identity, stages=policy.apply(stages), scorer=policy.choice)
            row["exact_match"] = _share(_answers(loaded, held_out, schedule), held_out)
            table = pd.concat([table, pd.DataFrame([row])], ignore_index=True)
            write_text(options.out, table.to_csv(index=False))
            print(row, flush=True)
    _report(table)


def _samples(dataset: str, use: str, count: int, types: Sequence[str]) -> list[Sample]:
    """The first samples of a use whose question is of one of ``types``."""
    data = open_data(dataset, seed=0)
    found: list[Sample] = []
    for entry in choose_samples(data, 50 * count, 50 * count, seed=0):
        if entry.use == use and len(found) < count:
            sample = data.load(entry)
            found += [sample] if not types or sample.question_type in types else []
    return found


def _target(loaded: LoadedBackbone, samples: Sequence[Sample]) -> BudgetTarget:
    """The decoder and its typical prompt; `_random_schedule` sets the budget."""
    inputs = loaded.inputs(list(samples[:BATCH]))
    vision = loaded.backbone.vision_mask(inputs["input_ids"]).sum(1).float().mean().item()
    whole = inputs["attention_mask"].sum(1).float().mean().item()
    return BudgetTarget("processed", 1.0, loaded.backbone.shape, vision, whole - vision)


def _random_schedule(target: BudgetTarget, draw: int) -> tuple[tuple[Stage, ...], TokenPolicy]:
    rng = np.random.default_rng(draw)
    policy = TokenPolicy(SCORERS[draw % len(SCORERS)])
    budget = BudgetTarget(
        "processed",
        float(rng.choice(BUDGETS)),
        target.shape,
        target.num_vision,
        target.num_other,
        policy=policy,
    )
    return random_stages(budget, rng, -1), policy


def _answers(loaded: LoadedBackbone, samples: Sequence[Sample], schedule: Schedule | None) -> list[str]:
    """Whole answers of the unpruned or the pruned model."""
    found: list[str] = []
    for first in range(0, len(samples), BATCH):
        inputs = {
            k: v.to(loaded.device) for k, v in loaded.inputs(list(samples[first : first + BATCH])).items()
        }
        if schedule is None:
            generated = loaded.generate(inputs, ANSWER_TOKENS)
        else:
            with pruned(loaded.backbone.model, schedule):
                generated = loaded.generate(inputs, ANSWER_TOKENS)
        found += loaded.answers(generated[:, inputs["input_ids"].shape[1] :])
    return found


def _share(answers: Sequence[str], samples: Sequence[Sample]) -> float:
    return float(np.mean([same_answer(one, s.answer) for one, s in zip(answers, samples, strict=True)]))


def _text(stages: Sequence[Stage]) -> str:
    return " ".join(f"{stage.layer}:{stage.keep_ratio:.3f}" for stage in stages)


def _report(table: pd.DataFrame) -> None:
    """Spearman correlation of each objective with exact match, with 95 % intervals over resampled schedules."""
    rng = np.random.default_rng(0)
    draws = [table.iloc[rng.integers(0, len(table), len(table))] for _ in range(RESAMPLES)]
    resampled = {name: np.array([_rank_correlation(one, name) for one in draws]) for name in OBJECTIVES}
    print(
        f"\n| objective | Spearman correlation with exact match, {len(table)} schedules | 95 % interval |\n|---|---|---|"
    )
    for name, words in OBJECTIVES.items():
        low, high = np.nanquantile(resampled[name], [0.025, 0.975])
        print(f"| {words} | {_rank_correlation(table, name):.3f} | {low:.3f} to {high:.3f} |")
    for measure in ("KL", "change"):
        gain = resampled[f"first {measure}"] - resampled[f"whole {measure}"]
        low, high = np.nanquantile(gain, [0.025, 0.975])
        print(
            f"{measure}, first minus whole: 95 % {low:.3f} to {high:.3f} (above 0: the whole answer ranks better)"
        )
    best = {name: float(table.exact_match[table[name].idxmin()]) for name in OBJECTIVES}
    print(f"exact match of the schedule with the least of each: {best}")


def _rank_correlation(table: pd.DataFrame, name: str) -> float:
    """-1: the lower the objective, the more answers are right."""
    return float(table[name].rank().corr(table.exact_match.rank()))


if __name__ == "__main__":
    main()
