"""Muon for matrices, AdamW for the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from scripts.demo_backbone.curriculum import MUON_DECAY


class Muon(torch.optim.Optimizer):
    """Momentum whose step is replaced by the nearest orthogonal matrix (Jordan et al., 2024).

    The weight decay is essential here, not a detail: with 0.01 instead of 0.3 the residual stream grew from a
    norm of 2 to 675 over the layers and positions were never learnt.
    """

    def __init__(self, matrices: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: nothing here calls the loss again
        """One step for all matrices, equal shapes together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for (rows, columns), matrices in by_shape.items():
                updates = []
                for matrix in matrices:
                    momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                    momentum.lerp_(matrix.grad, 1 - group["momentum"])
                    updates.append(matrix.grad.lerp(momentum, group["momentum"]))
                scale = math.sqrt(max(1, rows / columns))
                for matrix, update in zip(matrices, orthogonal(torch.stack(updates)), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update.to(matrix.dtype), alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrices: (N, rows, columns)."""
    x = matrices.bfloat16() if fast_bfloat16(matrices.device) else matrices
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are fast: not on a CPU without instructions for them."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def build_optimisers(model: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of decoder and tower, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if "post_layernorm" in name:
            parameter.requires_grad_(False)  # the stock forward computes it, LLaVA does not use it
            continue
        (matrices if ".layers." in name and parameter.ndim == 2 else others).append(parameter)
    optimisers = [
        Muon(matrices, lr=muon_lr, weight_decay=MUON_DECAY),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return optimisers
