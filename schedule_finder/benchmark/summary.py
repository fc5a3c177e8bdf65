"""Statistics over rounds: medians, quartiles, ratios, parts, break-even."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from schedule_finder.benchmark.clock import DECODE_PARTS, PREFILL_PARTS, PRUNING_PARTS
from schedule_finder.benchmark.one_run import Run


def times(
    own: list[Run], full: list[Run], same_path: list[Run] | None, lengths: Sequence[int]
) -> dict[str, Any]:
    """Medians and quartiles over rounds, ratios to the unpruned model round by round, and the rounds themselves.

    Args:
        own: rounds of a baseline.
        full: rounds of the unpruned model.
        same_path: rounds of the unpruned model on the path of this baseline; None if it did not run.
        lengths: numbers of new tokens to report totals for.
    """
    decoded = [run for run in own if len(run.token_ms) > 1]
    per_token = [_token_ms(run) for run in decoded]
    full_per_token = [_token_ms(run) for run in full if len(run.token_ms) > 1]
    gain = statistics.median(b.token_ms[0] - a.token_ms[0] for a, b in zip(own, full, strict=True))
    slower = [a - b for a, b in zip(per_token, full_per_token, strict=True)]
    # If the rounds disagree on which of both decodes faster, the difference is noise and gives no break-even.
    level = not slower or min(slower) <= 0 <= max(slower)
    loss = 0.0 if level else statistics.median(slower)
    return {
        "decoder_ms": spread([_decoder_ms(run) for run in own]),
        "decoder_ratio": _ratio(own, full),
        "same_path_ratio": None if same_path is None else _ratio(own, same_path),
        "first_token_ms": spread([run.token_ms[0] for run in own]),
        "token_ms": spread(per_token) if decoded else None,
        "total_ms": {
            str(length): spread([run.token_ms[length - 1] for run in own if len(run.token_ms) >= length])
            for length in lengths
        },
        "faster": None if own is full or not decoded else break_even(gain, loss),
        "prefill": _parts(own, "prefill", PREFILL_PARTS, lambda run: run.token_ms[0]),
        "decode": _parts(decoded, "decode", DECODE_PARTS, _token_ms) if decoded else None,
        "rounds": [
            {"parts": run.parts, "total_ms": run.token_ms[-1], "new_tokens": len(run.token_ms)} for run in own
        ],
    }


def _token_ms(run: Run) -> float:
    """Milliseconds per token after the first."""
    return (run.token_ms[-1] - run.token_ms[0]) / (len(run.token_ms) - 1)


def _decoder_ms(run: Run) -> float:
    """The decoder's prefill, scoring and dropping included."""
    return sum(run.parts["prefill"].get(part, 0.0) for part in ("decoder", *PRUNING_PARTS))


def _ratio(own: list[Run], other: list[Run]) -> dict[str, float]:
    return spread([_decoder_ms(a) / _decoder_ms(b) for a, b in zip(own, other, strict=True)])


def _parts(
    runs: list[Run], phase: str, names: Sequence[str], total: Callable[[Run], float]
) -> dict[str, float | None]:
    """Milliseconds by part, mean over the middle half of the rounds, ordered by ``total``.

    The parts then add up to a typical total; medians of single parts need not. None for parts that cannot be separated
    from the decoder.
    """
    cut = round(len(runs) / 4)
    middle = sorted(runs, key=total)[cut : len(runs) - cut]
    return {
        part: None
        if runs[0].undivided and part in PRUNING_PARTS
        else statistics.mean(run.parts[phase].get(part, 0.0) for run in middle)
        for part in names
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    ordered = sorted(values)
    if len(ordered) == 1:
        return {"median": ordered[0], "q1": ordered[0], "q3": ordered[0]}
    first, middle, third = statistics.quantiles(ordered, n=4, method="inclusive")
    return {"median": middle, "q1": first, "q3": third}


def break_even(gain_ms: float, loss_ms: float) -> dict[str, Any]:
    """The numbers of new tokens for which one method is faster than another.

    Args:
        gain_ms: milliseconds by which its first token is earlier; negative if later.
        loss_ms: milliseconds by which each further token takes longer; negative if shorter.

    Returns:
        ``{"when": "always" | "never"}``, or ``{"when": "to" | "from", "tokens": n}``.
    """
    if gain_ms > 0 and loss_ms <= 0:
        return {"when": "always"}
    if gain_ms <= 0 and loss_ms >= 0:
        return {"when": "never"}
    even = gain_ms / loss_ms  # further tokens after which both totals are equal
    if gain_ms > 0:
        return {"when": "to", "tokens": math.ceil(even)}
    return {"when": "from", "tokens": math.floor(even) + 2}


def faster_text(faster: dict[str, Any] | None) -> str:
    """The result of `break_even` in words."""
    if faster is None:
        return ""
    return f"{faster['when']} {faster['tokens']}" if "tokens" in faster else str(faster["when"])
