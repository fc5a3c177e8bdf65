"""Time and memory of a run on models that were not measured: computed from their shapes and from stated rates.

Does not import torch. FLOPs are those of `prefill_flops`; nothing here was timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pruning_runtime.costs import prefill_flops
from pruning_runtime.geometry import DecoderShape
from schedule_finder.search import spread_layers
from schedule_finder.search_work import search_forwards

BYTES = 2
"""Of a weight, an activation and a cached number, in bfloat16."""


@dataclass(frozen=True)
class VisionTower:
    """Geometry of a vision transformer; ``patches_per_token`` patches become one vision token."""

    depth: int
    width: int
    mlp_ratio: float
    patches_per_token: int
    parameters: int

    def flops(self, vision_tokens: int) -> float:
        """FLOPs of one image: linear maps, and attention among all its patches."""
        patches = vision_tokens * self.patches_per_token
        linear = 2 * (4 + 2 * self.mlp_ratio) * self.width**2
        return self.depth * (patches * linear + 4 * patches**2 * self.width)


@dataclass(frozen=True)
class Model:
    """A published model: its decoder, its tower, and whether embedding and LM head share their weights."""

    name: str
    source: str
    decoder: DecoderShape
    tower: VisionTower
    tied: bool

    @property
    def parameters(self) -> int:
        """Weights of decoder, embeddings and tower; biases and norms of the decoder are not counted."""
        shape = self.decoder
        attention = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim * shape.hidden_size
        layer = attention + 3 * shape.hidden_size * shape.intermediate_size
        embeddings = (1 if self.tied else 2) * shape.vocab_size * shape.hidden_size
        return shape.num_layers * layer + embeddings + self.tower.parameters

    def cache_bytes(self, tokens: float) -> float:
        """Of keys and values of one prompt."""
        shape = self.decoder
        return tokens * 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers * BYTES


def _qwen2_vl(
    size: str, layers: int, hidden: int, heads: int, kv_heads: int, inner: int, vocabulary: int
) -> Model:
    merger = 5120 * 5120 + 5120 * hidden
    blocks, patch = 32 * 12 * 1280**2, 3 * 2 * 14 * 14 * 1280
    return Model(
        name=f"Qwen2-VL-{size}",
        source=f"Qwen/Qwen2-VL-{size}-Instruct, config.json",
        decoder=DecoderShape(layers, hidden, heads, kv_heads, 128, inner, vocabulary),
        tower=VisionTower(32, 1280, 4.0, 4, blocks + patch + merger),
        tied=size == "2B",
    )


MODELS = (
    _qwen2_vl("2B", 28, 1536, 12, 2, 8960, 151936),
    _qwen2_vl("7B", 28, 3584, 28, 4, 18944, 152064),
    _qwen2_vl("72B", 80, 8192, 64, 8, 29568, 152064),
)


@dataclass(frozen=True)
class Job:
    """What a run does; the defaults are those of ``run`` with an image of 896 x 896 pixels per question.

    ``methods``: the full model, the schedule, two baselines and three draws of the random one.
    """

    vision_tokens: int = 1024
    other_tokens: int = 64
    samples: int = 1000
    held_out: int = 450
    methods: int = 7
    new_tokens: int = 16
    batch_size: int = 32
    batch_tokens: int = 16384
    solver: str = "sensitivity"
    budget: float = 0.35


@dataclass(frozen=True)
class Rates:
    """What the hardware is assumed to reach: FLOP/s, memory bytes per second, and bytes of one GPU that can be used."""

    flops: float = 400e12
    bandwidth: float = 2e12
    gpu_bytes: float = 72e9


@dataclass(frozen=True)
class CostEstimate:
    """Memory in bytes, forward passes of one sample, and seconds.

    Several GPUs hold a model that is too large for one and compute in turn (``--device auto-map``): they add memory,
    not speed.
    """

    weights: float
    cache: float
    peak: float
    gpus: int
    prefill_flops: float
    prefill_ms: float
    search_forwards: int
    generations: int
    profile_seconds: float
    search_seconds: float
    evaluate_seconds: float

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.profile_seconds + self.search_seconds + self.evaluate_seconds


def estimate(model: Model, job: Job, rates: Rates) -> CostEstimate:
    """Compute time and memory; see `CostEstimate`.

    A forward pass takes its FLOPs (tower and decoder) at ``rates.flops``. A generated token of a batch takes one pass
    over the weights and the batch's cache at ``rates.bandwidth``. The peak holds weights, the cache of a batch that
    generates, and the activations of one decoder layer for a batch of ``job.batch_tokens``.
    """
    shape, prompt = model.decoder, job.vision_tokens + job.other_tokens
    weights = float(BYTES * model.parameters)
    batch = max(1, min(job.batch_size, job.batch_tokens // prompt))
    cache = model.cache_bytes(prompt + job.new_tokens)
    activations = job.batch_tokens * BYTES * (2 * shape.intermediate_size + 4 * shape.hidden_size)
    peak = weights + job.batch_size * cache + activations
    gpus = -(-int(peak) // int(rates.gpu_bytes))
    flops = prefill_flops(shape, [prompt] * shape.num_layers)
    forward = (flops + model.tower.flops(job.vision_tokens)) / rates.flops
    token = (weights + batch * cache) / rates.bandwidth / batch
    layers = spread_layers(list(range(shape.num_layers - 1)))
    searched = search_forwards(
        job.solver,
        layers,
        shape.num_layers,
        job.samples,
        vision_share=job.vision_tokens / prompt,
        budget=job.budget,
    )
    generations = job.methods * job.held_out
    return CostEstimate(
        weights=weights,
        cache=cache,
        peak=peak,
        gpus=gpus,
        prefill_flops=flops,
        prefill_ms=1e3 * flops / rates.flops,
        search_forwards=round(searched or 0),
        generations=generations,
        profile_seconds=job.samples * forward,
        search_seconds=(searched or 0) * forward,
        evaluate_seconds=generations * (forward + job.new_tokens * token),
    )


def cost_table(models: Sequence[Model] = MODELS, job: Job = Job(), rates: Rates = Rates()) -> str:
    """A Markdown table, a row per model, and a line with everything that was assumed."""
    head = (
        "model", "weights", "GPUs", "peak", "cache of a prompt", "prefill of a prompt", "profile", "search", "evaluate",
        "all",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for model in models:
        found = estimate(model, job, rates)
        lines.append(
            f"| {model.name} | {found.weights / 1e9:.0f} GB | {found.gpus} | {found.peak / 1e9:.0f} GB "
            f"| {found.cache / 1e6:.0f} MB | {found.prefill_flops / 1e12:.1f} TFLOP, {found.prefill_ms:.0f} ms "
            f"| {job.samples} forward passes, {_time(found.profile_seconds)} "
            f"| at most {found.search_forwards} forward passes, {_time(found.search_seconds)} "
            f"| {found.generations} answers, {_time(found.evaluate_seconds)} | {_time(found.seconds)} |"
        )
    lines += [
        "",
        f"Computed, not measured: {job.vision_tokens} vision and {job.other_tokens} other tokens per prompt, "
        f"{job.samples} samples to profile, {job.held_out} held out, {job.methods} methods, {job.new_tokens} new tokens, "
        f"bfloat16, batches of {job.batch_size}; assumed rates per GPU: {rates.flops / 1e12:.0f} TFLOP/s, "
        f"{rates.bandwidth / 1e12:g} TB/s, {rates.gpu_bytes / 1e9:.0f} GB usable. GPUs that share a "
        "model compute in turn. Reading images is not counted.",
    ]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
