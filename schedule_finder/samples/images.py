"""Images of any mode as upright RGB pixels, with a list of the changes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from schedule_finder.errors import InputError
from schedule_finder.samples.entries import BadSample

MOST_PIXELS = 4096 * 4096
"""Larger images are scaled down to this many pixels, more than current processors use."""
BOMB_PIXELS = 89_478_485
"""Larger images are not even decoded. Pillow's own limit against decompression bombs, 256 MiB of RGB."""
_ORIENTATION = 0x0112
_NAMES = {"1": "black-and-white", "L": "grey", "P": "palette"}


@contextmanager
def reading(kind: str, name: str) -> Iterator[None]:
    """Turn any error of a decoder into a `BadSample` that names the file."""
    try:
        yield
    except (BadSample, InputError):
        raise
    except FileNotFoundError:
        raise BadSample(f"{kind} {name!r} does not exist") from None
    except UnidentifiedImageError:
        raise BadSample(f"{kind} {name!r} cannot be read: it has no known format") from None
    except Image.DecompressionBombError as error:
        raise BadSample(f"{kind} {name!r} has too many pixels: {error}") from error
    except Exception as error:  # decoders of damaged files raise anything from struct.error to IndexError
        lines = str(getattr(error, "strerror", None) or error).splitlines() or [type(error).__name__]
        raise BadSample(f"{kind} {name!r} cannot be read: {lines[0]}") from error


def open_image(source: Path | bytes, name: str) -> tuple[Image.Image, list[str]]:
    """Read an image file; the first frame of an animated one.

    Args:
        source: the file, or its bytes.
        name: for messages.

    Returns:
        The image as RGB, upright, and the repairs.

    Raises:
        BadSample: it cannot be read, is empty, or is too large.
    """
    with reading("image", name):
        if (len(source) if isinstance(source, bytes) else source.stat().st_size) == 0:
            raise BadSample(f"image {name!r} is an empty file")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if width * height > BOMB_PIXELS:
                raise BadSample(
                    f"image {name!r} has {width} x {height} pixels, more than {BOMB_PIXELS:,}; scale it down"
                )
            repairs = ["first frame of an animated image"] if getattr(image, "is_animated", False) else []
            rgb, more = upright_rgb(image)
            return rgb, repairs + more


def upright_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """RGB pixels, upright, at most `MOST_PIXELS`; transparent parts on white, deep pixels scaled to 8 bits.

    Returns the image and the repairs. Raises `BadSample` for an empty image or pixels that are not finite.
    """
    repairs = []
    if image.getexif().get(_ORIENTATION, 1) in range(2, 9):
        repairs.append("turned upright as its EXIF data says")
    image = ImageOps.exif_transpose(image)
    if 0 in image.size:
        raise BadSample("the image has no pixels")
    if image.mode.startswith("I") or image.mode == "F":
        image, note = _eight_bits(image)
        repairs.append(note)
    elif image.has_transparency_data:
        mode, image = image.mode, image.convert("RGBA")
        clear = np.asarray(image)[..., 3].min() < 255
        repairs.append("transparent parts laid on white" if clear else _converted(mode))
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode != "RGB":
        repairs.append(_converted(image.mode))
    image = image.convert("RGB")
    width, height = image.size
    if width * height > MOST_PIXELS:
        scale = (MOST_PIXELS / (width * height)) ** 0.5
        image.thumbnail((max(1, int(width * scale)), max(1, int(height * scale))))
        repairs.append(f"{width} x {height} pixels scaled down to {image.width} x {image.height}")
    return image, repairs


def _converted(mode: str) -> str:
    return f"{_NAMES.get(mode, mode)} image converted to RGB"


def _eight_bits(image: Image.Image) -> tuple[Image.Image, str]:
    """Deep grey pixels scaled to 8 bits. Pillow's own conversion clips them at 255."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise BadSample("the image's pixels are not finite (NaN or infinite)")
    low, high = float(values.min()), float(values.max())
    # 16-bit files come as I;16, or as I where the format has no such mode (PGM); floats are usually 0 to 1.
    scales = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    full = next((scale for scale in scales if low >= 0 and high <= scale), 0.0)
    if not full:
        values, full = values - low, (high - low) or 1.0
    grey = Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8))
    return grey, f"{16 if full == 65535 else 32}-bit image scaled to 8 bits"
