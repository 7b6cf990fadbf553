from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")


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
    """(task, answers, overrides) -> (record, samples): all as in a run, but for what the model says."""
    from zipeval import chat_model, records
    from zipeval.cli import compose
    from zipeval.runner import Session, run

    def evaluate(task, answers, *overrides):
        queue = iter(answers)
        short = {"max_new_tokens": 1, "do_sample": False}
        monkeypatch.setattr(chat_model, "_generation_options", lambda given: short)
        monkeypatch.setattr(Session, "decode", lambda self, ids: [next(queue) for _ in ids])
        settings = [f"tasks=[{task}]", f"data.root={miniatures}", f"results={tmp_path}", *overrides]
        (path,) = run(compose(settings))
        assert list(queue) == []
        record = records.read(path)
        return record, records.read_samples(path.parent, record)

    return evaluate


def pytest_addoption(parser):
    parser.addoption("--goldens", help="folder with what the official implementations answer (see test_goldens.py)")
