"""Questions about videos, read from a directory in the layout of Video-LLaVA's evaluation data (GPT_Zero_Shot_QA).

DIR/MSVD_Zero_Shot_QA/test_q.json    [{"question_id": 1, "video_name": "vid1", "question": "what is a man doing?"}, ...]
DIR/MSVD_Zero_Shot_QA/test_a.json    [{"question_id": 1, "answer": "cook"}, ...], in the same order
DIR/MSVD_Zero_Shot_QA/videos/vid1.mp4
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from zipeval.errors import UsageError

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
QUESTIONS, ANSWERS = "test_q.json", "test_a.json"


@dataclass(frozen=True)
class VideoSet:
    """The place of a set below DIR.

    Attributes:
        folder: folder of the set.
        videos: folder of its videos, below that.
        prefix: beginning of their file names, before the `video_name` of a question.
    """

    folder: str
    videos: str
    prefix: str = ""


SETS = {
    "zipeval_tgif_qa": VideoSet("TGIF_Zero_Shot_QA", "mp4"),
    "zipeval_msvd_qa": VideoSet("MSVD_Zero_Shot_QA", "videos"),
    "zipeval_msrvtt_qa": VideoSet("MSRVTT_Zero_Shot_QA", "videos/all"),
    "zipeval_activitynet_qa": VideoSet("Activitynet_Zero_Shot_QA", "all_test", "v_"),
}


def questions(task: str, root: str) -> list[dict[str, str]]:
    """Return the `question_id`, `question`, `answer` and `video` (a path) of every question of a set, in its order.

    Where a video is missing the path is of no file: that is a matter of its samples only.

    Raises:
        UsageError: if the directory lacks a file or a folder of the set, or if the files do not fit together.
    """
    place = SETS[task]
    folder = Path(root).expanduser().absolute() / place.folder
    entries = _read(task, root, folder / QUESTIONS)
    answers = _read(task, root, folder / ANSWERS)
    videos = folder / place.videos
    if not videos.is_dir():
        raise UsageError(
            f"data.videos={root}: tasks=[{task}] needs the videos in {videos}. No such "
            "directory."
        )
    try:
        if len(entries) != len(answers):
            raise ValueError(f"{len(entries)} questions, {len(answers)} answers")
        rows = list(map(_joined, entries, answers))
        stems = [f"{place.prefix}{entry['video_name']}" for entry in entries]
    # The files are of somebody else: lists of anything.
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UsageError(
            f"data.videos={root}: {QUESTIONS} and {ANSWERS} in {folder} do not fit "
            f"together ({reason}). "
            "Use the two of one release."
        ) from error
    paths = _video_paths(videos)
    for row, stem in zip(rows, stems, strict=True):
        row["video"] = str(paths.get(stem, videos / f"{stem}{SUFFIXES[0]}"))
    return rows


def _joined(question: dict, answer: dict) -> dict[str, str]:
    """Return a question with its answer.

    Raises:
        ValueError: if they are not of one question.
    """
    number = question["question_id"]
    if answer.get("question_id", number) != number:
        raise ValueError(f"question_id {number} meets {answer['question_id']}")
    return {
        "question_id": str(number),
        "question": str(question["question"]),
        "answer": str(answer["answer"]),
    }


def _video_paths(folder: Path) -> dict[str, Path]:
    """Return the videos of a folder by their names without an ending."""
    paths = {}
    # Backwards, so that of two videos of one name the first counts.
    for file in sorted(folder.iterdir(), reverse=True):
        if file.suffix.lower() in SUFFIXES:
            paths[file.stem] = file
    return paths


def _read(task: str, root: str, path: Path) -> list[dict]:
    """Return the entries of a file of questions or answers."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise UsageError(
            f"data.videos={root}: tasks=[{task}] needs {path} ({reason}). The "
            "directory is to look like Video-LLaVA's "
            "GPT_Zero_Shot_QA: see docs/benchmarks.md."
        ) from error
    if not isinstance(entries, list) or not entries:
        raise UsageError(
            f"data.videos={root}: {path} holds no list of questions or answers."
        )
    return entries
