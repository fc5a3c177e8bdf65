"""Stand-ins for the photo backbone's weights: a tiny GGUF file and a random EfficientNet-Lite0, and references."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, WIDTH, INNER, HEADS, KV_HEADS = 2, 64, 96, 4, 2
TOWER_WIDTH = 1280


def tiny_decoder() -> LlamaForCausalLM:
    """Random weights, large enough that every layer matters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def bytes_to_text() -> dict[int, str]:
    """The printable stand-ins of byte-level BPE for the 256 bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def write_gguf(file: Path, state: dict[str, torch.Tensor]) -> Path:
    """A decoder as a GGUF file: byte-level tokens and two merges, one matrix quantized as Q8_0, the rest as floats."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_text().values(), "zq", "qz"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 258)
    writer.add_token_merges(["z q", "q z"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    for name, tensor in state.items():
        if name == "token_embd.weight":
            quantized = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix in GGUF's order, in which the two halves of a rotary pair are neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def gguf_state(decoder: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    state = {
        "token_embd.weight": decoder.model.embed_tokens.weight,
        "output_norm.weight": decoder.model.norm.weight,
    }
    for number, layer in enumerate(decoder.model.layers):
        for own, foreign in names.items():
            weight = layer.get_submodule(own).weight
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(foreign)
            state[f"blk.{number}.{foreign}.weight"] = interleaved(weight, heads) if heads else weight
    return {name: weight.detach().clone() for name, weight in state.items()}


def lite_state() -> dict[str, torch.Tensor]:
    """Random weights of EfficientNet-Lite0 under its own names, with batch statistics that keep signals alive."""
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "_conv_stem.weight": (32, 3, 3, 3),
        "_conv_head.weight": (1280, 320, 1, 1),
    }
    norms = {"_bn0": 32, "_bn1": 1280}
    plan = [
        (1, 16, 1, 3),
        (6, 24, 2, 3),
        (6, 40, 2, 5),
        (6, 80, 3, 3),
        (6, 112, 3, 5),
        (6, 192, 4, 5),
        (6, 320, 1, 3),
    ]
    width, number = 32, 0
    for expand, out, repeats, kernel in plan:
        for _ in range(repeats):
            block, inner = f"_blocks.{number}", width * expand
            if expand != 1:
                shapes[f"{block}._expand_conv.weight"] = (inner, width, 1, 1)
                norms[f"{block}._bn0"] = inner
            shapes[f"{block}._depthwise_conv.weight"] = (inner, 1, kernel, kernel)
            shapes[f"{block}._project_conv.weight"] = (out, inner, 1, 1)
            norms |= {f"{block}._bn1": inner, f"{block}._bn2": out}
            width, number = out, number + 1
    state = {
        name: torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5
        for name, shape in shapes.items()
    }
    for name, channels in norms.items():
        state |= {f"{name}.weight": torch.rand(channels, generator=generator) + 0.5}
        state |= {f"{name}.bias": torch.randn(channels, generator=generator) * 0.2}
        state |= {f"{name}.running_mean": torch.randn(channels, generator=generator) * 0.1}
        state |= {f"{name}.running_var": torch.rand(channels, generator=generator) + 0.5}
    return state


def lite_reference(state: dict[str, torch.Tensor], picture: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0 with TensorFlow's padding, written from its definition."""

    def norm(hidden: torch.Tensor, name: str) -> torch.Tensor:
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(hidden, *parts, eps=1e-3)

    def convolve(hidden: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        kernel, size = weight.shape[-1], hidden.shape[-1]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        hidden = functional.pad(hidden, (total // 2, total - total // 2) * 2)
        return functional.conv2d(hidden, weight, stride=stride, groups=hidden.shape[1] // weight.shape[1])

    hidden = functional.relu6(norm(convolve(picture, "_conv_stem", 2), "_bn0"))
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for number, stride in enumerate(strides):
        block, before = f"_blocks.{number}", hidden
        if f"{block}._expand_conv.weight" in state:
            hidden = functional.relu6(norm(convolve(hidden, f"{block}._expand_conv"), f"{block}._bn0"))
        hidden = functional.relu6(norm(convolve(hidden, f"{block}._depthwise_conv", stride), f"{block}._bn1"))
        hidden = norm(convolve(hidden, f"{block}._project_conv"), f"{block}._bn2")
        hidden = hidden + before if hidden.shape == before.shape and stride == 1 else hidden
    return functional.relu6(norm(convolve(hidden, "_conv_head"), "_bn1"))
