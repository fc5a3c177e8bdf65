"""How long an answer takes with and without a schedule: prefill of the decoder, and everything.

    python -m scripts.bench_answers outputs/photo_backbone --dataset photo --schedule outputs/photo/4_schedule.json

All methods answer the same questions in turn, so that other load affects all of them; one thread. "Answer" is the time of
`generate`, the vision tower included. Medians over rounds of the processor time of this process, and of the ratio to the
unpruned model in the same round. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pruning_runtime import Schedule, pruned
from schedule_finder.models.loading import LoadedBackbone, load_backbone
from schedule_finder.samples import choose_samples, open_data


def main() -> None:
    """Measure, print a table, print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbone")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--schedule", nargs="+", required=True, help="schedule files")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_backbone(asked.backbone, device="cpu")
    schedules = {name: Schedule.of(name) for name in asked.schedule}
    first = next(iter(schedules.values()))
    methods = {"full": first.model_copy(update={"stages": ()})} | schedules
    data = open_data(asked.dataset)
    entries = [
        entry for entry in choose_samples(data, 2, max(asked.batches), seed=0) if entry.use == "held_out"
    ]
    rows = []
    for batch in asked.batches:
        inputs = loaded.inputs([data.load(entry) for entry in entries[:batch]])
        rows += _rounds(loaded, inputs, methods, asked.rounds, asked.max_new_tokens)
    table = summary(pd.DataFrame(rows))
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(
        json.dumps({"options": vars(asked), "torch": torch.__version__, "results": table.to_dict("records")})
    )


def _rounds(
    loaded: LoadedBackbone, inputs: dict[str, Tensor], methods: dict[str, Schedule], rounds: int, most: int
) -> list[dict[str, Any]]:
    """A row per round and method with seconds of the prefill and of the whole answer; the first round warms up."""
    rows = []
    for number in range(rounds + 1):
        for name, schedule in methods.items():
            prefill = _prefill(loaded, inputs, schedule)
            begun = time.process_time()
            with pruned(loaded.backbone.model, schedule):
                loaded.generate(inputs, most)
            row = {"batch": len(inputs["input_ids"]), "method": name, "round": number}
            rows.append(row | {"prefill": prefill, "answer": time.process_time() - begun})
    return [row for row in rows if row["round"]]


def _prefill(loaded: LoadedBackbone, inputs: dict[str, Tensor], schedule: Schedule) -> float:
    """Processor seconds of the decoder in one forward pass of the prompts, scoring included."""
    text_model = loaded.backbone.text_model
    spent = 0.0

    def start(*_: object) -> None:
        nonlocal spent
        spent -= time.process_time()

    def stop(*_: object) -> None:
        nonlocal spent
        spent += time.process_time()

    model: Any = loaded.backbone.model
    # The first hook of the decoder runs before those of `pruned`, and the last after them.
    before = text_model.register_forward_pre_hook(start)
    try:
        with torch.inference_mode(), pruned(model, schedule):
            after = text_model.register_forward_hook(stop)
            try:
                model(**inputs, logits_to_keep=1)
            finally:
                after.remove()
    finally:
        before.remove()
    return spent


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Median milliseconds per question, and median ratio to the unpruned model within a round, per batch and method."""
    found = []
    for batch, some in rows.groupby("batch"):
        full = some[some.method == "full"].set_index("round")
        for method, own in some.groupby("method", sort=False):
            own = own.set_index("round")
            line: dict[str, Any] = {"batch": batch, "method": method}
            for what in ("prefill", "answer"):
                line[f"{what}_ms"] = 1000 * statistics.median(own[what]) / batch
                line[f"{what}_ratio"] = statistics.median(own[what] / full[what])
            found.append(line)
    return pd.DataFrame(found)


if __name__ == "__main__":
    main()
