"""Words, special tokens, chat template and processor of the video demo backbone."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from schedule_finder.demo import clips
from scripts.demo_backbone import vocabulary as demo
from scripts.demo_backbone.vocabulary import BOS, EOS, IMAGE, PAD, PIXEL_MEAN, PIXEL_STD, UNKNOWN

VIDEO = "<video>"
CLIP_WORDS = ("in", "frame", "frames", "first", "with", "or", "have", *clips.FRAME_NAMES)
VOCABULARY = (*demo.VOCABULARY, VIDEO, *CLIP_WORDS)
"""The demo's words keep their ids, and so their embeddings."""
TOKEN_IDS = {word: index for index, word in enumerate(VOCABULARY)}
# A question's last content word completes its meaning.
CONTENT_WORDS = frozenset((*demo.CONTENT_WORDS, "there"))

CHAT_TEMPLATE = demo.CHAT_TEMPLATE.replace(
    "<image>{% elif part", "<image>{% elif part['type'] == 'video' %}<video>{% elif part"
)

VISION_TOKENS = clips.FRAMES * clips.FRAME_TOKENS
PREFIX_IDS = [TOKEN_IDS[BOS], TOKEN_IDS["user"]] + [TOKEN_IDS[VIDEO]] * VISION_TOKENS
PREFIX = len(PREFIX_IDS)


def build_processor() -> LlavaNextVideoProcessor:
    """A stock processor: a word-level tokenizer and frames of one size."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    side = {"height": clips.FRAME_SIZE, "width": clips.FRAME_SIZE}
    pixels = {
        "size": side,
        "crop_size": side,
        "do_center_crop": False,
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_STD] * 3,
    }
    return LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(**pixels),
        image_processor=LlavaNextImageProcessorPil(
            **pixels, image_grid_pinpoints=[[clips.FRAME_SIZE, clips.FRAME_SIZE]]
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=PAD,
            bos_token=BOS,
            eos_token=EOS,
            unk_token=UNKNOWN,
            additional_special_tokens=[IMAGE, VIDEO],
            padding_side="left",
            clean_up_tokenization_spaces=False,
        ),
        patch_size=clips.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        video_token=VIDEO,
        chat_template=CHAT_TEMPLATE,
    )
