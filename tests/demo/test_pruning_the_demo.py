"""On the trained backbone it matters which tokens stay, and when they leave."""

from __future__ import annotations

import pytest

from pruning_runtime import Schedule, Stage
from pruning_runtime.schedule import ScorerChoice
from schedule_finder.demo import QUESTION_TYPES
from schedule_finder.evaluation.evaluate import Evaluation
from schedule_finder.evaluation.hard_subset import FEWEST
from schedule_finder.evaluation.methods import SMALLER_IMAGES, Method
from schedule_finder.models.loading import LoadedBackbone, load_backbone
from schedule_finder.samples import DemoData, choose_samples

SAMPLES = 20 * len(QUESTION_TYPES)


@pytest.fixture(scope="module")
def demo() -> LoadedBackbone:
    return load_backbone("demo", device="cpu")


def schedule(demo: LoadedBackbone, scorer: str, *stages: tuple[int, float]) -> Schedule:
    return Schedule(
        backbone=demo.identity,
        stages=tuple(Stage(layer=layer, keep_ratio=ratio) for layer, ratio in stages),
        scorer=ScorerChoice(name=scorer),
    )


@pytest.fixture(scope="module")
def exact_match(demo: LoadedBackbone) -> dict[str, float]:
    """Exact match of each way to prune, on the same held-out samples."""
    methods = [
        Method("text-guided tenth", schedule(demo, "text_guided", (1, 0.1))),
        Method("random tenth", schedule(demo, "random", (1, 0.1))),
        Method("nothing, early", schedule(demo, "text_guided", (1, 0.0))),
        Method("nothing, late", schedule(demo, "text_guided", (6, 0.0))),
    ]
    data = DemoData(seed=11)
    entries = [entry for entry in choose_samples(data, 0, SAMPLES, seed=11) if entry.use == "held_out"]
    evaluation = Evaluation(demo, methods, max_new_tokens=4)
    for first in range(0, SAMPLES, 36):
        evaluation.run_batch([data.load(entry) for entry in entries[first : first + 36]])
    table = evaluation.table()
    overall = table[table.question_type == "all"]
    return dict(zip(overall.method, overall.exact_match, strict=True))


def test_random_tokens_fall_far_below_text_guided_ones(exact_match: dict[str, float]) -> None:
    assert exact_match["full"] > 0.9
    assert exact_match["text-guided tenth"] > exact_match["random tenth"] + 0.2


def test_throwing_the_image_away_costs_accuracy_early_and_nothing_late(exact_match: dict[str, float]) -> None:
    assert exact_match["nothing, early"] < exact_match["text-guided tenth"] - 0.2
    assert exact_match["nothing, late"] > exact_match["full"] - 0.03


def test_the_hard_subset_is_what_a_small_image_does_not_show(demo: LoadedBackbone) -> None:
    """The demo's processor enlarges small images again: they are blurred, and objects cannot be told apart."""
    of = ("tenth", "sha256:1")
    methods = [
        Method("tenth", schedule(demo, "text_guided", (1, 0.1)), 0.25, of=of),
        Method("random", schedule(demo, "random", (1, 0.1)), 0.25, of=of),
        Method(SMALLER_IMAGES, schedule(demo, "text_guided"), 0.25, image_scale=0.25, of=of),
    ]
    data = DemoData(seed=11)
    entries = [entry for entry in choose_samples(data, 0, 54, seed=11) if entry.use == "held_out"]
    evaluation = Evaluation(demo, methods, max_new_tokens=4)
    evaluation.run_batch([data.load(entry) for entry in entries])
    table = evaluation.table()
    overall = table[table.question_type == "all"].set_index("method")
    assert overall.hard_n["tenth"] >= FEWEST
    assert overall.hard_score[SMALLER_IMAGES] == 0
    assert overall.hard_score["tenth"] > overall.hard_score["random"] + 0.2
