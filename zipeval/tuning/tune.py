"""`zipeval tune`: train the projector for the few tokens that VisionZip leaves (its section 2.4, the rows VisionZip‡).

    OUT/projector.safetensors   the tuned weights with their manifest, see zipeval/checkpoints/projector.py
    OUT/checkpoints/            of a training that is under way; the same command goes on from the latest

Data are LLaVA's instructions, the layout of llava_v1_5_mix665k.json. docs/tuning.md says where every setting is from.
Imports no torch: what cannot be tuned is refused before.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipeval.checkpoints import projector
from zipeval.config.schema import RunConfig
from zipeval.errors import UsageError
from zipeval.inference.session import Session
from zipeval.reporting import logger
from zipeval.results import records
from zipeval.results.lock import locked
from zipeval.tuning.settings import Settings as Settings
from zipeval.utils import content_hash, ranks

if TYPE_CHECKING:
    import torch

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}
BEGUN, CHECKPOINTS = (
    "tuning.json",
    "checkpoints",
)  # manifest and state of a training that is not finished
TUNING = (
    "zipeval.tuning.tune",
    "zipeval.tuning.training",
)  # modules that a projector depends on too


@dataclass(frozen=True)
class Data:
    """Conversations to train on.

    Attributes:
        conversations: chat messages, of which the first begins with its image's path.
        about: of the file, for the manifest.
    """

    conversations: list[list[dict]]
    about: dict[str, Any]


@ranks.raise_on_all_ranks()
def tune(config: RunConfig, settings: Settings) -> Path:
    """Train a projector under the method of a configuration, or go on with that; returns the file that it is in.

    Raises:
        UsageError: for what cannot be tuned, before the model is loaded.
        RunError: as zipeval.tuning.training.train.
    """
    settings = settings.resolved()
    logger.check(config.logger)
    session = _session(config)
    place = projector.place(config.model.name, session.config.tokens)
    out = place.parent if settings.out is None else Path(settings.out).expanduser()
    data = read(
        Path(settings.data).expanduser(),
        Path(settings.images).expanduser(),
        settings.fraction,
        config.seed,
    )
    manifest = _manifest(session, settings, data)
    path = out / projector.FILE
    if path.exists():
        return _kept(path, manifest)
    with _turn(out, manifest) if ranks.first() else nullcontext():
        ranks.exchange(
            None
        )  # none begins what the first one refuses; and transformers finds a group of processes
        from zipeval.tuning.training import train

        weights = train(session, data.conversations, settings, out / CHECKPOINTS)
        if ranks.first():
            _write(path, weights, manifest)
    return path


def _session(config: RunConfig) -> Session:
    """The model and the method, which has to be one that tuned projectors are for."""
    name = config.method["name"]
    if name != projector.METHOD:
        raise UsageError(
            f"method={name}: projectors are tuned under method={projector.METHOD}, for method={projector.METHOD}_tuned."
        )
    if ":" in config.model.device:
        number = config.model.device.partition(":")[2]
        raise UsageError(
            f"model.device={config.model.device}: leave it out, and set CUDA_VISIBLE_DEVICES={number}."
        )
    session = Session(config)
    if not session.reduces:
        raise UsageError(
            f"tokens={session.config.tokens}: nothing is removed, so that there is nothing to tune for."
        )
    placement = session.placement
    if placement.dtype == "float16":
        raise UsageError(
            "model.dtype=float16: its gradients vanish. Set model.dtype=bfloat16 or float32."
        )
    if placement.device_map:
        raise UsageError(
            "model.device_map=auto: tuning takes one GPU a process. Use torchrun for several."
        )
    return session


def read(file: Path, images: Path, fraction: float, seed: int) -> Data:
    """The share of a file's conversations that is trained on.

    Raises:
        UsageError: if file or images are missing, or an entry is none of LLaVA's.
    """
    try:
        content = file.read_bytes()
        entries = json.loads(content)
        if not isinstance(entries, list):
            raise ValueError("not a list")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"data={file}: cannot be read ({error}). Give a JSON file of LLaVA's layout."
        ) from error
    numbers = [
        number
        for number, entry in enumerate(entries)
        if isinstance(entry, dict) and entry.get("image")
    ]
    count = round(fraction * len(numbers))
    if count == 0:
        raise UsageError(
            f"data={file}: {len(numbers)} of its {len(entries)} entries have an image, and fraction={fraction} of "
            "them is none. Set a larger fraction=."
        )
    chosen = sorted(random.Random(seed).sample(numbers, count))
    conversations = [
        _messages(entries[number], images, f"data={file}: entry {number}")
        for number in chosen
    ]
    paths = [Path(messages[0]["content"][0]["url"]) for messages in conversations]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UsageError(
            f"images={images}: {len(missing)} of {count} images are missing, such as {missing[0]}."
        )
    try:
        digests = content_hash.digests(paths)
    except OSError as error:
        raise UsageError(
            f"images={images}: {error.filename} cannot be read ({error.strerror})."
        ) from error
    digest_by_name = {
        entries[number]["image"]: digests[path]
        for number, path in zip(chosen, paths, strict=True)
    }
    about = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "images": content_hash.combined(digest_by_name),
        "entries": len(entries),
        "text_only": len(entries) - len(numbers),
        "samples": count,
    }
    return Data(conversations, about)


def _messages(entry: dict, images: Path, where: str) -> list[dict]:
    """An entry as chat messages; as LLaVA does, the image goes before the text of the first question.

    Raises:
        UsageError: for an entry of another layout.
    """
    turns = entry.get("conversations")
    try:
        roles, texts = (
            [turn["from"] for turn in turns],
            [turn["value"] for turn in turns],
        )
        if len(turns) < 2 or len(turns) % 2 or roles != [*ROLES] * (len(turns) // 2):
            raise ValueError("its turns are not human, gpt, human, gpt ...")
        if [text.count(PLACEHOLDER) for text in texts] != [1] + [0] * (len(texts) - 1):
            raise ValueError(
                f"its first turn, and that only, has to hold {PLACEHOLDER} once"
            )
        image = str(images / entry["image"])
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UsageError(
            f"{where}: {reason}. docs/tuning.md shows LLaVA's layout."
        ) from error
    messages = [
        {
            "role": ROLES[role],
            "content": [
                {"type": "text", "text": text.replace(PLACEHOLDER, "").strip()}
            ],
        }
        for role, text in zip(roles, texts, strict=True)
    ]
    messages[0]["content"].insert(0, {"type": "image", "url": image})
    return messages


def _manifest(session: Session, settings: Settings, data: Data) -> dict[str, Any]:
    """Everything that the weights depend on, and no more: the same training makes the same file."""
    trained = {
        k: v for k, v in asdict(settings).items() if k not in ("data", "images", "out")
    }
    config = session.config
    return {
        "purpose": projector.purpose(config, session.checkpoint, config.method),
        "data": data.about,
        "training": {**trained, "seed": config.seed, "processes": ranks.here().count},
        "read": {
            "prompt": config.model.prompt,
            "image_aspect": config.model.image_aspect,
        },
        "held": asdict(session.placement),
        "code": records.code(TUNING),
        "versions": records.versions(),
    }


def _kept(path: Path, manifest: dict) -> Path:
    """A finished projector, if it is what the command would make; other code is told of only."""
    earlier = projector.manifest(path)
    made_with = ("code", "versions")
    changed = [
        change
        for change in _changes(earlier, manifest)
        if change.partition(".")[0] not in made_with
    ]
    if changed:
        raise UsageError(
            f"{path} is of another tuning: {', '.join(changed)}. Move it away, or choose another out=DIR."
        )
    if ranks.first():
        print(f"{path}: finished before, kept. Delete it to tune again.")
    return path


@contextmanager
def _turn(out: Path, manifest: dict) -> Iterator[None]:
    """A block in which what is trained below a directory is this process's, and is what was begun there.

    Raises:
        UsageError: if another process is in such a block, or another tuning was begun.
    """
    records.prepare(str(out))
    about = manifest["data"]
    print(
        f"{about['entries']} entries, {about['text_only']} of them without an image; {about['samples']} are trained on."
    )
    with locked(out / "tuning.lock"):
        begun = out / BEGUN
        if begun.exists() and any(
            (out / CHECKPOINTS).glob("*")
        ):  # before the first there is nothing to lose
            changed = [
                *_changes(json.loads(begun.read_text(encoding="utf-8")), manifest)
            ]
            if changed:
                raise UsageError(
                    f"{out} holds the beginning of another tuning: {', '.join(changed)}. "
                    f"Delete {out / CHECKPOINTS} to begin anew, or choose another out=DIR."
                )
        records.atomic_write(
            begun, json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        )
        yield


def _write(path: Path, weights: dict[str, torch.Tensor], manifest: dict) -> None:
    """The result, in place of what was kept to go on from."""
    from safetensors.torch import save

    records.atomic_write(
        path, save(weights, {projector.KEY: json.dumps(manifest, sort_keys=True)})
    )
    (path.parent / BEGUN).unlink()
    shutil.rmtree(path.parent / CHECKPOINTS)


def _changes(then: dict, now: dict, prefix: str = "") -> Iterator[str]:
    """`training.lr 0.001 (now 0.002)` for everything that differs."""
    for name in dict.fromkeys([*then, *now]):
        before, after = then.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changes(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name} {before} (now {after})"
