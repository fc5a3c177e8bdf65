"""The embedded backbone: it loads like any model, answers, stops by itself, and needs to look."""

from __future__ import annotations

import json
import statistics
from itertools import groupby

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from schedule_finder.demo import BACKBONE_FOLDER, QUESTION_TYPES, demo_samples, scenes
from scripts.demo_backbone.batches import BatchRequest, make_batch
from scripts.demo_backbone.exam import Examinee, keys_hidden
from scripts.demo_backbone.model import decode, packed_sequence, vision_tokens
from scripts.demo_backbone.vocabulary import NONE, PREFIX, PREFIX_IDS, TEXT, TOKEN_IDS

PER_TYPE = 40  # held-out samples; a true .98 falls below .90 on 360 with a chance below 1e-10
SINGLE_REGION_TYPES = ("colour", "shape", "at", "where")


@pytest.fixture(scope="module")
def examinee():
    torch.manual_seed(0)
    return Examinee(BACKBONE_FOLDER)


@pytest.fixture(scope="module")
def transcript(examinee):
    """Held-out samples (a seed the model card did not use) with all tokens generated after the prompt."""
    samples = list(demo_samples(PER_TYPE * len(QUESTION_TYPES), split="held_out", seed=1))
    lines = []
    for start in range(0, len(samples), 90):
        batch = samples[start : start + 90]
        inputs = examinee.inputs(batch)
        with torch.inference_mode():
            output = examinee.model.generate(**inputs)
        lines += zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True)
    return lines


def test_loads_as_a_stock_model(examinee):
    assert type(examinee.model) is LlavaForConditionalGeneration
    assert type(examinee.processor) is LlavaProcessor
    assert examinee.model.config.text_config.num_hidden_layers >= 12
    assert next(examinee.model.parameters()).dtype == torch.float32
    for path in BACKBONE_FOLDER.iterdir():
        assert path.suffix != ".py"
        if path.suffix == ".json":
            assert "auto_map" not in json.loads(path.read_text(encoding="utf-8"))


def test_package_is_small():
    files = [path for path in BACKBONE_FOLDER.parent.rglob("*") if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= 12e6


def test_prompt_holds_one_token_per_cell(examinee):
    (sample,) = demo_samples(1, split="held_out")
    tokens = examinee.inputs([sample])["input_ids"][0].tolist()
    image_token = examinee.model.config.image_token_id
    assert tokens.count(image_token) == scenes.GRID**2
    assert tokens[0] == examinee.model.config.text_config.bos_token_id
    assert tokens.count(tokens[0]) == 1


def test_every_word_is_known(examinee):
    unknown = examinee.processor.tokenizer.unk_token_id
    for sample in demo_samples(900, split="calibration"):
        for text in (sample.question, sample.answer):
            tokens = examinee.processor.tokenizer(text)["input_ids"]
            assert unknown not in tokens, text
        assert len(tokens) == 1


def test_training_reads_words_as_the_tokenizer_does(examinee):
    """The training script splits questions by itself; both must give the same tokens."""
    for sample in demo_samples(90, split="train"):
        words = sample.question.replace("?", " ?").split()
        tokens = [TOKEN_IDS[word] for word in words]
        assert examinee.processor.tokenizer(sample.question)["input_ids"] == tokens


def test_answers_held_out_questions(transcript, examinee):
    right = {name: [] for name in QUESTION_TYPES}
    for sample, tokens in transcript:
        answer = examinee.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        right[sample.question_type].append(answer == sample.answer)
    accuracy = {name: statistics.mean(values) for name, values in right.items()}
    assert len(transcript) >= 300
    assert statistics.mean(accuracy[name] for name in SINGLE_REGION_TYPES) >= 0.95, accuracy
    assert statistics.mean(accuracy.values()) >= 0.90, accuracy
    assert min(accuracy.values()) >= 0.80, accuracy


def test_answers_are_one_word_and_end(transcript, examinee):
    """Nothing limits these generations but the end token: the default limit of 8 tokens is not reached."""
    end = examinee.model.generation_config.eos_token_id
    pad = examinee.model.generation_config.pad_token_id
    for sample, tokens in transcript:
        assert len(tokens) == 2, sample.id
        assert tokens[0] not in (end, pad)
        assert tokens[1] == end


def test_a_batch_answers_as_single_prompts_do(transcript, examinee):
    for sample, tokens in transcript[::30]:
        inputs = examinee.inputs([sample])
        with torch.inference_mode():
            output = examinee.model.generate(**inputs)
        assert output[0, inputs["input_ids"].shape[1] :].tolist() == tokens


def first_words(examinee, samples, hidden, first_layer: int) -> float:
    """Share of right first words when layers from `first_layer` on miss the vision tokens in `hidden`."""
    right = 0
    for sample, regions in zip(samples, hidden, strict=True):
        inputs = examinee.inputs([sample])
        tokens = inputs["input_ids"][0]
        vision = (tokens == examinee.model.config.image_token_id).nonzero()[:, 0]
        keys = torch.zeros(len(tokens), dtype=torch.bool)
        keys[vision[list(regions)]] = True
        with torch.inference_mode(), keys_hidden(examinee.model, keys, first_layer):
            logits = examinee.model(**inputs, logits_to_keep=1).logits[0, -1]
        answer = examinee.processor.tokenizer(sample.answer)["input_ids"]
        right += [int(logits.argmax())] == answer
    return right / len(samples)


def test_answers_need_their_region(examinee):
    """Early in the decoder the named region cannot be missed, other cells can."""
    samples = list(demo_samples(120, split="held_out", seed=2, question_types=SINGLE_REGION_TYPES))
    needed = [sample.regions for sample in samples]
    others = [tuple((region + 29) % 64 for region in regions) for regions in needed]
    nothing = [()] * len(samples)
    assert first_words(examinee, samples, nothing, first_layer=0) >= 0.95
    assert first_words(examinee, samples, others, first_layer=0) >= 0.85
    assert first_words(examinee, samples, needed, first_layer=0) <= 0.40


def test_vision_is_used_by_early_layers_only(examinee):
    """What a schedule is to find: at first vision is indispensable, in the end it is dead weight."""
    samples = list(demo_samples(90, split="held_out", seed=2))
    everything = [tuple(range(64))] * len(samples)
    assert first_words(examinee, samples, everything, first_layer=1) <= 0.5
    assert first_words(examinee, samples, everything, first_layer=11) >= 0.9


def test_hiding_keys_leaves_no_hook(examinee):
    with keys_hidden(examinee.model, torch.zeros(5, dtype=torch.bool), 0):
        hooked = sum(len(module._forward_pre_hooks) for module in examinee.model.modules())
    assert hooked == 12
    assert not any(module._forward_pre_hooks for module in examinee.model.modules())


def test_packed_training_forward_equals_the_stock_forward(examinee):
    """Each packed question gets the logits that the stock model gives it alone."""
    model = examinee.model
    shares = tuple((name, 1.0) for name in QUESTION_TYPES)
    batch = make_batch(BatchRequest(0, 7, 2, (6, 13), shares))
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    embed = model.model.language_model.embed_tokens
    with torch.inference_mode():
        vision = vision_tokens(model, tensors["pictures"])
        start = embed(torch.tensor(PREFIX_IDS[:2])).expand(2, -1, -1)
        x = torch.cat([start, vision, embed(tensors["ids"])], dim=1)
        x = decode(model, x, *packed_sequence(tensors["block"], tensors["positions"]))
        packed = model.lm_head(model.model.language_model.norm(x))[:, PREFIX:]
        compared = 0
        for row in range(2):
            pixels = examinee.processor.image_processor(
                Image.fromarray(batch["pictures"][row]), return_tensors="pt"
            )["pixel_values"]
            for number, places in groupby(range(TEXT), key=batch["block"][row].__getitem__):
                if number == NONE:
                    continue
                places = np.array(list(places))
                ids = torch.tensor([PREFIX_IDS + batch["ids"][row][places].tolist()])
                stock = model(input_ids=ids, pixel_values=pixels).logits[0, PREFIX:]
                assert (stock - packed[row, places]).abs().max() < 1e-3
                compared += 1
    assert compared >= 16


def test_model_card_lists_the_types_that_ship():
    card = (BACKBONE_FOLDER / "README.md").read_text(encoding="utf-8")
    listed = [line.split("`")[1] for line in card.splitlines() if line.startswith("| `")]
    assert tuple(listed) == QUESTION_TYPES
