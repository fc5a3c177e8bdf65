"""The bars of a finished backbone, and its model card."""

from __future__ import annotations

import statistics

import torch
from transformers import __version__ as transformers_version

from schedule_finder.demo import scenes
from scripts.demo_backbone.curriculum import (
    ALL_TYPES_BAR,
    BLIND_SAMPLES,
    MUON_DECAY,
    NORM_BAR,
    READABLE_BAR,
    SINGLE_REGION_BAR,
    SINGLE_REGION_TYPES,
    TEST_SAMPLES,
    TYPE_BAR,
    Progress,
)
from scripts.demo_backbone.model import WIDTH
from scripts.demo_backbone.trainer import Options
from scripts.demo_backbone.vocabulary import UNKNOWN, VISION_TOKENS, VOCABULARY


def failed_gates(accuracy: dict[str, float], progress: Progress) -> list[str]:
    """What keeps a backbone from being shipped, in words."""
    single = statistics.mean(accuracy[name] for name in SINGLE_REGION_TYPES)
    overall = statistics.mean(accuracy.values())
    decay = (progress.stop - progress.decay_start) / progress.stop
    checks = [
        (single >= SINGLE_REGION_BAR, f"single-region types: {single:.3f} < {SINGLE_REGION_BAR}"),
        (overall >= ALL_TYPES_BAR, f"all types: {overall:.3f} < {ALL_TYPES_BAR}"),
        (min(progress.readable) >= READABLE_BAR, f"vision tokens readable: {progress.readable}"),
        (progress.norm <= NORM_BAR, f"residual norm: {progress.norm:.0f} > {NORM_BAR:.0f}"),
        (decay >= 1 / 3, f"decay: {decay:.2f} of the steps < 1/3"),
    ]
    checks += [
        (value >= TYPE_BAR, f"{name}: {value:.3f} < {TYPE_BAR}; take it out of QUESTION_TYPES")
        for name, value in accuracy.items()
    ]
    return [message for passed, message in checks if not passed]


def model_card(
    accuracy: dict[str, float], blind: dict[int, float], options: Options, progress: Progress
) -> str:
    """The README of the exported folder; every number in it was measured in this run."""
    examples = {
        sample.question_type: f"{sample.question} {sample.answer}"
        for sample in scenes.demo_samples(len(scenes.QUESTION_TYPES), split="held_out")
    }
    rows = "\n".join(f"| `{name}` | {examples[name]} | {value:.3f} |" for name, value in accuracy.items())
    blind_rows = "\n".join(f"| {layer} | {value:.3f} |" for layer, value in blind.items())
    single = statistics.mean(accuracy[name] for name in SINGLE_REGION_TYPES)
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# Demo backbone

A small vision-language model, trained from scratch on drawn pictures. It stands in for an ordinary
backbone where a real one would need a download. `LlavaForConditionalGeneration` without custom code:
a CLIP tower of one layer, {VISION_TOKENS} vision tokens per picture, a Llama decoder of {options.layers} layers
of width {WIDTH}, {len(VOCABULARY)} words. Weights are stored as bfloat16. No token was ever dropped
in training.

It knows {scenes.IMAGE_SIZE} x {scenes.IMAGE_SIZE} pictures with {scenes.GRID} x {scenes.GRID} cells
and the questions below, and nothing else; any other word becomes `{UNKNOWN}`. This file was written by
`scripts/train_demo_backbone.py`.

## Held-out exact match

{TEST_SAMPLES} samples per type, `demo_samples(..., split="held_out", seed=0)`, greedy `generate()` in
float32. An answer counts if it is the right word followed by the end token. Every held-out picture
contains a combination of colour and shape that no training picture contained.

| type | example | exact match |
|---|---|---|
{rows}
| **single-region types** | | **{single:.3f}** |
| **all types** | | **{statistics.mean(accuracy.values()):.3f}** |

## Where vision is needed

Share of right first words on {BLIND_SAMPLES * len(accuracy)} held-out samples (all types) when decoder
layers from `l` on (0-based) see no vision token at all.

| l | right |
|---|---|
{blind_rows}

{_training(options, progress)}"""


def _training(options: Options, progress: Progress) -> str:
    """The section on how the backbone was trained."""
    levels = "\n".join(f"- {line}" for line in progress.history)
    decay = progress.stop - progress.decay_start
    return f"""## Training

{progress.step} steps of {options.images} pictures with about eleven questions each, seed {options.seed}:
{progress.seconds / 60:.0f} minutes on `{options.device}` ({options.threads} threads; export and test not
counted), torch {torch.__version__}, transformers {transformers_version}.
Muon {options.muon_lr} (weight decay {MUON_DECAY}) for the matrices of decoder and tower,
AdamW {options.adam_lr} for the rest; linear decay over the last {decay} steps
({decay / progress.step:.0%}). The last residual of the answering tokens has a norm of {progress.norm:.0f};
colour, shape, row and column can all be read from {progress.readable[4]:.1%} of the objects'
vision tokens (last training batch).

{levels}
"""
