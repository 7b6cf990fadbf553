"""Tell checkpoints apart by all that is in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zipeval.utils import content_hash
from zipeval.utils.progress import progress

# Weights, configurations, tokenizers, processors, chat templates, and code that comes with them.
IDENTITY = (
    ".safetensors",
    ".json",
    ".jinja",
    ".py",
    ".txt",
    ".model",
    ".tiktoken",
    ".bpe",
    ".vocab",
)
TEMPLATES = "additional_chat_templates"  # a folder, as transformers writes it
# What is told about a checkpoint, and what its training left: no answer depends on it.
ABOUT = ("readme", "license", "notice", "use_policy", "requirements")
TRAINING = (
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
)
LARGE = 1 << 30  # bytes: from here on it takes long enough to show how far it is


def fingerprint(path: Path, weights: Sequence[Path] = ()) -> str:
    """Return a hash of everything in a checkpoint that can change an answer: the same for a copy elsewhere.

    In it are names and every byte of
    - weights: `*.safetensors`, all shards and adapters, those that an index names, and the index,
    - configurations of models, generation, processors and tokenizers: `*.json`,
    - tokenizers: `*.json`, `*.txt`, `*.model`, `*.tiktoken`, `*.bpe`, `*.vocab`,
    - chat templates: `*.jinja`, also those in `additional_chat_templates/`,
    - code: `*.py`.

    Not in it are weights in formats that are never loaded (`*.bin`, `*.pth`, `*.msgpack`), states of optimizers and
    logs of trainings, README, LICENSE and the like, hidden files, other folders, and paths and times of files.

    Nothing is taken from the names of blobs in the Hugging Face cache: a blob can be changed where it lies.

    Args:
        path: directory of the checkpoint.
        weights: files that its index names.

    Raises:
        OSError: if a file cannot be read.
    """
    files = {
        file.relative_to(path).as_posix(): file
        for file in [*identity_files(path), *weights]
    }
    size = content_hash.unknown_bytes(files.values())
    if size < LARGE:
        digests = content_hash.digests(files.values())
    else:
        with progress(f"{path.name} checksum, MiB", size >> 20) as advance:
            digests = content_hash.digests(files.values(), advance)
    return content_hash.combined({name: digests[file] for name, file in files.items()})


def identity_files(path: Path) -> list[Path]:
    """Return the files of a checkpoint that can change an answer."""
    files = [*path.iterdir(), *(path / TEMPLATES).glob("*.jinja")]
    return [file for file in files if _can_change_an_answer(file) and file.is_file()]


def _can_change_an_answer(file: Path) -> bool:
    name = file.name.lower()
    if name.startswith((".", *ABOUT)) or name in TRAINING:
        return False
    return name.endswith(IDENTITY)
