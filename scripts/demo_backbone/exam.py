"""Exports a trained model and tests the exported folder through `generate()`."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    ProcessorMixin,
)

from schedule_finder.demo import scenes
from scripts.demo_backbone.model import build_model
from scripts.demo_backbone.vocabulary import EOS, IMAGE, SPECIAL_TOKENS, TOKEN_IDS, build_processor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Writes a folder that the stock Auto classes load; the weights are stored as bfloat16."""
    store(model, build_model(model.config.text_config.num_hidden_layers), build_processor(), folder)


def store(model: PreTrainedModel, stored: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Writes the weights of ``model`` as ``stored``, an instance for bfloat16, with its processor."""
    shutil.rmtree(folder, ignore_errors=True)
    stored.load_state_dict(model.state_dict())
    stored.to(torch.bfloat16)
    stored.generation_config = GenerationConfig(**SPECIAL_TOKENS, do_sample=False, max_new_tokens=8)
    stored.save_pretrained(folder)
    processor.save_pretrained(folder)
    # Saved readable by the owner alone, which a package must not be.
    (folder / "model.safetensors").chmod(0o644)


class Examinee:
    """An exported folder as a user loads it, computing in float32."""

    types: ClassVar[tuple[str, ...]] = scenes.QUESTION_TYPES
    samples: Callable[..., Iterator[Any]] = staticmethod(scenes.demo_samples)
    vision_token = IMAGE
    token_ids: ClassVar[dict[str, int]] = TOKEN_IDS

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def inputs(self, samples: list[Any]) -> BatchFeature:
        """Prompts and pictures of the samples, padded on the left."""
        images = [sample.image for sample in samples]
        return self.processor(
            images=images, text=self.prompts(samples, "image"), padding=True, return_tensors="pt"
        )

    def prompts(self, samples: list[Any], medium: str) -> list[str]:
        """The chat of each sample, as text."""
        return [
            self.processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": medium}, {"type": "text", "text": sample.question}],
                    }
                ],
                add_generation_prompt=True,
            )
            for sample in samples
        ]

    @torch.inference_mode()
    def exact_match(self, per_type: int, seed: int) -> dict[str, float]:
        """Share of held-out samples per question type whose whole generated answer is right."""
        right = dict.fromkeys(self.types, 0)
        samples = list(self.samples(per_type * len(right), split="held_out", seed=seed))
        for start in range(0, len(samples), 100):
            batch = samples[start : start + 100]
            inputs = self.inputs(batch)
            output = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            for sample, tokens in zip(batch, output.tolist(), strict=True):
                answer = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
                # Without an end the answer is not exact, whatever a reader would make of it.
                right[sample.question_type] += self.token_ids[EOS] in tokens and answer == sample.answer
        return {name: count / per_type for name, count in right.items()}

    @torch.inference_mode()
    def first_word_match(self, per_type: int, seed: int, blind_after: int) -> float:
        """Share of held-out samples answered rightly when layers >= `blind_after` see no vision token."""
        count = per_type * len(self.types)
        right = 0
        for sample in self.samples(count, split="held_out", seed=seed):
            inputs = self.inputs([sample])
            vision = inputs["input_ids"][0] == self.token_ids[self.vision_token]
            with keys_hidden(self.model, vision, first_layer=blind_after):
                logits = self.model(**inputs, logits_to_keep=1).logits
            right += int(logits.argmax()) == self.token_ids[sample.answer]
        return right / count


@contextmanager
def keys_hidden(model: Any, keys: Tensor, first_layer: int) -> Iterator[None]:
    """From decoder layer `first_layer` on nobody attends to the marked positions: `keys` (L,), one row."""
    length = len(keys)
    visible = torch.ones(length, length, dtype=torch.bool).tril() & ~keys

    def hide(_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"attention_mask": visible[None, None]}

    layers = model.model.language_model.layers[first_layer:]
    handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
