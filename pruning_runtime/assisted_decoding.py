"""Assisted decoding, with an assistant model or prompt lookup: the prompt runs alone before anything is drafted.

`generate` drafts tokens first and sends the prompt and its drafts in one call. There, drafts would count as text of the
prompt, which changes the scores, and rejected ones would stay in it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from pruning_runtime.backbone import Backbone

_MAKER = "_get_candidate_generator"
"""The method of a model with which `generate` makes what drafts; the same in transformers 5.17 to 5.23."""

Drafts = tuple[Tensor, Tensor | None]
"""Ids of the sequence and its drafts, ``[1, length]``, and the drafts' logits where there are any."""


@contextmanager
def prompt_before_drafts(backbone: Backbone) -> Iterator[None]:
    """Inside, assisted decoding sends no drafts with the first call, and no vision tokens later."""
    model: Any = backbone.model
    make = getattr(model, _MAKER, None)
    if make is None or _MAKER in vars(model):  # an instance's own is somebody else's
        yield
        return

    @functools.wraps(make)
    def make_patient(*args: Any, **kwargs: Any) -> Any:
        generator = make(*args, **kwargs)
        # Those that read the model's outputs have nothing to draft from before the first call.
        return generator if generator.requires_model_outputs else _patient(generator, backbone)

    vars(model)[_MAKER] = make_patient
    try:
        yield
    finally:
        vars(model).pop(_MAKER, None)


def _patient(generator: Any, backbone: Backbone) -> Any:
    """``generator``, whose first drafts are not used."""
    draft = generator.get_candidates

    def draft_text(input_ids: Tensor, **kwargs: Any) -> Drafts:
        return _before_vision(backbone, input_ids.shape[1], *draft(input_ids, **kwargs))

    def draft_nothing(input_ids: Tensor, **kwargs: Any) -> Drafts:
        # An assistant has to read the prompt now: it keeps it in a cache of its own.
        draft(input_ids, **kwargs)
        generator.get_candidates = draft_text
        return input_ids, None

    generator.get_candidates = draft_nothing
    return generator


def _before_vision(backbone: Backbone, length: int, ids: Tensor, logits: Tensor | None) -> Drafts:
    """Drafts up to the first vision token: lookup copies them from the prompt, and a model does not answer with them.

    ``length``: of the sequence without drafts.
    """
    is_vision = backbone.vision_mask(ids[:, length:])[0].tolist()
    if True not in is_vision:
        return ids, logits
    kept = is_vision.index(True)
    return ids[:, : length + kept], None if logits is None or kept == 0 else logits[:, :kept]
