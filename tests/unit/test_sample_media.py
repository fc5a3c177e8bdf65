"""Images and videos as people have them: every mode comes out right, and no damaged file stops a run."""

from __future__ import annotations

import functools
import io
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from schedule_finder.errors import InputError
from schedule_finder.samples.entries import BadSample
from schedule_finder.samples.images import BOMB_PIXELS, MOST_PIXELS, open_image, upright_rgb
from schedule_finder.samples.videos import open_video, spread


def pixels(seed: int = 0, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> tuple[np.ndarray, list[str]]:
    image, repairs = open_image(data, "a.png")
    assert image.mode == "RGB"
    return np.asarray(image), repairs


def write_video(path: Path, frames: int, size: tuple[int, int] = (32, 24), codec: str = "mpeg4") -> Path:
    """A video whose frame ``i`` is grey ``7 i``."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=10, width=size[0], height=size[1], pix_fmt="yuv420p")
        for place in range(frames):
            picture = av.VideoFrame.from_image(Image.new("RGB", size, (7 * place,) * 3))
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    return path


def places(frames: tuple[Image.Image, ...]) -> list[int]:
    """Which frames of `write_video` these are."""
    return [round(float(np.asarray(frame).mean()) / 7) for frame in frames]


def outcome(read: Callable[..., Any], data: bytes, *more: Any) -> tuple[Any, str]:
    """What was read, or why nothing was; any other error is the test's."""
    try:
        return read(data, "a", *more), ""
    except BadSample as error:
        return None, str(error)


# ---- images


def test_a_plain_image_is_left_as_it_is() -> None:
    found, repairs = decoded(encoded(pixels(1)))
    assert np.array_equal(found, np.asarray(pixels(1)))
    assert repairs == []


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_and_not_cut_off(kind: str) -> None:
    deep = (np.arange(24, dtype=np.uint16) * 2849).reshape(4, 6)  # 0 to 65527
    found, repairs = decoded(encoded(Image.fromarray(deep), kind))
    assert repairs == ["16-bit image scaled to 8 bits"]
    assert np.abs(found[..., 0] - deep / 257).max() <= 0.5
    assert np.array_equal(found[..., 0], found[..., 2])


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=4, max_size=4))
def test_deep_pixels_keep_their_order(values: list[int]) -> None:
    image = Image.fromarray(np.array(values, dtype=np.int32).reshape(2, 2))
    found = np.asarray(upright_rgb(image)[0])[..., 0].ravel().astype(int)
    order = np.argsort(values, kind="stable")
    assert (np.diff(found[order]) >= 0).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0, 100, 255], [0, 100, 255]), ([-1, 0, 1], [0, 128, 255])],
)
def test_floats(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    found, repairs = decoded(encoded(image, "TIFF"))
    assert found[0, :, 0].tolist() == expected
    assert repairs == ["32-bit image scaled to 8 bits"]
    with pytest.raises(BadSample, match="not finite"):
        upright_rgb(Image.fromarray(np.array([[np.nan]], dtype=np.float32)))


@pytest.mark.parametrize(
    ("mode", "kind", "repair"),
    [
        ("1", "PNG", "black-and-white image"), ("L", "PNG", "grey image"), ("P", "PNG", "palette image"),
        ("CMYK", "JPEG", "CMYK image"), ("YCbCr", "TIFF", "YCbCr image"), ("LA", "PNG", "LA image"),
        ("RGBA", "PNG", "RGBA image"),
    ],
)  # fmt: skip
def test_other_modes_become_rgb_and_say_so(mode: str, kind: str, repair: str) -> None:
    plain = Image.new("RGB", (16, 8), (255, 255, 255))
    plain.paste((0, 0, 0), (0, 0, 8, 8))
    found, repairs = decoded(encoded(plain.convert(mode), kind))
    assert repairs == [f"{repair} converted to RGB"]
    assert np.abs(found.astype(int) - np.asarray(plain)).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_lie_on_white(mode: str) -> None:
    clear = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 2, 2))
    found, repairs = decoded(encoded(clear.convert(mode) if mode != "P" else clear.quantize(4)))
    assert repairs == ["transparent parts laid on white"]
    assert found[0, :, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = pixels(1)
    turns = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_270], 7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_90],
    }  # fmt: skip
    upright = stored
    for turn in turns.get(orientation, []):
        upright = upright.transpose(turn)
    found, repairs = decoded(encoded(stored, exif=exif))
    assert np.array_equal(found, np.asarray(upright))
    assert repairs == ([] if orientation == 1 else ["turned upright as its EXIF data says"])


def test_of_an_animated_image_the_first_frame() -> None:
    shades = [Image.new("RGB", (6, 4), (shade,) * 3) for shade in (10, 200)]
    found, repairs = decoded(encoded(shades[0], "GIF", save_all=True, append_images=shades[1:]))
    assert found.max() == 10
    assert "first frame of an animated image" in repairs


def test_large_images_are_scaled_down_and_bombs_refused() -> None:
    wide = Image.new("L", (MOST_PIXELS // 1000, 2000))
    image, repairs = open_image(encoded(wide), "a.png")
    assert 0.99 * MOST_PIXELS < image.width * image.height <= MOST_PIXELS
    assert image.width / image.height == pytest.approx(wide.width / wide.height, rel=1e-3)
    assert any("scaled down" in repair for repair in repairs)
    header = bytearray(encoded(Image.new("1", (1, 1))))
    for side in (9460, 100_000):  # just beyond the limit, and beyond what Pillow opens
        assert side * side > BOMB_PIXELS
        header[16:24] = side.to_bytes(4, "big") * 2
        header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
        with pytest.raises(BadSample, match="pixels"):
            open_image(bytes(header), "bomb.png")


_KINDS = {
    "PNG": encoded(pixels(1, (40, 30))),
    "JPEG": encoded(pixels(1, (40, 30)), "JPEG"),
    "GIF": encoded(pixels(1, (40, 30)).quantize(), "GIF", save_all=True, append_images=[pixels(2, (40, 30))]),
    "WEBP": encoded(pixels(1, (40, 30)), "WEBP"),
    "TIFF": encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)), "TIFF"),
    "BMP": encoded(pixels(1, (40, 30)), "BMP"),
    "ICO": encoded(pixels(1, (40, 30)), "ICO"),
}


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.sampled_from(sorted(_KINDS)), st.data())
def test_damaged_files_give_an_image_or_a_reason(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(_KINDS[kind])
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255)), max_size=8)
    ):
        damaged[place] = value
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    found, reason = outcome(open_image, bytes(damaged))
    if found:
        assert found[0].mode == "RGB"
        assert min(found[0].size) > 0
    else:
        assert "'a'" in reason or "pixels" in reason
        assert "\n" not in reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_truncated_and_empty_files_say_so(kind: str) -> None:
    whole = _KINDS[kind]
    with pytest.raises(BadSample, match=r"image 'a\.x' cannot be read"):
        open_image(whole[: len(whole) * 2 // 3], "a.x")
    with pytest.raises(BadSample, match="empty file"):
        open_image(b"", "a.x")


# ---- videos


@given(st.integers(1, 500), st.integers(1, 500))
def test_frames_are_spread_evenly(total: int, count: int) -> None:
    found = spread(total, count)
    assert len(found) == min(total, count)
    assert found == sorted(set(found))
    assert found[0] >= 0
    assert found[-1] < total
    steps = np.diff([*found, total + found[0]])
    assert steps.max() - steps.min() <= 1
    assert abs(found[0] - (total - 1 - found[-1])) <= 1  # as far from the beginning as from the end


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv", "a.webm"])
def test_frames_of_a_video_file(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, 30, codec="libvpx" if name.endswith("webm") else "mpeg4")
    frames = open_video(path, name, 5)
    assert places(frames) == [3, 9, 15, 21, 27]
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (32, 24))}
    assert places(open_video(path.read_bytes(), name, 5)) == [3, 9, 15, 21, 27]
    assert places(open_video(path, name, 100)) == list(range(30))


def test_packets_that_hold_no_frame_are_not_counted(tmp_path: Path) -> None:
    """MPEG-4 in AVI marks frames that are not coded with packets of their own."""
    with av.open(str(tmp_path / "a.avi"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10, width=32, height=32, pix_fmt="yuv420p")
        shades = [Image.new("RGB", (32, 32), (7 * place,) * 3) for place in range(30)]
        packets = [packet for shade in shades for packet in stream.encode(av.VideoFrame.from_image(shade))]
        for place, packet in enumerate(packets + stream.encode()):
            empty = av.Packet(b"\x00\x00\x01\xb6\x51\x00")
            empty.stream, empty.time_base = stream, packet.time_base
            for half, piece in enumerate((packet, empty)):
                piece.pts = piece.dts = 2 * place + half
                file.mux(piece)
    assert places(open_video(tmp_path / "a.avi", "a.avi", 5)) == [3, 9, 15, 21, 27]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animated_image_is_a_video(kind: str) -> None:
    shades = [Image.new("RGB", (6, 4), (7 * place,) * 3) for place in range(12)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(shades[0], kind, save_all=True, append_images=shades[1:], duration=100, **options)
    assert places(open_video(data, "a", 4)) == spread(12, 4)
    assert places(open_video(encoded(shades[3], kind), "a", 4)) == [3]


def test_damaged_videos_say_why(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.avi"):  # the index of the one is at its end
        whole = write_video(tmp_path / name, 30).read_bytes()
        with pytest.raises(
            BadSample, match=f"video '{name}' (cannot be read: Invalid data|has no video stream)"
        ):
            open_video(whole[: len(whole) * 2 // 3], name, 4)
    with pytest.raises(BadSample, match="cannot be read"):
        open_video(b"no video at all", "a.mp4", 4)
    with pytest.raises(BadSample, match="empty file"):
        open_video(b"", "a.mp4", 4)
    with av.open(str(tmp_path / "sound.wav"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
    with pytest.raises(BadSample, match="no video stream"):
        open_video(tmp_path / "sound.wav", "sound.wav", 4)


@functools.cache
def _short_video(folder: Path) -> bytes:
    return write_video(folder / "short.mp4", 6).read_bytes()


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_a_damaged_video_gives_frames_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    damaged = bytearray(_short_video(tmp_path_factory.getbasetemp()))
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255)), max_size=20)
    ):
        damaged[place] = value
    frames, reason = outcome(open_video, bytes(damaged), 4)
    assert frames or ("'a'" in reason and "\n" not in reason)


def test_without_pyav_videos_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install 'adaptinfer\[video\]'"):
        open_video(path, "a.mp4", 4)
