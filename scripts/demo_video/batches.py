"""Training batches of the video demo backbone: clips with packed questions."""

from __future__ import annotations

from functools import partial

import numpy as np

from schedule_finder.demo import clips, scenes
from schedule_finder.demo.draws import scene_rng
from scripts.demo_backbone.batches import BatchRequest, Words, empty_text, pack_questions
from scripts.demo_backbone.vocabulary import NONE
from scripts.demo_video.vocabulary import CONTENT_WORDS, PREFIX, TOKEN_IDS, VISION_TOKENS

CLIP_WORDS = Words(TOKEN_IDS, PREFIX, CONTENT_WORDS, clips.CLIP_TYPES)


def make_clip_batch(request: BatchRequest) -> dict[str, np.ndarray]:
    """As `scripts.demo_backbone.batches.make_batch`; `pictures` (B, FRAMES, H, W, 3)."""
    rows = request.images
    batch = {
        "pictures": np.empty((rows, clips.FRAMES, clips.FRAME_SIZE, clips.FRAME_SIZE, 3), np.uint8),
        "cells": np.full((rows, VISION_TOKENS, 2), NONE, np.int64),
        **empty_text(rows),
    }
    for row in range(rows):
        rng = scene_rng("train", request.seed, request.step * rows + row)
        clip = clips.draw_clip(rng, "train", request.object_count)
        batch["pictures"][row] = clips.render_clip(clip, rng)
        for one in clip.objects:
            batch["cells"][row, list(one.regions)] = one.combination
        if request.type_shares:
            pack_questions(batch, row, partial(_ask, clip, rng), request.type_shares, rng, CLIP_WORDS)
    return batch


def _ask(clip: clips.Clip, rng: np.random.Generator, name: str) -> scenes.Question | None:
    return clips.ask_clip(clip, name, rng)
