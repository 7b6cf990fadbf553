"""Tasks: where lmms-eval finds one, which data it reads, and which number it gives a table, as the papers print it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import zipeval.tasks
from zipeval.benchmarks import lmms_names, scoring
from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.errors import UsageError, closest
from zipeval.utils.content_hash import digest_files

OURS = Path(zipeval.tasks.__path__[0])
NAME = re.compile(r"""^(task|group)\s*:\s*["']?([\w\-.]+)["']?\s*(?:#.*)?$""", re.M)
DATASET = re.compile(r"""^dataset_path\s*:\s*["']?([\w\-./]+)""", re.M)
DATA = (
    ".parquet",
    ".arrow",
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".txt",
)  # beside a task, whoever reads it
INCLUDE = re.compile(r"""^include\s*:\s*["']?([\w\-./]+)""", re.M)
OUTPUT = re.compile(r"""^output_type\s*:\s*["']?(\w+)""", re.M)

JUDGE = re.compile(
    r"OPENAI_API|API_KEY|gpt_eval|llm_judge|get_chat_response|verifiers\.openai|AzureOpenAI"
)
SEVERAL_ROUNDS = (
    "tasks=[{}]: it asks in several rounds; zipeval runs tasks that ask once, and its own conversations. "
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
    """How a task's result becomes a number in a table.

    Attributes:
        column: heading in tables, as in the papers.
        metric: what the number is: lmms-eval's name of it, or one that `derive` adds.
        scale: what turns the metric into the number that papers print.
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
LLAVA_LENGTH = {
    "until": ["ASSISTANT:"],
    "max_new_tokens": 128,
}  # lmms-eval sets none here, LLaVA's evaluation does
JUDGED = {
    "metric_list": [
        {"metric": "answered", "aggregation": "mean", "higher_is_better": True}
    ]
}

VIDEO = "as Video-LLaVA, with the judge that you name; questions and videos of data.videos=DIR"


def _turns(name: str, column: str, samples: int, **options) -> dict[str, Benchmark]:
    """A task in which the questions about an image are one conversation, with and without history."""
    about = "the later questions about an image, on the visual tokens that the first one left (accuracy_later), beside "
    tasks = {
        f"{name}_turns": ("turns", ""),
        f"{name}_turns_no_history": ("turns, no history", ", without text between"),
    }
    return {
        task: Benchmark(
            f"{column} ({label})",
            "accuracy_later",
            100,
            f"{about}a fresh selection for each (accuracy_later_fresh){more}",
            samples=samples,
            turns=True,
            sample=scoring.turns_sample,
            **options,
        )
        for task, (label, more) in tasks.items()
    }


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
        "as LLaVA: validation, a question is right in all rotations of its options (a limit= may part them); the judge "
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
        "mean F1 of adversarial, popular and random under LLaVA's rule for yes and no; pope_f1_exact is lmms-eval's",
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
            # Without lmms-eval's second metric, a file to submit that it writes into the working directory.
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
        "as MMMU: validation, images in their places, a seeded guess where no option is named",
        (Source(f"{HUB}/MMMU", "validation"),),
        samples=900,
        sample=scoring.mmmu_sample,
        derive=scoring.mmmu,
    ),
    "seedbench": Benchmark(
        "SEED",
        "seed_all",
        100,
        "as LLaVA: images and videos, of a video the middle one of the data set's frames; lmms-eval gives all of them",
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
        "as LLaVA, without lmms-eval's preamble, graded once by the judge that you name; theirs is GPT-4 (0613)",
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
        "as LLaVA, in the wild, up to 1024 tokens, graded by the judge that you name; theirs is GPT-4 (0613)",
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


@cache
def task_files() -> dict[str, tuple[str, Path]]:
    """Every task or group name -> (task | group, its YAML file), by text search: no YAML is parsed, nothing imported.

    lmms-eval has 2,000 of them; parsing all takes its own index five seconds.
    """
    found: dict[str, tuple[str, Path]] = {}
    for folder in (lmms_names.tasks_folder(), OURS):
        for file in sorted(folder.rglob("*.yaml")):
            for kind, name in NAME.findall(
                file.read_text(encoding="utf-8", errors="ignore")
            ):
                found.setdefault(name, (kind, file))
    return found


def task_folder(name: str) -> Path:
    """The folder that defines a task.

    Raises:
        UsageError: if there is no such task, if it is a group, if a judge scores it by a protocol unknown here, or if
            it asks in several rounds.
    """
    found = task_files()
    if name not in found:
        known = [n for n in found if n in BENCHMARKS or n[:1] == name[:1]] or list(
            BENCHMARKS
        )
        raise UsageError(
            f"tasks=[{name}]: no such task.{closest(name, known)} `zipeval list tasks` says more."
        )
    kind, file = found[name]
    if kind == "group":
        raise UsageError(
            f"tasks=[{name}]: that is a group of tasks; name its members, listed in {file}."
        )
    judged = any(
        JUDGE.search(f.read_text(encoding="utf-8", errors="ignore"))
        for f in _sources(file.parent)
    )
    if judged and name not in BENCHMARKS:
        raise UsageError(
            f"tasks=[{name}]: a judge model scores its answers, and zipeval knows no protocol for it; without a judge "
            f"lmms-eval makes numbers up. It knows those of {', '.join(PROTOCOLS)}."
        )
    if name not in BENCHMARKS and _first_of(OUTPUT, file) == lmms_names.MULTI_ROUND:
        raise UsageError(SEVERAL_ROUNDS.format(name))
    return file.parent


def check_limit(name: str, limit: int | None) -> None:
    """Raises UsageError where the limit would cut between samples that are scored together."""
    multiple = BENCHMARKS[name].multiple if name in BENCHMARKS else 1
    if limit and limit % multiple:
        raise UsageError(
            f"limit={limit}: tasks=[{name}] scores {multiple} questions about an image together. Choose a multiple of "
            f"{multiple}, such as limit={limit + multiple - limit % multiple}."
        )


def dataset(name: str) -> str | None:
    """The data set's id on the hub, of any task; None where the data lies beside the task."""
    found = _first_of(DATASET, task_files()[name][1])
    return found if found and "/" in found else None


def lies_beside(name: str, folder: Path) -> bool:
    """Return whether all data of a task lies beside it in zipeval's own folders, and so is in its hash."""
    ours = folder.resolve().is_relative_to(OURS.resolve())
    return ours and not (name in BENCHMARKS and BENCHMARKS[name].sources)


def _first_of(setting: re.Pattern, file: Path) -> str | None:
    """What a task's YAML, or what that includes, has for a setting; None: nothing."""
    while file.is_file():
        text = file.read_text(encoding="utf-8", errors="ignore")
        if found := setting.search(text):
            return found[1]
        file = file.parent / (included[1] if (included := INCLUDE.search(text)) else "")
    return None


def _sources(folder: Path) -> list[Path]:
    return [
        f
        for f in sorted(folder.iterdir())
        if f.suffix in (".yaml", ".py") or f.name.startswith("_default")
    ]


def _included(name: str, folder: Path) -> list[Path]:
    """Return the files outside of a task's folder that its YAML includes, and those that they include."""
    files = []
    _, file = task_files().get(
        name, ("task", folder / f"{name}.yaml")
    )  # the folder of a task of somebody else's
    while file.is_file() and (
        found := INCLUDE.search(file.read_text(encoding="utf-8", errors="ignore"))
    ):
        file = (file.parent / found[1]).resolve()
        if file in files or not file.is_file():
            break
        files.append(file)
    return [file for file in files if file.parent != folder.resolve()]


def task_hash(name: str, folder: Path, questions: list[dict] | None = None) -> str:
    """Hash of a task's definition, of what replaces parts of it here, and of its data where that lies beside it or is
    given.
    """
    beside = BENCHMARKS[name].beside if name in BENCHMARKS else ()
    data = [file for file in folder.iterdir() if file.suffix in DATA and file.is_file()]
    digest = digest_files([*_sources(folder), *data, *beside, *_included(name, folder)])
    if name not in BENCHMARKS:
        return digest
    known = BENCHMARKS[name]
    protocol = PROTOCOLS[name].version if name in PROTOCOLS else None
    ours = json.dumps(
        [known.metric, known.scale, known.settings, known.version, protocol],
        sort_keys=True,
    )
    asked = [
        {**row, "video": Path(row["video"]).stem} for row in questions or []
    ]  # wherever the videos lie
    return hashlib.sha256(f"{digest}{ours}{asked}".encode()).hexdigest()[:16]
