"""Every refusal of a model, a schedule or a call that cannot be pruned correctly, with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from pruning_runtime.backbone import Backbone
from pruning_runtime.errors import PruningError, ScheduleError, UnsupportedBackbone
from pruning_runtime.model_quirks.attention_temperature import find_temperature
from pruning_runtime.renumbering import find_rotary, problem_of_table, rope_types, table_index
from pruning_runtime.schedule import Schedule
from pruning_runtime.scorers import FeatureScorer, FrameScorer, Scorer, TowerScorer
from pruning_runtime.tower import find_tower

# ---- the model and the schedule, before anything is installed


def check_setup(backbone: Backbone, schedule: Schedule) -> None:
    """Raise `ScheduleError` or `UnsupportedBackbone` if ``schedule`` cannot be applied to ``backbone``."""
    schedule.check_backbone(backbone)
    _check_model(backbone)
    family = type(backbone.model).__name__
    if schedule.positions == "renumbered" and (reason := why_not_renumbered(backbone)) is not None:
        raise UnsupportedBackbone(f"{family}: {reason}; use positions 'original'")
    if schedule.dropped_tokens == "merge" and (reason := why_not_merged(backbone)) is not None:
        raise UnsupportedBackbone(f"{family}: {reason}; use dropped_tokens 'discard'")
    for layer, scorer in schedule.scorers().items():
        _check_scorer(schedule, layer, scorer)
        _check_scored_layer(backbone, max(layer, 0), scorer)
        if isinstance(scorer, TowerScorer):
            find_tower(backbone)  # refuses a model without one


def _check_model(backbone: Backbone) -> None:
    model, family = backbone.model, type(backbone.model).__name__
    generation = getattr(model, "generation_config", None)
    # Releases before 5.23 have the second name only.
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    checkpointing = next((name for name in names if hasattr(type(model), name)), None)
    if model.training and checkpointing is not None and getattr(model, checkpointing):
        raise UnsupportedBackbone(f"{family}: pruning is for inference; call model.eval() first")
    if getattr(generation, "prefill_chunk_size", None):
        raise UnsupportedBackbone(f"{family}: generation_config.prefill_chunk_size must be None to prune")
    if "static" in (getattr(generation, "cache_implementation", None) or ""):
        raise UnsupportedBackbone(
            f"{family}: a static cache has one length for all layers; use the dynamic cache"
        )


def _check_scorer(schedule: Schedule, layer: int, scorer: Scorer) -> None:
    """Raise `ScheduleError` if a scorer has no meaning at its stage, whatever the backbone."""
    if not isinstance(scorer, FeatureScorer):
        return
    if scorer.needs_layer and layer == -1:
        raise ScheduleError(
            f"stages: layer -1 is before the decoder, and scorer {scorer.name!r} reads a decoder layer; use it from "
            "layer 0 on"
        )
    if isinstance(scorer, FrameScorer) and layer != schedule.stages[0].layer:
        raise ScheduleError(
            f"stages: scorer {scorer.name!r} compares whole frames, and tokens have left before layer {layer}; use it "
            "at the first stage only"
        )
    if scorer.joins is not None and schedule.dropped_tokens == "merge":
        raise ScheduleError(
            f"scorer {scorer.name!r} merges dropped tokens by its own rule; use dropped_tokens 'discard' with it"
        )


def _check_scored_layer(backbone: Backbone, layer: int, scorer: Scorer) -> None:
    reads_keys = scorer.needs_attention or (isinstance(scorer, FeatureScorer) and scorer.needs_keys)
    if not reads_keys or backbone.has_own_attention(layer):
        return
    usable = [layer for layer in range(len(backbone.layers)) if backbone.has_own_attention(layer)]
    raise ScheduleError(
        f"stages: layer {layer} of {type(backbone.model).__name__} has no keys of its own to score with "
        f"({backbone.layer_kinds[layer]}); scorer {scorer.name!r} can be used at layers {usable}"
    )


def why_not_merged(backbone: Backbone) -> str | None:
    """Why ``dropped_tokens: merge`` cannot be used; None if it can."""
    kernel = backbone.text_model.config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        return f"attention kernel {kernel!r} does not take token sizes; sdpa and eager do"
    if _shares_keys(backbone):
        return "its layers share keys, and a merged token would change the keys of later layers"
    if not all(map(backbone.attends, range(len(backbone.layers)))):
        return "its recurrent layers do not take token sizes"
    return None


def why_not_renumbered(backbone: Backbone) -> str | None:
    """Why ``positions: renumbered`` cannot be used; None if it can."""
    model: Any = backbone.text_model
    if _shares_keys(backbone):
        return "its layers share keys, which have one position each"
    if not isinstance(rotary := getattr(model, "rotary_emb", None), torch.nn.Module):
        return "its decoder has no `rotary_emb` to make another table with"
    without = [layer for layer, block in enumerate(backbone.layers) if table_index(block) is None]
    if without:
        return f"layers {without} take no position_embeddings and count positions themselves"
    if "dynamic" in rope_types(model):
        return "its 'dynamic' RoPE depends on the longest sequence so far, for all layers at once"
    tried: set[str] = set()
    for layer, kind in enumerate(backbone.layer_kinds):
        name, make = find_rotary(model, layer, kind)
        if name not in tried and (problem := problem_of_table(make, rotary)) is not None:
            return f"the rotary table of its layer {layer} ({kind}) cannot be made for other positions: {problem}"
        tried.add(name)
    return None


def why_not_static(backbone: Backbone, scorers: Iterable[Scorer]) -> str | None:
    """Why the prefill cannot run at static shapes (``fast=True``); None if it can."""
    text = backbone.text_model
    kernel = text.config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        return f"attention kernel {kernel!r} may read the padding on the host; sdpa and eager do not"
    if not all(map(backbone.attends, range(len(backbone.layers)))):
        return "its recurrent layers keep a state that cannot be cut to the prompt"
    if _shares_keys(backbone):
        return "its layers share keys"
    if host_types := rope_types(text) & {"dynamic", "longrope"}:
        return f"its {host_types.pop()!r} RoPE reads the longest position on the host"
    if any(find_temperature(block) is not None for block in backbone.layers):
        return "its queries are scaled by their position in the cache, which padding changes"
    moved = any(hasattr(module, "_hf_hook") for module in text.modules())
    if moved or len({parameter.device for parameter in text.parameters()}) > 1:
        return "its decoder is spread over several devices or offloaded"
    if text.config.output_hidden_states or text.config.output_attentions:
        return "its configuration requests more than the last hidden states"
    for scorer in scorers:
        if scorer.name == "random":
            return "scorer 'random' draws on the host"
        if isinstance(scorer, TowerScorer):
            return f"scorer {scorer.name!r} reads the vision tower, whose statistics have no static buffers"
    return None


def _shares_keys(backbone: Backbone) -> bool:
    return backbone.kv_sources != tuple(range(len(backbone.layers)))


# ---- one call


def check_prompt(cache: Cache | None, arguments: dict[str, Any]) -> None:
    """Raise if a call with a new prompt cannot be pruned; ``arguments`` are the model's."""
    if arguments.get("cu_seq_lens_q") is not None:
        raise UnsupportedBackbone(
            "continuous batching packs prompts into one row with a paged cache, which cannot be pruned; "
            "call generate() on a padded batch"
        )
    if getattr(cache, "is_compileable", False):
        raise UnsupportedBackbone(
            f"{type(cache).__name__} has one fixed length for all layers; use a DynamicCache to prune"
        )
    _check_mask(arguments)


def _check_mask(arguments: dict[str, Any]) -> None:
    mask = arguments.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise PruningError(f"attention_mask must be [batch, length], found shape {tuple(mask.shape)}")


def check_answer(answer_length: int, length: int, in_answer: Sequence[int]) -> None:
    """Raise `PruningError` if the last ``answer_length`` positions of a prompt cannot be a given answer.

    Args:
        answer_length: positions of the answer.
        length: positions of the prompt, the answer included.
        in_answer: vision tokens in the answer of each row.
    """
    if answer_length >= length:
        raise PruningError(f"answer_length {answer_length}: the prompt has only {length} positions")
    if any(in_answer):
        raise PruningError(
            f"answer_length {answer_length}: there are vision tokens among the last positions of the prompt"
        )


def find_vision(
    backbone: Backbone, given: Tensor | None, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor:
    """Vision tokens of a prompt, bool ``[batch, length]``: ``given``, or found by id. Raises `PruningError`."""
    prompt = inputs_embeds if input_ids is None else input_ids
    if prompt is not None and not len(prompt):
        raise PruningError("the batch has no rows")
    if given is not None and prompt is not None:
        repeats, rest = divmod(len(prompt), max(len(given), 1))
        if given.dim() != 2 or rest or given.shape[1] != prompt.shape[1]:
            raise PruningError(
                f"vision_mask is {tuple(given.shape)}, the prompt that the model receives is {tuple(prompt.shape[:2])}; "
                "`generate` without a cache sends a longer one at every token"
            )
        # Beams and several answers: `generate` repeats each row.
        alike = prompt.unflatten(0, (len(given), repeats))
        if repeats > 1 and not bool((alike == alike[:, :1]).all()):
            raise PruningError(
                f"vision_mask has {len(given)} rows for {len(prompt)} different prompts; give a row for each"
            )
        return given.bool().to(prompt.device).repeat_interleave(repeats, 0)
    if input_ids is None:
        raise PruningError("a prompt given as inputs_embeds needs pruned(..., vision_mask=[batch, length])")
    return backbone.vision_mask(input_ids)


def check_continuation(backbone: Backbone, arguments: dict[str, Any], *, after_vision: bool) -> None:
    """Raise `PruningError` if a call with tokens after a prompt cannot be right.

    Args:
        backbone: of the model.
        arguments: the model's.
        after_vision: whether the prompt has vision tokens.
    """
    _check_mask(arguments)
    input_ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if input_ids is None and embeddings is not None and embeddings.shape[1] > 1 and not after_vision:
        raise PruningError(
            "several inputs_embeds arrived on a cache that holds a prompt without vision tokens; vision tokens among them "
            "could not be pruned: run the whole prompt on a fresh cache"
        )
    # Several tokens only: a check of every generated token would wait for the device each time.
    if input_ids is None or input_ids.shape[1] == 1:
        return
    if bool(backbone.vision_mask(input_ids).any()):
        raise PruningError(
            "vision tokens arrived on a cache that already holds a prompt: chunked prefill cannot be "
            "pruned, and a later turn with a new image needs the whole conversation on a fresh cache"
        )
