"""Trains the video demo backbone from the demo backbone's weights and writes its Hugging Face folder.

    python -m scripts.train_demo_video_backbone                # about half an hour on one free CPU core
    python -m scripts.train_demo_video_backbone --resume       # goes on from the last checkpoint

The model is a stock `LlavaNextVideoForConditionalGeneration`. Training shares its code with
`scripts.train_demo_backbone`: an alignment phase without the decoder, levels that end when their question types are
learnt, a decay phase, then export and an exact-match test of the exported folder through `generate()`. What differs is
in `scripts.demo_video`. The exit status is 1, and the package is left as it was, if the result misses a bar; the message
names the question types to take out of `clips.CLIP_TYPES`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from schedule_finder.demo import VIDEO_BACKBONE_FOLDER
from scripts.demo_backbone.trainer import Options
from scripts.demo_video.card import BLIND_SAMPLES, TEST_SAMPLES, missed_bars, video_model_card
from scripts.demo_video.exam import VideoExaminee, export_video
from scripts.demo_video.model import LAYERS
from scripts.demo_video.trainer import ClipTrainer


def main() -> int:
    """Trains, exports, tests, and ships what passes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=VIDEO_BACKBONE_FOLDER, help="model folder to write")
    add("--work", type=Path, default=Path("outputs/demo_video_backbone"), help="folder for checkpoints")
    add("--seed", type=int, default=0)
    add("--layers", type=int, default=LAYERS, help="decoder layers; others than the default are for studies")
    add("--device", default="cpu")
    add("--threads", type=int, default=1, help="CPU threads of the training process")
    add("--workers", type=int, default=1, help="processes that draw clips")
    add("--images", type=int, default=12, help="clips per step")
    add("--muon-lr", type=float, default=0.01)
    add("--adam-lr", type=float, default=2e-3)
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--compile", action=argparse.BooleanOptionalAction, default=False)
    options = Options(**vars(parser.parse_args()))

    trainer = ClipTrainer(options)
    trainer.run()
    candidate = options.work / "candidate"
    export_video(trainer.model.cpu(), candidate)
    examinee = VideoExaminee(candidate)
    accuracy = examinee.exact_match(TEST_SAMPLES, seed=0)
    print(json.dumps(accuracy), flush=True)
    blind = {
        layer: examinee.first_word_match(BLIND_SAMPLES, seed=0, blind_after=layer)
        for layer in range(options.layers + 1)
    }
    card = video_model_card(accuracy, blind, options, trainer.progress)
    (candidate / "README.md").write_text(card, encoding="utf-8")
    print(card)
    failures = missed_bars(accuracy)
    if failures:
        print(f"{candidate} misses its bars:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    shutil.rmtree(options.out, ignore_errors=True)
    shutil.copytree(candidate, options.out)
    print(json.dumps({"folder": str(options.out), "steps": trainer.progress.step, "exact_match": accuracy}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
