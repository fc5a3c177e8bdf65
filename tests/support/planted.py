"""A stock LLaVA whose attention moves at known layers, so that the right change points are known.

The model is an ordinary ``LlavaForConditionalGeneration`` built from its config; only its weights are
chosen. Nothing is patched, so it can go through any path a real backbone goes through.

How the truth is planted
------------------------
* Every image patch carries the code of one of ``num_groups`` groups, drawn anew for each sample. The
  patch embedding reads the code, the tower and the projector pass it on unchanged (the projector by
  ``gelu(x) - gelu(-x) == x``), and the decoder's residual stream is frozen (``o_proj`` and
  ``down_proj`` are zero), so every layer sees the same vision tokens.
* Text tokens share one direction. In layer ``l`` the query projection turns it into the key of the
  group that layer ``l``'s regime attends to. A boundary ``b`` is the first layer of a new regime. Two
  regimes may have the same group (the first returns). An isolated layer attends to a group of its own.
* RoPE would turn the pattern with the distance between tokens. Keys live in the slow half of the
  rotary pairs, where with ``rope_theta = 1e6`` a pair turns by at most 1e-3 rad per position.
* Noise is added to the q and k projections: per layer (``noise``; independent or correlated between
  neighbouring layers, Gaussian or heavy-tailed) or accumulating from layer to layer (``drift``). Patches
  of one group differ, per token and per sample, and so do text tokens, so that the same perturbed
  projection moves every token of every sample differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

if TYPE_CHECKING:
    from collections.abc import Sequence

HIDDEN = 64
CODE = 32  # width of the vision tower; dims [0, 32) of the decoder hold vision, [32, 64) text
HEADS = 4
HEAD_DIM = HIDDEN // HEADS
PATCH = 4  # pixels
VOCAB = 32
PAD, BOS, IMAGE = 0, 1, 2
FIRST_WORD = 3
MAX_GROUPS = HEAD_DIM // 2  # one key slot per group in the slow rotary pairs


@dataclass(frozen=True)
class PlantedBackbone:
    """A model, the layers at which its attention was made to move, and a source of samples."""

    model: LlavaForConditionalGeneration
    boundaries: tuple[int, ...]
    isolated: tuple[int, ...]
    grid: int  # patches per side; vision tokens per sample = grid ** 2
    num_groups: int

    def make_batch(self, n: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Make ``n`` samples: left-padded prompts of 4 to 8 words after the image, and pixels.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[n, length]``, ``pixel_values``
            ``[n, 3, grid * PATCH, grid * PATCH]``.
        """
        rng = np.random.default_rng([seed, 1])
        num_vision = self.grid**2
        words = [rng.integers(FIRST_WORD, VOCAB, rng.integers(4, 9)) for _ in range(n)]
        rows = [[BOS, FIRST_WORD, *[IMAGE] * num_vision, *w] for w in words]
        length = max(map(len, rows))
        ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])

        group = np.stack([rng.permutation(num_vision) for _ in range(n)]) % self.num_groups
        code = _codes()[group] + 0.5 * rng.standard_normal((n, num_vision, CODE))
        patches = (code @ _patch_basis()).reshape(n, self.grid, self.grid, 3, PATCH, PATCH)
        side = self.grid * PATCH
        pixels = patches.transpose(0, 3, 1, 4, 2, 5).reshape(n, 3, side, side)
        return {
            "input_ids": ids,
            "attention_mask": (ids != PAD).long(),
            "pixel_values": torch.tensor(pixels, dtype=torch.float32),
        }


def planted_llava(
    num_layers: int,
    boundaries: Sequence[int],
    noise: float | Sequence[float] = 0.0,
    seed: int = 0,
    *,
    isolated: Sequence[int] = (),
    groups: Sequence[int] | None = None,
    drift: float = 0.0,
    tails: float | None = None,
    correlation: float = 0.0,
    strength: float = 3.0,
    grid: int = 6,
    kv_heads: int = HEADS,
) -> PlantedBackbone:
    """Build a LLaVA whose text queries attend to one group of vision tokens per regime.

    Args:
        num_layers: decoder layers.
        boundaries: first layers of the second, third, ... regime, 0-based, increasing; empty for no shift.
        noise: standard deviation, in nats, of what each layer's own perturbation adds to the attention
            logit of a vision token; one number, or one per layer.
        seed: draws all weights.
        isolated: layers that attend to a group of their own, each to another.
        groups: the group of each regime, numbered from 0 in order of first use; equal numbers are a regime
            that returns. By default every regime has its own.
        drift: as ``noise``, for a perturbation that accumulates: layer ``l`` carries the sum of ``l + 1``
            steps of this size.
        tails: degrees of freedom (> 2) of the multivariate t distribution from which the noise of each query
            or key dimension is drawn, at the same variance; None for Gaussian noise.
        correlation: of the noise of neighbouring layers, in [0, 1) (a first-order autoregression).
        strength: logit, in nats, by which the regime's group stands above the other vision tokens.
        grid: patches per side; ``grid ** 2`` vision tokens.
        kv_heads: key/value heads; fewer than 4 makes a GQA model.
    """
    bounds, alone = tuple(map(int, boundaries)), tuple(map(int, isolated))
    of_layer, num_groups = _group_of_layer(num_layers, bounds, alone, groups)
    level = np.broadcast_to(np.asarray(noise, dtype=float), (num_layers,))
    rng = np.random.default_rng([seed, 0])
    model = _empty_llava(num_layers, grid, kv_heads, seed)
    text = np.concatenate([np.zeros(CODE), np.ones(HIDDEN - CODE)])
    codes = np.pad(_codes(), ((0, 0), (0, HIDDEN - CODE)))  # [MAX_GROUPS, HIDDEN]
    slots = np.r_[HEAD_DIM // 4 : HEAD_DIM // 2, 3 * HEAD_DIM // 4 : HEAD_DIM]  # slow rotary pairs

    # After RMSNorm both kinds of token have norm sqrt(HIDDEN), i.e. sqrt(2) times their code.
    read_group = np.zeros((HEAD_DIM, HIDDEN))
    read_group[slots] = codes / (CODE * np.sqrt(2))  # own group's slot = 1, others about 0
    order = rng.permutation(num_groups)

    # Logit = q.k / sqrt(HEAD_DIM) with |k| about 1: this amplitude of q makes it `strength`.
    to_query = text / ((HIDDEN - CODE) * np.sqrt(2))
    # A weight perturbation of std sigma makes a vector of std sigma * sqrt(HIDDEN) per component.
    # q noise meets a key of norm ~1; k noise meets a query of norm strength * sqrt(HEAD_DIM).
    unit_q = np.sqrt(HEAD_DIM) / np.sqrt(2 * HIDDEN)
    unit_k = 1 / (strength * np.sqrt(2 * HIDDEN))
    noise_q = _Noise((HIDDEN, HIDDEN), drift, tails, correlation)
    noise_k = _Noise((kv_heads * HEAD_DIM, HIDDEN), drift, tails, correlation)
    with torch.no_grad():
        for index, layer in enumerate(model.model.language_model.layers):
            heads = strength * np.sqrt(HEAD_DIM) * rng.uniform(0.8, 1.2, HEADS)
            query = np.zeros((HEADS, HEAD_DIM, HIDDEN))
            query[:, slots[order[of_layer[index]]]] = heads[:, None] * to_query
            query = query.reshape(HIDDEN, HIDDEN) + unit_q * noise_q.next(level[index], rng)
            key = np.tile(read_group, (kv_heads, 1)) + unit_k * noise_k.next(level[index], rng)
            layer.self_attn.q_proj.weight.copy_(torch.from_numpy(query))
            layer.self_attn.k_proj.weight.copy_(torch.from_numpy(key))
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        words = np.zeros((VOCAB, HIDDEN))
        words[:, CODE:] = 1 + 0.5 * rng.standard_normal((VOCAB, HIDDEN - CODE))
        model.get_input_embeddings().weight.copy_(torch.from_numpy(words))
    return PlantedBackbone(model.eval(), bounds, alone, grid, num_groups)


def _group_of_layer(
    num_layers: int, boundaries: tuple[int, ...], isolated: tuple[int, ...], groups: Sequence[int] | None
) -> tuple[np.ndarray, int]:
    """Which group each layer attends to ``[num_layers]``, and how many there are with one for no layer."""
    if list(boundaries) != sorted(set(boundaries)) or any(not 0 < b < num_layers for b in boundaries):
        raise ValueError(f"boundaries must increase within 1..{num_layers - 1}, got {boundaries}")
    if list(isolated) != sorted(set(isolated)) or any(not 0 <= layer < num_layers for layer in isolated):
        raise ValueError(f"isolated must increase within 0..{num_layers - 1}, got {isolated}")
    of_regime = np.arange(len(boundaries) + 1) if groups is None else np.asarray(groups)
    if len(of_regime) != len(boundaries) + 1:
        raise ValueError(f"groups: {len(of_regime)} for {len(boundaries) + 1} regimes")
    own = int(of_regime.max()) + 1
    if own + len(isolated) + 1 > MAX_GROUPS:
        raise ValueError(
            f"boundaries and isolated: {own + len(isolated)} groups, at most {MAX_GROUPS - 1} can be planted"
        )
    of_layer = of_regime[np.searchsorted(boundaries, np.arange(num_layers), side="right")]
    of_layer[list(isolated)] = own + np.arange(len(isolated))
    return of_layer, own + len(isolated) + 1


class _Noise:
    """Perturbations of one weight matrix, layer by layer: a first-order autoregression and a random walk."""

    def __init__(self, shape: tuple[int, int], drift: float, tails: float | None, correlation: float) -> None:
        self._tails, self._drift, self._correlation = tails, drift, correlation
        self._walk = np.zeros(shape)
        self._last: np.ndarray | None = None

    def next(self, level: float, rng: np.random.Generator) -> np.ndarray:
        self._walk = self._walk + self._drift * rng.standard_normal(self._walk.shape)
        fresh = self._draw(rng)
        if self._last is not None:
            fresh = self._correlation * self._last + np.sqrt(1 - self._correlation**2) * fresh
        self._last = fresh
        return np.asarray(self._walk + level * fresh)

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        if self._tails is None:
            return rng.standard_normal(self._walk.shape)
        # One scale per output: sums over inputs keep the tails, which entries drawn apart would lose.
        scale = rng.chisquare(self._tails, (len(self._walk), 1)) / (self._tails - 2)
        return rng.standard_normal(self._walk.shape) / np.sqrt(scale)


def random_boundaries(num_layers: int, count: int, rng: np.random.Generator, gap: int = 3) -> tuple[int, ...]:
    """Draw ``count`` boundaries uniformly, with at least ``gap`` layers in every regime.

    Where that many regimes of ``gap`` layers do not fit, the largest gap that does is used.
    """
    gap = min(gap, num_layers // (count + 1))
    slack = num_layers - gap * (count + 1)
    cuts = np.sort(rng.integers(0, slack + 1, count))
    return tuple(int(c + gap * (i + 1)) for i, c in enumerate(cuts))


def recovered(found: Sequence[int], boundaries: Sequence[int]) -> bool:
    """Whether every boundary was found within one layer, and nothing else."""
    if len(found) != len(boundaries):
        return False
    return all(abs(f - b) <= 1 for f, b in zip(sorted(found), sorted(boundaries), strict=True))


def _codes() -> np.ndarray:
    """Codes ``[MAX_GROUPS, CODE]`` of +-1: orthogonal, zero-mean, so LayerNorm keeps them."""
    hadamard = np.ones((1, 1))
    while len(hadamard) < CODE:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    return hadamard[1 : MAX_GROUPS + 1]


def _patch_basis() -> np.ndarray:
    """Orthonormal rows ``[CODE, 3 * PATCH * PATCH]``: how a code is painted into a patch."""
    gauss = np.random.default_rng(0).standard_normal((3 * PATCH * PATCH, CODE))
    return np.linalg.qr(gauss)[0].T


def _empty_llava(num_layers: int, grid: int, kv_heads: int, seed: int) -> LlavaForConditionalGeneration:
    """A LLaVA from its config whose tower and projector hand the patch codes to the decoder."""
    vision: dict[str, Any] = {
        "hidden_size": CODE,
        "intermediate_size": CODE,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": grid * PATCH,
        "patch_size": PATCH,
    }
    text: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCAB,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_index=IMAGE,
        image_seq_length=grid**2,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    identity = torch.eye(CODE)
    with torch.no_grad():
        tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
        basis = torch.from_numpy(_patch_basis()).float().reshape(CODE, 3, PATCH, PATCH)
        tower.embeddings.patch_embedding.weight.copy_(basis)
        tower.embeddings.position_embedding.weight.zero_()
        for block in tower.encoder.layers:
            for linear in (block.self_attn.out_proj, block.mlp.fc2):
                linear.weight.zero_()
                linear.bias.zero_()
        projector = model.model.multi_modal_projector
        for linear in (projector.linear_1, projector.linear_2):
            linear.weight.zero_()
            linear.bias.zero_()
        projector.linear_1.weight.copy_(torch.cat([identity, -identity]))
        projector.linear_2.weight[:CODE].copy_(torch.cat([identity, -identity], dim=1))
    return model
