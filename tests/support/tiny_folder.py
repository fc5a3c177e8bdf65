"""A checkpoint folder and data files, as somebody else would have made them."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from tests.support.tiny_models import (
    BOS,
    EOS,
    IMAGE,
    PAD,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    build_llava,
    build_qwen2_vl,
)

TEMPLATE = (
    "<bos> user {% for part in messages[0]['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE {% elif part['type'] == 'video' %}VIDEO "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)
WORDS = ["user", "assistant", "what", "is", "this", "?", "red", "green", "blue", "left", "right", "where"]


def tokenizer(special: dict[str, int]) -> PreTrainedTokenizerFast:
    """Word-level, with ids as the tiny models have them."""
    vocabulary = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<unk>": VOCAB - 1} | special
    vocabulary |= {word: 3 + place for place, word in enumerate(WORDS)}
    vocabulary |= {f"word{number}": number for number in set(range(VOCAB)) - set(vocabulary.values())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(special),
    )


def write_llava_folder(folder: Path, *, seed: int = 0, template: bool = True) -> Path:
    """A tiny LLaVA checkpoint with its processor, saved by transformers itself."""
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}, do_center_crop=False
        ),
        tokenizer=tokenizer({"<image>": IMAGE}),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>") if template else None,
    )
    build_llava(seed=seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_qwen2_vl_folder(folder: Path, *, seed: int = 0) -> Path:
    """A tiny Qwen2-VL checkpoint: dynamic resolution, video processor and all."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    special = {
        "<|image_pad|>": IMAGE,
        "<|video_pad|>": VIDEO,
        "<|vision_start|>": VISION_START,
        "<|vision_end|>": VISION_END,
    }
    pixels = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 64 * 16}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer(special),
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>").replace(
            "VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"
        ),
    )
    build_qwen2_vl(seed=seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_jsonl(folder: Path, rows: int, *, seed: int = 0, sizes: bool = False, square: bool = False) -> Path:
    """A data file with the columns image, question, answer, and its images in a folder beside it.

    Images are all of one size (``square`` or not), or of many ``sizes``.
    """
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for row in range(rows):
        size = generator.choice((16, 24, 40, 64), 2) if sizes else (24 if square else 20, 24)
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{row}.png")
        question = " ".join(["what", "is", "this", *generator.choice(WORDS[5:], size=row % 4), "?"])
        lines.append(
            {"image": f"images/{row}.png", "question": question, "answer": str(generator.choice(WORDS[6:9]))}
        )
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_video_jsonl(folder: Path, rows: int, *, seed: int = 0) -> Path:
    """A data file with the columns video, question, answer: lists of 12 frames, an animated image, a video file."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in range(rows):
        pixels = generator.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
        frames = [Image.fromarray(frame) for frame in pixels]
        names = [f"{row}-{place}.png" for place in range(12)]
        if row % 3 == 0:
            for name, frame in zip(names, frames, strict=True):
                frame.save(folder / name)
        elif row % 3 == 1:
            names = [f"{row}.gif"]
            frames[0].save(folder / names[0], save_all=True, append_images=frames[1:])
        else:
            names = [f"{row}.mp4"]
            with av.open(str(folder / names[0]), "w") as file:
                stream = file.add_stream("mpeg4", rate=10, width=32, height=32, pix_fmt="yuv420p")
                for frame in frames:
                    file.mux(stream.encode(av.VideoFrame.from_image(frame)))
                file.mux(stream.encode())
        lines.append({"video": names, "question": "what is this ?", "answer": "red"})
    path = folder / "videos.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
