"""What `pruned` leaves behind (nothing) and what it refuses (by name)."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MllamaConfig, MllamaForConditionalGeneration, PreTrainedModel

from pruning_runtime import PruningError, ScheduleError, UnsupportedBackbone, find_backbone, pruned
from tests.support.model_state import state_of
from tests.support.schedules import schedule_for
from tests.support.tiny_models import FAMILIES


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_is_left_behind(attention: str, fails: bool) -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(attention=attention), tiny.batch((1, 2))
    model.generate(**inputs, max_new_tokens=2)  # transformers itself installs hooks at the first call
    before = copy.deepcopy(state_of(model))
    try:
        with pruned(model, schedule_for(model, (1, 0.5))), torch.no_grad():
            assert state_of(model) != before
            if fails:
                model(**dict(inputs, pixel_values=inputs["pixel_values"][:1]))
            model.generate(**inputs, max_new_tokens=2)
    except ValueError:
        assert fails
    assert state_of(model) == before


def test_a_failed_call_does_not_harm_the_next() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,))
    with pruned(model, schedule_for(model, (1, 0.5))), torch.no_grad():
        first = model(**inputs).logits
        with pytest.raises(ValueError, match="do not match"):
            model(**dict(inputs, pixel_values=torch.cat([inputs["pixel_values"]] * 2)))
        assert torch.equal(model(**inputs).logits, first)


def test_nested_and_concurrent_use_is_an_error() -> None:
    model = FAMILIES["llava"].build()
    schedule = schedule_for(model, (1, 0.5))
    problems: list[Exception] = []

    def elsewhere() -> None:
        try:
            with pruned(model, schedule):
                pass
        except PruningError as error:
            problems.append(error)

    with pruned(model, schedule):
        with pytest.raises(PruningError, match="already inside"), pruned(model, schedule):
            pass
        with pytest.raises(PruningError, match="already inside"), pruned(model.model, schedule):
            pass  # the same decoder
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(problems) == 1
    with pruned(model, schedule):
        pass


def test_a_backbone_that_was_found_before_takes_the_place_of_its_model() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1, 2))
    model.generate(**inputs, max_new_tokens=2)  # transformers itself installs hooks at the first call
    backbone, before = find_backbone(model), copy.deepcopy(state_of(model))
    schedule = schedule_for(model, (1, 0.5))
    with torch.no_grad():
        with pruned(model, schedule) as record:
            expected = model(**inputs).logits
        with pruned(backbone, schedule) as found:
            assert torch.equal(model(**inputs).logits, expected)
            for again in (model, backbone):
                with pytest.raises(PruningError, match="already inside"), pruned(again, schedule):
                    pass
    assert found.tokens_per_layer == record.tokens_per_layer
    assert state_of(model) == before


def test_two_models_are_pruned_side_by_side() -> None:
    tiny = FAMILIES["llava"]
    models = [tiny.build(seed=seed) for seed in (0, 1)]
    inputs = tiny.batch((1,))
    alone = []
    for model in models:
        with pruned(model, schedule_for(model, (1, 0.3))), torch.no_grad():
            alone.append(model(**inputs).logits)
    with (
        pruned(models[0], schedule_for(models[0], (1, 0.3))),
        pruned(models[1], schedule_for(models[1], (1, 0.3))),
        torch.no_grad(),
    ):
        for model, expected in zip(models, alone, strict=True):
            assert torch.equal(model(**inputs).logits, expected)


def test_schedule_for_another_backbone() -> None:
    llava, qwen = FAMILIES["llava"].build(), FAMILIES["qwen2_vl"].build()
    schedule = schedule_for(llava, (1, 0.5))
    with pytest.raises(ScheduleError, match=r"model_type is 'qwen2_vl'.*'llava'"), pruned(qwen, schedule):
        pass
    deeper = FAMILIES["llava"].build(num_hidden_layers=8)
    with pytest.raises(ScheduleError, match="num_layers is 8.*made for 6"), pruned(deeper, schedule):
        pass
    digest = find_backbone(llava).config_digest
    exact = schedule.model_copy(
        update={"backbone": schedule.backbone.model_copy(update={"config_digest": digest})}
    )
    wider = FAMILIES["llava"].build(intermediate_size=80)
    with pruned(llava, exact):
        pass
    with pytest.raises(ScheduleError, match="config_digest"), pruned(wider, exact):
        pass


def _train_with_checkpoints(model: PreTrainedModel) -> None:
    model.gradient_checkpointing_enable()
    model.train()


@pytest.mark.parametrize(
    ("break_setup", "message"),
    [
        (_train_with_checkpoints, "eval"),
        (lambda model: setattr(model.generation_config, "prefill_chunk_size", 8), "prefill_chunk_size"),
        (lambda model: setattr(model.generation_config, "cache_implementation", "static"), "static"),
    ],
)
def test_setups_that_are_refused(break_setup: Any, message: str) -> None:
    model = FAMILIES["llava"].build()
    break_setup(model)
    with pytest.raises(UnsupportedBackbone, match=message), pruned(model, schedule_for(model, (1, 0.5))):
        pass


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda model: torch.compile(model, backend="eager"), r"call model\.compile\(\)"),
        (torch.nn.DataParallel, "the `module` of a DataParallel"),
    ],
    ids=["compiled", "parallel"],
)
def test_wrappers_of_a_model_are_refused(wrap: Any, message: str) -> None:
    model = FAMILIES["llava"].build()
    schedule = schedule_for(model, (1, 0.5))
    with pytest.raises(UnsupportedBackbone, match=message), pruned(wrap(model), schedule):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer_length": 1.5}, "answer_length must be a whole number of at least 0, found 1.5"),
        ({"answer_length": None}, "found None"),
        ({"vision_mask": [[True]]}, "vision_mask must be a tensor, found list"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    model = FAMILIES["llava"].build()
    with pytest.raises(PruningError, match=message), pruned(model, schedule_for(model, (1, 0.5)), **options):
        pass


def test_calls_that_are_refused() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,))
    schedule = schedule_for(model, (1, 0.5))
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pruned(model, schedule), torch.no_grad():
        with pytest.raises(UnsupportedBackbone, match="StaticCache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(PruningError, match="outside `pruned`"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        with pytest.raises(PruningError, match="vision_mask"):
            model(inputs_embeds=embeds)
        with pytest.raises(PruningError, match="no rows"):
            model(input_ids=inputs["input_ids"][:0])
        with pytest.raises(PruningError, match="whole model"):
            model.get_decoder()(inputs_embeds=embeds)
        with pytest.raises(UnsupportedBackbone, match="continuous batching"):
            # What `generate_batch` passes in its own thread, which logs the error and fails the request.
            model(**inputs, cu_seq_lens_q=torch.tensor([0, inputs["input_ids"].shape[1]]))
        with pytest.raises(PruningError, match="chunked prefill"):
            model.generate(inputs["input_ids"], max_new_tokens=2, prefill_chunk_size=8)


def test_embeddings_with_a_vision_mask_equal_token_ids() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1, 2))
    schedule = schedule_for(model, (1, 0.4))
    with pruned(model, schedule), torch.no_grad():
        expected = model(**inputs).logits
    features = torch.cat(model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output)
    vision = find_backbone(model).vision_mask(inputs["input_ids"])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(vision[..., None], features)
    with pruned(model, schedule, vision_mask=vision), torch.no_grad():
        found = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(found, expected)


def test_cross_attention_backbones_are_refused_by_name() -> None:
    config = MllamaConfig(
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2,
                       "intermediate_size": 32, "image_size": 28, "patch_size": 14, "vision_output_dim": 64,
                       "intermediate_layers_indices": [0]},
        text_config={"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
                     "intermediate_size": 32, "vocab_size": 64, "cross_attention_layers": [1], "pad_token_id": 0},
    )  # fmt: skip
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config)
    with pytest.raises(UnsupportedBackbone, match="MllamaForConditionalGeneration.*cross-attention"):
        find_backbone(model)


# ---- a cache after its `with` has ended


def _generate(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> None:
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=2)


def _one_token_with_mask(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> None:
    model(input_ids=ids[:, -1:], attention_mask=torch.ones_like(ids), past_key_values=cache)


def _one_token(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> None:
    model(input_ids=ids[:, -1:], past_key_values=cache)


def _several_tokens(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> None:
    model(input_ids=ids[:, -3:], past_key_values=cache)


def _in_another_with(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> None:
    with pruned(model, schedule_for(model, (1, 0.5))):
        _one_token(model, ids, cache)


def _a_copy(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> None:
    _one_token(model, ids, copy.deepcopy(cache))


@pytest.mark.parametrize(
    "use", [_generate, _one_token_with_mask, _one_token, _several_tokens, _in_another_with, _a_copy]
)
def test_a_cache_is_refused_after_its_with(use: Any) -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,))
    model.generate(**inputs, max_new_tokens=2)
    before = copy.deepcopy(state_of(model))
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        with pruned(model, schedule_for(model, (1, 0.5))) as record:
            ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=3)
            use_inside = copy.deepcopy(cache)
            model(input_ids=ids[:, -1:], past_key_values=use_inside)
        assert state_of(model) == before
        assert record.cache_bytes > 0
        with pytest.raises(PruningError, match="its `with pruned"):
            use(model, ids, cache)
        # The model itself is not affected.
        fresh = model(**inputs).logits
    assert state_of(model) == before
    assert fresh.shape[1] == inputs["input_ids"].shape[1]
    assert isinstance(cache, DynamicCache)
