"""The bars of a finished video backbone, and its model card."""

from __future__ import annotations

import statistics

import torch
from transformers import __version__ as transformers_version

from schedule_finder.demo import clips
from scripts.demo_backbone.curriculum import MUON_DECAY, Progress
from scripts.demo_backbone.trainer import Options
from scripts.demo_backbone.vocabulary import UNKNOWN
from scripts.demo_video.vocabulary import VISION_TOKENS, VOCABULARY

ALL_TYPES_BAR = 0.85  # mean over all types
TYPE_BAR = 0.75  # each type
TEST_SAMPLES = 100  # per question type
BLIND_SAMPLES = 15  # per question type and layer


def missed_bars(accuracy: dict[str, float]) -> list[str]:
    """What keeps a backbone from being shipped, in words."""
    overall = statistics.mean(accuracy.values())
    messages = [f"all types: {overall:.3f} < {ALL_TYPES_BAR}"] if overall < ALL_TYPES_BAR else []
    return messages + [
        f"{name}: {value:.3f} < {TYPE_BAR}; take it out of CLIP_TYPES"
        for name, value in accuracy.items()
        if value < TYPE_BAR
    ]


def video_model_card(
    accuracy: dict[str, float], blind: dict[int, float], options: Options, progress: Progress
) -> str:
    """The README of the exported folder; every number in it was measured in this run."""
    examples = {
        sample.question_type: f"{sample.question} {sample.answer}"
        for sample in clips.clip_samples(len(clips.CLIP_TYPES), split="held_out")
    }
    rows = "\n".join(f"| `{name}` | {examples[name]} | {value:.3f} |" for name, value in accuracy.items())
    blind_rows = "\n".join(f"| {layer} | {value:.3f} |" for layer, value in blind.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: video-text-to-text
---

# Video demo backbone

A small video-language model for drawn clips. `LlavaNextVideoForConditionalGeneration` without custom code: a CLIP tower
of one layer, {clips.FRAME_TOKENS} vision tokens per frame and {VISION_TOKENS} per clip of {clips.FRAMES} frames, a Llama
decoder of {options.layers} layers, {len(VOCABULARY)} words. Its weights were begun with those of the demo backbone and are
stored as bfloat16. No token was ever dropped in training.

It knows clips of {clips.FRAMES} frames of {clips.FRAME_SIZE} x {clips.FRAME_SIZE} pixels and the questions below, and
nothing else; any other word becomes `{UNKNOWN}`. It was not trained on pictures. This file was written by
`scripts/train_demo_video_backbone.py`.

## Held-out exact match

{TEST_SAMPLES} samples per type, `clip_samples(..., split="held_out", seed=0)`, greedy `generate()` in float32. An answer
counts if it is the right word followed by the end token. Every held-out clip contains a combination of colour and shape
that no training clip contained.

| type | example | exact match |
|---|---|---|
{rows}
| **all types** | | **{statistics.mean(accuracy.values()):.3f}** |

## Where vision is needed

Share of right first words on {BLIND_SAMPLES * len(accuracy)} held-out samples (all types) when decoder layers from `l` on
(0-based) see no vision token at all.

| l | right |
|---|---|
{blind_rows}

{_training(options, progress)}"""


def _training(options: Options, progress: Progress) -> str:
    """The section on how the backbone was trained."""
    events = "\n".join(f"- {line}" for line in progress.history)
    decay = progress.stop - progress.decay_start
    return f"""## Training

{progress.step} steps of {options.images} clips with about ten questions each, seed {options.seed}:
{progress.seconds / 60:.0f} minutes on `{options.device}` ({options.threads} threads, on a machine shared with other
jobs), torch {torch.__version__}, transformers {transformers_version}. Muon {options.muon_lr} (weight decay {MUON_DECAY})
for the decoder's matrices, AdamW {options.adam_lr} for the rest, both at half of these rates; tower and projector are
frozen after the alignment; linear decay over the last {decay} steps. After two decoder layers,
{progress.readable[-1]:.1%} of the vision tokens tell the number of their frame (last training batch).

{events}
"""
