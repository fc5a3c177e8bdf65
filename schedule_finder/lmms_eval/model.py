"""The model ``adaptinfer`` of lmms-eval: one of its chat models, generating with a schedule.

lmms-eval imports this module when the model is asked for. It needs lmms-eval, which the package does not install by
itself: ``pip install 'adaptinfer[lmms-eval]'``.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from lmms_eval.utils import simple_parse_args_string
from transformers import AutoConfig, AutoModelForImageTextToText

from pruning_runtime.backbone import find_backbone
from pruning_runtime.errors import PruningError
from schedule_finder.errors import InputError
from schedule_finder.evidence import digest
from schedule_finder.lmms_eval.arguments import PruningArguments
from schedule_finder.lmms_eval.generation import recorded_generation
from schedule_finder.lmms_eval.recording import TaskRecord, read_records, summary_lines, write_records

_TASK = 4
"""Index of the task's name in the arguments of a generation request of a chat model."""
_MESSAGES, _DOCUMENT = 1, 3


class AdaptInfer(lmms):  # type: ignore[misc]  # lmms-eval is not installed beside mypy
    """What lmms-eval makes an instance of; `create_from_arg_string` puts it in front of the chat model ``base``."""

    is_simple = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> AdaptInfer:
        """The wrapped model, from ``--model_args`` and the options of the command line. Raises `InputError`."""
        given = simple_parse_args_string(arg_string)
        own, _ = PruningArguments.take(given)
        given |= {name: value for name, value in (additional_config or {}).items() if value is not None}
        # Most models take no `max_batch_size`, and refuse what they do not know.
        given.pop("max_batch_size", None)
        model = _wrapping(own.base)
        _add_model_type(model, given)
        return model(**given | _device_map(model, given))

    def __init__(self, **given: Any) -> None:
        self._pruning, others = PruningArguments.take(given)
        super().__init__(**others)
        if not hasattr(self.model, "generate"):
            raise InputError(
                f"--model_args: base={self._pruning.base} loads a {type(self.model).__name__}, which cannot generate; "
                "choose llava_hf, qwen2_5_vl, ..."
            )
        self._applied, self._image_scale = self._pruning.applied(find_backbone(self.model))
        self._tasks: dict[str, TaskRecord] = {}

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """The wrapped model's answers, with the schedule, one task after the other.

        Raises:
            PruningError: a prompt failed; an answer that the wrapped model left empty would be scored as wrong.
        """
        answers: list[Any] = [None] * len(requests)
        for task in dict.fromkeys(request.args[_TASK] for request in requests):
            indices = [index for index, request in enumerate(requests) if request.args[_TASK] == task]
            own = [requests[index] for index in indices]
            for index, answer in zip(indices, self._answer_task(task, own), strict=True):
                answers[index] = answer
        self._report()
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not offered: lmms-eval 0.7 gives chat models generation tasks only."""
        raise NotImplementedError("adaptinfer: chat models of lmms-eval 0.7 get generation tasks only")

    def _answer_task(self, task: str, requests: list[Any]) -> list[Any]:
        record = self._tasks.setdefault(task, TaskRecord())
        if self._image_scale != 1:
            requests = [_with_smaller_images(request, self._image_scale) for request in requests]
        # Tokens are what the wrapped model would generate, so its own code makes prompts and reads answers.
        with recorded_generation(self.model, self._applied, record.prompts.append) as failures:
            answers = super().generate_until(requests)
        if failures:
            raise PruningError(f"task {task}: {failures[0]}") from failures[0]
        for request, answer in zip(requests, answers, strict=True):
            record.add_answer(request.args[_DOCUMENT], getattr(answer, "text", answer))
        return answers

    def _report(self) -> None:
        """Print a line per task, and write ``record``."""
        full = read_records(self._pruning.full) if self._pruning.full else {}
        for line in summary_lines(self._tasks, full):
            print(f"adaptinfer: {line}")
        if self._pruning.record is not None:
            path = self._pruning.record
            if self.world_size > 1:
                path = path.with_name(f"{path.stem}.rank{self.rank}{path.suffix}")
            write_records(path, self._tasks, self._facts())

    def _facts(self) -> dict[str, Any]:
        """What was run."""
        return {
            "base": self._pruning.base,
            "schedule": self._pruning.schedule,
            "digest": digest(self._applied),
            "baseline": self._pruning.baseline,
            "image_scale": self._image_scale,
        }


def _device_map(model: type[AdaptInfer], given: dict[str, Any]) -> dict[str, str]:
    """The device as the wrapped model's ``device_map``, where it has one and the user gave none.

    The default of `llava_hf` is an empty text, which transformers 5 refuses. Several processes place themselves.
    """
    base = next(each for each in model.__mro__ if "__init__" in vars(each) and each is not AdaptInfer)
    parameter = inspect.signature(base).parameters.get("device_map")
    if parameter is None or "device_map" in given or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return {}
    device = given.get("device") or ("cuda" if parameter.default == "" else None)
    return {"device_map": str(device)} if device else {}


def _add_model_type(model: type[AdaptInfer], given: dict[str, Any]) -> None:
    """Let `llava_hf` load any checkpoint that transformers has a class for.

    It has a list of three model types and refuses others, but its code is that of any model with LLaVA's processor.
    """
    modules = (sys.modules[each.__module__] for each in model.__mro__)
    known = next((vars(module)["model_map"] for module in modules if "model_map" in vars(module)), None)
    if isinstance(known, dict) and "pretrained" in given:
        config = AutoConfig.from_pretrained(given["pretrained"], revision=given.get("revision", "main"))
        known.setdefault(config.model_type, AutoModelForImageTextToText)


@functools.cache
def _wrapping(base: str) -> type[AdaptInfer]:
    """A class that is both: the plug-in in front of the chat model. Raises `InputError`."""
    try:
        model = get_model(base)
    except ValueError as error:
        raise InputError(f"--model_args: base={base}; lmms-eval has no such model") from error
    if model.is_simple:
        raise InputError(
            f"--model_args: base={base} has no chat version in lmms-eval; choose llava_hf, qwen2_5_vl, ..."
        )
    return type(f"AdaptInfer_{model.__name__}", (AdaptInfer, model), {"__doc__": AdaptInfer.__doc__})


def _with_smaller_images(request: Any, scale: float) -> Any:
    """The request with images of its messages scaled; videos are left as they are."""
    arguments = list(request.args)
    arguments[_MESSAGES] = _scaled_messages(arguments[_MESSAGES], scale)
    return type(request)(
        request_type=request.request_type,
        arguments=tuple(arguments),
        idx=request.idx,
        metadata=request.metadata,
    )


def _scaled_messages(messages_of: Callable[..., Any], scale: float) -> Callable[..., Any]:
    @functools.wraps(messages_of)
    def scaled(*args: Any, **kwargs: Any) -> Any:
        messages = messages_of(*args, **kwargs)
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    size = [max(1, round(side * scale)) for side in part["url"].size]
                    part["url"] = part["url"].resize(size)
        return messages

    return scaled
