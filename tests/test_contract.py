"""What holds for every method on every model family; whoever adds one is found by listing its folder.

The checks are the package's, zipeval/contract/, so that `zipeval test-method` runs the same.
"""

from __future__ import annotations

import pytest
import torch
from tiny_methods import METHODS, method, modules

import zipeval.models
from zipeval.cli import compose
from zipeval.contract.checks import CHECKS, NotApplicable, parts
from zipeval.contract.subjects import SUBJECTS
from zipeval.engine import decoder
from zipeval.engine.decoder import DecoderMethod

WITHOUT_BUDGET = ("none", "vanilla")
INSIDE_THE_DECODER = ("fastv", "sparsevlm")
ON_THE_EMBEDDED_MODEL = ("chain", "vanilla")  # of each kind one
# Everything else has to apply: a check that silently had nothing to say would be none.
NOT_APPLICABLE = {
    ("keeping everything is the stock model", "none"),
    ("order is preserved", "vanilla"),
    ("nothing is left where it fails", "vanilla"),
    *(("order is preserved", name) for name in INSIDE_THE_DECODER),
}


@pytest.fixture(params=SUBJECTS, ids=lambda subject: subject.name)
def subject(request):
    return request.param


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def test_every_family_is_tried():
    families = {subject.name.removesuffix("_hd") for subject in SUBJECTS}
    assert families - {"tiny_llava"} == {*modules(zipeval.models)}


def test_every_method_has_its_configuration(name):
    assert (
        compose(
            [
                f"method={name}",
                "tokens=9",
                *["method.first.tokens=9"][: name == "chain"],
            ]
        ).method["name"]
        == name
    )


def test_methods_with_a_budget_are_known(name):
    assert method(name).has_budget == (name not in WITHOUT_BUDGET)


@pytest.mark.parametrize("check", CHECKS)
def test_the_contract(check, subject, name):
    if subject.name == "tiny_llava" and name not in ON_THE_EMBEDDED_MODEL:
        pytest.skip("the embedded model is a LLaVA, and larger than the random one")
    if (check, name) in NOT_APPLICABLE:
        with pytest.raises(NotApplicable):
            CHECKS[check](method(name), subject)
        return
    CHECKS[check](method(name), subject)


def test_order_is_preserved_in_the_decoder(subject, name, monkeypatch):
    """Of what is kept as it was, in every layer that drops tokens."""
    placed, place = [], decoder._insert_merged

    def record(*arguments):
        placed.append(place(*arguments))
        return placed[-1]

    monkeypatch.setattr(decoder, "_insert_merged", record)
    model, made = subject.model(), method(name).on(subject)
    with torch.no_grad(), made.applied(model):
        model(**subject.prompts())
    assert bool(placed) == any(
        isinstance(part, DecoderMethod) for part in parts(made, subject)
    )
    for index, valid, (*_, source) in placed:
        for row in torch.where(valid, source.gather(1, index), -1):
            assert (row[row >= 0].diff() > 0).all()
