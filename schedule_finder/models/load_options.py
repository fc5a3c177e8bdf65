"""How a checkpoint is loaded and prompted beyond device and dtype; imports neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from schedule_finder.errors import InputError

LOAD_IN = ("4bit", "8bit")
ATTENTION_KERNELS = ("sdpa", "eager", "flash_attention_2")
"""Kernels of the attention layers that profiling and pruning support."""


@dataclass(frozen=True)
class LoadOptions:
    """Options of a checkpoint. They are part of a run's options, so that every step loads the same way.

    Attributes:
        revision: branch, tag or commit of a hub name.
        trust_remote_code: run the Python code of the checkpoint. Not taken from a run's folder: code that came with a
            folder must not run unless the user of this command allows it.
        attn_implementation: kernel of the attention layers; None: the default of transformers.
        load_in: ``4bit`` or ``8bit``: quantize the weights while loading, with bitsandbytes.
        allow_missing_weights: accept a checkpoint with missing or unexpected tensors.
        system_prompt: text of a system message before each question.
        processor_args: arguments of the processor, for example ``max_pixels``.
    """

    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    load_in: str | None = None
    allow_missing_weights: bool = False
    system_prompt: str | None = None
    processor_args: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def given(
        cls,
        *,
        processor_arg: Sequence[str] | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **options: Any,
    ) -> Self:
        """From the options of a command line; None means not given. Raises `InputError`."""
        arguments = dict(map(_argument, processor_arg or []))
        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        arguments |= {name: value for name, value in pixels.items() if value is not None}
        _check("--load-in", options.get("load_in"), LOAD_IN)
        _check("--attn-implementation", options.get("attn_implementation"), ATTENTION_KERNELS)
        known = {name: value for name, value in options.items() if value is not None}
        return cls(**known, processor_args=arguments)

    @classmethod
    def of_run(cls, stored: Mapping[str, Any], *, trust_remote_code: bool = False) -> Self:
        """From the options of a run. Raises `InputError` where the run needs code and it is not allowed."""
        names = {field.name for field in fields(cls)}
        if unknown := sorted(set(stored) - names):
            raise InputError(
                f"run.json: unknown loading option {unknown[0]!r}; known: {', '.join(sorted(names))}"
            )
        if stored.get("trust_remote_code") and not trust_remote_code:
            raise InputError(
                "this run's backbone was loaded with --trust-remote-code; give the option again to run the checkpoint's "
                "code"
            )
        return cls(**{**stored, "trust_remote_code": trust_remote_code})

    def stored(self) -> dict[str, Any]:
        """The options that differ from the defaults, JSON-able."""
        default = asdict(LoadOptions())
        return {name: value for name, value in asdict(self).items() if value != default[name]}


def _argument(text: str) -> tuple[str, Any]:
    """``KEY=VALUE``; the value as JSON where it is JSON, else as text."""
    name, found, value = text.partition("=")
    if not found or not name.isidentifier():
        raise InputError(f"--processor-arg {text!r}: write KEY=VALUE, as in max_pixels=602112")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _check(option: str, value: str | None, choices: Sequence[str]) -> None:
    if value is not None and value not in choices:
        raise InputError(f"{option} {value!r}: choose {', '.join(choices)}")
