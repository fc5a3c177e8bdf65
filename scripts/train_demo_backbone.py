"""Trains the embedded demo backbone from scratch and writes its Hugging Face folder.

    python -m scripts.train_demo_backbone                         # about half an hour on two free CPU cores
    python -m scripts.train_demo_backbone --device cuda --workers 8
    python -m scripts.train_demo_backbone --resume                # goes on from the last checkpoint

One unattended run: an alignment phase without the decoder, a curriculum whose levels end when their question
types are learnt, a decay phase of at least a third of all steps, then export and an exact-match test of the
exported folder through `generate()`. The exit status is 1, and the package is left as it was, if the result
misses a bar; the message names the question types to take out of `scenes.QUESTION_TYPES`.

The model is a stock `LlavaForConditionalGeneration`. Training runs a leaner forward over the same weights:
all questions of a picture share one sequence, a mask keeps them apart, positions restart at each question, so
every question sees exactly what it would see alone (`tests/demo/test_backbone.py` compares the two).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from schedule_finder.demo import BACKBONE_FOLDER
from scripts.demo_backbone.card import failed_gates, model_card
from scripts.demo_backbone.curriculum import BLIND_SAMPLES, TEST_SAMPLES
from scripts.demo_backbone.exam import Examinee, export
from scripts.demo_backbone.model import LAYERS
from scripts.demo_backbone.trainer import Options, Trainer


def main() -> int:
    """Trains, exports, tests, and ships what passes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=BACKBONE_FOLDER, help="model folder to write")
    add("--work", type=Path, default=Path("outputs/demo_backbone"), help="folder for checkpoints")
    add("--seed", type=int, default=0)
    add("--layers", type=int, default=LAYERS, help="decoder layers; others than the default are for studies")
    add("--device", default="cpu")
    add("--threads", type=int, default=2, help="CPU threads of the training process")
    add("--workers", type=int, default=1, help="processes that draw scenes")
    add("--images", type=int, default=12, help="pictures per step")
    add("--muon-lr", type=float, default=0.01)
    add("--adam-lr", type=float, default=2e-3)
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = Options(**vars(parser.parse_args()))

    trainer = Trainer(options)
    trainer.run()
    progress = trainer.progress
    candidate = options.work / "candidate"
    export(trainer.model.cpu(), candidate)  # type: ignore[arg-type]
    examinee = Examinee(candidate)
    accuracy = examinee.exact_match(TEST_SAMPLES, seed=0)
    blind = {
        layer: examinee.first_word_match(BLIND_SAMPLES, seed=0, blind_after=layer)
        for layer in range(options.layers + 1)
    }
    card = model_card(accuracy, blind, options, progress)
    (candidate / "README.md").write_text(card, encoding="utf-8")
    print(card)
    failures = failed_gates(accuracy, progress)
    if failures:
        print(f"{candidate} misses its bars:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    shutil.rmtree(options.out, ignore_errors=True)
    shutil.copytree(candidate, options.out)
    print(json.dumps({"folder": str(options.out), "steps": progress.step, "exact_match": accuracy}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
