"""Compiled blocks answer as the model does, and are gone afterwards."""

from __future__ import annotations

import pytest
import torch
from tiny import llava
from tiny_methods import answer, ask, snapshot

from zipeval.engine.compiled import compile_blocks
from zipeval.methods.chain import Chain
from zipeval.methods.fastv import FastV
from zipeval.methods.vanilla import Vanilla
from zipeval.methods.visionzip import VisionZip

IMAGES = [1, 2, 1]
LAYERS = 3
METHODS = {  # and the blocks of decoder and encoder that it watches
    "vanilla": (Vanilla(), [], []),
    "visionzip": (VisionZip(tokens=12), [], [-2]),
    "fastv": (FastV(keep=9, K=1), [0], []),
    "chain": (Chain(VisionZip(tokens=12), FastV(keep=9, K=2)), [1], [-2]),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model():
    """In float64: a choice that hangs on rounding is nobody's error."""
    return llava(side=6, layers=LAYERS, gain=1.0).double()


class Counted:
    """torch.compile's graphs, run as they are.

    Attributes:
        made: graphs.
        ran: how often one of them.
    """

    def __init__(self):
        self.made = self.ran = 0

    def __call__(self, graph, inputs):
        self.made += 1

        def run(*given):
            self.ran += 1
            return graph(*given)

        return run


def same(actual, expected):
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["visionzip", "fastv"])
def test_answers_are_the_same(model, name):
    inputs, method, backend = ask(model, IMAGES), METHODS[name][0], Counted()
    with method.applied(model):
        eager = answer(model, inputs)
        before = snapshot(model)
        with compile_blocks(model, method, backend):
            same(answer(model, inputs), eager)
            made = backend.made
            assert backend.ran > made > 0
            same(answer(model, inputs), eager)
            assert backend.made == made  # nothing has to be compiled twice
        assert snapshot(model) == before


@pytest.mark.parametrize("name", METHODS)
def test_blocks_that_a_method_watches_stay_as_they_are(model, name):
    method, in_decoder, in_encoder = METHODS[name]
    layers, blocks = (
        model.model.language_model.layers,
        model.model.vision_tower.encoder.layers,
    )
    with method.applied(model), compile_blocks(model, method):
        eager = {block for block in (*layers, *blocks) if "forward" not in vars(block)}
    assert eager == {*(layers[i] for i in in_decoder), *(blocks[i] for i in in_encoder)}


def test_they_are_gone_after_an_error(model):
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), compile_blocks(model, Vanilla()):
        raise ZeroDivisionError
    assert snapshot(model) == before
