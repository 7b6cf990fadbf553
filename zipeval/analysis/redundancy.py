"""Redundancy of visual tokens, measured on a model and images: who receives the encoder's attention, layer by layer.

    OUT/layers.csv     by layer: mean and standard deviation over the images of every measure of concentration
    OUT/images.csv     the measures of every image in every layer
    OUT/attention.npy  (images, layers, patches) float32, what they were computed of; patches in reading order
    OUT/about.json     which model, images and code
    OUT/MODEL-*.pdf and .svg  plots, as Figures 2 and 5 of VisionZip, and the measures by layer

Of images that a model sees in crops, the first counts: the whole image.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
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
SHOWN = 4  # images with an overlay


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
    found = sources(images, limit)
    session = Session(config)
    try:
        records.try_out(out)
    except OSError as error:
        raise UsageError(
            f"out={out}: cannot write there ({error.strerror}). Choose another place."
        ) from error
    attention, pictures, read_at = measure(session, found)
    sender = "CLS" if cls_tokens(session.load()[0]) else "all tokens, mean"
    measured = {
        name: of(attention.astype(np.float64)) for name, of in MEASURES.items()
    }  # (images, layers)
    np.save(array := io.BytesIO(), attention)
    about = {
        "model": config.model.name,
        "fingerprint": session.checkpoint.fingerprint,
        "image_aspect": config.model.image_aspect,
        "images": str(images or "of zipeval_shapes"),
        "images_hash": _hash_images(found),
        "count": len(found),
        "features_read_at_layer": read_at + 1,
        "versions": records.versions(),
        "git": records.git_revision(),
    }
    files = {
        "layers.csv": _layers(measured),
        "images.csv": _images([*found], measured),
        "attention.npy": array.getvalue(),
        "about.json": json.dumps(about, indent=2) + "\n",
    }
    for name, content in files.items():
        records.atomic_write(out / name, content)
    drawn = attention_plots.plots(attention, measured, pictures, read_at, sender)
    return [*(out / name for name in files), *write(drawn, out, config.model.name)]


def sources(directory: Path | None, limit: int | None) -> dict[str, Path | bytes]:
    """By name: image files of a directory, or the embedded task's images.

    Raises:
        UsageError: if there are none, or if one has no image's header.
    """
    if directory is None:
        from pyarrow import parquet

        rows = parquet.read_table(EMBEDDED, columns=["image_id", "image"]).to_pylist()
        found = {row["image_id"]: row["image"]["bytes"] for row in rows}
    else:
        if not directory.is_dir():
            raise UsageError(
                f"images={directory}: no such directory. Leave it out for the images of zipeval_shapes."
            )
        # Some formats, such as PDF, are there to be written only.
        known = {
            suffix
            for suffix, form in Image.registered_extensions().items()
            if form in Image.OPEN
        }
        found = {
            path.name: path
            for path in directory.iterdir()
            if path.suffix.lower() in known and path.is_file()
        }
        if not found:
            raise UsageError(
                f"images={directory}: no image files in it, such as *.jpg or *.png. Name another directory."
            )
    found = dict(sorted(found.items())[:limit])
    for path in found.values() if directory else ():
        try:
            with decoding():
                Image.open(path).close()
        except MediaError as error:
            raise _damaged(path, error) from error
    return found


def _hash_images(images: dict[str, Path | bytes]) -> str:
    """Return the hash of the names and contents of images."""
    digests = content_hash.digests(
        image for image in images.values() if isinstance(image, Path)
    )
    by_name = {}
    for name, image in images.items():
        by_name[name] = (
            digests[image]
            if isinstance(image, Path)
            else hashlib.sha256(image).hexdigest()
        )
    return content_hash.combined(by_name)


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(
        f"images={path.parent}: {path.name} cannot be decoded ({error}). Take it away."
    )


def measure(
    session: Session, images: dict[str, Path | bytes]
) -> tuple[np.ndarray, list[bytes], int]:
    """(attention (images, layers, patches), JPEG files of the first images, layer that features are read at).

    Raises:
        UsageError: for an image that cannot be decoded.
    """
    import torch

    from zipeval.engine.images import PIXELS, pixels, tower
    from zipeval.engine.received import record_attention
    from zipeval.engine.vision import encode_crops, scored_layer

    model, _ = session.load()
    layers = [*tower(model).encoder.layers]
    read_at = next(
        i for i, layer in enumerate(layers) if layer is scored_layer(model, "image")
    )
    attention, pictures = [], []
    with (
        progress(f"{session.config.model.name} attention", len(images)) as advance,
        torch.inference_mode(),
    ):
        for inputs in _inputs(session, images):
            with record_attention(model) as received:
                given = {
                    name: inputs[name].to(model.device, model.dtype)
                    for name in PIXELS["image"]
                    if name in inputs
                }
                encode_crops(model, inputs | given, "image", reads_pixels=False)
            attention.append(
                torch.stack([layer[0] for layer in received]).cpu().numpy()
            )
            if len(pictures) < SHOWN:
                pictures.append(session.jpeg(pixels(inputs, "image")[0]))
            advance(1)
    return np.stack(attention), pictures, read_at


def _inputs(session: Session, images: dict[str, Path | bytes]) -> Iterator[dict]:
    """The processor's, image by image."""
    for source in images.values():
        try:
            with decoding():
                image = Image.open(
                    io.BytesIO(source) if isinstance(source, bytes) else source
                )
            parts = [{"type": "image", "url": image}, {"type": "text", "text": ""}]
            yield dict(
                session.inputs([session.decoded([{"role": "user", "content": parts}])])
            )
        except MediaError as error:
            raise _damaged(
                Path(source), error
            ) from error  # the embedded task's own are none of these


def _layers(measured: dict[str, np.ndarray]) -> str:
    """Mean and standard deviation over the images."""
    columns = {"layer": range(1, next(iter(measured.values())).shape[1] + 1)}
    for name, values in measured.items():
        columns |= {f"{name}_mean": values.mean(0), f"{name}_sd": values.std(0)}
    return _csv([*columns], zip(*columns.values(), strict=True))


def _images(names: list[str], measured: dict[str, np.ndarray]) -> str:
    values = np.stack([*measured.values()], -1)  # (images, layers, measures)
    lines = (
        (name, layer, *of)
        for name, its in zip(names, values, strict=True)
        for layer, of in enumerate(its, 1)
    )
    return _csv(["image", "layer", *measured], lines)


def _csv(header: list[str], lines: Iterable[Iterable]) -> str:
    writer = csv.writer(text := io.StringIO(), lineterminator="\n")
    writer.writerow(header)
    writer.writerows(
        [f"{v:.6f}" if isinstance(v, float) else v for v in line] for line in lines
    )
    return text.getvalue()
