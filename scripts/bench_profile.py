"""The cost of profiling against a plain forward, and against dumps of eager attention maps.

    python -m scripts.bench_profile                                  # 12 layers, width 256, one CPU thread
    python -m scripts.bench_profile --shape llava-1.5-7b --device cuda --dtype bfloat16
    python -m scripts.bench_profile --repeats 9 --text 40

Four methods: the plain forward; the profile as `adaptinfer-profile` makes it (`profile_batch`: attention rows of at most
128 text queries, computed beside the model's SDPA kernel); the same with all text queries; dumps as in published
analyses: eager attention with `output_attentions`, and one `.npy` file per sample (the mean over heads in float16, less
than is usually stored). With as many key heads as query heads and with a quarter of them, with short and long questions.

Time: all methods in one process in turn, so that other load affects all of them; the median over rounds of the ratio to
the plain forward. Memory: the peak of one batch, in a process per method, above the memory before it; on the CPU
resident memory (Linux; glibc returns freed blocks at once, see `RETURN_FREED`), on a GPU the memory that PyTorch
allocated. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from pruning_runtime import find_backbone
from schedule_finder.profiling.capture import profile_batch
from schedule_finder.profiling.fields import MOST_QUERIES

WAYS = ("plain", "profile", "exact", "dumps")
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""By default glibc keeps freed blocks of up to 32 MB, depending on those before: the peak of one call then varies by
half, and a profile may seem to take less than the plain forward."""
IMAGE_ID = 5
SHAPES = {
    # layers, width, width inside the MLP, heads; tower: layers, width, heads, image size, patch size
    "12x256": ((12, 256, 691, 8), (1, 32, 1, 96, 4)),
    "llava-1.5-7b": ((32, 4096, 11008, 32), (24, 1024, 16, 336, 14)),
}


def build(options: argparse.Namespace, kv_share: int) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights; ``kv_share`` query heads share a key head."""
    (layers, width, inner, heads), (tower, tower_width, tower_heads, image, patch) = SHAPES[options.shape]
    vision = CLIPVisionConfig(
        hidden_size=tower_width,
        intermediate_size=4 * tower_width,
        num_hidden_layers=tower,
        num_attention_heads=tower_heads,
        image_size=image,
        patch_size=patch,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // kv_share,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_ID, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        return LlavaForConditionalGeneration(config).to(getattr(torch, options.dtype)).eval()


def make_calls(
    options: argparse.Namespace, model: LlavaForConditionalGeneration, text: int, folder: Path
) -> dict[str, Callable[[], object]]:
    """Each method as a function that runs one batch."""
    *_, image, patch = SHAPES[options.shape][1]
    vision = (image // patch) ** 2
    torch.manual_seed(0)
    ids = torch.randint(10, 1000, (options.batch, 4 + vision + text))
    ids[:, 4 : 4 + vision] = IMAGE_ID
    pixels = torch.randn(options.batch, 3, image, image).to(model.dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    backbone = find_backbone(model)

    @torch.inference_mode()
    def forward(**more: bool) -> tuple[torch.Tensor, ...] | None:
        there = {name: value.to(model.device) for name, value in inputs.items()}
        return model(**there, use_cache=False, logits_to_keep=1, **more).attentions

    def dumps() -> None:
        model.set_attn_implementation("eager")
        maps = forward(output_attentions=True)
        model.set_attn_implementation("sdpa")
        for row in range(options.batch):
            kept = torch.stack([layer[row].mean(0).half() for layer in maps])
            np.save(folder / f"{row}.npy", kept.cpu().numpy())

    return {
        "plain": forward,
        "profile": lambda: profile_batch(backbone, inputs, MOST_QUERIES),
        "exact": lambda: profile_batch(backbone, inputs),
        "dumps": dumps,
    }


def wait(device: str) -> None:
    """Wait until the GPU has finished."""
    if device != "cpu":
        torch.cuda.synchronize()


def peak_kilobytes() -> int:
    """Largest resident memory of this process since the peak was reset (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def peak_here(call: Callable[[], object], device: str) -> float:
    """Peak memory of one call in megabytes, above the memory before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory in use
    before = peak_kilobytes()
    call()
    return (peak_kilobytes() - before) / 1024


def main() -> None:
    """Measure, print a table, print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="12x256")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--text", type=int, nargs="+", default=[40, 400], help="text tokens after the image")
    parser.add_argument("--kv-share", type=int, nargs="+", default=[1, 4], help="query heads per key head")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        if options.peak_of:
            calls = make_calls(options, build(options, options.kv_share[0]), options.text[0], Path(name))
            print(peak_here(calls[options.peak_of], options.device))
        else:
            report(options, measure(options, Path(name)))


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """One row per method, number of key heads and length."""
    results = []
    for kv_share in options.kv_share:
        model = build(options, kv_share)
        for text in options.text:
            calls = make_calls(options, model, text, folder)
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            for repeat in range(options.repeats + 1):
                note(f"{heads(kv_share)}, {text} text tokens: round {repeat + 1} of {options.repeats + 1}")
                for way, call in calls.items():
                    wait(options.device)
                    begun = time.perf_counter()
                    call()
                    wait(options.device)
                    if repeat:  # the first round warms up
                        seconds[way].append(time.perf_counter() - begun)
            for way in WAYS:
                pairs = zip(seconds[way], seconds["plain"], strict=True)
                results.append(
                    {
                        "kv_share": kv_share,
                        "text": text,
                        "way": way,
                        "seconds": statistics.median(seconds[way]),
                        "times_plain": statistics.median(mine / plain for mine, plain in pairs),
                    }
                )
        del model, calls
    for number, row in enumerate(results):  # with no model left in this process
        note(f"memory: {number + 1} of {len(results)}")
        command = [sys.executable, "-m", "scripts.bench_profile", "--peak-of", str(row["way"])]
        for name in ("shape", "device", "dtype", "batch", "threads"):
            command += [f"--{name}", str(getattr(options, name))]
        command += ["--text", str(row["text"]), "--kv-share", str(row["kv_share"])]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=os.environ | RETURN_FREED
        )
        row["peak_mb"] = float(done.stdout.split()[-1])
    return results


def heads(kv_share: object) -> str:
    """How many query heads share a key head."""
    return "MHA" if kv_share == 1 else f"GQA {kv_share}:1"


def note(line: str) -> None:
    """Show progress on a terminal."""
    if sys.stderr.isatty():
        print(f"{line:60}", end="\r", file=sys.stderr, flush=True)


def report(options: argparse.Namespace, results: list[dict[str, object]]) -> None:
    """Print a table and the JSON line."""
    print(f"{'attention':10} {'text':>5} {'way':8} {'seconds':>8} {'x plain':>8} {'peak MB':>8}")
    for row in results:
        print(
            f"{heads(row['kv_share']):10} {row['text']:5} {row['way']:8} {row['seconds']:8.3f} {row['times_plain']:8.2f} "
            f"{row['peak_mb']:8.0f}"
        )
    print(json.dumps({"options": vars(options), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
