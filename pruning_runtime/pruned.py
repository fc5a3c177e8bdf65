"""Install the hooks that apply a schedule, for the duration of a ``with`` or until `remove`, and remove them.

Hooks on the decoder layers drop tokens from the hidden states and gather masks and rotary tables. The attention tap
supplies the scores. The model's own layer loop, kernels and cache are not changed: every layer computes a shorter
sequence, and its cache holds the tokens that it computed. One token's path: `pruned` installs the hooks of
`PruningSession` (session.py); `Prefill.before_layer` (prefill.py) applies the stages with `select_kept`
(selection.py); the result is a `Segment` (sequence.py).
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pruning_runtime.assisted_decoding import prompt_before_drafts
from pruning_runtime.attention_tap import attention_tap
from pruning_runtime.backbone import Backbone, find_backbone
from pruning_runtime.errors import PruningError
from pruning_runtime.forward_override import replaced_forwards
from pruning_runtime.model_quirks.attention_temperature import find_temperature
from pruning_runtime.preflight import check_setup
from pruning_runtime.record import Record
from pruning_runtime.schedule import Schedule
from pruning_runtime.session import PruningSession
from pruning_runtime.setup import PruningSetup, tower_needs
from pruning_runtime.tower import tower_tap

_in_use: WeakSet[nn.Module] = WeakSet()
_in_use_lock = threading.Lock()


class AppliedSchedule:
    """A schedule that is applied to a model until `remove`; returned by `apply`.

    Also a context manager, which removes it at the end. Forward passes of one model must not run at the same time.

    Attributes:
        schedule: what is applied.
        record: what the latest prefill did.
    """

    def __init__(
        self,
        model: PreTrainedModel | Backbone,
        schedule: Schedule,
        *,
        vision_mask: Tensor | None,
        keep_scores: bool,
        timing: bool,
        fast: bool,
        answer_length: int,
    ) -> None:
        if not hasattr(answer_length, "__index__") or answer_length < 0:
            raise PruningError(f"answer_length must be a whole number of at least 0, found {answer_length!r}")
        if not isinstance(vision_mask, Tensor | None):
            raise PruningError(f"vision_mask must be a tensor, found {type(vision_mask).__name__}")
        self.schedule = schedule
        backbone = model if isinstance(model, Backbone) else find_backbone(model)
        check_setup(backbone, schedule)
        with ExitStack() as undo:
            # A model and its inner model share the decoder.
            _claim(backbone.text_model)
            undo.callback(_release, backbone.text_model)
            needs = tower_needs(schedule)
            tower = None if needs is None else undo.enter_context(tower_tap(backbone, needs, vision_mask))
            setup = PruningSetup.prepare(
                backbone, schedule, keep_scores=keep_scores, timing=timing, tower=tower
            )
            session = PruningSession(setup, vision_mask, fast, answer_length)
            undo.callback(session.close)
            for hook in _install(backbone, session, original_positions=schedule.positions == "original"):
                undo.callback(hook.remove)
            undo.enter_context(prompt_before_drafts(backbone))
            if fast:
                undo.enter_context(replaced_forwards([backbone.text_model], _replacement(session.decoder)))
            if setup.reads_attention:
                undo.enter_context(attention_tap(backbone, session.on_attention))
            self._undo: ExitStack | None = undo.pop_all()
        # The hooks keep the session, and so this object: without it, the taps would end with the last reference to it.
        session.applied = self
        self.record: Record = session.record

    @property
    def active(self) -> bool:
        """Whether the schedule is still applied."""
        return self._undo is not None

    def remove(self) -> None:
        """Leave the model as it was before. A second call does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    def __enter__(self) -> Record:
        return self.record

    def __exit__(self, *_error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<AppliedSchedule ({'active' if self.active else 'removed'}): {self.schedule!r}>"


def apply(
    model: PreTrainedModel | Backbone,
    schedule: Schedule | str | os.PathLike[str],
    *,
    vision_mask: Tensor | None = None,
    keep_scores: bool = False,
    timing: bool = False,
    fast: bool = False,
    answer_length: int = 0,
) -> AppliedSchedule:
    """Apply ``schedule`` to ``model`` until the returned handle's `AppliedSchedule.remove`, for servers.

    ```python
    handle = apply(model, "4_schedule.json")
    output = model.generate(**inputs, max_new_tokens=32)
    print(handle.record.processed)  # of the latest prompt
    handle.remove()
    ```

    Arguments, guarantees and errors are those of `pruned`. The model stays pruned if the handle is dropped; applying
    another schedule to it raises `PruningError` until the first one is removed. Call `remove` before you drop the
    model: until then its memory is not freed.
    """
    return AppliedSchedule(
        model,
        Schedule.of(schedule),
        vision_mask=vision_mask,
        keep_scores=keep_scores,
        timing=timing,
        fast=fast,
        answer_length=answer_length,
    )


@contextmanager
def pruned(
    model: PreTrainedModel | Backbone,
    schedule: Schedule | str | os.PathLike[str],
    *,
    vision_mask: Tensor | None = None,
    keep_scores: bool = False,
    timing: bool = False,
    fast: bool = False,
    answer_length: int = 0,
) -> Iterator[Record]:
    """Apply ``schedule`` to ``model``; afterwards the model is unchanged.

    Inside the ``with``, call `forward` and `generate` as usual. The logits equal those of the unpruned sequence in
    which later layers cannot attend to dropped tokens. A `forward` that returns all logits returns them at their
    original positions; those of dropped tokens have no meaning. A cache that was filled inside the ``with`` can be
    used inside it only.

    Args:
        model: a stock Hugging Face vision-language model, in inference; or its `Backbone`, which saves the search for
            its parts where many schedules follow each other. Find the backbone again after changing the modules.
        schedule: made for this backbone; or its file, or the name of a preset.
        vision_mask: bool ``[batch, length]``, only for a prompt given as ``inputs_embeds``. Otherwise vision tokens
            are found by their ids.
        keep_scores: keep every stage's scores in the record.
        timing: measure milliseconds by part.
        fast: run the prefill at static shapes as CUDA graphs. This pays for small batches on a GPU, where launching
            kernels takes longer than running them. Each new shape is captured on first use, which takes the time of
            several prefills, and is kept with a prompt's keys and values until the ``with`` ends; use one ``with``
            for many prompts. Do not change the decoder's weights, adapters or hooks during that time. Prompts and
            backbones that cannot run at static shapes take the plain path, with one warning.
        answer_length: the last ``answer_length`` positions of every prompt are a given answer. They score no tokens,
            so what is kept is what the prompt alone would keep, and their logits are those of the pruned prompt
            continued with this answer (teacher forcing in one pass).

    Yields:
        The `Record`, which each prefill updates.

    Raises:
        ScheduleError: the schedule was made for another backbone.
        UnsupportedBackbone: the model, or its set-up, cannot be pruned correctly.
        PruningError: the model is already inside a `pruned`, or ``answer_length`` is negative.
    """
    applied = apply(
        model,
        schedule,
        vision_mask=vision_mask,
        keep_scores=keep_scores,
        timing=timing,
        fast=fast,
        answer_length=answer_length,
    )
    with applied as record:
        yield record


def _install(
    backbone: Backbone, session: PruningSession, *, original_positions: bool
) -> list[RemovableHandle]:
    """Register all hooks; the caller removes them."""
    model, text_model = backbone.model, backbone.text_model
    hooks = [
        model.register_forward_pre_hook(session.before_model, with_kwargs=True),
        text_model.register_forward_pre_hook(session.before_decoder, with_kwargs=True),
        text_model.register_forward_hook(session.after_decoder),
    ]
    for layer, block in enumerate(backbone.layers):
        hooks.append(block.register_forward_pre_hook(session.before_layer(layer), with_kwargs=True))
        temperature = find_temperature(block)
        if temperature is not None and original_positions:
            correct = session.after_queries(layer, temperature)
            hooks.append(temperature.queries.register_forward_hook(correct))
    return hooks


def _replacement(decoder: Callable[..., Any]) -> Callable[[int, Callable[..., Any]], Callable[..., Any]]:
    """Make ``decoder`` look like the forward that it replaces: models read its signature."""

    def make(_index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            return decoder(*args, **kwargs)

        return replaced

    return make


def _claim(model: nn.Module) -> None:
    """Refuse nested and concurrent use of one model."""
    with _in_use_lock:
        if model in _in_use:
            raise PruningError(
                "this model is already inside `pruned`, or a schedule is applied to it; leave that `with`, call "
                "`remove`, or load a second copy"
            )
        _in_use.add(model)


def _release(model: nn.Module) -> None:
    with _in_use_lock:
        _in_use.discard(model)
