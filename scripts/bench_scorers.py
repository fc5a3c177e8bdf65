"""What scoring costs, as a share of the unpruned decoder's prefill: every scorer, in one interleaved run.

    python -m scripts.bench_scorers                                          # shape:llava-tiny on one CPU thread
    python -m scripts.bench_scorers --tokens 576 --keep 64 --batch 1 8 --repeats 5
    python -m scripts.bench_scorers --backbone shape:llava-1.5-7b --device cuda --dtype bfloat16

A stage keeps ``--keep`` of ``--tokens`` vision tokens beside 40 text tokens: before the decoder where the rule allows it,
or else after layer 1. The prompt is given as random embeddings. Each round runs the unpruned decoder and every scorer in
turn, so that other load affects all of them; medians over the rounds. Scorers that need the vision tower are left out:
there is no image. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from typing import Any

import torch

from pruning_runtime import PruningError, Schedule, ScheduleError, UnsupportedBackbone, find_backbone, pruned
from pruning_runtime.backbone import Backbone
from pruning_runtime.schedule import BackboneIdentity, ScorerChoice, Stage
from pruning_runtime.scorers import SCORERS, FeatureScorer, find_scorer
from schedule_finder.models.shapes import build_shape

TEXT_TOKENS = 40
UNPRUNED = "unpruned"


def main() -> None:
    """Measure every combination and print a table for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="shape:llava-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=(576, 2880))
    parser.add_argument("--keep", type=int, nargs="+", default=(64, 320))
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = build_shape(asked.backbone, torch.device(asked.device), getattr(torch, asked.dtype))
    backbone = find_backbone(model)
    results = []
    for batch in asked.batch:
        for tokens in asked.tokens:
            for keep in asked.keep:
                results += measure(backbone, batch, tokens, keep, asked.repeats)
    print(json.dumps({"backbone": asked.backbone, "device": asked.device, "results": results}))


def measure(backbone: Backbone, batch: int, tokens: int, keep: int, repeats: int) -> list[dict[str, Any]]:
    """One table: a row per scorer."""
    schedules = {name: schedule(backbone, name, keep / tokens) for name in SCORERS}
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    inputs = prompt(backbone, batch, tokens)
    for number in range(repeats + 1):
        for name, one in {UNPRUNED: None, **schedules}.items():
            try:
                took = run(backbone, inputs, one)
            except (PruningError, ScheduleError, UnsupportedBackbone):
                continue
            if number:  # the first round warms up
                times[name].append(took)
    full = statistics.median(prefill for prefill, _ in times.pop(UNPRUNED))
    print(f"\nbatch {batch}, {tokens} vision tokens, {keep} kept; unpruned prefill {full:.1f} ms")
    rows = []
    for name, some in times.items():
        scoring = statistics.median(ms for _, ms in some)
        prefill = statistics.median(ms for ms, _ in some)
        rows.append(
            {
                "batch": batch,
                "tokens": tokens,
                "keep": keep,
                "scorer": name,
                "layer": schedules[name].stages[0].layer,
                "scoring_ms": scoring,
                "prefill_ms": prefill,
                "unpruned_ms": full,
            }
        )
        print(f"  {name:<14}{scoring:9.2f} ms scoring, {100 * scoring / full:5.1f} % of the unpruned prefill")
    return rows


def schedule(backbone: Backbone, scorer: str, ratio: float) -> Schedule:
    """One stage with ``scorer``, as early as the rule allows."""
    rule = find_scorer(scorer)
    inside = rule.needs_attention or (issubclass(rule, FeatureScorer) and rule.needs_layer)
    return Schedule(
        backbone=BackboneIdentity(
            name=backbone.name, model_type=backbone.model_type, num_layers=backbone.shape.num_layers
        ),
        stages=(Stage(layer=1 if inside else -1, keep_ratio=ratio),),
        scorer=ScorerChoice(name=scorer),
    )


def prompt(backbone: Backbone, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random embeddings: a few text tokens, the vision tokens, and the question behind them."""
    weight = next(backbone.text_model.parameters())
    length = tokens + TEXT_TOKENS
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (batch, length, backbone.shape.hidden_size)
    embeddings = torch.randn(shape, generator=generator, device=weight.device).to(weight.dtype)
    vision = torch.zeros(batch, length, dtype=torch.bool, device=weight.device)
    vision[:, 5 : 5 + tokens] = True
    return {"inputs_embeds": embeddings, "vision": vision}


def run(backbone: Backbone, inputs: dict[str, torch.Tensor], one: Schedule | None) -> tuple[float, float]:
    """Milliseconds of the decoder's prefill and of scoring in it."""
    if one is None:
        one = schedule(backbone, "strided", 1.0)
    model: Any = backbone.model
    with torch.inference_mode(), pruned(model, one, vision_mask=inputs["vision"], timing=True) as record:
        model(inputs_embeds=inputs["inputs_embeds"], use_cache=False, logits_to_keep=1)
    return record.milliseconds["prefill"], record.milliseconds.get("scoring", 0.0)


if __name__ == "__main__":
    main()
