"""The vision tower's statistics, on every small family that has one, against slow references."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pruning_runtime.backbone import find_backbone
from pruning_runtime.errors import PruningError, UnsupportedBackbone
from pruning_runtime.tower import TowerNeeds, TowerStatistics, find_tower, tower_tap
from pruning_runtime.tower import patch_map as patch_maps
from tests.support import tiny_families_a
from tests.support.rounding import FACTOR, RELATIVE, effect_on
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_models import FAMILIES, Inputs, _build, build_qwen2_5_vl
from tests.support.tower_reference import REFUSED, mean_over, owners, record, tower_cases, vision_of

CASES = tower_cases()
SUPPORTED = [name for name in CASES if name.removesuffix(" video") not in REFUSED]
EVERYTHING = TowerNeeds(frozenset({"deep", "deep_received"}), states=True, keys=True, places=True)


@functools.cache
def model_of(name: str, attention: str | None = None) -> PreTrainedModel:
    return CASES[name].build(attention=attention or CASES[name].kernels[0])


def run(model: PreTrainedModel, inputs: Inputs, needs: TowerNeeds) -> tuple[TowerStatistics, Tensor]:
    """Statistics and logits of one forward."""
    with tower_tap(find_backbone(model), needs) as tap, torch.no_grad():
        logits = model(**inputs).logits
        return tap.statistics(vision_of(model, inputs)), logits


def map_of(model: PreTrainedModel, inputs: Inputs) -> patch_maps.PatchMap:
    with tower_tap(find_backbone(model), TowerNeeds()) as tap, torch.no_grad():
        model(**inputs)
        assert tap.patch_map is not None
        return tap.patch_map


def members_of(patch_map: patch_maps.PatchMap) -> list[list[int]]:
    return [[p for p in row if p >= 0] for row in patch_map.members.tolist()]


@pytest.mark.parametrize("name", SUPPORTED)
def test_patches_of_every_token_equal_the_jacobian_and_are_a_partition(name: str) -> None:
    model, inputs = model_of(name), CASES[name].batch()
    found = map_of(model, inputs)
    members = members_of(found)
    assert members == owners(model, find_tower(find_backbone(model)).blocks[found.feeding], inputs)
    every = [position for row in members for position in row]
    assert len(every) == len(set(every)) > 0
    assert len(members) == int(vision_of(model, inputs).sum())


@pytest.mark.parametrize("name", SUPPORTED)
def test_statistics_equal_the_eager_kernels_maps(name: str) -> None:
    inputs, eager = CASES[name].batch(), model_of(name, "eager")
    # Without padding, transformers runs Phi-4-multimodal's tower causally with other kernels than eager.
    kernel = "eager" if name.startswith("phi4") else CASES[name].kernels[0]
    statistics, _ = run(model_of(name, kernel), inputs, EVERYTHING)
    found = map_of(eager, inputs)
    tower = find_tower(find_backbone(eager))
    groups = owners(eager, tower.blocks[found.feeding], inputs)

    def close(mine: Tensor | None, reference: str, *args: int) -> None:
        def measure() -> Tensor:
            values = getattr(record(eager, tower.blocks, inputs), reference)(found.feeding, *args)
            return mean_over(values, groups).nan_to_num(0)

        scale, effect = effect_on(measure, tower.blocks)
        exact = measure()
        assert mine is not None
        assert mine.dtype == torch.float32
        assert mine.shape == exact.shape
        has_patch = torch.tensor([bool(group) for group in groups])
        assert torch.equal(mine.flatten(1).isnan().any(1) if mine.dim() > 1 else mine.isnan(), ~has_patch)
        difference = float((mine.nan_to_num(0) - exact).abs().max())
        assert difference <= max(RELATIVE * scale, FACTOR * effect)
        # The values differ between tokens by far more than the bound: a wrong order would show.
        spread = exact[has_patch].std(0).max()
        assert float(spread) > 20 * max(RELATIVE * scale, FACTOR * effect)

    close(statistics.saliency["deep_received"], "received")
    if found.cls is None:
        assert torch.equal(
            statistics.saliency["deep"].nan_to_num(0), statistics.saliency["deep_received"].nan_to_num(0)
        )
    else:
        close(statistics.saliency["deep"], "row_of", found.cls)
    close(statistics.states, "flat_states")
    close(statistics.keys, "mean_keys")


@pytest.mark.parametrize("name", SUPPORTED)
def test_places_count_rows_and_columns_of_every_image(name: str) -> None:
    model, inputs = model_of(name), CASES[name].batch()
    statistics, _ = run(model, inputs, EVERYTHING)
    found = map_of(model, inputs)
    assert found.has_places
    has_patch = (found.members >= 0).any(1)
    for values in (statistics.row, statistics.column, statistics.image):
        assert torch.equal(values >= 0, has_patch)
    triples = torch.stack([statistics.image, statistics.row, statistics.column], 1)[has_patch]
    assert len(triples.unique(dim=0)) == len(triples)
    images = statistics.image[has_patch].unique()
    assert images.tolist() == list(range(len(images)))
    for image in images:
        inside = statistics.image == image
        area = (statistics.row[inside].max() + 1) * (statistics.column[inside].max() + 1)
        # LLaVA-NeXT's unpadded tiles have fewer tokens than their grid has places.
        assert int(inside.sum()) <= int(area)
        if not name.startswith("llava_"):
            assert int(inside.sum()) == int(area)


@pytest.mark.parametrize(
    ("name", "attention"), [(n, kernel) for n in SUPPORTED for kernel in CASES[n].kernels]
)
def test_model_gives_the_same_logits_and_is_unchanged_afterwards(name: str, attention: str) -> None:
    model, inputs = model_of(name, attention), CASES[name].batch()

    def state() -> dict[str, object]:
        return {
            path: (
                id(module.__dict__.get("config")),
                module.__dict__.get("forward"),
                *map(len, hooks(module)),
            )
            for path, module in model.named_modules()
        }

    def hooks(module: torch.nn.Module) -> tuple[dict, dict]:
        return module._forward_hooks, module._forward_pre_hooks

    with torch.no_grad():
        plain = model(**inputs).logits
    before, functions = state(), list(ALL_ATTENTION_FUNCTIONS)
    masks = set(AttentionMaskInterface._global_mapping)

    def interrupted() -> None:
        with tower_tap(find_backbone(model), EVERYTHING), torch.no_grad():
            logits.append(model(**inputs).logits)
            raise KeyError

    logits: list[Tensor] = []
    with pytest.raises(KeyError):
        interrupted()
    assert torch.equal(logits[0], plain)
    assert state() == before
    assert list(ALL_ATTENTION_FUNCTIONS) == functions
    assert set(AttentionMaskInterface._global_mapping) == masks


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(CASES)))
def test_families_without_a_map_are_refused_by_name_in_one_line(name: str) -> None:
    model, inputs = CASES[name].build(), CASES[name].batch()
    with (
        pytest.raises(UnsupportedBackbone, match=f"{type(model).__name__}.*{REFUSED[name]}") as refused,
        tower_tap(find_backbone(model), TowerNeeds()),
        torch.no_grad(),
    ):
        model(**inputs)
    assert "\n" not in str(refused.value)


def test_positions_that_feed_several_tokens_are_refused() -> None:
    # 3 x 3 patches become 2 x 2 tokens by interpolation: the middle ones belong to several.
    config = tiny_families_a._llava_onevision()
    config["vision_config"]["image_size"] = 12
    family = FAMILIES_A["llava_onevision"]
    model_class = __import__("transformers").LlavaOnevisionForConditionalGeneration
    model = _build(model_class, model_class.config_class(**config), seed=0, attention="sdpa")
    inputs = family.batch((1,), modality="video")
    inputs["pixel_values_videos"] = torch.randn(1, tiny_families_a.FRAMES, 3, 12, 12)
    with (
        pytest.raises(UnsupportedBackbone, match="15 of 27 tower positions feed several vision tokens"),
        tower_tap(find_backbone(model), TowerNeeds()),
        torch.no_grad(),
    ):
        model(**inputs)


# ---- Qwen2.5-VL: windows


def windowed(attention: str = "sdpa") -> PreTrainedModel:
    """Four blocks, of which 1 and 3 see whole images; windows of 2 x 2 tokens."""
    model = build_qwen2_5_vl(attention=attention)
    config = model.config
    config.vision_config.depth = 4
    config.vision_config.fullatt_block_indexes = [1, 3]
    return _build(type(model), config, seed=3, attention=attention)


def test_window_order_is_undone() -> None:
    model, inputs = windowed(), FAMILIES["qwen2_5_vl"].batch((2, 1))
    found = map_of(model, inputs)
    # 8 x 8 patches are 4 x 4 tokens; the tower runs window by window, each of 2 x 2 tokens, row by row.
    tokens = torch.arange(16).view(4, 4)
    in_windows = torch.cat([tokens[r : r + 2, c : c + 2].flatten() for r in (0, 2) for c in (0, 2)])
    group = in_windows.argsort()
    assert not torch.equal(group, torch.arange(16))
    expected = torch.cat([16 * image + group for image in range(3)])
    assert torch.equal(found.members, expected[:, None] * 4 + torch.arange(4))
    statistics, _ = run(model, inputs, EVERYTHING)
    assert torch.equal(statistics.row.view(3, 4, 4)[1], torch.arange(4)[:, None].expand(4, 4))
    assert torch.equal(statistics.column.view(3, 4, 4)[2], torch.arange(4).expand(4, 4))


def test_blocks_that_attend_in_windows_are_passed_over() -> None:
    eager, inputs = windowed("eager"), FAMILIES["qwen2_5_vl"].batch((2, 1))
    needs = TowerNeeds(frozenset({"deep", "middle", "shallow"}))
    statistics, _ = run(eager, inputs, needs)
    found = map_of(eager, inputs)
    assert (found.feeding, found.whole) == (3, {1, 3})
    recorded = record(eager, find_tower(find_backbone(eager)).blocks, inputs)
    for name, block in {"shallow": 1, "middle": 1, "deep": 3}.items():
        expected = mean_over(recorded.received(block), members_of(found))
        torch.testing.assert_close(statistics.saliency[name], expected)


# ---- several prompts


def count_runs(model: PreTrainedModel, prompts: list[Inputs]) -> list[int]:
    """How often the tower's first block runs for each prompt."""
    runs: list[int] = []
    backbone = find_backbone(model)
    block = find_tower(backbone).blocks[0]

    def hook(*_: object) -> None:
        runs[-1] += 1

    handle = block.register_forward_pre_hook(hook)
    patch_maps._maps.clear()
    with tower_tap(backbone, TowerNeeds()), torch.no_grad():
        for inputs in prompts:
            runs.append(0)
            model(**inputs)
    handle.remove()
    return runs


def test_the_map_is_found_once_for_prompts_of_one_shape() -> None:
    family = FAMILIES_A["qwen3_vl"]
    model = family.build()
    prompts = [family.batch((1,), seed=1), family.batch((1,), seed=2), family.batch((2,), seed=1)]
    probed, known = 3, 1  # for the gradients, for what does not depend on pixels, and the model's own
    assert count_runs(model, [*prompts, prompts[0]]) == [probed, known, probed, known]


def test_images_of_equal_area_and_other_shape_have_other_places() -> None:
    family = FAMILIES_A["qwen3_vl"]
    model, inputs = family.build(), family.batch((1,))
    wide = inputs | {"image_grid_thw": torch.tensor([[1, 4, 16]])}
    rows = [run(model, each, EVERYTHING)[0].row.max() for each in (inputs, wide)]
    assert [int(row) for row in rows] == [3, 1]


def test_number_of_backward_passes_grows_with_the_logarithm_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (passes.append(1), grad(*a, **k))[1])
    patch_maps._maps.clear()
    model, inputs = model_of("qwen2_vl"), FAMILIES["qwen2_vl"].batch((4, 4))
    assert len(map_of(model, inputs).members) == 128
    assert len(passes) == 1 + 2 * 7


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "gemma4", "molmo2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_same_map(name: str, dtype: torch.dtype) -> None:
    if name not in CASES:
        pytest.skip("this release of transformers lacks the family")
    model, inputs = CASES[name].build(), CASES[name].batch()
    expected = map_of(model, inputs).members
    halved = {k: v.to(dtype) if v.is_floating_point() and "pixel" in k else v for k, v in inputs.items()}
    patch_maps._maps.clear()
    assert torch.equal(map_of(model.to(dtype), halved).members, expected)


def generated_statistics(name: str, **options: int) -> tuple[TowerStatistics, TowerStatistics]:
    """What the tap finds in a plain forward of a batch, and while `generate` runs it."""
    model, inputs = model_of(name), CASES[name].batch()
    expected, _ = run(model, inputs, EVERYTHING)
    patch_maps._maps.clear()
    seen: list[TowerStatistics] = []
    backbone = find_backbone(model)

    prompts: list[torch.Tensor] = []

    def remember(_module: object, _args: object, kwargs: dict) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            prompts.append(kwargs["input_ids"])

    def read(*_: object) -> None:
        # At the decoder, where stages read them too: by release, the tower runs in the model's forward or before it.
        if len(seen) < len(prompts):
            seen.append(tap.statistics(backbone.vision_mask(prompts[-1])))

    with torch.inference_mode():
        made_inside = {key: value.clone() for key, value in inputs.items()}
        with tower_tap(backbone, EVERYTHING) as tap:
            hooks = [
                model.register_forward_pre_hook(remember, with_kwargs=True),
                backbone.text_model.register_forward_pre_hook(read),
            ]
            model.generate(**made_inside, max_new_tokens=3, do_sample=False, **options)
            for hook in hooks:
                hook.remove()
    assert len(seen) == 1
    assert not [key for key in vars(model) if "prepare_encoder" in key]
    return expected, seen[0]


def assert_equal(found: TowerStatistics, expected: TowerStatistics) -> None:
    for name, values in expected.saliency.items():
        torch.testing.assert_close(found.saliency[name], values, equal_nan=True)
    torch.testing.assert_close(found.states, expected.states, equal_nan=True)
    torch.testing.assert_close(found.keys, expected.keys, equal_nan=True)
    for part in ("row", "column", "image"):
        assert torch.equal(getattr(found, part), getattr(expected, part))


GENERATED = [
    n for n in ("llava", "qwen2_vl both", "qwen2_5_vl", "llava_next", "gemma3", "molmo2") if n in CASES
]


@pytest.mark.parametrize("name", GENERATED)
def test_generation_gives_the_statistics_of_the_prompt(name: str) -> None:
    expected, found = generated_statistics(name)
    assert_equal(found, expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llava_next"])
def test_beams_have_the_statistics_of_their_row(name: str) -> None:
    if name != "qwen2_vl" and not hasattr(GenerationMixin, "_maybe_prepare_encoder_kwargs_for_generation"):
        pytest.skip(
            "this transformers repeats images one by one: a beam of a row with two images sees one of them twice"
        )
    expected, found = generated_statistics(name, num_beams=2)
    counts = vision_of(model_of(name), CASES[name].batch()).sum(1).tolist()
    rows = torch.arange(sum(counts)).split(counts)
    twice = torch.cat([row for row in rows for _ in range(2)])
    torch.testing.assert_close(found.saliency["deep"], expected.saliency["deep"][twice], equal_nan=True)
    assert torch.equal(found.row, expected.row[twice])
    # No two rows share an image.
    parts = [set(part.tolist()) - {-1} for part in found.image.split([c for c in counts for _ in range(2)])]
    assert sum(map(len, parts)) == len(set().union(*parts))


def test_prompts_without_a_tower_run() -> None:
    family = FAMILIES["llava"]
    model, inputs = model_of("llava"), family.batch((1,))
    vision = vision_of(model, inputs)
    with tower_tap(find_backbone(model), EVERYTHING) as tap, torch.no_grad():
        model(**inputs)
        text = family.batch((0,))
        model(**text)
        nothing = tap.statistics(torch.zeros_like(text["input_ids"], dtype=torch.bool))
        assert nothing.row.numel() == 0
        assert nothing.saliency["deep"].numel() == 0
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
        with pytest.raises(PruningError, match="tower did not run"):
            tap.statistics(vision)
        model(**inputs)
        with pytest.raises(
            PruningError,
            match="rows of the prompt have \\[3\\] vision tokens, the vision tower made \\[16\\]",
        ):
            tap.statistics(vision & (vision.cumsum(1) <= 3))
