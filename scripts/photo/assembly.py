"""Joins tower, projector, adapters and decoder into a stock `FastVlmForConditionalGeneration` with its processor.

Tower features hardly carry position, so the prompt marks the rows of the image: a text token stands between two
rows of vision tokens. The stock `LlavaProcessor` does this without custom code: its "image token" is the whole
block of rows, which stands once for an image and is expanded to itself. The processor counts images by the first
token of the block, which therefore is a token that occurs nowhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    EfficientNetModel,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from schedule_finder.samples.photo_scenes import IMAGE_SIZE, TOKENS_PER_SIDE

IMAGE_TOKEN, IMAGE_START = "<image>", "<image_start>"
ROW_MARKS = tuple(str(row) for row in range(1, TOKENS_PER_SIDE))
"""The text between two rows of vision tokens: the number of the row that follows."""
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
OPENING = f"{TURN_START}user\n"
"""What stands before the image."""
WEIGHTS_FILE = Path(__file__).with_name("adapters.safetensors")
"""The trained projector and adapters, float16."""


def image_block() -> str:
    """The text of one image: all rows of image tokens with the marks between them."""
    row = IMAGE_TOKEN * TOKENS_PER_SIDE
    return IMAGE_START + row + "".join(mark + row for mark in ROW_MARKS)


def question_text(question: str) -> str:
    """The text from the end of the image to the beginning of the answer."""
    return f"\n{question}"


def answer_text(answer: str) -> str:
    """The answer and the end of its turn."""
    return f" {answer}{TURN_END}"


def chat_template() -> str:
    """The template that gives the same text as the functions above; answers of earlier turns are closed."""
    return (
        "{% for message in messages %}"
        "{% if loop.first %}" + OPENING.replace("\n", "{{ '\\n' }}") + "{% endif %}"
        "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
        "{% else %}{% set parts = message['content'] %}{% endif %}"
        "{% for part in parts if part['type'] == 'image' %}" + image_block() + "{% endfor %}"
        "{% for part in parts if part['type'] == 'text' %}"
        "{% if message['role'] == 'assistant' %} {{ part['text'] }}" + TURN_END + "{% else %}"
        "{{ '\\n' + part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )


def build_processor(tokenizer: Any) -> LlavaProcessor:
    """The stock processor; adds the two image tokens to ``tokenizer``."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, IMAGE_START]})
    # What is not among the initial arguments is not saved.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    tokenizer.pad_token = TURN_END
    tokenizer.chat_template = None
    tokenizer.model_max_length = 2048
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size=size,
            crop_size=size,
            do_center_crop=False,
            image_mean=list(PIXEL_MEAN),
            image_std=list(PIXEL_STD),
        ),
        tokenizer=tokenizer,
        # One "patch" is the whole image, so that a block stands for itself.
        patch_size=IMAGE_SIZE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=image_block(),
        chat_template=chat_template(),
    )


def build_model(tower: EfficientNetModel, decoder: LlamaForCausalLM, tokenizer: Any) -> Any:
    """The stock model with an untrained projector; ``tokenizer`` has the image tokens already."""
    text_config = decoder.config.to_dict()
    text_config.pop("dtype", None)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text_config["vocab_size"] = max(decoder.config.vocab_size, len(tokenizer))
    config = FastVlmConfig(
        text_config=text_config,
        vision_config=tower.config,
        image_token_index=image_token_id,
        image_seq_length=TOKENS_PER_SIDE**2,
        tie_word_embeddings=True,
    )
    model = FastVlmForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    weights = dict(decoder.model.state_dict())
    embeddings = weights["embed_tokens.weight"]
    # Image features replace the image token's own embedding; that of the start token is the same everywhere.
    new_rows = embeddings.mean(0, keepdim=True).repeat(text_config["vocab_size"] - len(embeddings), 1)
    weights["embed_tokens.weight"] = torch.cat([embeddings, new_rows])
    model.model.language_model.load_state_dict(weights)
    model.tie_weights()
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    start = tokenizer.convert_tokens_to_ids(TURN_START)
    model.generation_config = GenerationConfig(bos_token_id=start, eos_token_id=end, pad_token_id=end)
    return model.eval()


def adapted_linears(language_model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that have an adapter, by the names that the adapter file uses."""
    found: dict[str, nn.Linear] = {}
    for number, layer in enumerate(language_model.layers):
        for name in ADAPTED:
            parent = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
            found[f"layers.{number}.{name}"] = getattr(parent, name)
    return found


def save_trained(
    projector: dict[str, Tensor], adapters: dict[str, tuple[Tensor, Tensor]], file: Path
) -> None:
    """Write projector and adapters as float16. An adapter is (A, B); its weight change is ``B @ A``."""
    tensors = {f"projector.{name}": weight for name, weight in projector.items()}
    for name, (down, up) in adapters.items():
        tensors |= {f"{name}.lora_A": down, f"{name}.lora_B": up}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({name: t.detach().to(torch.float16).contiguous() for name, t in tensors.items()}, partial)
    partial.replace(file)


def load_trained(file: Path) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Projector and adapters as `save_trained` wrote them, in float32."""
    tensors = {name: weight.float() for name, weight in load_file(file).items()}
    projector = {
        name.removeprefix("projector."): weight
        for name, weight in tensors.items()
        if name.startswith("projector.")
    }
    names = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    return projector, {name: (tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in names}


def merge_trained(model: Any, file: Path) -> None:
    """Load the projector of ``file`` into ``model`` and add its adapters to the decoder's weights, in place."""
    projector, adapters = load_trained(file)
    model.model.multi_modal_projector.load_state_dict(projector)
    linears = adapted_linears(model.model.language_model)
    with torch.no_grad():
        for name, (down, up) in adapters.items():
            linears[name].weight += (up @ down).to(linears[name].weight.dtype)
