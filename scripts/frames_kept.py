"""How rules spend a budget over the frames of a clip: tokens per frame, and the share of what answers need.

    python -m scripts.frames_kept --keep 0.25 --scorers random,strided,evs,vidcom2

One stage before the decoder keeps a share of the vision tokens of the video demo. Printed are, as means over held-out
clips: the kept tokens of the frame with the fewest and of the one with the most, of the first frame and of the others,
and the share of the vision tokens with the asked objects that are kept.
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
from schedule_finder.models.loading import LoadedBackbone, load_backbone, set_threads
from schedule_finder.samples import DemoVideoData, Sample


def kept_tokens(loaded: LoadedBackbone, sample: Sample, schedule: Schedule) -> np.ndarray:
    """Numbers of the vision tokens that the schedule's only stage keeps."""
    inputs = loaded.inputs([sample])
    model = loaded.backbone.model
    with torch.inference_mode(), pruned(model, schedule) as record:
        model(**inputs, use_cache=False)
    first = int(loaded.backbone.vision_mask(inputs["input_ids"])[0].nonzero()[0])
    (kept,) = record.stages[0].kept_positions()
    return np.array([int(position) - first for position in kept if 0 <= position - first < 72])


def row(loaded: LoadedBackbone, samples: list[Sample], name: str, keep: float) -> str:
    """One line of the table."""
    is_frame_rule = issubclass(find_scorer(name), FrameScorer)
    options = {"frame_tokens": clips.FRAME_TOKENS} if is_frame_rule else {}
    schedule = Schedule(
        backbone=loaded.identity,
        stages=(Stage(layer=-1, keep_ratio=keep),),
        scorer=ScorerChoice(name=name, options=options),
        dropped_tokens="discard",
    )
    counts, needed = [], []
    for sample in samples:
        kept = kept_tokens(loaded, sample, schedule)
        counts.append(np.bincount(kept // clips.FRAME_TOKENS, minlength=clips.FRAMES))
        if sample.regions:
            needed.append(np.isin(sample.regions, kept).mean())
    frames = np.array(counts, dtype=float)
    numbers = frames.min(1).mean(), frames.max(1).mean(), frames[:, 0].mean(), frames[:, 1:].mean()
    return f"| {name} | " + " | ".join(f"{number:.1f}" for number in numbers) + f" | {np.mean(needed):.0%} |"


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
    print(
        "| rule | fewest in a frame | most | first frame | other frames | needed tokens kept |\n|---|---|---|---|---|---|"
    )
    for name in options.scorers.split(","):
        print(row(loaded, samples, name, options.keep), flush=True)


if __name__ == "__main__":
    main()
