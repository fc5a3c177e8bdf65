"""What profiling costs beside a plain forward, and what eager attention maps would cost instead.

    python -m scripts.bench_probe                    # 12 layers, width 256, 576 + 40 tokens, one CPU thread
    python -m scripts.bench_probe --repeats 9 --text 200

Three ways in one run, interleaved so that a noisy machine hits all alike: the plain forward; the profile
(`profile_batch`, q and k of the rater rows beside the model's own SDPA kernel); eager attention with
`output_attentions`, which is what published analyses use. Peak memory is that of a process of its own per
way, above that process before its first forward (Linux only). The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from pruning_runtime import find_backbone
from schedule_finder.attention_profile import profile_batch

WAYS = ("plain", "profile", "eager maps")
VISION_TOKENS = 576
IMAGE_ID = 5


def build(way: str, layers: int, width: int, kv_heads: int) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights whose vision tower is as small as can be."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=96,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=int(2.7 * width),
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_ID, vision_feature_layer=-1
    )
    config._attn_implementation = "eager" if way == "eager maps" else "sdpa"
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def make_call(way: str, options: argparse.Namespace, kv_heads: int) -> Callable[[], object]:
    """A function that does one batch in this way."""
    model = build(way, options.layers, options.width, kv_heads)
    ids = torch.randint(10, 1000, (options.batch, 4 + VISION_TOKENS + options.text))
    ids[:, 4 : 4 + VISION_TOKENS] = IMAGE_ID
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(options.batch, 3, 96, 96),
    }
    backbone = find_backbone(model)

    def plain() -> object:
        with torch.inference_mode():
            return model(**inputs, use_cache=False, logits_to_keep=1)

    def eager() -> object:
        with torch.inference_mode():
            return model(**inputs, use_cache=False, logits_to_keep=1, output_attentions=True)

    return {"plain": plain, "profile": lambda: profile_batch(backbone, inputs), "eager maps": eager}[way]


def peak_kilobytes() -> int:
    """Largest memory of this process since the peak was reset (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def peak_megabytes(way: str, kv_heads: int, arguments: list[str]) -> float:
    """Peak memory of one batch above the process's memory before it, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", way, "--kv-heads", str(kv_heads), *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Measure, print a table, print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--text", type=int, default=40, help="text tokens after the image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--kv-heads", type=int, default=8, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        call = make_call(options.memory_of, options, options.kv_heads)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, at what is in use now
        before = peak_kilobytes()
        call()
        print((peak_kilobytes() - before) / 1024)
        return

    results = []
    for kv_heads in (8, 2):
        calls = {way: make_call(way, options, kv_heads) for way in WAYS}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(options.repeats + 1):
            for way, call in calls.items():
                begun = time.perf_counter()
                call()
                if repeat:  # the first round warms up
                    seconds[way].append(time.perf_counter() - begun)
        for way in WAYS:
            ratios = [mine / plain for mine, plain in zip(seconds[way], seconds["plain"], strict=True)]
            results.append(
                {
                    "kv_heads": kv_heads,
                    "way": way,
                    "seconds": statistics.median(seconds[way]),
                    "times_plain": statistics.median(ratios),
                    "peak_mb": peak_megabytes(way, kv_heads, sys.argv[1:]),
                }
            )
    print(f"{'attention':10} {'way':11} {'seconds':>8} {'x plain':>8} {'peak MB':>8}")
    for row in results:
        heads = "8 kv heads" if row["kv_heads"] == 8 else "2 kv heads"
        print(
            f"{heads:10} {row['way']:11} {row['seconds']:8.3f} {row['times_plain']:8.2f} {row['peak_mb']:8.0f}"
        )
    print(json.dumps({"options": vars(options), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
