"""The parts of a training step: adapters, the packed forward, the alignment of the projector, exact match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from schedule_finder.samples.photo_assets import NAMES
from schedule_finder.samples.photo_questions import PhotoQuestion
from schedule_finder.samples.photo_scenes import PhotoScene, cell_tokens
from scripts.photo.assembly import adapted_linears
from scripts.photo.feature_pool import FEATURES, VISION_TOKENS
from scripts.photo.packing import IGNORED, PackedQuestions, Packer

_ALIGNED_TOKENS = 1024  # per step of the alignment
_TEMPERATURE = 1 / 30
_BACKGROUND_WEIGHT = 0.1


class AdaptedLinear(nn.Module):
    """A frozen linear layer and a trained low-rank change of it: ``W x + B A x``; A and B are float32."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        narrow = functional.linear(hidden, self.down.to(hidden.dtype))
        return self.linear(hidden) + functional.linear(narrow, self.up.to(hidden.dtype))


class PhotoTrainer(nn.Module):
    """Decoder with adapters, and the projector: what a training step needs of the model.

    The decoder's own weights are frozen and kept in ``dtype``.
    """

    def __init__(self, model: Any, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.projector = model.model.multi_modal_projector
        self.decoder = model.model.language_model.to(dtype)
        self.decoder.requires_grad_(False)
        # Plain matrix products are the fastest attention for short sequences with a mask on the CPU.
        self.decoder.config._attn_implementation = "eager"
        self.adapters: dict[str, AdaptedLinear] = {}
        for name, linear in adapted_linears(self.decoder).items():
            self.adapters[name] = AdaptedLinear(linear, rank)
            layer = self.decoder.layers[int(name.split(".")[1])]
            last = name.split(".")[2]
            parent = layer.self_attn if hasattr(layer.self_attn, last) else layer.mlp
            setattr(parent, last, self.adapters[name])

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The trained matrices of all adapters."""
        return [weight for adapter in self.adapters.values() for weight in (adapter.down, adapter.up)]

    def trained(self) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """Projector and adapters, as `assembly.save_trained` takes them."""
        adapters = {name: (adapter.down, adapter.up) for name, adapter in self.adapters.items()}
        return self.projector.state_dict(), adapters

    def load_trained(self, projector: dict[str, Tensor], adapters: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Start from trained weights."""
        self.projector.load_state_dict(projector)
        with torch.no_grad():
            for name, (down, up) in adapters.items():
                self.adapters[name].down.copy_(down)
                self.adapters[name].up.copy_(up)

    def answer_logits(self, features: Tensor, packed: PackedQuestions) -> tuple[Tensor, Tensor]:
        """Logits ``[answer tokens, vocabulary]`` and the tokens that they should predict."""
        embedded = self.decoder.embed_tokens(packed.input_ids)
        vision = self.projector(features.float()).to(self.dtype)
        embedded = embedded.masked_scatter(packed.vision[:, None], vision)
        hidden = self.decoder(
            inputs_embeds=embedded[None],
            attention_mask=packed.mask(self.dtype),
            position_ids=packed.positions[None],
            use_cache=False,
        ).last_hidden_state[0]
        asked = packed.labels != IGNORED
        return functional.linear(hidden[asked], self.decoder.embed_tokens.weight).float(), packed.labels[
            asked
        ]


@torch.inference_mode()
def exact_matches(
    trainer: PhotoTrainer, packer: Packer, features: Tensor, questions: Sequence[PhotoQuestion]
) -> list[bool]:
    """Whether greedy decoding would give each answer: every token of it is the likeliest after those before it."""
    packed = packer.pack(questions)
    logits, labels = trainer.answer_logits(features, packed)
    wrong = packed.segments[packed.labels != IGNORED][logits.argmax(-1) != labels]
    return [number not in wrong for number in range(1, len(questions) + 1)]


def accuracy_by_type(results: Iterable[tuple[str, bool]]) -> dict[str, tuple[int, int]]:
    """Right answers and questions of each type."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for question_type, correct in results:
        asked[question_type] += 1
        right[question_type] += correct
    return {question_type: (right[question_type], number) for question_type, number in asked.items()}


def align_projector(
    projector: nn.Module,
    packer: Packer,
    embeddings: Tensor,
    features: Tensor,
    scenes: Sequence[PhotoScene],
    steps: int,
    report: Any = print,
) -> float:
    """Train the projector alone: each vision token on an object becomes like the word embedding of its name.

    The loss is the cross-entropy over the cosines with all names and "background".

    Args:
        projector: trained in place.
        packer: tokenizes the names.
        embeddings: input embeddings of the decoder.
        features: ``[scenes, VISION_TOKENS, FEATURES]``, float16.
        scenes: what the features show.
        steps: of `_ALIGNED_TOKENS` tokens.
        report: gets a line of progress now and then.

    Returns:
        The share of object tokens whose nearest name is right, at the end.
    """
    words = [embeddings[list(packer.tokens(f" {name}"))].float().mean(0) for name in (*NAMES, "background")]
    targets = functional.normalize(torch.stack(words), dim=1)
    scale = torch.stack(words).norm(dim=1).mean()
    flat, labels = features.reshape(-1, FEATURES), torch.cat([_token_labels(scene) for scene in scenes])
    weights = torch.ones(len(words))
    weights[-1] = _BACKGROUND_WEIGHT
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    right = 0.0
    for step in range(steps):
        drawn = torch.randint(len(flat), (_ALIGNED_TOKENS,))
        projected = projector(flat[drawn].float())
        cosines = functional.normalize(projected, dim=1) @ targets.T
        loss = functional.cross_entropy(cosines / _TEMPERATURE, labels[drawn], weight=weights)
        # Vision tokens should also be as long as words: the decoder has only seen those.
        loss = loss + ((projected.norm(dim=1) / scale - 1) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_object = labels[drawn] < len(NAMES)
        right = (cosines.argmax(1) == labels[drawn])[on_object].float().mean().item()
        if step % 100 == 0 or step == steps - 1:
            report(f"alignment step {step}: loss {loss.item():.3f}, object tokens right {right:.3f}")
    return right


def _token_labels(scene: PhotoScene) -> Tensor:
    """Number of the name at each vision token, or ``len(NAMES)`` for the background."""
    labels = torch.full((VISION_TOKENS,), len(NAMES))
    for one in scene.objects:
        labels[list(cell_tokens(one.cell))] = NAMES.index(one.name)
    return labels
