"""Accuracy and prompt tokens of settings in vLLM on the demo's held-out questions, all in one engine.

    python -m scripts.bench_vllm --questions 450

Needs vLLM 0.32 and this package in one environment; see docs/serving.md.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from schedule_finder.demo import BACKBONE_FOLDER, demo_samples
from schedule_finder.evaluation.metrics import METRICS
from schedule_finder.intervals import mean_interval

SETTINGS = (
    (1.0, "strided"),
    (0.5, "strided"),
    (0.5, "divprune"),
    (0.25, "strided"),
    (0.25, "divprune"),
)


def main() -> None:
    """Print a Markdown table."""
    import numpy as np
    from vllm import LLM, SamplingParams

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=450)
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    samples = list(demo_samples(asked.questions, split="held_out", seed=0))
    llm = LLM(
        model=str(BACKBONE_FOLDER),
        dtype=asked.dtype,
        max_model_len=256,
        enforce_eager=True,
        enable_prefix_caching=False,
        hf_overrides={"adaptinfer": {"keep_ratio": 1.0}},
    )
    print("| keep ratio | scorer | prompt tokens | exact match (95 %) | answers/s |\n|---|---|---|---|---|")
    for ratio, scorer in SETTINGS:
        begin = time.perf_counter()
        outputs = llm.chat(
            [_messages(sample) for sample in samples],
            SamplingParams(temperature=0, max_tokens=8),
            use_tqdm=False,
            mm_processor_kwargs={"keep_ratio": ratio, "scorer": scorer},
        )
        seconds = time.perf_counter() - begin
        right = np.array(
            [
                METRICS["exact_match"].score(output.outputs[0].text.strip(), [sample.answer])
                for output, sample in zip(outputs, samples, strict=True)
            ]
        )
        low, high = mean_interval(right)
        tokens = np.mean([len(output.prompt_token_ids) for output in outputs])
        print(
            f"| {ratio:g} | {scorer} | {tokens:.1f} | {100 * right.mean():.1f} % ({100 * low:.1f}-{100 * high:.1f}) | "
            f"{len(samples) / seconds:.0f} |",
            flush=True,
        )


def _messages(sample: Any) -> list[dict[str, Any]]:
    content = [{"type": "image_pil", "image_pil": sample.image}, {"type": "text", "text": sample.question}]
    return [{"role": "user", "content": content}]


if __name__ == "__main__":
    main()
