"""lmms-eval tasks of a test's own, about the embedded task's pictures."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from datasets import Dataset, Features, Image, Value

import zipeval.tasks

FEATURES = Features(
    {"image": Image(), "question": Value("string"), "answer": Value("string")}
)
RIGHT = (
    "return {'acc': float(str(results[0]).strip().lower() == doc['answer'].lower())}"
)


def write_task(
    folder: Path,
    name: str,
    generation: str,
    samples: int = 6,
    process: str = RIGHT,
    more: str = "",
) -> Path:
    """Write a task, and its data beside it; returns its YAML file.

    Args:
        generation: its generation_kwargs, in YAML's flow style.
        process: what its process_results does with `doc` and `results`.
        more: further lines of its YAML.
    """
    shapes = pd.read_parquet(
        Path(zipeval.tasks.__path__[0]) / "shapes" / "test.parquet"
    ).head(samples)
    rows = [
        {
            "image": {"bytes": row.image["bytes"], "path": None},
            "question": row.question,
            "answer": row.answer,
        }
        for row in shapes.itertuples()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=FEATURES).to_parquet(str(folder / "test.parquet"))
    (folder / "utils.py").write_text(
        f"def visual(doc):\n    return [doc['image']]\n\n\ndef process(doc, results):\n    {process}\n"
    )
    file = folder / f"{name}.yaml"
    file.write_text(
        f"task: {name}\ndataset_path: parquet\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/test.parquet}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_visual: !function utils.visual\ndoc_to_text: question\n"
        f"doc_to_target: answer\nprocess_results: !function utils.process\ngeneration_kwargs: {generation}\n"
        f"metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]\n{more}"
    )
    return file
