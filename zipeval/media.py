"""Images and videos of a question, decoded and cut as the model's authors do it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from unittest.mock import patch

import av
import numpy as np
from PIL import Image, ImageFile

from zipeval.errors import MediaError

# What PIL raises for a file that is not as it should be: SyntaxError for a PNG, RuntimeError for an AVIF.
# AttributeError is that of a row without its image.
BROKEN = (OSError, ValueError, AttributeError, SyntaxError, RuntimeError, Image.DecompressionBombError)


THUMBNAIL = 336  # pixels of its longer side, at most


@contextmanager
def decoding() -> Iterator[None]:
    """Raises MediaError for what the block raises where an image is damaged, cut off or not there."""
    try:
        with patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", False):  # lmms-eval sets it: the rest would be grey
            yield
    except BROKEN as error:
        raise MediaError(f"an image cannot be decoded ({error})") from error


def rgb(image: Image.Image | str, aspect: str, background: tuple[int, int, int]) -> Image.Image:
    """The image as the processor gets it.

    Args:
        image: or the path of one.
        aspect: `pad` makes it square, centred on `background` (LLaVA-1.5's evaluation); anything else leaves its shape
            to the processor, which may crop it.

    Raises:
        MediaError: if it is not an image, or damaged.
    """
    with decoding():
        image = (Image.open(image) if isinstance(image, str) else image).convert("RGB")
    width, height = image.size
    if aspect != "pad" or width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def jpeg(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> bytes:
    """A JPEG file of a picture as the model saw it.

    Args:
        pixels: (3, height, width), normalised by the `mean` and `std` of each channel.
    """
    levels = 255 * (pixels.transpose(1, 2, 0) * std + mean)
    image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(file := BytesIO(), "JPEG", quality=85)
    return file.getvalue()


def frames(path: str | os.PathLike, count: int) -> np.ndarray:
    """(count, height, width, 3) uint8 RGB: frames at even distances from the first to the last.

    A video of fewer frames gives some of them more than once. What cannot be decoded at its end is not part of it.

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
                    found[seen - 1] = frame.to_ndarray(format="rgb24")
                if seen == length:
                    return np.stack([found[i] for i in wanted])
            length = seen
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        raise MediaError(f"{path} cannot be decoded ({error})") from error
    raise MediaError(f"{path} holds no video frame")


def _packets(path) -> int:
    """Of the first video stream: its frames, if all of them can be decoded."""
    with av.open(os.fspath(path)) as container:
        if not container.streams.video:
            return 0
        if container.streams.video[0].codec_context is None:  # PyAV would crash the process
            raise ValueError("no decoder for its codec")
        return sum(packet.size > 0 for packet in container.demux(video=0))


def _decode(path) -> Iterator[av.VideoFrame]:
    """Frames up to the first that is damaged."""
    with av.open(os.fspath(path)) as container:
        try:
            yield from container.decode(video=0)
        except av.error.InvalidDataError:
            return
