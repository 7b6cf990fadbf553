"""Images and videos of a question, decoded and cut as the model's authors do it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import islice
from typing import Any

import av
import numpy as np
import xxhash
from av.sidedata.sidedata import Type
from PIL import ExifTags, Image, ImageOps

from zipeval.errors import MediaError
from zipeval.utils.foreign_patches import refuse_truncated_images

# What PIL raises for a file that is not as it should be: SyntaxError for a PNG,
# RuntimeError for an AVIF. AttributeError is that of a row without its image,
# struct.error that of datasets where EXIF is damaged.
BROKEN = (
    OSError,
    ValueError,
    AttributeError,
    SyntaxError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)

# PIL's modes of gray in 16 bits.
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
# Files of 16 bits in these formats PIL reads into 32 bits, depending on its version.
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
# 65535 / 255: the highest level becomes the highest one.
TO_EIGHT_BITS = 257
# Float levels may lie this far beyond 0 and 1.
ROUNDING = 1e-6
# A display matrix may differ from a quarter turn by this share.
ANGLE_TOLERANCE = 0.02
# The longer side of a thumbnail has at most so many pixels.
THUMBNAIL = 336


@contextmanager
def decoding() -> Iterator[None]:
    """Raise MediaError where the block meets an image that is damaged, cut off or not there."""
    try:
        with refuse_truncated_images():
            yield
    except BROKEN as error:
        raise MediaError(f"an image cannot be decoded ({error})") from error


def rgb(
    image: Image.Image | str, aspect: str, background: tuple[int, int, int]
) -> Image.Image:
    """Return an image as the processor gets it.

    Args:
        image: an image or the path of one. EXIF says which side is up.
        aspect: `pad` makes it square, centred on `background` (LLaVA-1.5's evaluation); anything else leaves its shape
            to the processor, which may crop it.

    Raises:
        MediaError: if it is not an image, or damaged, or of numbers that nothing says the range of.
    """
    with decoding():
        image = Image.open(image) if isinstance(image, str) else image
        # PIL forgets the format of a file once its pixels are turned.
        source = image.format
        image = _eight_bits(_upright(image), source)
        # What is transparent shows the colour behind it, as in LLaVA's evaluation.
        image = image.convert("RGB")
    return _pad_to_square(image, background) if aspect == "pad" else image


def _pad_to_square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return an image in the middle of a square, as LLaVA's `expand2square` does."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def in_eight_bits(row: dict[str, Any]) -> dict[str, Any]:
    """Return a data set's row with its images scaled to eight bits a channel.

    Most tasks convert an image to RGB themselves, which cuts off what is above 255. An image of numbers whose range
    nothing tells stays as it is: the task may not show it.
    """
    return {name: _scaled(value) for name, value in row.items()}


def _scaled(value: Any) -> Any:
    """Return a value of a row with the images in it scaled; lists hold several."""
    if isinstance(value, list):
        return list(map(_scaled, value))
    if not isinstance(value, Image.Image):
        return value
    with suppress(ValueError):
        return _eight_bits(value, value.format)
    return value


def _upright(image: Image.Image) -> Image.Image:
    """Return an image as EXIF says that it is held, as datasets has turned those of its rows.

    What was turned has no such tag any more, and so is not turned again.
    """
    # PIL itself turns a TIFF when it loads it, so this comes before the question.
    image.load()
    # Where EXIF is damaged the pixels are whole all the same.
    with suppress(SyntaxError, struct.error):
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image


def _eight_bits(image: Image.Image, source: str | None) -> Image.Image:
    """Return an image of at most eight bits a channel: PIL would cut off what is above 255.

    Args:
        source: the format of its file.

    Raises:
        ValueError: for numbers of an unknown range.
    """
    if image.mode in SIXTEEN_BITS:
        return _gray(np.asarray(image) / TO_EIGHT_BITS)
    if image.mode == "I":
        return _gray(_scale_integers(np.asarray(image), source))
    if image.mode == "F":
        return _gray(_scale_floats(np.asarray(image)))
    return image


def _scale_integers(levels: np.ndarray, source: str | None) -> np.ndarray:
    """Return 32-bit levels from 0 to 255, which hold 16 bits or 8."""
    lowest, highest = levels.min(), levels.max()
    if lowest < 0 or highest > 65535:
        raise ValueError(
            f"32-bit integers from {lowest} to {highest}, of which nothing says the "
            "range"
        )
    # From a file of another format, small numbers are an array of bytes held in
    # integers.
    are_bytes = source not in SIXTEEN_BIT_FORMATS and highest <= 255
    return levels if are_bytes else levels / TO_EIGHT_BITS


def _scale_floats(levels: np.ndarray) -> np.ndarray:
    """Return floating point levels from 0 to 1 as such from 0 to 255."""
    if not np.isfinite(levels).all():
        raise ValueError("floating point numbers that are not finite")
    if levels.min() < -ROUNDING or levels.max() > 1 + ROUNDING:
        raise ValueError(
            f"floating point numbers from {levels.min():g} to {levels.max():g}, and "
            "not from 0 to 1"
        )
    return levels * 255


def _gray(levels: np.ndarray) -> Image.Image:
    """Return levels (height, width), from 0 to 255, as an image."""
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def picture_hash(picture: Image.Image | np.ndarray) -> str:
    """Return 16 hexadecimal digits that tell pictures apart.

    Args:
        picture: an image as `rgb` returns it, or the frames of a video as `frames` returns them.
    """
    pixels = np.ascontiguousarray(picture)
    digest = xxhash.xxh3_64(str(pixels.shape).encode())
    digest.update(pixels)
    return digest.hexdigest()


def jpeg(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> bytes:
    """Return a JPEG file of a picture as the model saw it.

    Args:
        pixels: (3, height, width), normalised by the `mean` and `std` of each channel.
    """
    # [channels, height, width] -> [height, width, channels]
    levels = 255 * (pixels.transpose(1, 2, 0) * std + mean)
    return thumbnail(Image.fromarray(levels.round().clip(0, 255).astype(np.uint8)))


def thumbnail(image: Image.Image) -> bytes:
    """Return a JPEG file of an image, made small enough for a page."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file := BytesIO(), "JPEG", quality=85)
    return file.getvalue()


def frames(path: str | os.PathLike, count: int) -> np.ndarray:
    """Return frames at even distances from the first to the last: (count, height, width, 3), uint8, RGB.

    A video of fewer frames gives some of them more than once. What cannot be decoded at its end is not part of it. They
    are turned and mirrored as the video is displayed.

    Raises:
        MediaError: if there is no such file, no video in it, or no frame that can be decoded.
    """
    try:
        length = _count_packets(path)
        while length:
            positions = np.linspace(0, length - 1, count).astype(int)
            pictures, decoded = _decode_frames(path, positions, length)
            if decoded == length:
                return np.stack([pictures[position] for position in positions])
            # A damaged end is no part of the video: choose among the frames before it.
            length = decoded
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        raise MediaError(f"{path} cannot be decoded ({error})") from error
    raise MediaError(f"{path} holds no video frame")


def _decode_frames(
    path: str | os.PathLike, positions: np.ndarray, length: int
) -> tuple[dict[int, np.ndarray], int]:
    """Return the frames at some positions, and how many of `length` frames were decoded."""
    pictures, decoded = {}, 0
    for position, frame in enumerate(islice(_decode(path), length)):
        if position in positions:
            pictures[position] = _displayed(frame)
        decoded = position + 1
    return pictures, decoded


def _displayed(frame: av.VideoFrame) -> np.ndarray:
    """Return a frame (height, width, 3) turned and mirrored as its display matrix says.

    Raises:
        ValueError: for an angle other than those of a quarter turn.
    """
    pixels = frame.to_ndarray(format="rgb24")
    matrices = [data for data in frame.side_data if data.type == Type.DISPLAYMATRIX]
    if not matrices:
        return pixels
    # A pixel at (x, y) is displayed at (a x + c y, b x + d y): ffmpeg's
    # libavutil/display.h.
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrices[0]))
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, crossed) > ANGLE_TOLERANCE * max(straight, crossed):
        raise ValueError("it is displayed at an angle that is no quarter turn")
    is_turned = crossed > straight
    if is_turned:
        pixels = pixels.transpose(1, 0, 2)
    # x is displayed at a x, or at c y once the axes have changed places; y likewise.
    mirrored, upside_down = (c < 0, b < 0) if is_turned else (a < 0, d < 0)
    if mirrored:
        pixels = pixels[:, ::-1]
    if upside_down:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _count_packets(path: str | os.PathLike) -> int:
    """Return the frames of the first video stream, if all of them can be decoded."""
    with av.open(os.fspath(path)) as container:
        if not container.streams.video:
            return 0
        # Without a decoder PyAV would crash the process.
        if container.streams.video[0].codec_context is None:
            raise ValueError("no decoder for its codec")
        return sum(packet.size > 0 for packet in container.demux(video=0))


def _decode(path: str | os.PathLike) -> Iterator[av.VideoFrame]:
    """Yield frames up to the first that is damaged."""
    with av.open(os.fspath(path)) as container, suppress(av.error.InvalidDataError):
        yield from container.decode(video=0)
