"""From a name to a stock model with complete weights, or one line that says why not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from schedule_finder.demo import BACKBONE_FOLDERS
from schedule_finder.errors import InputError
from schedule_finder.hub import hub_reachable
from schedule_finder.library_messages import library_messages_off
from schedule_finder.models.load_options import LoadOptions

_SHOWN = 3
"""Tensors that a refusal names."""


def checkpoint_source(name: str) -> str:
    """What transformers is asked for: a folder, or a hub name. Raises `InputError` for a folder without a model."""
    if name in BACKBONE_FOLDERS:
        return str(BACKBONE_FOLDERS[name])
    if not Path(name).expanduser().exists() and not name.startswith((".", "/", "~")):
        return name
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(
            f"backbone {name!r}: no config.json in that folder; give a model folder, a hub name or `demo`"
        )
    return str(folder)


def load_checkpoint(
    name: str,
    options: LoadOptions,
    *,
    dtype: torch.dtype | str,
    device: torch.device,
    device_map: str | None,
) -> tuple[Any, Any, Callable[[str], Path | None]]:
    """Model, processor, and a function that finds files of the checkpoint by name.

    Raises:
        InputError: it does not load, is no vision-language model, or its weights are not those of its configuration.
    """
    source = checkpoint_source(name)
    hub: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if options.revision is not None:
        hub["revision"] = options.revision
    offline = not Path(source).is_dir() and not hub_reachable()
    if offline:
        hub["local_files_only"] = True
    quantization = _quantization(options.load_in, dtype, device)
    with library_messages_off(), _one_line(name, offline):
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of loading weights: the commands have progress of their own
        _check_kind(AutoConfig.from_pretrained(source, **hub), name)
        if options.attn_implementation is not None:
            quantization["attn_implementation"] = options.attn_implementation
        if quantization.get("quantization_config") and device_map is None:
            device_map = str(device)  # quantized weights cannot be moved afterwards
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **quantization,
            **hub,
        )
        model, info = loaded
        check_weights(name, info, allowed=options.allow_missing_weights)
        processor = AutoProcessor.from_pretrained(source, **options.processor_args, **hub)
    _check_processor_args(processor, options.processor_args)
    return model, processor, lambda file: _file(source, file, options.revision)


def check_weights(name: str, info: dict[str, Any], *, allowed: bool) -> None:
    """Refuse a checkpoint whose tensors are not those of its configuration.

    Args:
        name: of the backbone.
        info: the loading info of `from_pretrained`.
        allowed: accept missing and unexpected tensors; tensors of a wrong shape are always refused.

    Raises:
        InputError: with the counts, and the first tensors of each kind.
    """
    mismatched = sorted(
        f"{key} ({_shape(stored)} in the checkpoint, {_shape(wanted)} in the configuration)"
        for key, stored, wanted in info["mismatched_keys"]
    )
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    problems = [
        f"{len(keys)} tensor{'s' * (len(keys) > 1)} {what} ({_first(keys)})"
        for what, keys in (
            ("missing", () if allowed else missing),
            ("unexpected", () if allowed else unexpected),
            ("of another shape", mismatched),
        )
        if keys
    ]
    if problems:
        hint = (
            ""
            if mismatched
            else "; --allow-missing-weights loads it all the same, with random values for what is missing"
        )
        raise InputError(
            f"backbone {name!r}: its weights are not those of its config.json: {', '.join(problems)}; correct the "
            f"checkpoint or its configuration{hint}"
        )


@contextmanager
def _one_line(name: str, offline: bool) -> Iterator[None]:
    """Turn every error of loading into one `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (
        OSError,
        ValueError,
        ImportError,
        KeyError,
        AttributeError,
        TypeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        if offline:
            raise InputError(
                f"backbone {name!r} does not load: it is no local folder, the hub cannot be reached, and its files are not "
                "in the local cache; check the name and the network, or give a folder with the checkpoint"
            ) from error
        if "trust_remote_code" in str(error):
            raise InputError(
                f"backbone {name!r} comes with Python code of its own; --trust-remote-code runs it (read it first)"
            ) from error
        if isinstance(error, ImportError) and "torchvision" in str(error).lower():
            raise InputError(
                f"backbone {name!r}: its video processor needs torchvision, which is not installed or does not fit torch; "
                "pip install 'adaptinfer[video]', with a torchvision of the same build as torch"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"backbone {name!r} does not load: {reason} (known: `demo`, `demo-video`, a folder with a checkpoint and its "
            "processor, or a hub name that can be reached)"
        ) from error


def _check_kind(config: Any, name: str) -> None:
    """Refuse configurations that are of no vision-language model, before their weights are read."""
    from transformers import AutoModelForImageTextToText

    known = type(config) in AutoModelForImageTextToText._model_mapping
    if known or "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {}):
        return
    if any(hasattr(config, part) for part in ("vision_config", "vq_config", "visual")):
        raise InputError(
            f"backbone {name!r}: transformers has no image-text-to-text class for model_type {config.model_type!r}"
        )
    raise InputError(
        f"backbone {name!r} has no vision tower (model_type {config.model_type!r}); give a vision-language model"
    )


def _quantization(load_in: str | None, dtype: torch.dtype | str, device: torch.device) -> dict[str, Any]:
    """The ``quantization_config`` of ``--load-in``. Raises `InputError` where bitsandbytes is missing."""
    if load_in is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"--load-in {load_in} needs bitsandbytes: pip install bitsandbytes")
    if importlib.util.find_spec("accelerate") is None:
        raise InputError(f"--load-in {load_in} needs accelerate: pip install accelerate")
    from transformers import BitsAndBytesConfig

    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    if load_in == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    }


def _check_processor_args(processor: Any, arguments: Any) -> None:
    """Refuse names that no part of the processor has: transformers ignores them."""
    parts = [
        processor,
        *(getattr(processor, name, None) for name in ("image_processor", "video_processor", "tokenizer")),
    ]
    known = {
        name
        for part in parts
        if part is not None
        for name in (*vars(part), *getattr(getattr(part, "valid_kwargs", None), "__annotations__", ()))
        if not name.startswith("_")
    }
    for name in arguments:
        if name not in known:
            option = {"min_pixels": "--min-pixels", "max_pixels": "--max-pixels"}.get(
                name, f"--processor-arg {name}"
            )
            raise InputError(f"{option}: {type(processor).__name__} has no argument {name!r}")


def _file(source: str, name: str, revision: str | None) -> Path | None:
    """A file of a checkpoint that was loaded: in its folder, or in the hub's cache."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def commit_of(find: Callable[[str], Path | None]) -> str | None:
    """The commit of a checkpoint from the hub, which its cache names; None for a folder.

    Args:
        find: what `load_checkpoint` returns.
    """
    path = find("config.json")
    if path is None or path.parent.parent.name != "snapshots":
        return None
    return path.parent.name


def _first(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")


def _shape(size: Any) -> str:
    return "x".join(map(str, size)) or "scalar"
