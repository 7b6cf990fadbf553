"""Measure the redundancy of visual tokens: which of them receive the encoder's attention, layer by layer.

    OUT/layers.csv     by layer: mean and standard deviation over the images of every measure of concentration
    OUT/images.csv     the measures of every image in every layer
    OUT/attention.npy  (images, layers, patches) float32, what they were computed of; patches in reading order
    OUT/about.json     which model, images and code
    OUT/MODEL-*.pdf and .svg  plots, as Figures 2 and 5 of VisionZip, and the measures by layer

Of images that a model sees in crops, the first counts: the whole image.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

import zipeval.tasks
from zipeval.analysis import attention_plots
from zipeval.analysis.concentration import entropy, gini, top
from zipeval.config.schema import RunConfig
from zipeval.engine.images import cls_tokens
from zipeval.errors import MediaError, UsageError
from zipeval.inference.session import Session
from zipeval.media import decoding
from zipeval.reporting.plots import write
from zipeval.results import records
from zipeval.utils import content_hash
from zipeval.utils.progress import progress

MEASURES = {"gini": gini, "top10": top, "entropy": entropy}
EMBEDDED = Path(zipeval.tasks.__path__[0], "shapes", "test.parquet")
# Images with an overlay.
SHOWN = 4
# What an image is found in: a file, or the content of one.
Images = dict[str, Path | bytes]


def analyze(
    config: RunConfig, images: Path | None, limit: int | None, out: Path
) -> list[Path]:
    """Measure, and write all of it; the same bytes for the same model, images and machine, but for about.json.

    Args:
        config: of the model; what it says of methods and tasks has no part in it.
        images: directory of image files; None: the images of the embedded task.
        limit: of them in the order of their names; None: all.
        out: directory, made if it is not there.

    Raises:
        UsageError: for images that are not there or are none, and for a directory that cannot be written, before the
            model is loaded; behind that for images that turn out to be damaged.
    """
    named_images = sources(images, limit)
    session = Session(config)
    try:
        records.try_out(out)
    except OSError as error:
        raise UsageError(
            f"out={out}: cannot write there ({error.strerror}). Choose another place."
        ) from error
    attention, pictures, read_at = measure(session, named_images)
    sender = "CLS" if cls_tokens(session.load()[0]) else "all tokens, mean"
    exact = attention.astype(np.float64)
    # Each (images, layers).
    measured = {name: measure_of(exact) for name, measure_of in MEASURES.items()}
    about = {
        "model": config.model.name,
        "fingerprint": session.checkpoint.fingerprint,
        "image_aspect": config.model.image_aspect,
        "images": str(images or "of zipeval_shapes"),
        "images_hash": _hash_images(named_images),
        "count": len(named_images),
        "features_read_at_layer": read_at + 1,
        "versions": records.versions(),
        "git": records.git_revision(),
    }
    files = {
        "layers.csv": _layers(measured),
        "images.csv": _images([*named_images], measured),
        "attention.npy": _npy(attention),
        "about.json": json.dumps(about, indent=2) + "\n",
    }
    for name, content in files.items():
        # A command that is cut off leaves no half of a file.
        records.atomic_write(out / name, content)
    plots = attention_plots.plots(attention, measured, pictures, read_at, sender)
    paths = [out / name for name in files]
    return paths + write(plots, out, config.model.name)


def sources(directory: Path | None, limit: int | None) -> Images:
    """Return the image files of a directory, or the embedded task's images, by name.

    Raises:
        UsageError: if there are none, or if one has no image's header.
    """
    images = _embedded_images() if directory is None else _image_files(directory)
    first = dict(sorted(images.items())[:limit])
    if directory is not None:
        for path in first.values():
            _check_header(path)
    return first


def _embedded_images() -> dict[str, bytes]:
    """Return the images of the embedded task by their ids."""
    from pyarrow import parquet

    rows = parquet.read_table(EMBEDDED, columns=["image_id", "image"]).to_pylist()
    return {row["image_id"]: row["image"]["bytes"] for row in rows}


def _image_files(directory: Path) -> dict[str, Path]:
    """Return the image files of a directory by their names.

    Raises:
        UsageError: if there are none.
    """
    if not directory.is_dir():
        raise UsageError(
            f"images={directory}: no such directory. Leave it out for the images of zipeval_shapes."
        )
    # Some formats, such as PDF, are there to be written only.
    formats = Image.registered_extensions()
    readable = {suffix for suffix in formats if formats[suffix] in Image.OPEN}
    files = {}
    for path in directory.iterdir():
        if path.suffix.lower() in readable and path.is_file():
            files[path.name] = path
    if not files:
        raise UsageError(
            f"images={directory}: no image files in it, such as *.jpg or *.png. Name another directory."
        )
    return files


def _check_header(path: Path) -> None:
    """Refuse a file that is no image, before a model is loaded for it."""
    try:
        with decoding():
            Image.open(path).close()
    except MediaError as error:
        raise _damaged(path, error) from error


def _hash_images(images: Images) -> str:
    """Return the hash of the names and contents of images."""
    by_name, files = {}, {}
    for name, image in images.items():
        if isinstance(image, Path):
            files[name] = image
        else:
            by_name[name] = hashlib.sha256(image).hexdigest()
    # Files are hashed by several threads.
    digests = content_hash.digests(files.values())
    by_name |= {name: digests[path] for name, path in files.items()}
    return content_hash.combined(by_name)


def _damaged(path: Path, error: Exception) -> UsageError:
    """Return the error of an image file that cannot be decoded."""
    return UsageError(
        f"images={path.parent}: {path.name} cannot be decoded ({error}). Take it away."
    )


def measure(session: Session, images: Images) -> tuple[np.ndarray, list[bytes], int]:
    """Measure the attention that patches receive in every layer of the encoder.

    Returns:
        The attention (images, layers, patches); JPEG files of the first images; the layer that features are read at.

    Raises:
        UsageError: for an image that cannot be decoded.
    """
    import torch

    from zipeval.engine.images import PIXELS, pixels, tower
    from zipeval.engine.received import record_attention
    from zipeval.engine.vision import encode_crops, scored_layer

    model, _ = session.load()
    # Counted from 0.
    is_read = [
        layer is scored_layer(model, "image") for layer in tower(model).encoder.layers
    ]
    read_at = is_read.index(True)
    # One image at a time: only the first crop's attention is kept of each.
    attention, pictures = [], []
    with (
        progress(f"{session.config.model.name} attention", len(images)) as advance,
        torch.inference_mode(),
    ):
        for inputs in _inputs(session, images):
            # A copy: the picture that is kept has the processor's own numbers.
            on_device = dict(inputs)
            for name in inputs.keys() & set(PIXELS["image"]):
                on_device[name] = inputs[name].to(model.device, model.dtype)
            with record_attention(model) as received:
                encode_crops(model, on_device, "image", reads_pixels=False)
            # Of each layer the first crop, the whole image: [layers, patches].
            whole = torch.stack([layer[0] for layer in received])
            attention.append(whole.cpu().numpy())
            if len(pictures) < SHOWN:
                pictures.append(session.jpeg(pixels(inputs, "image")[0]))
            advance(1)
    return np.stack(attention), pictures, read_at


def _inputs(session: Session, images: Images) -> Iterator[dict]:
    """Yield the processor's inputs, image by image."""
    for source in images.values():
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        try:
            with decoding():
                image = Image.open(file)
            content = [{"type": "image", "url": image}, {"type": "text", "text": ""}]
            messages = session.decoded([{"role": "user", "content": content}])
            yield dict(session.inputs([messages]))
        # The embedded task's own images are none of these.
        except MediaError as error:
            raise _damaged(Path(source), error) from error


def _npy(array: np.ndarray) -> bytes:
    """Return an array as the content of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _layers(measured: dict[str, np.ndarray]) -> str:
    """Return layers.csv: mean and standard deviation over the images, of measures (images, layers)."""
    columns = {}
    for name, values in measured.items():
        columns |= {f"{name}_mean": values.mean(0), f"{name}_sd": values.std(0)}
    table = pd.DataFrame(columns)
    table.index = pd.RangeIndex(1, len(table) + 1, name="layer")
    return _csv(table)


def _images(names: list[str], measured: dict[str, np.ndarray]) -> str:
    """Return images.csv: the measures (images, layers) of every image in every layer."""
    layers = range(1, next(iter(measured.values())).shape[1] + 1)
    index = pd.MultiIndex.from_product([names, layers], names=["image", "layer"])
    # [images, layers] -> [images * layers], the layers of an image behind each other.
    columns = {name: values.ravel() for name, values in measured.items()}
    return _csv(pd.DataFrame(columns, index=index))


def _csv(table: pd.DataFrame) -> str:
    """Return a table as CSV: the same bytes on every system."""
    return table.to_csv(float_format="%.6f", na_rep="nan", lineterminator="\n")
