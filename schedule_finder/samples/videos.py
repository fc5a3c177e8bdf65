"""From a video file, an animated image or a list of frames to a few frames, evenly spread over its length."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from schedule_finder.errors import InputError
from schedule_finder.samples.entries import BadSample
from schedule_finder.samples.images import BOMB_PIXELS, reading, upright_rgb

_ANIMATED = ("GIF", "WEBP", "PNG")


def spread(total: int, count: int) -> list[int]:
    """Indices of ``count`` of ``total`` items (all, if there are fewer): the middles of equal parts."""
    count = min(total, count)
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def open_video(source: Path | bytes, name: str, count: int) -> tuple[Image.Image, ...]:
    """``count`` frames of a video file or an animated image as RGB, evenly spread over its length.

    A video with fewer frames gives all it has.

    Args:
        source: the file, or its bytes.
        name: for messages.
        count: frames to take.

    Raises:
        BadSample: it cannot be read or holds no frames.
        InputError: PyAV, which decodes videos, is not installed.
    """
    with reading("video", name):
        if (len(source) if isinstance(source, bytes) else source.stat().st_size) == 0:
            raise BadSample(f"video {name!r} is an empty file")
        frames = _animated(source, name, count) or _decoded(source, name, count)
        if not frames:
            raise BadSample(f"video {name!r} holds no frames")
        return tuple(upright_rgb(frame)[0] for frame in frames)


def _animated(source: Path | bytes, name: str, count: int) -> list[Image.Image]:
    """Frames of an animated image; empty for other files."""
    try:
        image: Any = Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=_ANIMATED
        )
    except UnidentifiedImageError:
        return []
    with image:
        _refuse_huge(name, image.width, image.height)
        frames = []
        for index in spread(image.n_frames, count):
            image.seek(index)
            frames.append(image.copy())
        return frames


def _decoded(source: Path | bytes, name: str, count: int) -> list[Image.Image]:
    """Frames of a video file, decoded by PyAV."""
    try:
        import av
    except ImportError:
        raise InputError(
            "videos are decoded by PyAV, which is not installed: pip install 'adaptinfer[video]', or give each "
            "video as a list of frame files"
        ) from None

    def container() -> Any:
        return av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source))

    with container() as file:
        if not file.streams.video:
            raise BadSample(f"video {name!r} has no video stream")
        stream = file.streams.video[0]
        _refuse_huge(name, stream.width, stream.height)
        # Headers often lack the number of frames or overstate it: count packets.
        total = sum(packet.size > 0 for packet in file.demux(stream))
    frames, seen = _pick(container, spread(total, count))
    if len(frames) < min(total, count):  # not every packet is a frame
        frames, _ = _pick(container, spread(seen, count))
    return frames


def _pick(container: Any, indices: Sequence[int]) -> tuple[list[Image.Image], int]:
    """The frames at ``indices``, and the number of frames up to the last of them."""
    wanted, frames, seen = set(indices), [], 0
    with container() as file:
        for frame in file.decode(video=0):
            if seen in wanted:
                frames.append(frame.to_image())
            seen += 1
            if len(frames) == len(wanted):
                break
    return frames, seen


def _refuse_huge(name: str, width: int, height: int) -> None:
    if width * height > BOMB_PIXELS:
        raise BadSample(f"video {name!r} has frames of {width} x {height} pixels, more than {BOMB_PIXELS:,}")
