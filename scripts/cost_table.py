"""Print the table of time and memory in docs/guide.md, for other prompts or rates if given.

Everything is computed from shapes and assumed rates; nothing is measured. Run from the repository root:

    python -m scripts.cost_table
    python -m scripts.cost_table --vision-tokens 256 --tflops 120 --terabytes 1.2
"""

from __future__ import annotations

import argparse

from schedule_finder.models.cost_estimate import MODELS, Job, Rates, cost_table


def main() -> None:
    """Print the table."""
    job, rates = Job(), Rates()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vision-tokens", type=int, default=job.vision_tokens, help="per prompt")
    parser.add_argument("--other-tokens", type=int, default=job.other_tokens, help="per prompt")
    parser.add_argument("--samples", type=int, default=job.samples, help="to profile")
    parser.add_argument("--eval-samples", type=int, default=job.held_out, help="held out")
    parser.add_argument("--tflops", type=float, default=rates.flops / 1e12, help="reached per GPU, TFLOP/s")
    parser.add_argument(
        "--terabytes", type=float, default=rates.bandwidth / 1e12, help="memory, TB/s per GPU"
    )
    parser.add_argument(
        "--gigabytes", type=float, default=rates.gpu_bytes / 1e9, help="usable memory per GPU"
    )
    given = parser.parse_args()
    job = Job(
        vision_tokens=given.vision_tokens,
        other_tokens=given.other_tokens,
        samples=given.samples,
        held_out=given.eval_samples,
    )
    rates = Rates(given.tflops * 1e12, given.terabytes * 1e12, given.gigabytes * 1e9)
    print(cost_table(MODELS, job, rates))


if __name__ == "__main__":
    main()
