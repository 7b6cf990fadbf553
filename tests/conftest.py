from __future__ import annotations

import os
import signal
import tempfile
from dataclasses import replace

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault(
    "ZIPEVAL_CACHE", tempfile.mkdtemp()
)  # digests of the files of tests are of no use to anybody
if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # a shell's background job inherits it, and so would what it runs
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory):
    """A data.root= with miniatures of the benchmarks' data sets. What datasets keeps of them has a place of its own."""
    from datasets import config
    from miniatures import make

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield make(tmp_path_factory.mktemp("miniatures"))


@pytest.fixture
def scripted(miniatures, tmp_path, monkeypatch):
    """(task, answers, overrides) -> (record, samples): all as in a run, but for what the model says to each question.

    To one that cannot be decoded nothing is said.
    """
    from zipeval.cli import compose
    from zipeval.evaluation.runner import run
    from zipeval.inference import answering
    from zipeval.results import records

    answer = answering.BatchGenerator.answer

    def evaluate(task, answers, *overrides):
        said = dict(enumerate(answers))
        short = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1}
        monkeypatch.setattr(answering, "generation_options", lambda given: short)
        monkeypatch.setattr(
            answering.BatchGenerator,
            "answer",
            lambda self, batch, options: [
                replace(real, text=said.pop(question.number))
                for question, real in zip(
                    batch, answer(self, batch, options), strict=True
                )
            ],
        )
        settings = [
            f"tasks=[{task}]",
            f"data.root={miniatures}",
            f"results={tmp_path}",
            *overrides,
        ]
        (path,) = run(compose(settings))
        record = records.read(path)
        samples = records.read_samples(path.parent, record)
        assert [*said] == [sample["doc_id"] for sample in samples if "error" in sample]
        return record, samples

    return evaluate


def pytest_addoption(parser):
    parser.addoption(
        "--goldens",
        help="folder with what the official implementations answer (see test_goldens.py)",
    )
