"""Tasks: the place where lmms-eval finds one, the data it reads, and the number that it gives a table, as in the papers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import zipeval.tasks
from zipeval.benchmarks import lmms_names, scoring
from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.errors import UsageError, closest
from zipeval.utils.content_hash import digest_files

OURS = Path(zipeval.tasks.__path__[0])
# Settings in a task's YAML. They are searched for, since parsing 2,000 files takes
# seconds.
NAME = re.compile(r"""^(task|group)\s*:\s*["']?([\w\-.]+)["']?\s*(?:#.*)?$""", re.M)
DATASET = re.compile(r"""^dataset_path\s*:\s*["']?([\w\-./]+)""", re.M)
# Files beside a task with these endings are its data, whoever reads them.
DATA = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv", ".txt")
INCLUDE = re.compile(r"""^include\s*:\s*["']?([\w\-./]+)""", re.M)
OUTPUT = re.compile(r"""^output_type\s*:\s*["']?(\w+)""", re.M)
# Code with one of these asks a judge model.
JUDGE = re.compile(
    r"OPENAI_API|API_KEY|gpt_eval|llm_judge|get_chat_response|verifiers\.openai|AzureOpenAI"
)
SEVERAL_ROUNDS = (
    "tasks=[{}]: it asks in several rounds; zipeval runs tasks that ask once, and its "
    "own conversations. "
    "`zipeval list tasks` shows both."
)


@dataclass(frozen=True)
class Source:
    """A part of a data set on the hub, or of a copy of it."""

    dataset: str
    split: str
    config: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """A task, and the way from its result to a number in a table.

    Attributes:
        column: heading in tables, as in the papers.
        metric: lmms-eval's name of the number, or one that `derive` adds.
        scale: the factor that turns the metric into the number that papers print.
        about: one line for `zipeval list tasks`: what differs from the papers' protocol.
        sources: what it reads, the samples first; nothing for data beside the task.
        samples: in the split on the hub, as its card has it; of conversations, the images they are about. None for data
            that is counted where it lies.
        needs: `server` where the papers' split is scored by one, to which answers are submitted; here another split is
            read, whose answers are public.
        multiple: samples that are scored together; a limit has to be a multiple of it.
        turns: its samples are conversations: see zipeval/inference/conversing.py.
        beside: files of its data that lie in the folder of another task.
        version: part of the task's hash; to be raised with every change of `functions` that changes an answer.
        settings: what replaces lmms-eval's own in the task's YAML.
        functions: makes what replaces functions of the task, anew for every evaluation.
        sample: see zipeval/benchmarks/scoring.py; without it a sample's score is its `metric`.
        derive: see zipeval/benchmarks/scoring.py.
    """

    column: str
    metric: str
    scale: float
    about: str
    sources: tuple[Source, ...] = ()
    samples: int | None = None
    needs: str = ""
    multiple: int = 1
    turns: bool = False
    beside: tuple[Path, ...] = ()
    version: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    functions: Callable[[], dict[str, Any]] | None = None
    sample: Callable[[dict], dict] | None = None
    derive: Callable[[dict[str, float], list[dict]], dict[str, float]] | None = None


HUB = "lmms-lab-encoder"
SHORT = "\nAnswer the question using a single word or phrase."
# lmms-eval sets no length in some tasks, LLaVA's evaluation does.
LLAVA_LENGTH = {"until": ["ASSISTANT:"], "max_new_tokens": 128}
# The metric of a task before its judge is asked.
JUDGED = {
    "metric_list": [
        {"metric": "answered", "aggregation": "mean", "higher_is_better": True}
    ]
}

VIDEO = "as Video-LLaVA, with the judge that you name; questions and videos of data.videos=DIR"


def _turns(name: str, column: str, samples: int, **options) -> dict[str, Benchmark]:
    """Return two tasks in which the questions about an image are one conversation, with and without history."""
    about = "the later questions about an image, on the visual tokens that the first one left (accuracy_later), beside "
    variants = (
        ("turns", "turns", ""),
        ("turns_no_history", "turns, no history", ", without text between"),
    )
    tasks = {}
    for suffix, label, more in variants:
        tasks[f"{name}_{suffix}"] = Benchmark(
            f"{column} ({label})",
            "accuracy_later",
            100,
            f"{about}a fresh selection for each (accuracy_later_fresh){more}",
            samples=samples,
            turns=True,
            sample=scoring.turns_sample,
            **options,
        )
    return tasks


BENCHMARKS = {
    "zipeval_shapes": Benchmark(
        "zipeval_shapes",
        "accuracy",
        100,
        "embedded: 1,499 questions of six types about 300 synthetic images",
    ),
    "gqa": Benchmark(
        "GQA",
        "exact_match",
        100,
        "as the papers: testdev-balanced",
        (
            Source(f"{HUB}/GQA", "testdev", "testdev_balanced_instructions"),
            Source(f"{HUB}/GQA", "testdev", scoring.GQA_IMAGES),
        ),
        samples=12_578,
        functions=partial(scoring.gqa_functions, f"{HUB}/GQA"),
    ),
    "mmbench_en_dev": Benchmark(
        "MMB",
        "gpt_eval_score",
        1,
        "as LLaVA: validation, a question is right in all rotations of its options (a "
        "limit= may part them); the judge "
        "reads answers that name no option",
        (Source(f"{HUB}/MMBench", "dev", "en"),),
        samples=4_329,
        settings=JUDGED,
        functions=scoring.mmbench_functions,
    ),
    "mme": Benchmark(
        "MME",
        "mme_total",
        1,
        "perception + cognition; LLaVA's own table prints perception alone",
        (Source(f"{HUB}/MME", "test"),),
        samples=2_374,
        multiple=2,
        sample=scoring.mme_sample,
        derive=scoring.mme,
    ),
    "pope": Benchmark(
        "POPE",
        "pope_f1_llava",
        100,
        "mean F1 of adversarial, popular and random under LLaVA's rule for yes and no; "
        "pope_f1_exact is lmms-eval's",
        (Source(f"{HUB}/POPE", "test"),),
        samples=9_000,
        sample=scoring.pope_sample,
        derive=scoring.pope,
    ),
    "scienceqa_img": Benchmark(
        "SQA",
        "exact_match",
        100,
        "as the papers: the questions with an image",
        (Source(f"{HUB}/ScienceQA", "test", "ScienceQA-IMG"),),
        samples=2_017,
    ),
    "vqav2_val": Benchmark(
        "VQAv2",
        "exact_match",
        100,
        "as the papers on the validation split",
        (Source(f"{HUB}/VQAv2", "validation"),),
        samples=214_354,
        needs="server",
    ),
    "textvqa_val": Benchmark(
        "TextVQA",
        "exact_match",
        100,
        "as LLaVA: validation, OCR tokens in the prompt",
        (Source(f"{HUB}/textvqa", "validation"),),
        samples=5_000,
        settings={
            "lmms_eval_specific_kwargs": {
                "default": {"pre_prompt": "", "post_prompt": SHORT, "ocr": True}
            },
            "generation_kwargs": LLAVA_LENGTH,
            # Without lmms-eval's second metric, a file to submit that it writes into
            # the working directory.
            "metric_list": [
                {
                    "metric": "exact_match",
                    "aggregation": "mean",
                    "higher_is_better": True,
                }
            ],
        },
    ),
    "mmmu_val": Benchmark(
        "MMMU",
        "mmmu_acc",
        100,
        "as MMMU: validation, images in their places, a seeded guess where no option "
        "is named",
        (Source(f"{HUB}/MMMU", "validation"),),
        samples=900,
        sample=scoring.mmmu_sample,
        derive=scoring.mmmu,
    ),
    "seedbench": Benchmark(
        "SEED",
        "seed_all",
        100,
        "as LLaVA: images and videos, of a video the middle one of the data set's "
        "frames; lmms-eval gives all of them",
        (Source(f"{HUB}/SEED-Bench", "test"),),
        samples=17_990,
        settings={"generation_kwargs": LLAVA_LENGTH},
        functions=scoring.seed_functions,
        sample=scoring.seed_sample,
    ),
    "mmvet": Benchmark(
        "MM-Vet",
        "gpt_eval_score",
        1,
        "as LLaVA, without lmms-eval's preamble, graded once by the judge that you "
        "name; theirs is GPT-4 (0613)",
        (Source(f"{HUB}/MMVet", "test"),),
        samples=218,
        settings={
            **JUDGED,
            "lmms_eval_specific_kwargs": {
                "default": {"pre_prompt": "", "post_prompt": ""}
            },
        },
        functions=scoring.judged_functions,
    ),
    "llava_in_the_wild": Benchmark(
        "LLaVA-B",
        "gpt_eval_llava_all",
        1,
        "as LLaVA, in the wild, up to 1024 tokens, graded by the judge that you name; "
        "theirs is GPT-4 (0613)",
        (Source(f"{HUB}/llava-bench-in-the-wild", "train"),),
        samples=60,
        settings={
            **JUDGED,
            "generation_kwargs": {**LLAVA_LENGTH, "max_new_tokens": 1024},
        },
        functions=scoring.judged_functions,
    ),
    "vizwiz_vqa_val": Benchmark(
        "VizWiz",
        "exact_match",
        100,
        "as the papers on the validation split",
        (Source(f"{HUB}/VizWiz-VQA", "val"),),
        samples=4_319,
        needs="server",
        settings={"generation_kwargs": LLAVA_LENGTH},
    ),
    "zipeval_tgif_qa": Benchmark("TGIF", "accuracy", 1, VIDEO),
    "zipeval_msvd_qa": Benchmark("MSVD", "accuracy", 1, VIDEO),
    "zipeval_msrvtt_qa": Benchmark("MSRVTT", "accuracy", 1, VIDEO),
    "zipeval_activitynet_qa": Benchmark("ActivityNet", "accuracy", 1, VIDEO),
    **_turns(
        "zipeval_shapes",
        "zipeval_shapes",
        300,
        beside=(OURS / "shapes" / "test.parquet",),
    ),
}
BENCHMARKS |= _turns("zipeval_gqa", "GQA", 398, sources=BENCHMARKS["gqa"].sources)
BENCHMARKS |= _turns("zipeval_pope", "POPE", 500, sources=BENCHMARKS["pope"].sources)


# It stands for a task of which nothing is known but its definition.
UNKNOWN = Benchmark("", "", 1, "")


def lookup(name: str) -> Benchmark:
    """Return what is known of a task; `UNKNOWN` for one of lmms-eval's others, or of somebody else's."""
    return BENCHMARKS.get(name, UNKNOWN)


@cache
def task_files() -> dict[str, tuple[str, Path]]:
    """Return (task | group, its YAML file) of every task or group, by text search: no YAML is parsed, nothing imported.

    lmms-eval has 2,000 of them; parsing all takes its own index five seconds.
    """
    files: dict[str, tuple[str, Path]] = {}
    folders = (lmms_names.tasks_folder(), OURS)
    for file in chain.from_iterable(sorted(f.rglob("*.yaml")) for f in folders):
        for kind, name in NAME.findall(_text(file)):
            # lmms-eval takes the first file of a name, too.
            files.setdefault(name, (kind, file))
    return files


def task_folder(name: str) -> Path:
    """Return the folder that defines a task.

    Raises:
        UsageError: if there is no such task, if it is a group, if a judge scores it by a protocol unknown here, or if
            it asks in several rounds.
    """
    files = task_files()
    if name not in files:
        raise UsageError(
            f"tasks=[{name}]: no such task.{_closest_task(name)} `zipeval list tasks` "
            "says more."
        )
    kind, file = files[name]
    if kind == "group":
        raise UsageError(
            f"tasks=[{name}]: that is a group of tasks; name its members, listed in "
            f"{file}."
        )
    if name not in BENCHMARKS:
        _check_runnable(name, file)
    return file.parent


def _closest_task(name: str) -> str:
    """Return ' Did you mean x?' of a task that is known here, or that begins with the same letter."""
    near = [task for task in task_files() if task in BENCHMARKS or task[:1] == name[:1]]
    return closest(name, near or BENCHMARKS)


def _check_runnable(name: str, file: Path) -> None:
    """Raise UsageError for a task of lmms-eval's that zipeval does not score or does not ask as it is meant."""
    if any(JUDGE.search(_text(source)) for source in _sources(file.parent)):
        raise UsageError(
            f"tasks=[{name}]: a judge model scores its answers, and zipeval knows no "
            "protocol for it; without a judge "
            f"lmms-eval makes numbers up. It knows those of {', '.join(PROTOCOLS)}."
        )
    if _first_of(OUTPUT, file) == lmms_names.MULTI_ROUND:
        raise UsageError(SEVERAL_ROUNDS.format(name))


def check_limit(name: str, limit: int | None) -> None:
    """Raise UsageError where the limit would cut between samples that are scored together."""
    multiple = lookup(name).multiple
    if limit and limit % multiple:
        raise UsageError(
            f"limit={limit}: tasks=[{name}] scores {multiple} questions about an image "
            "together. Choose a multiple of "
            f"{multiple}, such as limit={limit + multiple - limit % multiple}."
        )


def dataset(name: str) -> str | None:
    """Return the data set's id on the hub, of any task; None where the data lies beside the task."""
    _, file = task_files()[name]
    path = _first_of(DATASET, file) or ""
    # Without a slash it is a format that datasets reads from files, such as parquet.
    return path if "/" in path else None


def lies_beside(name: str, folder: Path) -> bool:
    """Return whether all data of a task lies beside it in zipeval's own folders, and so is in its hash."""
    is_ours = folder.resolve().is_relative_to(OURS.resolve())
    return is_ours and not lookup(name).sources


def _text(file: Path) -> str:
    """Return the text of a file; bytes that are no UTF-8 do not matter to a search."""
    return file.read_text(encoding="utf-8", errors="ignore")


def _first_of(setting: re.Pattern, file: Path) -> str | None:
    """Return the value of a setting in a task's YAML, or else in what that includes; None where there is none."""
    while file.is_file():
        text = _text(file)
        if value := setting.search(text):
            return value[1]
        included = INCLUDE.search(text)
        # The folder itself is no file, which ends the search.
        file = file.parent / (included[1] if included else "")
    return None


def _sources(folder: Path) -> list[Path]:
    """Return the YAML files and the code in a task's folder; `_default` files have no ending."""
    files = sorted(folder.iterdir())
    return [
        file
        for file in files
        if file.suffix in (".yaml", ".py") or file.name.startswith("_default")
    ]


def _included(name: str, folder: Path) -> list[Path]:
    """Return the files outside of a task's folder that its YAML includes, and those that they include."""
    # A task that lmms-eval does not find is somebody else's, in a folder of its name.
    _, file = task_files().get(name, ("task", folder / f"{name}.yaml"))
    files = []
    # A file that is included again ends a circle.
    while file.is_file() and file not in files:
        files.append(file)
        included = INCLUDE.search(_text(file))
        if included is None:
            break
        file = (file.parent / included[1]).resolve()
    # The first is the task's own. What lies in its folder is hashed anyway.
    return [file for file in files[1:] if file.parent != folder.resolve()]


def task_hash(name: str, folder: Path, questions: list[dict] | None = None) -> str:
    """Return the hash of a task's definition, of what replaces parts of it here, and of its data.

    Data counts where it lies beside the task, or is given as `questions`.
    """
    known = lookup(name)
    data = [file for file in folder.iterdir() if file.suffix in DATA and file.is_file()]
    outside = [*known.beside, *_included(name, folder)]
    digest = digest_files([*_sources(folder), *data, *outside])
    if name not in BENCHMARKS:
        return digest
    protocol = PROTOCOLS[name].version if name in PROTOCOLS else None
    ours = json.dumps(
        [known.metric, known.scale, known.settings, known.version, protocol],
        sort_keys=True,
    )
    rows = []
    for row in questions or []:
        # By its name alone: the same videos may lie anywhere.
        rows.append({**row, "video": Path(row["video"]).stem})
    return hashlib.sha256(f"{digest}{ours}{rows}".encode()).hexdigest()[:16]
