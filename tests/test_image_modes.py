"""Pictures as they are held and numbered: EXIF, display matrices, more than eight bits."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import ExifTags, Image, ImageOps
from test_media import GRAY, write_task

from zipeval import media
from zipeval.cli import compose
from zipeval.errors import MediaError
from zipeval.evaluation.chat_model import ZipEval
from zipeval.evaluation.runner import evaluate
from zipeval.inference.session import Session

RAMP = np.tile(np.linspace(0, 1, 96), (96, 1))
IN_BYTES = np.round(RAMP * 255)
COLOURS = np.array(
    [
        [[255, 0, 0], [0, 255, 0], [0, 0, 255]],
        [[255, 255, 255], [0, 0, 0], [255, 255, 0]],
    ],
    np.uint8,
)


def read(image):
    return np.asarray(media.rgb(image, "crop", GRAY))


def saved(image, path, **options):
    image.save(path, **options)
    return str(path)


def photo(folder, orientation, suffix="png"):
    """An image of six colours, as a camera held otherwise stores it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return saved(
        Image.fromarray(COLOURS),
        folder / f"{orientation}.{suffix}",
        exif=exif,
        **LOSSLESS[suffix],
    )


LOSSLESS = {"png": {}, "webp": {"lossless": True}, "tif": {}}
UPRIGHT = {
    1: COLOURS,
    2: COLOURS[:, ::-1],
    3: COLOURS[::-1, ::-1],
    4: COLOURS[::-1],
    5: COLOURS.transpose(1, 0, 2),
    6: np.rot90(COLOURS, -1),
    7: COLOURS.transpose(1, 0, 2)[::-1, ::-1],
    8: np.rot90(COLOURS),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", LOSSLESS)
def test_a_picture_stands_upright_by_path_and_by_object(orientation, suffix, tmp_path):
    path = photo(tmp_path, orientation, suffix)
    expected = UPRIGHT[orientation]
    assert np.array_equal(read(path), expected)
    assert np.array_equal(read(Image.open(path)), expected)
    assert np.array_equal(
        read(Image.open(path).convert("RGB")), expected
    )  # as most tasks do
    turned = ImageOps.exif_transpose(Image.open(path))
    assert np.array_equal(read(turned), expected)  # and not twice
    assert np.array_equal(read(media.rgb(path, "crop", GRAY)), expected)


def test_a_row_and_a_path_show_the_model_the_same(tmp_path):
    path = photo(tmp_path, 6)
    rows = Dataset.from_list(
        [{"image": {"bytes": Path(path).read_bytes(), "path": None}}]
    )
    rows = rows.cast(Features({"image": ImageFeature()}))
    assert np.array_equal(read(rows[0]["image"]), read(path))


def test_damaged_exif_leaves_the_picture_as_it_is(tmp_path):
    path = Path(photo(tmp_path, 6, "webp"))
    path.write_bytes(
        path.read_bytes().replace(b"MM\0*", b"MM\0?").replace(b"II*\0", b"II?\0")
    )
    assert np.array_equal(read(str(path)), COLOURS)


def test_gray_of_sixteen_bits_is_scaled(tmp_path):
    in_words = np.round(RAMP * 65535).astype(np.uint16)
    image = Image.fromarray(in_words)
    assert image.mode == "I;16"
    pictures = {
        "I;16": image,
        "I;16B": Image.frombytes("I;16B", image.size, in_words.astype(">u2").tobytes()),
        "I": Image.fromarray(in_words.astype(np.int32)),
        "png": saved(image, tmp_path / "a.png"),
        "tif": saved(image, tmp_path / "a.tif"),
        "int tif": saved(
            Image.fromarray(in_words.astype(np.int32)), tmp_path / "b.tif"
        ),
    }
    (tmp_path / "a.pgm").write_bytes(
        b"P5\n96 96\n65535\n" + in_words.astype(">u2").tobytes()
    )
    pictures["pgm"] = str(tmp_path / "a.pgm")
    for name, picture in pictures.items():
        levels = read(picture)[..., 0]
        assert len(np.unique(levels)) == 96, name
        assert np.abs(levels - IN_BYTES).max() <= 1, name


def test_a_dark_file_of_sixteen_bits_is_dark(tmp_path):
    """PIL reads a PGM into 32 bits: no number in it tells how many it has."""
    (tmp_path / "a.pgm").write_bytes(b"P5\n2 1\n65535\n" + struct.pack(">2H", 0, 200))
    assert read(str(tmp_path / "a.pgm"))[0, :, 0].tolist() == [0, 1]
    assert read(Image.fromarray(np.array([[0, 200]], np.int32)))[0, :, 0].tolist() == [
        0,
        200,
    ]


def test_floats_from_0_to_1_are_scaled(tmp_path):
    image = Image.fromarray(RAMP.astype(np.float32))
    for picture in (image, saved(image, tmp_path / "a.tif")):
        assert np.array_equal(read(picture)[..., 0], IN_BYTES)


@pytest.mark.parametrize(
    "levels, reason",
    [
        ([[0.0, 200.0]], "floating point numbers from 0 to 200, and not from 0 to 1"),
        ([[-0.5, 1.0]], "floating point numbers from -0.5 to 1"),
        ([[0.0, np.nan]], "not finite"),
        ([[0.0, np.inf]], "not finite"),
        (
            np.array([[0, 70000]], np.int32),
            "32-bit integers from 0 to 70000, of which nothing says the range",
        ),
        (np.array([[-1, 255]], np.int32), "32-bit integers from -1 to 255"),
    ],
    ids=str,
)
def test_numbers_of_an_unknown_range_are_refused(levels, reason):
    image = Image.fromarray(
        np.asarray(levels, np.float32) if isinstance(levels, list) else levels
    )
    with pytest.raises(MediaError, match=reason):
        read(image)


def palette():
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return image


def transparent_palette():
    image = palette()
    image.info["transparency"] = 1
    return image


PIXELS = {
    "1": (Image.new("1", (1, 1), 1), (255, 255, 255)),
    "L": (Image.new("L", (1, 1), 77), (77, 77, 77)),
    "LA": (
        Image.new("LA", (1, 1), (77, 0)),
        (77, 77, 77),
    ),  # transparency shows no background
    "P": (palette(), (10, 20, 30)),
    "P, transparent": (transparent_palette(), (10, 20, 30)),
    "RGB": (Image.new("RGB", (1, 1), (1, 2, 3)), (1, 2, 3)),
    "RGBA": (Image.new("RGBA", (1, 1), (1, 2, 3, 0)), (1, 2, 3)),
    "CMYK": (Image.new("CMYK", (1, 1), (255, 0, 0, 0)), (0, 255, 255)),
    "YCbCr": (Image.new("YCbCr", (1, 1), (76, 85, 255)), (254, 0, 0)),
    "HSV": (Image.new("HSV", (1, 1), (0, 255, 255)), (255, 0, 0)),
    "I;16": (Image.new("I;16", (1, 1), 40000), (156, 156, 156)),
    "I": (Image.new("I", (1, 1), 40000), (156, 156, 156)),
    "F": (Image.new("F", (1, 1), 0.5), (128, 128, 128)),
}


@pytest.mark.parametrize("image, pixel", PIXELS.values(), ids=PIXELS)
def test_a_pixel_of_every_mode(image, pixel):
    assert tuple(read(image)[0, 0]) == pixel


def test_a_png_of_sixteen_bits_a_colour_is_read():
    """PIL itself takes the upper byte."""
    import zlib

    def chunk(kind, content):
        body = kind + content
        return (
            struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    pixels = chunk(
        b"IDAT", zlib.compress(b"\0" + struct.pack(">3H", 40000, 65535, 300))
    )
    file = BytesIO(b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b""))
    assert tuple(read(Image.open(file))[0, 0]) == (156, 255, 1)


@pytest.mark.parametrize("visual", ["doc['image']", "doc['image'].convert('RGB')"])
def test_a_data_set_of_more_than_eight_bits(visual, tmp_path):
    """Most tasks convert images themselves."""
    in_words = np.round(RAMP * 65535).astype(np.uint16)
    gray = (Image.fromarray(in_words), Image.fromarray(IN_BYTES.astype(np.uint8)))
    rows = []
    for image in gray:
        image.save(file := BytesIO(), "PNG")
        rows.append(
            {
                "image": {"bytes": file.getvalue(), "path": None},
                "question": "How many circles are there?",
            }
        )
    features = Features({"image": ImageFeature(), "question": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(
        str(tmp_path / "test.parquet")
    )
    model = ZipEval(Session(compose([])))
    record, _ = evaluate(
        model, "gray", write_task(tmp_path, "gray", "parquet", "test.parquet", visual)
    )
    assert record["failed"] == 0
    wide, usual = (
        np.asarray(Image.open(BytesIO(model.images["gray", number])))
        for number in (0, 1)
    )
    assert np.abs(wide.astype(int) - usual).max() <= 2


def test_a_picture_of_an_unknown_range_is_one_recorded_failure(tmp_path):
    rows = []
    for levels in (RAMP, RAMP * 1000):
        Image.fromarray(levels.astype(np.float32)).save(file := BytesIO(), "TIFF")
        rows.append(
            {
                "image": {"bytes": file.getvalue(), "path": None},
                "question": "How many circles are there?",
            }
        )
    features = Features({"image": ImageFeature(), "question": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(
        str(tmp_path / "test.parquet")
    )
    folder = write_task(tmp_path, "depth", "parquet", "test.parquet", "doc['image']")
    record, samples = evaluate(ZipEval(Session(compose([]))), "depth", folder)
    assert record["failed"] == 1
    assert "floating point numbers from 0 to 1000" in samples[1]["error"]


ONE, LAST = 1 << 16, 1 << 30
MATRICES = {  # of a track: a, b, u, c, d, v, x, y, w
    "as it is": ((ONE, 0, 0, 0, ONE, 0, 0, 0, LAST), "RGBW"),
    "turned right": ((0, ONE, 0, -ONE, 0, 0, 0, 0, LAST), "BRWG"),
    "turned over": ((-ONE, 0, 0, 0, -ONE, 0, 0, 0, LAST), "WBGR"),
    "turned left": ((0, -ONE, 0, ONE, 0, 0, 0, 0, LAST), "GWRB"),
    "mirrored": ((-ONE, 0, 0, 0, ONE, 0, 0, 0, LAST), "GRWB"),
    "upside down": ((ONE, 0, 0, 0, -ONE, 0, 0, 0, LAST), "BWRG"),
    "transposed": ((0, ONE, 0, ONE, 0, 0, 0, 0, LAST), "RBGW"),
    "none": ((0,) * 9, "RGBW"),
}
NAMES = {(255, 0, 0): "R", (0, 255, 0): "G", (0, 0, 255): "B", (255, 255, 255): "W"}


def held_video(path, matrix):
    """A video of red, green, blue and white quarters, 96 x 64, whose container says how it is held."""
    quarters = np.array(
        [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8
    )
    pixels = quarters.repeat(32, 0).repeat(48, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    start = (
        content.index(b"tkhd") + 4 + 40
    )  # version, times, duration, layer and volume stand before it
    assert struct.unpack_from(">9i", content, start) == MATRICES["as it is"][0]
    struct.pack_into(">9i", content, start, *matrix)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("matrix, quarters", MATRICES.values(), ids=MATRICES)
def test_frames_stand_as_the_video_is_displayed(matrix, quarters, tmp_path):
    for frame in media.frames(held_video(tmp_path / "a.mp4", matrix), 2):
        height, width, _ = frame.shape
        assert (height, width) == ((96, 64) if matrix[1] else (64, 96))
        middles = [
            frame[y, x].astype(int)
            for y in (height // 4, -height // 4)
            for x in (width // 4, -width // 4)
        ]
        colours = [
            min(NAMES, key=lambda colour: np.abs(pixel - colour).sum())
            for pixel in middles
        ]
        assert "".join(NAMES[colour] for colour in colours) == quarters


def test_a_video_held_at_an_odd_angle_is_a_media_error(tmp_path):
    half = int(ONE * 0.7071)
    path = held_video(tmp_path / "a.mp4", (half, half, 0, -half, half, 0, 0, 0, LAST))
    with pytest.raises(
        MediaError,
        match=r"a\.mp4 cannot be decoded \(it is displayed at an angle that is no quarter",
    ):
        media.frames(path, 2)
