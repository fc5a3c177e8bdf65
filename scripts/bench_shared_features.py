"""What computing a prompt's vision features once saves in a search and in an evaluation.

    python -m scripts.bench_shared_features demo --dataset demo
    python -m scripts.bench_shared_features outputs/photo_backbone --dataset photo --samples 8

A batch of prompts runs again and again, as the methods of a search or an evaluation do: with the vision tower each time,
and with features that are kept. Both in one process in turn; the median over rounds of the processor time of this process,
which other load disturbs less than the clock does. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from pruning_runtime import Schedule, pruned
from pruning_runtime.schedule import ScorerChoice, Stage
from schedule_finder.measuring.vision_features import VisionFeatures
from schedule_finder.models.loading import LoadedBackbone, load_backbone
from schedule_finder.samples import choose_samples, open_data

RATIOS = (1.0, 0.5, 0.25, 0.1)


def main() -> None:
    """Measure, print a table, print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbone")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_backbone(asked.backbone, device="cpu")
    data = open_data(asked.dataset)
    entries = [entry for entry in choose_samples(data, 2, asked.samples, seed=0) if entry.use == "held_out"]
    inputs = loaded.inputs([data.load(entry) for entry in entries])
    features = VisionFeatures(loaded.backbone)
    rows = []
    print(f"{'kept before the decoder':24} {'what':9} {'each time, s':>12} {'kept, s':>8} {'ratio':>6}")
    for ratio in RATIOS:
        for what, call in _calls(loaded, inputs, ratio).items():
            own, kept = _seconds(call, features, asked.rounds)
            rows.append({"ratio": ratio, "what": what, "each_time": own, "kept": kept})
            print(f"{ratio:<24.0%} {what:9} {own:12.3f} {kept:8.3f} {kept / own:6.2f}", flush=True)
    print(json.dumps({"options": vars(asked), "torch": torch.__version__, "results": rows}))


def _calls(
    loaded: LoadedBackbone, inputs: dict[str, torch.Tensor], ratio: float
) -> dict[str, Callable[[], object]]:
    """A forward pass and a generation of the batch that keep evenly spaced tokens."""
    model: Any = loaded.backbone.model
    schedule = Schedule(
        backbone=loaded.identity,
        stages=(Stage(layer=-1, keep_ratio=ratio),) if ratio < 1 else (),
        scorer=ScorerChoice(name="strided"),
    )

    def forward() -> None:
        with torch.inference_mode(), pruned(model, schedule):
            model(**inputs, use_cache=False, logits_to_keep=1)

    def generate() -> None:
        with pruned(model, schedule):
            loaded.generate(inputs, 16)

    return {"forward": forward, "generate": generate}


def _seconds(call: Callable[[], object], features: VisionFeatures, rounds: int) -> tuple[float, float]:
    """Median seconds with the vision tower each time, and with kept features."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for reused in (False, True):
            with features.reused(reused):
                begun = time.process_time()
                call()
                if number:  # the first round warms up
                    seconds[reused].append(time.process_time() - begun)
    return statistics.median(seconds[False]), statistics.median(seconds[True])


if __name__ == "__main__":
    main()
