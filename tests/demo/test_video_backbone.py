"""The embedded video backbone: a stock model that answers questions about clips, stops by itself, and needs to look."""

from __future__ import annotations

import json
import statistics
from itertools import groupby

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextVideoForConditionalGeneration, LlavaNextVideoProcessor

from schedule_finder.demo import CLIP_TYPES, VIDEO_BACKBONE_FOLDER, clip_samples
from scripts.demo_backbone.batches import BatchRequest
from scripts.demo_backbone.model import decode, packed_sequence
from scripts.demo_backbone.vocabulary import NONE, TEXT
from scripts.demo_video.batches import make_clip_batch
from scripts.demo_video.exam import VideoExaminee
from scripts.demo_video.model import clip_tokens
from scripts.demo_video.vocabulary import PREFIX, PREFIX_IDS, TOKEN_IDS

PER_TYPE = 20


@pytest.fixture(scope="module")
def examinee() -> VideoExaminee:
    return VideoExaminee(VIDEO_BACKBONE_FOLDER)


def test_loads_as_a_stock_model(examinee: VideoExaminee) -> None:
    assert type(examinee.model) is LlavaNextVideoForConditionalGeneration
    assert type(examinee.processor) is LlavaNextVideoProcessor
    for path in VIDEO_BACKBONE_FOLDER.glob("*.json"):
        assert "auto_map" not in json.loads(path.read_text(encoding="utf-8"))
    assert sum(path.stat().st_size for path in VIDEO_BACKBONE_FOLDER.iterdir()) <= 12e6


def test_prompt_holds_one_token_per_cell_and_knows_every_word(examinee: VideoExaminee) -> None:
    unknown = examinee.processor.tokenizer.unk_token_id
    for sample in clip_samples(50, split="calibration"):
        ids = examinee.inputs([sample])["input_ids"][0].tolist()
        assert ids.count(TOKEN_IDS["<video>"]) == 72
        assert unknown not in ids
        words = sample.question.replace("?", " ?").split()
        assert ids[PREFIX : PREFIX + len(words)] == [TOKEN_IDS[word] for word in words]


def test_answers_held_out_questions_and_ends(examinee: VideoExaminee) -> None:
    """Seeds other than the model card's."""
    accuracy = examinee.exact_match(PER_TYPE, seed=1)
    assert tuple(accuracy) == CLIP_TYPES
    assert statistics.mean(accuracy.values()) >= 0.8, accuracy
    assert min(accuracy.values()) >= 0.5, accuracy


def test_vision_is_used_by_early_layers_only(examinee: VideoExaminee) -> None:
    last = examinee.model.config.text_config.num_hidden_layers
    assert examinee.first_word_match(4, seed=2, blind_after=0) <= 0.5
    assert examinee.first_word_match(4, seed=2, blind_after=last) >= 0.75


def test_packed_training_forward_equals_the_stock_forward(examinee: VideoExaminee) -> None:
    """Each packed question gets the logits that the stock model gives it alone, after the stock video path."""
    model = examinee.model
    batch = make_clip_batch(BatchRequest(0, 7, 2, (5, 9), tuple((name, 1.0) for name in CLIP_TYPES)))
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    embed = model.model.language_model.embed_tokens
    with torch.inference_mode():
        vision = clip_tokens(model, tensors["pictures"])
        start = embed(torch.tensor(PREFIX_IDS[:2])).expand(2, -1, -1)
        x = torch.cat([start, vision, embed(tensors["ids"])], dim=1)
        x = decode(model, x, *packed_sequence(tensors["block"], tensors["positions"], PREFIX))
        packed = model.lm_head(model.model.language_model.norm(x))[:, PREFIX:]
        compared = 0
        for row in range(2):
            frames = [Image.fromarray(frame) for frame in batch["pictures"][row]]
            pixels = examinee.processor.video_processor([frames], return_tensors="pt")["pixel_values_videos"]
            for number, places in groupby(range(TEXT), key=batch["block"][row].__getitem__):
                if number == NONE:
                    continue
                chosen = np.array(list(places))
                ids = torch.tensor([PREFIX_IDS + batch["ids"][row][chosen].tolist()])
                stock = model(input_ids=ids, pixel_values_videos=pixels).logits[0, PREFIX:]
                assert (stock - packed[row, chosen]).abs().max() < 1e-3
                compared += 1
    assert compared >= 14


def test_model_card_lists_the_types_that_ship() -> None:
    card = (VIDEO_BACKBONE_FOLDER / "README.md").read_text(encoding="utf-8")
    listed = [line.split("`")[1] for line in card.splitlines() if line.startswith("| `")]
    assert tuple(listed) == CLIP_TYPES
