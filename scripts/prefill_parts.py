"""Where the time of a pruned prefill goes: processor time of the decoder by kind of work, full against pruned.

    python -m scripts.prefill_parts --backbone shape:llava-tiny --batch 1

Uses torch's profiler on the CPU. Parts are sums over operators; "scoring" and "dropping" are the runtime's own, whatever
operators they use, and "python" is what is left of the decoder's time: modules, hooks and calls of operators. The profiler
makes calls slower, so parts are shares to compare, and the total is measured without it (`adaptinfer-profile bench`).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pruning_runtime import Schedule, pruned
from pruning_runtime.backbone import Backbone
from pruning_runtime.timing import Stopwatch
from schedule_finder.benchmark.choose_schedule import choose_schedule
from schedule_finder.models.loading import load_to_measure
from schedule_finder.models.synthetic_inputs import synthetic_inputs

DECODER = "decoder"
OWN_PARTS = ("scoring", "dropping")
"""Of the runtime; timed around whatever they call."""
KINDS = {
    "linear maps": ("mm", "addmm", "bmm", "linear", "matmul"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention", "_softmax"),
    "gathering": ("gather", "index", "index_select", "take_along_dim", "masked_fill_", "masked_fill"),
}
"""Operators by kind; all others are "element-wise and copies"."""
OTHERS, PYTHON = "element-wise and copies", "python"


def main() -> None:
    """Profile both prefills, print a table and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="shape:llava-tiny")
    parser.add_argument("--schedule", help="a file or a preset; default: the published 64 tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    backbone = load_to_measure(asked.backbone, device="cpu")
    schedule, origin = choose_schedule(asked.schedule, backbone)
    inputs = synthetic_inputs(backbone, asked.batch)
    print(f"{asked.backbone}, batch {asked.batch}, {origin}")
    full = parts_of(backbone, inputs, None, asked.rounds)
    short = parts_of(backbone, inputs, schedule, asked.rounds)
    whole = {"full": sum(full.values()), "pruned": sum(short.values())}
    print(f"{'ms of processor time':26} {'full':>8} {'pruned':>8} {'ratio':>7} {'of pruned':>10}")
    for part in [*KINDS, OTHERS, *OWN_PARTS, PYTHON]:
        ratio = f"{short[part] / full[part]:7.1%}" if full[part] else " " * 7
        share = short[part] / whole["pruned"]
        print(f"{part:26} {full[part]:8.2f} {short[part]:8.2f} {ratio} {share:10.1%}")
    ratio = whole["pruned"] / whole["full"]
    print(f"{'all':26} {whole['full']:8.2f} {whole['pruned']:8.2f} {ratio:7.1%}")
    results = {"full": dict(full), "pruned": dict(short)}
    print(json.dumps({"options": vars(asked), "torch": torch.__version__, "results": results}))


def parts_of(
    backbone: Backbone, inputs: dict[str, torch.Tensor], schedule: Schedule | None, rounds: int
) -> Counter[str]:
    """Milliseconds of one prefill in the decoder, by part."""
    model: Any = backbone.model
    prunes = pruned(model, schedule) if schedule is not None else nullcontext()
    with torch.inference_mode(), prunes, _marked(backbone):
        for _ in range(3):
            model(**inputs, logits_to_keep=1)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(rounds):
                model(**inputs, logits_to_keep=1)
    parts: Counter[str] = Counter()
    for event in recorded.events() or ():
        above = list(_ancestors(event))
        if event.name == DECODER or DECODER in above:
            own = next((name for name in (event.name, *above) if name in OWN_PARTS), None)
            parts[own or _kind(event.name)] += event.self_cpu_time_total / 1e3 / rounds
    return parts


@contextmanager
def _marked(backbone: Backbone) -> Iterator[None]:
    """Let the profiler see the decoder and the runtime's own parts."""
    text = backbone.text_model
    own_forward, own_part = text.forward, Stopwatch.part

    def forward(*args: Any, **kwargs: Any) -> Any:
        with record_function(DECODER):
            return own_forward(*args, **kwargs)

    @contextmanager
    def part(_self: Stopwatch, name: str) -> Iterator[None]:
        with record_function(name):
            yield

    vars(text)["forward"] = forward
    Stopwatch.part = part  # type: ignore[method-assign]
    try:
        yield
    finally:
        del vars(text)["forward"]
        Stopwatch.part = own_part  # type: ignore[method-assign]


def _ancestors(event: Any) -> Iterator[str]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


def _kind(name: str) -> str:
    if name == DECODER:
        return PYTHON
    operator = name.removeprefix("aten::")
    return next((kind for kind, operators in KINDS.items() if operator in operators), OTHERS)


if __name__ == "__main__":
    main()
