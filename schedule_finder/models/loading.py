"""From a name to a model with its processor: the embedded demo, a folder, or a hub name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pruning_runtime.backbone import Backbone, find_backbone
from pruning_runtime.schedule import BackboneIdentity
from schedule_finder.demo import BACKBONE_FOLDERS
from schedule_finder.errors import InputError
from schedule_finder.models.checkpoint import commit_of, load_checkpoint
from schedule_finder.models.fingerprint import fingerprint
from schedule_finder.models.generation import GREEDY
from schedule_finder.models.load_options import LoadOptions
from schedule_finder.models.shapes import RANDOM_WEIGHTS, build_shape, is_shape

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import ProcessorMixin

    from schedule_finder.samples import Sample

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedBackbone:
    """A backbone ready to run: its parts, its processor, and how it was loaded."""

    backbone: Backbone
    processor: ProcessorMixin
    identity: BackboneIdentity
    device: torch.device
    dtype: torch.dtype
    options: LoadOptions = field(default_factory=LoadOptions, kw_only=True)

    @property
    def prompt_digest(self) -> str:
        """Hash of what makes the prompt of a sample; profiles with different ones cannot be merged.

        The chat template, and the system prompt and the processor arguments where they are given.
        """
        text = _template(self.processor)
        given = {
            "system_prompt": self.options.system_prompt,
            "processor_args": dict(self.options.processor_args),
        }
        if any(given.values()):
            text += json.dumps(given, sort_keys=True)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]

    def inputs(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Model inputs of a batch on the host, padded on the left, formatted by the backbone's chat template.

        Raises:
            InputError: a sample has a video and the backbone's processor takes none.
        """
        prompts = [self._prompt(sample) for sample in samples]
        images = [image for sample in samples for image in sample.images]
        videos = [list(video) for sample in samples for video in sample.videos]
        media: dict[str, Any] = {"images": images or None}
        if videos:
            if getattr(self.processor, "video_processor", None) is None:
                raise InputError(
                    f"{type(self.processor).__name__} takes no videos; give frames as a list of images "
                    "(--image-column), or choose a backbone for videos"
                )
            # The frames are chosen already; some processors would sample them again.
            media |= {"videos": videos, "do_sample_frames": False}
        self.processor.tokenizer.padding_side = "left"
        return dict(self.processor(**media, text=prompts, padding=len(prompts) > 1, return_tensors="pt"))

    def generate(self, inputs: dict[str, Tensor], max_new_tokens: int, **options: Any) -> Any:
        """Greedy `generate` of the backbone, as it is or inside a `pruned`; beams of its configuration do not count."""
        model: Any = self.backbone.model
        with torch.inference_mode():
            return model.generate(**inputs, max_new_tokens=max_new_tokens, **GREEDY, **options)

    def answers(self, generated: Tensor) -> list[str]:
        """Text of generated token ids, ``[batch, length]``."""
        return [text.strip() for text in self.processor.batch_decode(generated, skip_special_tokens=True)]

    def _prompt(self, sample: Sample) -> str:
        content: list[dict[str, Any]] = [{"type": "image"} for _ in sample.images]
        content += [{"type": "video"} for _ in sample.videos]
        content.append({"type": "text", "text": sample.question})
        conversation: Any = [{"role": "user", "content": content}]
        if system := self.options.system_prompt:
            conversation.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        return self.processor.apply_chat_template(
            conversation,
            chat_template=_template(self.processor),
            add_generation_prompt=True,
        )


def set_threads(name: str, threads: int | None = None) -> None:
    """Set torch's CPU threads; None: one for the demos, else torch's own number.

    Their matrices are too small to share: a second thread gains little on an idle machine and is ten times slower
    on a busy one.
    """
    threads = 1 if threads is None and name in BACKBONE_FOLDERS else threads
    if threads is not None:
        torch.set_num_threads(threads)


def load_backbone(
    name: str, *, device: str = "auto", dtype: str = "auto", options: LoadOptions | None = None
) -> LoadedBackbone:
    """Load ``demo``, ``demo-video``, a folder or a hub name with stock `AutoModelForImageTextToText` and `AutoProcessor`.

    Args:
        name: what to load.
        device: a torch device; ``auto`` for the first CUDA device if there is one; ``auto-map`` to spread the
            model over all of them and, where they are too small, the host's memory (accelerate's
            ``device_map="auto"``).
        dtype: one of `DTYPES`, or ``auto``: float32 on the CPU, the checkpoint's own elsewhere.
        options: how the checkpoint is loaded and prompted.

    Raises:
        InputError: there is no such backbone, device or dtype, it does not load, or its weights are incomplete.
    """
    if is_shape(name):
        raise InputError(f"backbone {name!r} has {RANDOM_WEIGHTS}; only `adaptinfer-profile bench` takes it")
    options = options or LoadOptions()
    spread = device == "auto-map"
    chosen_device = _device("auto" if spread else device)
    chosen_dtype = _dtype(dtype, chosen_device)
    model, processor, find = load_checkpoint(
        name, options, dtype=chosen_dtype, device=chosen_device, device_map="auto" if spread else None
    )
    model.eval()
    if not spread and options.load_in is None:
        model.to(chosen_device)
    backbone = find_backbone(model)
    identity = BackboneIdentity(
        name=name,
        model_type=backbone.model_type,
        num_layers=backbone.shape.num_layers,
        revision=commit_of(find),
        config_digest=backbone.config_digest,
        fingerprint=fingerprint(find) or None,
    )
    return LoadedBackbone(backbone, processor, identity, chosen_device, model.dtype, options=options)


def load_to_measure(
    name: str, *, device: str = "auto", dtype: str = "auto", options: LoadOptions | None = None
) -> Backbone:
    """A backbone for latency and memory: as `load_backbone`, or a shape with random weights (``shape:...``).

    ``auto`` gives a shape float32 on the CPU and bfloat16 elsewhere. Raises `InputError` as `load_backbone` does.
    """
    if not is_shape(name):
        return load_backbone(name, device=device, dtype=dtype, options=options).backbone
    chosen_device = _device(device)
    chosen = _dtype(dtype, chosen_device)
    precision = chosen if isinstance(chosen, torch.dtype) else torch.bfloat16
    return find_backbone(build_shape(name, chosen_device, precision))


def _template(processor: ProcessorMixin) -> str:
    template = getattr(processor, "chat_template", None) or getattr(
        processor.tokenizer, "chat_template", None
    )
    if not template:
        raise InputError(
            "this backbone's processor has no chat template; add one to its folder (chat_template.jinja)"
        )
    return template


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise InputError(f"--dtype {name!r}: choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]
