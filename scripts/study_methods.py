"""Study of token rules: every scorer at equal budgets, where its authors use it and on the searched stages.

For each budget (share of the vision tokens that layers compute) it compares, on the same held-out questions and with the
same runtime: the search, every rule at its published place scaled to the budget, every rule on the searched stages, and
evenly strided and random tokens. A question counts as right if the first token that the model gives begins its answer.
Methods are compared by answer change, the search's own objective, and answer KL stands beside it.

Questions are answered in chunks; `outcomes.parquet` holds every question's result of all finished chunks, so a study
goes on where it stopped and can be enlarged later (`--questions`). Run from the repository root, after
`adaptinfer-profile profile` and `detect` have filled the run folder:

    python -m scripts.study_methods outputs/photo_backbone --run outputs/photo --dataset photo --questions 400

Writes `schedules.json` (what is compared), `outcomes.parquet`, `methods.csv`, `methods.png` and `methods.pdf` to `--out`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from pruning_runtime.errors import PruningError, ScheduleError, UnsupportedBackbone
from pruning_runtime.preflight import check_setup
from pruning_runtime.schedule import Schedule, Stage
from pruning_runtime.scorers import SCORERS, FeatureScorer
from schedule_finder.errors import InputError
from schedule_finder.figures.rules_study import PLACES, rules_figure
from schedule_finder.files import write_json, write_text
from schedule_finder.intervals import mean_interval, wilson_interval
from schedule_finder.measuring.answer_change import answer_change
from schedule_finder.measuring.answer_kl import AnswerKL
from schedule_finder.measuring.token_policy import TokenPolicy
from schedule_finder.models.loading import LoadedBackbone, load_backbone
from schedule_finder.run.folder import Run
from schedule_finder.samples import DataSet, Sample, choose_samples, open_data
from schedule_finder.search import Search
from schedule_finder.solvers import BudgetTarget
from schedule_finder.solvers.sensitivity import UNNEEDED
from schedule_finder.solvers.shapes import scaled_to_budget
from schedule_finder.solvers.whole_schedules import respent

BUDGETS = (0.5, 0.25, 0.15, 0.1)
SEARCHED = "search"
CHUNK = 48
"""Questions that all methods answer before the next ones begin."""
BATCH = 16

Stages = tuple[Stage, ...]

PUBLISHED: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "text_guided": ((2 / 32, 11 / 32, 21 / 32), (133 / 576, 27 / 576, 3 / 576)),
    "sparsevlm": ((3 / 32, 7 / 32, 16 / 32), (303 / 576, 110 / 576, 36 / 576)),
    "last_token": ((2 / 32,), (0.5,)),
    "dart": ((2 / 32,), (0.5,)),
}
"""Share of the layers that have run when tokens leave, and keep ratios, of rules inside the decoder: AdaptInfer,
SparseVLM, FastV, DART."""
PYRAMID = ((8 / 32, 16 / 32, 24 / 32), (0.5, 0.25, 0.125))
"""PyramidDrop's layers and ratios, with the attention of the last token."""


@dataclass(frozen=True)
class Compared:
    """A method at one budget: stages, and the scorers that rank tokens there."""

    method: str
    place: str
    """A key of `rules_study.PLACES`."""
    budget: float
    stages: list[list[float]]
    scorer: str
    pre_decoder: str | None
    dropped_tokens: str
    processed: float
    flops: float

    @property
    def key(self) -> str:
        """Column of its outcomes."""
        return f"{self.method} | {self.place} | {self.budget}"

    def run(self, answer_kl: AnswerKL) -> tuple[np.ndarray, np.ndarray]:
        """Answer KL in nats and the first token of each question."""
        stages = tuple(Stage(layer=int(layer), keep_ratio=ratio) for layer, ratio in self.stages)
        policy = TokenPolicy(self.scorer, self.dropped_tokens, pre_decoder=self.pre_decoder)  # type: ignore[arg-type]
        return answer_kl.measure_with_tokens(stages, policy)


def main() -> None:
    """Choose what is compared, answer the questions, and write the table and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbone")
    parser.add_argument("--run", type=Path, required=True, help="run folder with a profile of the backbone")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--questions", type=int, default=400, help="held-out questions")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument(
        "--places", nargs="+", choices=PLACES, help="where rules are placed; default: everywhere"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/study_methods"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="begin no chunk after so many minutes")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    begun = time.monotonic()
    loaded = load_backbone(asked.backbone, device="cpu")
    data = open_data(asked.dataset)
    compared = _compared(asked.out / "schedules.json", asked.run, loaded, data, asked.budgets)
    places = {SEARCHED, *(asked.places or PLACES)}
    compared = [one for one in compared if one.place in places]
    entries = [entry for entry in choose_samples(data, 2, asked.questions, seed=0) if entry.use == "held_out"]
    outcomes = asked.out / "outcomes.parquet"
    for first in range(0, len(entries), CHUNK):
        samples = [data.load(entry) for entry in entries[first : first + CHUNK]]
        if asked.minutes is not None and time.monotonic() - begun > 60 * asked.minutes:
            break
        _answer(outcomes, loaded, samples, compared)
        report(asked.out, compared)


# ---- what is compared


def _compared(
    path: Path, run: Path, loaded: LoadedBackbone, data: DataSet, budgets: Sequence[float]
) -> list[Compared]:
    """The methods, from the file of an earlier start or chosen now."""
    known = [Compared(**one) for one in json.loads(path.read_text())] if path.exists() else []
    search = Search(Run(run), (loaded, data), batch_size=BATCH)
    for budget in budgets:
        if any(one.budget == budget for one in known):
            continue
        known += _methods(search, loaded, budget)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, [asdict(one) for one in known])
    return [one for one in known if one.budget in budgets]


def _methods(search: Search, loaded: LoadedBackbone, budget: float) -> list[Compared]:
    """Everything at one budget that the backbone allows."""
    target = search.target(budget, "processed")
    schedule = search.solve(budget, "processed")
    first = schedule.stages[0]
    pre_decoder = first.scorer.name if first.scorer is not None else None
    policy = TokenPolicy(schedule.scorer.name, schedule.dropped_tokens, pre_decoder=pre_decoder)
    found = [_one(SEARCHED, SEARCHED, target.under(policy), schedule.stages)]
    found += [
        _one(name, place, target.under(rule), stages)
        for name, place, rule, stages in _placed(
            target, schedule, search.sensitivity_table().last_needed(UNNEEDED)
        )
    ]
    return [one for one in found if _allowed(loaded, schedule, one)]


def _placed(
    target: BudgetTarget, schedule: Schedule, end: int | None
) -> Iterator[tuple[str, str, TokenPolicy, Stages]]:
    """Every rule before the decoder, at its published place, and on the searched stages; ``end``: where vision ends."""
    for name, rule in SCORERS.items():
        policy = TokenPolicy(name)
        budget = target.under(policy)
        ways: list[tuple[str, Callable[[], Stages | None]]] = [
            ("searched stages", lambda budget=budget: respent(schedule.stages, budget))  # type: ignore[misc]
        ]
        if not (issubclass(rule, FeatureScorer) and rule.needs_layer):
            ways.append(("before the decoder", lambda budget=budget: budget.spend_rest([-1], ())))  # type: ignore[misc]
            if end is not None:
                ways.append(("leaving twice", lambda budget=budget: budget.spend_first(-1, end)))  # type: ignore[misc]
        if schedule.dropped_tokens == "merge":
            merging = target.under(TokenPolicy(name, "merge"))
            ways.append(("searched stages, merged", lambda budget=merging: respent(schedule.stages, budget)))  # type: ignore[misc]
        if name in PUBLISHED:
            ways.append(
                ("published", lambda name=name, budget=budget: scaled_to_budget(*PUBLISHED[name], budget))  # type: ignore[misc]
            )
        for place, stages_of in ways:
            try:
                stages = stages_of()
            except InputError:
                continue  # the published layers cannot meet this budget
            if stages is not None:
                merged = TokenPolicy(name, "merge" if place.endswith("merged") else "discard")
                yield name, place, merged, stages
    try:
        stages = scaled_to_budget(*PYRAMID, target.under(TokenPolicy("last_token")))
        yield "pyramiddrop", "published", TokenPolicy("last_token"), stages
    except InputError:
        return


def _one(name: str, place: str, target: BudgetTarget, stages: Sequence[Stage]) -> Compared:
    cost, policy = target.account(stages), target.policy
    assert cost.flops is not None
    return Compared(
        method=name,
        place=place,
        budget=target.target,
        stages=[[stage.layer, stage.keep_ratio] for stage in stages],
        scorer=policy.scorer,
        pre_decoder=policy.pre_decoder,
        dropped_tokens=policy.dropped_tokens,
        processed=cost.processed,
        flops=cost.flops,
    )


def _allowed(loaded: LoadedBackbone, schedule: Schedule, one: Compared) -> bool:
    """Whether the backbone can run a method; says why not."""
    stages = tuple(Stage(layer=int(layer), keep_ratio=ratio) for layer, ratio in one.stages)
    policy = TokenPolicy(one.scorer, one.dropped_tokens, pre_decoder=one.pre_decoder)  # type: ignore[arg-type]
    changed = schedule.model_copy(
        update={
            "stages": policy.apply(stages),
            "scorer": policy.choice,
            "dropped_tokens": policy.dropped_tokens,
        }
    )
    try:
        check_setup(loaded.backbone, changed)
    except (ScheduleError, UnsupportedBackbone) as error:
        print(f"left out: {one.key}: {error}")
        return False
    return True


# ---- answers


def _answer(path: Path, loaded: LoadedBackbone, samples: list[Sample], compared: Sequence[Compared]) -> None:
    """Answer one chunk with every method that has no outcome for it yet; each method is written when it is done."""
    done = pd.read_parquet(path) if path.exists() else pd.DataFrame(columns=["id", "method", "kl", "right"])
    ids = [sample.id for sample in samples]
    known = set(done[done.id.isin(ids)].method)
    missing = [one for one in compared if one.key not in known]
    if not missing and "full" in known:
        return
    answer_kl = AnswerKL.for_samples(loaded, samples, BATCH, answer_tokens=1)
    parts = [done]
    if "full" not in known:
        kl, tokens = answer_kl.measure_with_tokens((), TokenPolicy("strided"))
        parts.append(_rows(ids, "full", kl, _right(loaded, samples, tokens)))
    for one in missing:
        try:
            kl, tokens = one.run(answer_kl)
        except PruningError as error:  # what only a prompt shows, such as a rule for frames
            print(f"left out: {one.key}: {error}")
            continue
        parts.append(_rows(ids, one.key, kl, _right(loaded, samples, tokens)))
        pd.concat(parts, ignore_index=True).to_parquet(path, index=False)
        print(f"{len(ids)} questions, {one.key}: answer change {answer_change(kl).mean():.3f}", flush=True)


def _right(loaded: LoadedBackbone, samples: Sequence[Sample], tokens: np.ndarray) -> np.ndarray:
    """Whether each first token begins the question's answer, ``[questions]``."""
    pieces = loaded.processor.batch_decode([[int(token)] for token in tokens], skip_special_tokens=True)
    return np.array(
        [
            bool(piece.strip()) and (sample.answer or "").lower().startswith(piece.strip().lower())
            for piece, sample in zip(pieces, samples, strict=True)
        ]
    )


def _rows(ids: Sequence[str], method: str, kl: np.ndarray, right: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"id": ids, "method": method, "kl": kl, "right": right})


# ---- the table


def report(out: Path, compared: Sequence[Compared]) -> None:
    """Write ``methods.csv`` and the figure from the questions that every compared method has answered."""
    outcomes = pd.read_parquet(out / "outcomes.parquet")
    outcomes = outcomes[outcomes.method.isin({"full", *(one.key for one in compared)})]
    kl = outcomes.pivot_table(index="id", columns="method", values="kl").dropna()
    right = outcomes.pivot_table(index="id", columns="method", values="right", aggfunc="first").loc[kl.index]
    rows = [_row(Compared("full", "full", 1.0, [], "", None, "", 1.0, 1.0), "full", "full", kl, right)]
    for one in compared:
        if one.key not in kl:
            continue  # left out
        own = next(c.key for c in compared if c.method == SEARCHED and c.budget == one.budget)
        rows.append(_row(one, one.key, own, kl, right))
    table = pd.DataFrame(rows)
    write_text(out / "methods.csv", table.to_csv(index=False, float_format="%.6g"))
    for suffix in ("png", "pdf"):
        rules_figure(table).savefig(out / f"methods.{suffix}", dpi=200)
    for budget, some in table[table.budget < 1].groupby("budget"):
        ranks = {name: spearmanr(-some[name], some.right).statistic for name in ("change", "kl")}
        print(
            f"{budget:.0%}, {len(some)} methods: rank correlation with right answers {ranks['change']:.2f} of answer "
            f"change, {ranks['kl']:.2f} of answer KL"
        )


def _row(one: Compared, key: str, own: str, kl: pd.DataFrame, right: pd.DataFrame) -> dict[str, object]:
    """A line of the table; ``own`` is the search at the same budget, which the method is compared with."""
    hits = right[key].astype(float).to_numpy()
    low, high = wilson_interval(hits.sum(), len(hits))
    change = answer_change(kl[key].to_numpy())
    change_low, change_high = mean_interval(change)
    worse = change - answer_change(kl[own].to_numpy())
    worse_low, worse_high = mean_interval(worse)
    fields = asdict(one)
    fields["stages"] = " ".join(f"{int(layer)}:{ratio:.4f}" for layer, ratio in one.stages)
    return fields | {
        "questions": len(hits),
        "right": hits.mean(),
        "right_low": low,
        "right_high": high,
        "change": change.mean(),
        "change_low": change_low,
        "change_high": change_high,
        "kl": kl[key].mean(),
        "above_search": worse.mean(),
        "above_low": worse_low,
        "above_high": worse_high,
    }


if __name__ == "__main__":
    main()
