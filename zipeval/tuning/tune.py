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
# Manifest and state of a training that is not finished.
BEGUN, CHECKPOINTS = "tuning.json", "checkpoints"
# Modules that a projector depends on beside what answers depend on.
TUNING = ("zipeval.tuning.tune", "zipeval.tuning.training")


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
        # No process begins what the first one refuses; and transformers, which is imported
        # behind this, finds a group of processes.
        ranks.exchange(None)
        from zipeval.tuning.training import train

        weights = train(session, data.conversations, settings, out / CHECKPOINTS)
        if ranks.first():
            _write(path, weights, manifest)
    return path


def _session(config: RunConfig) -> Session:
    """Return the session of the model and the method, which has to be one that tuned projectors are for.

    Raises:
        UsageError: for settings under which nothing can be tuned.
    """
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
    """Return the share of a file's conversations that is trained on.

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
    # LLaVA's file has conversations about text only, too. A projector learns nothing of
    # them.
    numbers = []
    for number, entry in enumerate(entries):
        if isinstance(entry, dict) and entry.get("image"):
            numbers.append(number)
    count = round(fraction * len(numbers))
    if count == 0:
        raise UsageError(
            f"data={file}: {len(numbers)} of its {len(entries)} entries have an image, and fraction={fraction} of "
            "them is none. Set a larger fraction=."
        )
    chosen = sorted(random.Random(seed).sample(numbers, count))
    conversations = []
    for number in chosen:
        where = f"data={file}: entry {number}"
        conversations.append(_messages(entries[number], images, where))
    # The image is the first part of the first message.
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
    digest_by_name = {}
    for number, path in zip(chosen, paths, strict=True):
        digest_by_name[entries[number]["image"]] = digests[path]
    about = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "images": content_hash.combined(digest_by_name),
        "entries": len(entries),
        "text_only": len(entries) - len(numbers),
        "samples": count,
    }
    return Data(conversations, about)


def _messages(entry: dict, images: Path, where: str) -> list[dict]:
    """Return an entry as chat messages; as LLaVA does, the image goes before the text of the first question.

    Raises:
        UsageError: for an entry of another layout.
    """
    turns = entry.get("conversations")
    try:
        roles = [turn["from"] for turn in turns]
        texts = [turn["value"] for turn in turns]
        # At least one pair of question and answer, and whole pairs only.
        pairs = max(1, len(turns) // 2)
        if roles != [*ROLES] * pairs:
            raise ValueError("its turns are not human, gpt, human, gpt ...")
        placeholders = [text.count(PLACEHOLDER) for text in texts]
        if placeholders[0] != 1 or sum(placeholders) != 1:
            raise ValueError(
                f"its first turn, and that only, has to hold {PLACEHOLDER} once"
            )
        image = str(images / entry["image"])
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UsageError(
            f"{where}: {reason}. docs/tuning.md shows LLaVA's layout."
        ) from error
    messages = []
    for role, text in zip(roles, texts, strict=True):
        part = {"type": "text", "text": text.replace(PLACEHOLDER, "").strip()}
        messages.append({"role": ROLES[role], "content": [part]})
    messages[0]["content"].insert(0, {"type": "image", "url": image})
    return messages


def _manifest(session: Session, settings: Settings, data: Data) -> dict[str, Any]:
    """Return everything that the weights depend on, and no more: the same training makes the same file."""
    trained = asdict(settings)
    # Places are no part of it: the content of data and images is hashed.
    for place in ("data", "images", "out"):
        del trained[place]
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
    """Return the path of a finished projector, if it is what the command would make.

    Raises:
        UsageError: if it is of another tuning. Other versions of packages alone are no reason.
    """
    earlier = projector.manifest(path)
    same_versions = manifest | {"versions": earlier.get("versions")}
    changed = [*_changes(earlier, same_versions)]
    if changed:
        raise UsageError(
            f"{path} is of another tuning: {', '.join(changed)}. Move it away, or choose another out=DIR."
        )
    if ranks.first():
        print(f"{path}: finished before, kept. Delete it to tune again.")
    return path


@contextmanager
def _turn(out: Path, manifest: dict) -> Iterator[None]:
    """Hold a directory while this process trains in it what was begun there.

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
        # Before the first checkpoint there is nothing to lose.
        if begun.exists() and any((out / CHECKPOINTS).glob("*")):
            earlier = json.loads(begun.read_text(encoding="utf-8"))
            changed = [*_changes(earlier, manifest)]
            if changed:
                raise UsageError(
                    f"{out} holds the beginning of another tuning: {', '.join(changed)}. "
                    f"Delete {out / CHECKPOINTS} to begin anew, or choose another out=DIR."
                )
        text = json.dumps(manifest, indent=2, sort_keys=True)
        records.atomic_write(begun, text + "\n")
        yield


def _write(path: Path, weights: dict[str, torch.Tensor], manifest: dict) -> None:
    """Write the result in place of the checkpoints from which the training would go on."""
    from safetensors.torch import save

    about = {projector.KEY: json.dumps(manifest, sort_keys=True)}
    records.atomic_write(path, save(weights, about))
    (path.parent / BEGUN).unlink()
    shutil.rmtree(path.parent / CHECKPOINTS)


def _changes(then: dict, now: dict, prefix: str = "") -> Iterator[str]:
    """Yield `training.lr 0.001 (now 0.002)` for everything that differs."""
    for name in dict.fromkeys([*then, *now]):
        before, after = then.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changes(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name} {before} (now {after})"
