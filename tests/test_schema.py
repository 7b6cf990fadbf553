"""Records and samples have the fields that their classes document, and no others."""

from pathlib import Path
from typing import get_type_hints

import pytest

from zipeval.config.compose import compose
from zipeval.evaluation import runner
from zipeval.results import records
from zipeval.results.schema import Prefill, Record, Sample, SamplesFile, VisualTokens


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Records with their samples, of a method that reduces at the encoder and of one within the decoder."""
    results = tmp_path_factory.mktemp("runs")
    runs = []
    for method in ("visionzip", "fastv"):
        overrides = [f"method={method}", "tokens=16", "limit=3", f"results={results}"]
        for path in map(Path, runner.evaluate_run(compose(overrides))):
            record = records.read(path)
            runs.append((record, records.read_samples(path.parent, record)))
    return runs


def test_records_have_the_fields_of_their_class(written):
    for record, _ in written:
        assert record.keys() <= get_type_hints(Record).keys()
        assert Record.__required_keys__ <= record.keys()


def test_parts_of_records_have_the_fields_of_their_classes(written):
    parts = {"visual_tokens": VisualTokens, "prefill": Prefill, "samples": SamplesFile}
    for record, _ in written:
        for name, part in parts.items():
            assert record[name].keys() == get_type_hints(part).keys()


def test_samples_have_the_fields_of_their_class(written):
    for _, samples in written:
        for sample in samples:
            assert sample.keys() <= get_type_hints(Sample).keys()
            assert Sample.__required_keys__ <= sample.keys()
