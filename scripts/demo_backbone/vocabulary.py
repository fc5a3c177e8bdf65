"""Words, special tokens, chat template and processor of the demo backbone."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from schedule_finder.demo import scenes

PAD, BOS, EOS, IMAGE, UNKNOWN = "<pad>", "<bos>", "<eos>", "<image>", "<unk>"
EMPTY = "empty"  # never asked or answered: what the alignment phase calls a cell without an object
PROMPT_WORDS = ("user", "assistant", "?", "what", "which", "is", "are", "has", "the", "a", "an", "there")
SCENE_WORDS = ("how", "many", "objects", "object", "shaped", "colour", "shape", "row", "column", "at")
RELATION_WORDS = ("left", "right", "of", "above", "below")
VOCABULARY = (
    *(PAD, BOS, EOS, IMAGE, UNKNOWN, EMPTY, *PROMPT_WORDS, *SCENE_WORDS, *RELATION_WORDS, "yes", "no"),
    *(*scenes.COLOUR_NAMES, *scenes.SHAPE_NAMES, *scenes.ROW_NAMES, *scenes.COLUMN_NAMES),
    *scenes.COUNT_NAMES,
)
TOKEN_IDS = {word: index for index, word in enumerate(VOCABULARY)}
SPECIAL_TOKENS = {
    "pad_token_id": TOKEN_IDS[PAD],
    "bos_token_id": TOKEN_IDS[BOS],
    "eos_token_id": TOKEN_IDS[EOS],
}
CONTENT_WORDS = frozenset(
    (*scenes.COLOUR_NAMES, *scenes.SHAPE_NAMES, *scenes.COLUMN_NAMES, "object", "objects")
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)

TRAINED_TYPES = (*scenes.QUESTION_TYPES, *scenes.PRACTICE_TYPES)
VISION_TOKENS = scenes.GRID**2
PREFIX_IDS = [TOKEN_IDS[BOS], TOKEN_IDS["user"]] + [TOKEN_IDS[IMAGE]] * VISION_TOKENS
PREFIX = len(PREFIX_IDS)
TEXT = 104  # text tokens of a packed sequence: about eleven questions with their answers
NONE = -1  # in the integer arrays of a batch: nothing here

PIXEL_MEAN, PIXEL_STD = 0.5, 0.25  # of pixel values in 0 ... 1


def build_processor() -> LlavaProcessor:
    """A stock processor: a word-level tokenizer and pictures of one size."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE},
            do_center_crop=False,
            crop_size={"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE},
            image_mean=[PIXEL_MEAN] * 3,
            image_std=[PIXEL_STD] * 3,
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=PAD,
            bos_token=BOS,
            eos_token=EOS,
            unk_token=UNKNOWN,
            additional_special_tokens=[IMAGE],
            padding_side="left",
            clean_up_tokenization_spaces=False,
        ),
        patch_size=scenes.CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
