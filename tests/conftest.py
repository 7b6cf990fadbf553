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


def pytest_addoption(parser):
    parser.addoption("--goldens", help="folder with what the official implementations answer (see test_goldens.py)")
