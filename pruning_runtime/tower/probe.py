"""Which tower block feeds the decoder, and which tower positions make each vision token: read with gradients.

The model runs on the prompt itself up to the decoder. The output of every tower block is replaced by a new leaf, so
that its gradient shows only the paths to the decoder that pass no later block. The last block with a gradient feeds the
decoder. Between this block and the decoder lie only the projector and what merges or reorders positions, so backward
passes are cheap.

The owner of each position is found by group testing. Number the ``n`` vision tokens in binary. For every bit, one
backward pass starts from the tokens with the bit and one from those without it. A position that feeds one token has a
gradient in exactly one pass of each pair, and these passes spell the number of the token. A position with a gradient
in both passes of a pair feeds several tokens. So ``2 ceil(log2 n)`` backward passes, 24 for 2880 tokens, identify
every owner, and show that the positions are a partition, whatever the pattern is. Gradients of other positions are
exactly zero: everything after the block acts on groups of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pruning_runtime.backbone import Backbone
from pruning_runtime.errors import UnsupportedBackbone
from pruning_runtime.forward_override import replaced_forwards
from pruning_runtime.tower.blocks import VisionTower
from pruning_runtime.tower.kernel import BlockAttention, tapped_blocks


@dataclass(frozen=True, slots=True)
class Probed:
    """What the probe found. Positions are numbered over all runs of the tower in one forward, in order.

    Attributes:
        feeding: the block that feeds the decoder.
        runs: sequences and positions per sequence of each run of the tower, at the feeding block.
        positions: positions of all runs, by block.
        spans: longest attention sequence, by block; short in blocks that attend in windows.
        owner: number of the vision token that each position feeds, ``[positions]``; -1 for none.
        fixed: positions of a sequence that do not depend on the pixels (CLS first, then registers).
    """

    feeding: int
    runs: tuple[tuple[int, int], ...]
    positions: tuple[int, ...]
    spans: tuple[int, ...]
    owner: Tensor
    fixed: tuple[int, ...]


class _Stopped(Exception):
    """The run reached the point up to which it is needed."""


@dataclass
class _Trace:
    """What a run of the model leaves: the outputs of the blocks, and the decoder's input."""

    first_inputs: list[Tensor] = field(default_factory=list)
    leaves: dict[int, list[Tensor]] = field(default_factory=dict)
    spans: dict[int, int] = field(default_factory=dict)
    embeddings: Tensor | None = None

    def measure(self, attention: BlockAttention) -> None:
        longest = self.spans.get(attention.block, 0)
        self.spans[attention.block] = max(longest, attention.key.shape[2])


def probe(
    backbone: Backbone, tower: VisionTower, vision: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Probed:
    """Run the probe on a prompt.

    Args:
        backbone: the model and its parts.
        tower: of the model.
        vision: the prompt's vision tokens, bool ``[batch, length]``.
        args, kwargs: of the model's forward.

    Raises:
        UnsupportedBackbone: the tower does not feed the decoder, or a position feeds several vision tokens.
    """
    with torch.inference_mode(False), torch.enable_grad():
        args = tuple(map(_usable, args))
        # The cache is not touched: a run without it does not reach the first layer's attention.
        kwargs = {name: _usable(value) for name, value in kwargs.items() if name != "past_key_values"}
        trace = _run(backbone, tower, args, kwargs)
        vision = vision.clone()
        if trace.embeddings is None or not trace.leaves or not trace.embeddings.requires_grad:
            raise UnsupportedBackbone(
                f"{_name(backbone)}: nothing of {tower.path} enters with the decoder's input embeddings"
            )
        tokens = _vision_rows(trace.embeddings, vision)
        feeding = _feeding_block(backbone, tower, trace, tokens)
        leaves = trace.leaves[feeding]
        owner = _owners(backbone, tokens, leaves)
        fixed = _fixed_positions(backbone, tower, args, kwargs, trace.first_inputs[0])
    return Probed(
        feeding=feeding,
        runs=tuple(_sequences(leaf) for leaf in leaves),
        positions=tuple(
            sum(_positions(leaf) for leaf in trace.leaves.get(block, ()))
            for block in range(len(tower.blocks))
        ),
        spans=tuple(trace.spans.get(block, 0) for block in range(len(tower.blocks))),
        owner=owner,
        fixed=fixed,
    )


# ---- runs of the model


def _run(
    backbone: Backbone,
    tower: VisionTower,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    embed_only: bool = False,
) -> _Trace:
    """Run the model up to the decoder, or, with ``embed_only``, up to the tower's first block."""
    trace = _Trace()

    def make(block: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*block_args: Any, **block_kwargs: Any) -> Any:
            if block == 0:
                # Hidden states come first, by position or under a name of the family's.
                states = next(iter(block_args or block_kwargs.values()))
                trace.first_inputs.append(states.detach().clone())
                if embed_only:
                    raise _Stopped
            with torch.no_grad():
                output = forward(*block_args, **block_kwargs)
            states = output[0] if isinstance(output, tuple) else output
            leaf = states.detach().requires_grad_()
            trace.leaves.setdefault(block, []).append(leaf)
            # A copy: the model may change what a block returns in place, a leaf may not be changed.
            passed_on = leaf.clone()
            return (passed_on, *output[1:]) if isinstance(output, tuple) else passed_on

        return run

    with ExitStack() as undo:
        undo.enter_context(replaced_forwards(tower.blocks, make))
        if not embed_only:
            undo.enter_context(tapped_blocks(tower, range(len(tower.blocks)), trace.measure))
        undo.enter_context(_stopped_at_decoder(backbone, trace))
        undo.enter_context(suppress(_Stopped))
        # `forward` and not a call: the model's own hooks are not part of the probe.
        backbone.model.forward(*args, **kwargs)
    return trace


@contextmanager
def _stopped_at_decoder(backbone: Backbone, trace: _Trace) -> Iterator[None]:
    """Keep the decoder's input embeddings and stop: at the text model if it receives them, else at layer 0."""

    def at_text_model(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(embeddings := kwargs.get("inputs_embeds"), Tensor):
            trace.embeddings = embeddings
            raise _Stopped

    def at_first_layer(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.embeddings = args[0] if args else kwargs["hidden_states"]
        raise _Stopped

    # First of all hooks, so that those of `pruned` do not see the probe.
    hooks = [
        backbone.text_model.register_forward_pre_hook(at_text_model, with_kwargs=True, prepend=True),
        backbone.layers[0].register_forward_pre_hook(at_first_layer, with_kwargs=True, prepend=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _usable(value: Any) -> Any:
    """A tensor made in inference mode cannot take part in autograd; a copy can."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


# ---- what feeds the decoder


def _feeding_block(backbone: Backbone, tower: VisionTower, trace: _Trace, tokens: Tensor) -> int:
    seen = [(block, leaf) for block, leaves in trace.leaves.items() for leaf in leaves]
    gradients = _gradients(tokens, _signs(tokens), [leaf for _, leaf in seen])
    alive = [block for (block, _), gradient in zip(seen, gradients, strict=True) if bool(gradient.any())]
    if not alive:
        raise UnsupportedBackbone(
            f"{_name(backbone)}: nothing of {tower.path} enters with the decoder's input embeddings, so its attention "
            "cannot be assigned to vision tokens; use a scorer that does not read the tower"
        )
    return max(alive)


def _owners(backbone: Backbone, tokens: Tensor, leaves: list[Tensor]) -> Tensor:
    """Number of the vision token that each position feeds, -1 for none; on the CPU."""
    signs = _signs(tokens)
    number = torch.arange(tokens.shape[0], device=tokens.device)
    total = sum(map(_positions, leaves))
    owner = torch.zeros(total, dtype=torch.long)
    used, shared = torch.zeros(total, dtype=torch.bool), torch.zeros(total, dtype=torch.bool)
    for bit in range(max(1, (tokens.shape[0] - 1).bit_length())):
        has_bit = (number >> bit & 1).bool()[:, None]
        with_bit, without = (
            torch.cat([gradient.any(-1).flatten().cpu() for gradient in _gradients(tokens, start, leaves)])
            for start in (signs * has_bit, signs * ~has_bit)
        )
        owner |= with_bit.long() << bit
        used |= with_bit | without
        shared |= with_bit & without
    if bool(shared.any()):
        raise UnsupportedBackbone(
            f"{_name(backbone)}: {int(shared.sum())} of {total} tower positions feed several vision tokens each, so "
            "tower attention cannot be assigned to vision tokens; use a scorer that does not read the tower"
        )
    return owner.masked_fill(~used, -1)


def _gradients(tokens: Tensor, start: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(tokens, leaves, start, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(leaf) if gradient is None else gradient
        for gradient, leaf in zip(gradients, leaves, strict=True)
    ]


def _signs(tokens: Tensor) -> Tensor:
    """Random vectors, so that the derivatives of a token's features do not cancel."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens.shape, generator=generator).to(tokens)


def _vision_rows(embeddings: Tensor, vision: Tensor) -> Tensor:
    """The embeddings of the vision tokens, ``[vision tokens, width]``, row-major over the batch."""
    return embeddings[vision.to(embeddings.device)]


# ---- what does not depend on the pixels


def _fixed_positions(
    backbone: Backbone, tower: VisionTower, args: tuple[Any, ...], kwargs: dict[str, Any], before: Tensor
) -> tuple[int, ...]:
    """Positions at which every sequence has the same input of the first block when the pixels change."""
    changed = {
        name: _other_pixels(value) if _is_pixels(name, value) else value for name, value in kwargs.items()
    }
    after = _run(backbone, tower, args, changed, embed_only=True).first_inputs[0]
    if after.shape != before.shape:
        return ()
    sequences, length = _sequences(before)
    same = (after == before).all(-1).view(sequences, length).all(0)
    return tuple(same.nonzero().flatten().tolist())


def _is_pixels(name: str, value: Any) -> bool:
    return "pixel" in name and "mask" not in name and isinstance(value, Tensor) and value.is_floating_point()


def _other_pixels(pixels: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    other = pixels + torch.randn(pixels.shape, generator=generator).to(pixels)
    if pixels.dim() < 5:
        return other
    # Batches of images leave the slots of absent images zero, and models find those by their value.
    absent = (pixels == 0).flatten(2).all(-1)
    return other.masked_fill(absent.view(*absent.shape, *[1] * (pixels.dim() - 2)), 0)


def _sequences(states: Tensor) -> tuple[int, int]:
    """Number of sequences and positions per sequence of a block's output; a packed output is one sequence."""
    return (1, states.shape[0]) if states.dim() == 2 else (states.shape[0], states[0, ..., 0].numel())


def _positions(states: Tensor) -> int:
    return states[..., 0].numel()


def _name(backbone: Backbone) -> str:
    return type(backbone.model).__name__
