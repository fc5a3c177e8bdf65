"""How rules spend a budget over the frames of a clip: right answers, tokens per frame, and the share of what answers need.

    python -m scripts.frames_kept --keep 0.25 --scorers random,strided,evs,vidcom2

One stage before the decoder keeps a share of the vision tokens of the video demo. Printed are, over held-out clips: right
answers with their 95 % interval, then means of the kept tokens of the frame with the fewest and of the one with the most, of
the first frame and of the others, and of the share of the vision tokens with the asked objects that are kept.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from pruning_runtime import pruned
from pruning_runtime.schedule import Schedule, ScorerChoice, Stage
from pruning_runtime.scorers import find_scorer
from pruning_runtime.scorers.frames import FrameScorer
from schedule_finder.demo import clips
from schedule_finder.intervals import wilson_interval
from schedule_finder.models.loading import LoadedBackbone, load_backbone, set_threads
from schedule_finder.samples import DemoVideoData, Sample

BATCH = 25


@torch.inference_mode()
def answer(loaded: LoadedBackbone, samples: list[Sample], schedule: Schedule) -> list[tuple[str, np.ndarray]]:
    """The answer to each sample, and the numbers of the vision tokens that the first stage keeps (all without one)."""
    found = []
    for start in range(0, len(samples), BATCH):
        inputs = loaded.inputs(samples[start : start + BATCH])
        length = inputs["input_ids"].shape[1]
        with pruned(loaded.backbone.model, schedule) as record:
            output = loaded.generate(inputs, max_new_tokens=3)
            vision = loaded.backbone.vision_mask(inputs["input_ids"])
            numbers = vision.cumsum(1) - 1
            kept = (
                record.stages[0].kept_positions()
                if record.stages
                else [mask.nonzero()[:, 0] for mask in vision]
            )
        found += [
            (text, numbers[row][torch.as_tensor(kept[row])].numpy())
            for row, text in enumerate(loaded.answers(output[:, length:]))
        ]
    return found


def row(loaded: LoadedBackbone, samples: list[Sample], name: str, keep: float) -> str:
    """One line of the table."""
    is_frame_rule = issubclass(find_scorer(name), FrameScorer)
    options = {"frame_tokens": clips.FRAME_TOKENS} if is_frame_rule else {}
    schedule = Schedule(
        backbone=loaded.identity,
        stages=(Stage(layer=-1, keep_ratio=keep),) if keep < 1 else (),
        scorer=ScorerChoice(name=name, options=options),
        dropped_tokens="discard",
    )
    found = answer(loaded, samples, schedule)
    right = np.array([text == sample.answer for (text, _), sample in zip(found, samples, strict=True)])
    frames = np.array(
        [np.bincount(kept // clips.FRAME_TOKENS, minlength=clips.FRAMES) for _, kept in found], dtype=float
    )
    needed = [
        np.isin(sample.regions, kept).mean()
        for (_, kept), sample in zip(found, samples, strict=True)
        if sample.regions
    ]
    low, high = wilson_interval(int(right.sum()), len(right))
    numbers = frames.min(1).mean(), frames.max(1).mean(), frames[:, 0].mean(), frames[:, 1:].mean()
    spread = " | ".join(f"{number:.1f}" for number in numbers)
    score = f"{right.mean():.1%} ({low:.1%}-{high:.1%})"
    return f"| {name if keep < 1 else 'full'} | {score} | {spread} | {np.mean(needed):.0%} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backbone", default="demo-video", help="`demo-video` or a folder of another training run"
    )
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--scorers", default="random,strided,evs,vidcom2")
    parser.add_argument("--clips", type=int, default=200)
    options = parser.parse_args()
    set_threads("demo-video")
    loaded, data = load_backbone(options.backbone), DemoVideoData()
    samples = [data.load(entry) for entry in data.entries(0, options.clips)]
    print("| rule | right | fewest in a frame | most | first frame | other frames | needed tokens kept |")
    print("|---|---|---|---|---|---|---|")
    print(row(loaded, samples, "strided", 1.0), flush=True)
    for name in options.scorers.split(","):
        print(row(loaded, samples, name, options.keep), flush=True)


if __name__ == "__main__":
    main()
