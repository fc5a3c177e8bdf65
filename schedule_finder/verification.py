"""Check on a real checkpoint that pruning is exact: pruned generation against the unpruned model with masked keys.

The reference uses no part of the runtime: it runs the whole sequence again for every step, without a cache, and hides
the dropped tokens as keys in the mask that the model itself made for each later layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from pruning_runtime import PruningError, Schedule, ScheduleError, Stage, UnsupportedBackbone, pruned
from pruning_runtime.backbone import RECURRENT_KINDS, Backbone
from pruning_runtime.record import Record
from pruning_runtime.schedule import ScorerChoice
from pruning_runtime.scorers import SCORERS, find_scorer
from schedule_finder.errors import InputError
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.samples import Sample

Inputs = dict[str, Tensor]
Result = Literal["exact", "differs", "inconclusive", "not compared", "refused"]
DroppedFrom = list[tuple[int, Tensor]]
"""``(layer, dropped)``: from ``layer`` on, positions in ``dropped`` (bool ``[batch, prompt]``) are no keys."""

STEPS = 3
"""Generated tokens that are compared."""
RATIOS = (0.5, 0.2)
"""Keep ratios of the two stages."""
RELATIVE = 1e-5
"""Difference that the runtime's contract allows in float32, relative to the largest logit."""
FACTOR = 8.0
"""Room above the measured effect of one rounding error per layer: a layer makes many of them."""
CLEAR = 20.0
"""Pruning must change the logits by so many times the bound, or the comparison shows nothing."""
_DRAWS = 3
_PER_TOKEN = ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True)
class Check:
    """One scorer. Differences are the largest of any logit, relative to the largest logit.

    Attributes:
        scorer: its name; "keep all" is the schedule that drops nothing.
        result: see `Verification`.
        stages: layers of the stages.
        difference: pruned against masked.
        pruning: pruned against unpruned; the comparison can show something where this is large.
        reason: why the scorer was refused or not compared.
    """

    scorer: str
    result: Result
    stages: tuple[int, ...] = ()
    difference: float | None = None
    pruning: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Verification:
    """All checks of a backbone.

    Attributes:
        verdict: ``exact`` if all scorers that were compared are; ``differs`` if one does; else ``inconclusive``.
        bound: difference that rounding explains, measured on this model and these prompts.
        prompts: vision tokens of each prompt.
        dtype: of the weights.
        checks: by scorer.
    """

    verdict: Result
    bound: float
    prompts: tuple[int, ...]
    dtype: str
    checks: tuple[Check, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return asdict(self)


def verify(
    loaded: LoadedBackbone,
    scorers: Sequence[str] = tuple(SCORERS),
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Verification:
    """Compare pruned generation with the masked reference, for each scorer.

    Raises:
        InputError: the backbone has recurrent layers, or an attention kernel without masks.
    """
    backbone = loaded.backbone
    _check_comparable(backbone)
    inputs = _prompts(loaded)
    scale, bound = _rounding(backbone, inputs)
    vision = backbone.vision_mask(inputs["input_ids"]).sum(1).tolist()
    checks = [_keep_all(loaded, inputs)]
    for number, name in enumerate(scorers):
        progress(number, len(scorers))
        checks.append(_check(loaded, inputs, name, scale, bound))
    progress(len(scorers), len(scorers))
    ran = {check.result for check in checks}
    order: tuple[Result, ...] = ("differs", "inconclusive", "exact")
    verdict = next(result for result in order if result in ran)
    return Verification(
        verdict, bound, tuple(vision), str(loaded.dtype).removeprefix("torch."), tuple(checks)
    )


def _check_comparable(backbone: Backbone) -> None:
    if RECURRENT_KINDS & set(backbone.layer_kinds):
        raise InputError(
            f"{backbone.name}: has recurrent layers, for which masking is no reference; the tests of its family compare "
            "with a shortened sequence instead"
        )
    kernel = backbone.text_model.config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise InputError(f"--verify: the kernel {kernel!r} takes no masks; use --attn-implementation sdpa")


def _prompts(loaded: LoadedBackbone) -> Inputs:
    """Two prompts of different length, each with a picture of its own; on the backbone's device."""
    pictures = []
    for seed, size in enumerate(((112, 112), (112, 84))):
        noise = torch.randint(
            0, 256, (size[1] // 14, size[0] // 14, 3), generator=torch.Generator().manual_seed(seed)
        )
        small = Image.fromarray(noise.to(torch.uint8).numpy())
        pictures.append(small.resize(size, Image.Resampling.BICUBIC))
    questions = ("What is this?", "What is in the picture on the left side, and which colour is it?")
    samples = [
        Sample(str(number), (picture,), question, None)
        for number, (picture, question) in enumerate(zip(pictures, questions, strict=True))
    ]
    return {name: value.to(loaded.device) for name, value in loaded.inputs(samples).items()}


# ---- checks


def _keep_all(loaded: LoadedBackbone, inputs: Inputs) -> Check:
    """A schedule that keeps everything changes no bit."""
    schedule = _schedule(loaded, "strided", [loaded.backbone.shape.num_layers // 2], (1.0,))
    _, plain = _generate(loaded, inputs)
    with pruned(loaded.backbone, schedule):
        _, kept = _generate(loaded, inputs)
    difference = float((plain - kept).abs().max() / plain.abs().max())
    return Check("keep all", "exact" if torch.equal(plain, kept) else "differs", difference=difference)


def _check(loaded: LoadedBackbone, inputs: Inputs, name: str, scale: float, bound: float) -> Check:
    """One scorer at two stages in the decoder, or before it where the decoder's are refused."""
    if getattr(find_scorer(name), "joins", None):
        return Check(
            name, "not compared", reason="merges dropped tokens by its own rule, which is no masking"
        )
    reason = ""
    for layers in _layers(loaded.backbone):
        schedule = _schedule(loaded, name, layers, RATIOS)
        try:
            with pruned(loaded.backbone, schedule) as record:
                tokens, logits = _generate(loaded, inputs)
        except (PruningError, ScheduleError, UnsupportedBackbone) as error:
            reason = reason or str(error)
            continue
        gone = _dropped(loaded.backbone, inputs, record)
        difference = (
            float((logits - masked_logits(loaded.backbone, inputs, tokens, gone)).abs().max()) / scale
        )
        change = float((logits - masked_logits(loaded.backbone, inputs, tokens, [])).abs().max()) / scale
        result: Result = "exact" if difference <= bound else "differs"
        if result == "exact" and change < CLEAR * bound:
            result = "inconclusive"
        return Check(name, result, tuple(layers), difference, change)
    return Check(name, "refused", reason=reason)


def _layers(backbone: Backbone) -> list[list[int]]:
    """Stages to try: two inside the decoder, at layers with attention of their own; one before it."""
    depth = backbone.shape.num_layers
    own = [layer for layer in range(depth - 1) if backbone.has_own_attention(layer)]
    early, late = own[len(own) // 4 : len(own) // 4 + 1], own[len(own) // 2 : len(own) // 2 + 1]
    inside = sorted({*early, *late})
    return [inside, [-1]] if inside else [[-1]]


def _schedule(
    loaded: LoadedBackbone, scorer: str, layers: Sequence[int], ratios: Sequence[float]
) -> Schedule:
    stages = tuple(Stage(layer=layer, keep_ratio=ratio) for layer, ratio in zip(layers, ratios, strict=False))
    return Schedule(backbone=loaded.identity, stages=stages, scorer=ScorerChoice(name=scorer))


def _generate(loaded: LoadedBackbone, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Tokens ``[batch, STEPS]`` and their logits ``[batch, STEPS, vocabulary]``."""
    options = {"min_new_tokens": STEPS, "suppress_tokens": list(loaded.backbone.vision_token_ids)}
    output = loaded.generate(inputs, STEPS, output_logits=True, return_dict_in_generate=True, **options)
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, 1).float()


def _dropped(backbone: Backbone, inputs: Inputs, record: Record) -> DroppedFrom:
    """What the record says left, and before which layer."""
    valid = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    gone = []
    for stage in record.stages:
        dropped = backbone.vision_mask(inputs["input_ids"]) & valid
        for row, positions in enumerate(stage.kept_positions()):
            dropped[row, positions] = False
        gone.append((stage.layer + 1, dropped))
    return gone


# ---- the reference


def masked_logits(backbone: Backbone, inputs: Inputs, generated: Tensor, gone: DroppedFrom) -> Tensor:
    """Logits of every step with dropped tokens hidden as keys, float32 ``[batch, steps, vocabulary]``."""
    model: Any = backbone.model
    steps = []
    with _hidden_keys(backbone, gone), torch.inference_mode():
        for step in range(generated.shape[1]):
            sequence = _continued(inputs, generated[:, :step])
            steps.append(model(**sequence, use_cache=False).logits[:, -1].float())
    return torch.stack(steps, 1)


def _continued(inputs: Inputs, tokens: Tensor) -> Inputs:
    """The prompt with generated tokens behind it; models with M-RoPE count positions themselves."""
    sequence = dict(inputs)
    more = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    more |= dict.fromkeys(_PER_TOKEN, torch.zeros_like(tokens))
    for name, part in more.items():
        if name in inputs:
            sequence[name] = torch.cat([inputs[name], part.to(inputs[name].dtype)], 1)
    if "mm_token_type_ids" not in inputs and "attention_mask" in inputs:
        sequence["position_ids"] = (sequence["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return sequence


@contextmanager
def _hidden_keys(backbone: Backbone, gone: DroppedFrom) -> Iterator[None]:
    hooks = []
    for layer, block in enumerate(backbone.layers):
        dropped = [positions for first, positions in gone if layer >= first]
        if dropped:
            union = torch.stack(dropped).any(0)
            hooks.append(block.register_forward_pre_hook(_hide(union), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hide(dropped: Tensor) -> Callable[..., Any]:
    """A pre-hook that hides positions of the prompt in a layer's own mask."""

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        batch, length = hidden.shape[-3], hidden.shape[-2]
        keys = torch.zeros(batch, length, dtype=torch.bool, device=hidden.device)
        keys[:, : dropped.shape[1]] = dropped.to(hidden.device)
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()[None, None]
        if mask.dtype == torch.bool:
            mask = mask & ~keys[:, None, None, :]
            # A query that would see nothing, such as padding, looks at itself, so that no NaN arises.
            itself = torch.eye(mask.shape[-2], length, dtype=torch.bool, device=hidden.device)
            mask = mask | (~mask.any(-1, keepdim=True) & itself)
        else:
            mask = mask.expand(batch, -1, -1, -1)
            mask = mask.masked_fill(keys[:, None, None, :], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    return hook


# ---- rounding


def _rounding(backbone: Backbone, inputs: Inputs) -> tuple[float, float]:
    """The largest logit of the prompts, and the difference that rounding explains, relative to it.

    The second is measured: the input of every layer is moved by one last place, with random signs.
    """
    model: Any = backbone.model

    def last_logits() -> Tensor:
        with torch.inference_mode():
            return model(**inputs, use_cache=False).logits[:, -1].float()

    exact = last_logits()
    scale, most = float(exact.abs().max()), 0.0
    for seed in range(_DRAWS):
        generator = torch.Generator().manual_seed(seed)
        hooks = [
            block.register_forward_pre_hook(_nudge(generator), with_kwargs=True) for block in backbone.layers
        ]
        try:
            most = max(most, float((last_logits() - exact).abs().max()))
        finally:
            for hook in hooks:
                hook.remove()
    return scale, max(RELATIVE, FACTOR * most / scale)


def _nudge(generator: torch.Generator) -> Callable[..., Any]:
    def moved(hidden: Tensor) -> Tensor:
        signs = torch.randint(0, 2, hidden.shape, generator=generator) * 2 - 1
        return hidden * (1 + signs.to(hidden.device, hidden.dtype) * torch.finfo(hidden.dtype).eps)

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (moved(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": moved(kwargs["hidden_states"])}

    return hook
