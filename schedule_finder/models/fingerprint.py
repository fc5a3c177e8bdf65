"""Fingerprints of a checkpoint: its whole configuration, and sampled bytes of every tensor.

They are read from the checkpoint's files, so that they do not depend on the dtype, the device or the quantization that
the model is loaded with, nor on defaults that a version of transformers adds to a configuration.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

SAMPLED_BLOCKS, BLOCK_BYTES = 16, 64
"""Blocks that are read of each tensor, evenly spread: at most 1 KiB."""
_NOT_COMPARED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation")
"""Fields of a configuration that do not change the model: where it was saved, and how it is loaded."""
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def fingerprint(find: Callable[[str], Path | None]) -> dict[str, str]:
    """Hashes of the ``configuration`` and the ``weights`` of a checkpoint.

    Args:
        find: path of a file of the checkpoint by name, None where it has no such file.

    Returns:
        Hash by part; a part whose files are not found is missing.
    """
    found = {}
    if config := find("config.json"):
        document = _without(json.loads(config.read_text(encoding="utf-8")), _NOT_COMPARED)
        found["configuration"] = _short(hashlib.sha256(json.dumps(document, sort_keys=True).encode()))
    if files := weight_files(find):
        found["weights"] = weights_fingerprint(files)
    return found


def weight_files(find: Callable[[str], Path | None]) -> list[Path]:
    """The files with a checkpoint's tensors, in the order that transformers prefers; empty where there are none."""
    for whole, index in zip(_WEIGHT_FILES, _INDEX_FILES, strict=True):
        if path := find(whole):
            return [path]
        if path := find(index):
            names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            return [shard for name in names if (shard := find(name))]
    return []


def weights_fingerprint(files: list[Path]) -> str:
    """Hash of names, types, shapes and sampled bytes of all tensors, whatever file each is in.

    Files that are not safetensors are sampled as a whole.
    """
    parts = sorted(part for path in files for part in _parts(path))
    return _short(hashlib.sha256("\n".join(parts).encode()))


def differences(known: Mapping[str, str] | None, found: Mapping[str, str] | None) -> list[str]:
    """What differs of two fingerprints, in words; parts that one of them lacks are not compared."""
    return [
        part
        for part in sorted(known or {})
        if part in (found or {}) and (known or {})[part] != (found or {})[part]
    ]


def _parts(path: Path) -> Iterator[str]:
    """A line for each tensor of a file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            yield f"{path.name} {size} {_sampled(file, 0, size)}"
            return
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                first, last = tensor["data_offsets"]
                digest = _sampled(file, 8 + length + first, last - first)
                yield f"{name} {tensor['dtype']} {tensor['shape']} {digest}"


def _sampled(file: BinaryIO, first: int, size: int) -> str:
    """Hash of evenly spread blocks of ``size`` bytes from ``first``; of all of them where they are few."""
    found = hashlib.sha256()
    if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
        file.seek(first)
        found.update(file.read(size))
    else:
        for block in range(SAMPLED_BLOCKS):
            file.seek(first + block * (size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
            found.update(file.read(BLOCK_BYTES))
    return found.hexdigest()


def _without(value: Any, names: tuple[str, ...]) -> Any:
    """A JSON document without some keys, at any depth."""
    if isinstance(value, dict):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return [_without(item, names) for item in value] if isinstance(value, list) else value


def _short(digest: Any) -> str:
    return "sha256:" + str(digest.hexdigest())[:16]
