"""Lower bound of the time of a prefill at the rates that this device reached in the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning_runtime.costs import layer_flops
from pruning_runtime.geometry import DecoderShape
from schedule_finder.benchmark.clock import PartClock

_MATMULS, _COPY_BYTES = 4, {"cuda": 2**29, "cpu": 2**26}


@dataclass(frozen=True)
class Rates:
    """Measured rates: floating-point operations and copied bytes (read and written), per second."""

    flops: float
    bytes: float


def measure_rates(shape: DecoderShape, rows: int, device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of one matrix product of the decoder's MLP over ``rows`` tokens, and of one large copy."""
    # Not random, so that the state of a GPU's generator does not change.
    left = _ramp(rows, shape.hidden_size, device, dtype)
    right = _ramp(shape.hidden_size, shape.intermediate_size, device, dtype)
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.inference_mode():
        product = _best_ms(lambda: left @ right, device)
        copying = _best_ms(lambda: target.copy_(source), device)
    return Rates(
        flops=2 * rows * shape.hidden_size * shape.intermediate_size / product * 1e3,
        bytes=2 * source.nbytes / copying * 1e3,
    )


def _ramp(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Unequal numbers: products of zeros are faster than others."""
    return torch.linspace(-1, 1, rows * columns, device=device, dtype=dtype).view(rows, columns)


def _best_ms(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_MATMULS + 1):
        clock = PartClock.on(device)
        clock.start()
        call()
        clock.end_forward(last=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock.read()[1][0])
    return min(times[1:])


def roofline_ms(
    shape: DecoderShape, tokens_per_layer: Sequence[int], batch: int, rates: Rates, value_bytes: int
) -> float:
    """Lower bound in milliseconds of the decoder's layers over one batch of prompts.

    Per layer the maximum of compute time and memory time at the measured rates. Minimal traffic: weights read once,
    hidden states read and written once, keys and values written once.
    """
    head = shape.head_dim + (shape.value_dim or shape.head_dim)
    weights = shape.hidden_size * (
        (shape.num_heads + shape.num_kv_heads) * head + 3 * shape.intermediate_size
    )
    per_token = 2 * shape.hidden_size + shape.num_kv_heads * head
    return 1e3 * sum(
        max(
            batch * flops / rates.flops,
            value_bytes * (weights + batch * tokens * per_token) / rates.bytes,
        )
        for tokens, flops in zip(tokens_per_layer, layer_flops(shape, tokens_per_layer), strict=True)
    )
