"""Images and videos of a question, decoded and cut as the model's authors do it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any
from unittest.mock import patch

import av
import numpy as np
import xxhash
from av.sidedata.sidedata import Type
from PIL import ExifTags, Image, ImageFile, ImageOps

from zipeval.errors import MediaError

# What PIL raises for a file that is not as it should be: SyntaxError for a PNG, RuntimeError for an AVIF.
# AttributeError is that of a row without its image, struct.error that of datasets where EXIF is damaged.
BROKEN = (
    OSError,
    ValueError,
    AttributeError,
    SyntaxError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)

SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")  # PIL's modes of gray in 16 bits
SIXTEEN_BIT_FORMATS = (
    "PNG",
    "PPM",
)  # whose files PIL reads into 32 bits, depending on its version
DISPLAY_MATRIX = Type.DISPLAYMATRIX  # of a frame: how its video is held
ROUNDING = 1e-6  # of float levels, beyond 0 and 1
TURNED_BY_ABOUT = 0.02  # of a display matrix: what a right angle may lack, as a share

THUMBNAIL = 336  # pixels of its longer side, at most


@contextmanager
def decoding() -> Iterator[None]:
    """Raises MediaError for what the block raises where an image is damaged, cut off or not there."""
    try:
        with patch.object(
            ImageFile, "LOAD_TRUNCATED_IMAGES", False
        ):  # lmms-eval sets it: the rest would be grey
            yield
    except BROKEN as error:
        raise MediaError(f"an image cannot be decoded ({error})") from error


def rgb(
    image: Image.Image | str, aspect: str, background: tuple[int, int, int]
) -> Image.Image:
    """The image as the processor gets it.

    Args:
        image: or the path of one. EXIF says which side is up.
        aspect: `pad` makes it square, centred on `background` (LLaVA-1.5's evaluation); anything else leaves its shape
            to the processor, which may crop it.

    Raises:
        MediaError: if it is not an image, or damaged, or of numbers that nothing says the range of.
    """
    with decoding():
        image = Image.open(image) if isinstance(image, str) else image
        source = image.format  # is lost where pixels are turned
        image = _eight_bits(_upright(image), source).convert(
            "RGB"
        )  # without regard to transparency, as LLaVA
    width, height = image.size
    if aspect != "pad" or width == height:
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

    def scaled(value: Any) -> Any:
        if isinstance(value, list):
            return [scaled(item) for item in value]
        if not isinstance(value, Image.Image):
            return value
        try:
            return _eight_bits(value, value.format)
        except ValueError:
            return value

    return {name: scaled(value) for name, value in row.items()}


def _upright(image: Image.Image) -> Image.Image:
    """Return an image as EXIF says that it is held, as datasets has turned those of its rows.

    What was turned has no such tag any more, and so is not turned again.
    """
    image.load()  # with that PIL itself turns a TIFF
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return ImageOps.exif_transpose(image)
    except (SyntaxError, struct.error):  # damaged EXIF: the pixels are whole
        pass
    return image


def _eight_bits(image: Image.Image, source: str | None) -> Image.Image:
    """Return an image of at most eight bits a channel: PIL would cut off what is above 255.

    Args:
        source: the format of its file.

    Raises:
        ValueError: for numbers of an unknown range.
    """
    if image.mode in SIXTEEN_BITS:
        return _gray(np.asarray(image) / 257)
    if image.mode == "I":
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                f"32-bit integers from {levels.min()} to {levels.max()}, of which nothing says the range"
            )
        in_bytes = (
            source not in SIXTEEN_BIT_FORMATS and levels.max() <= 255
        )  # an array of bytes, held in integers
        return _gray(levels if in_bytes else levels / 257)
    if image.mode == "F":
        levels = np.asarray(image)
        if not np.isfinite(levels).all():
            raise ValueError("floating point numbers that are not finite")
        if levels.min() < -ROUNDING or levels.max() > 1 + ROUNDING:
            raise ValueError(
                f"floating point numbers from {levels.min():g} to {levels.max():g}, and not from 0 to 1"
            )
        return _gray(levels * 255)
    return image


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
    """A JPEG file of a picture as the model saw it.

    Args:
        pixels: (3, height, width), normalised by the `mean` and `std` of each channel.
    """
    levels = 255 * (pixels.transpose(1, 2, 0) * std + mean)
    return thumbnail(Image.fromarray(levels.round().clip(0, 255).astype(np.uint8)))


def thumbnail(image: Image.Image) -> bytes:
    """Return a JPEG file of an image, made small enough for a page."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file := BytesIO(), "JPEG", quality=85)
    return file.getvalue()


def frames(path: str | os.PathLike, count: int) -> np.ndarray:
    """(count, height, width, 3) uint8 RGB: frames at even distances from the first to the last.

    A video of fewer frames gives some of them more than once. What cannot be decoded at its end is not part of it. They
    are turned and mirrored as the video is displayed.

    Raises:
        MediaError: if there is no such file, no video in it, or no frame that can be decoded.
    """
    try:
        length = _packets(path)
        while length:
            wanted = np.linspace(0, length - 1, count).astype(int)
            found, seen = {}, 0
            for seen, frame in enumerate(_decode(path), 1):
                if seen - 1 in wanted:
                    found[seen - 1] = _displayed(frame)
                if seen == length:
                    return np.stack([found[i] for i in wanted])
            length = seen
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        raise MediaError(f"{path} cannot be decoded ({error})") from error
    raise MediaError(f"{path} holds no video frame")


def _displayed(frame: av.VideoFrame) -> np.ndarray:
    """Return a frame (height, width, 3) as its display matrix says that it is held.

    Raises:
        ValueError: for an angle other than those of a quarter turn.
    """
    pixels = frame.to_ndarray(format="rgb24")
    matrix = next(
        (bytes(data) for data in frame.side_data if data.type == DISPLAY_MATRIX), None
    )
    if matrix is None:
        return pixels
    # A pixel at (x, y) is displayed at (a x + c y, b x + d y): ffmpeg's libavutil/display.h.
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, crossed) > TURNED_BY_ABOUT * max(straight, crossed):
        raise ValueError("it is displayed at an angle that is no quarter turn")
    if crossed > straight:
        pixels, mirrored, upside_down = pixels.transpose(1, 0, 2), c < 0, b < 0
    else:
        mirrored, upside_down = a < 0, d < 0
    pixels = pixels[:, ::-1] if mirrored else pixels
    return np.ascontiguousarray(pixels[::-1] if upside_down else pixels)


def _packets(path) -> int:
    """Of the first video stream: its frames, if all of them can be decoded."""
    with av.open(os.fspath(path)) as container:
        if not container.streams.video:
            return 0
        if (
            container.streams.video[0].codec_context is None
        ):  # PyAV would crash the process
            raise ValueError("no decoder for its codec")
        return sum(packet.size > 0 for packet in container.demux(video=0))


def _decode(path) -> Iterator[av.VideoFrame]:
    """Frames up to the first that is damaged."""
    with av.open(os.fspath(path)) as container:
        try:
            yield from container.decode(video=0)
        except av.error.InvalidDataError:
            return
