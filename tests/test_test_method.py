"""`zipeval test-method`: methods that break the contract are found out, each by the check that is there for it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from zipeval.contract.checks import CHECKS, BrokenError, Candidate
from zipeval.contract.run import (
    FAILED,
    NOT_APPLICABLE,
    PASSED,
    Outcome,
    run_checks,
    show,
)
from zipeval.contract.subjects import SUBJECTS
from zipeval.engine.ragged import take
from zipeval.engine.vision import Reduced, VisionMethod
from zipeval.errors import UsageError

LLAVA = SUBJECTS[0]


@dataclass(frozen=True)
class Norms(VisionMethod):
    """The patches whose features are longest; keeps to the contract."""

    tokens: int

    def reduce(self, crops):
        chosen = (
            self.choose(crops).topk(self.tokens).indices.sort().values + crops.prefix
        )
        return Reduced(take(crops.hidden, chosen), chosen)

    def choose(self, crops):
        return crops.hidden[:, crops.prefix :].norm(dim=-1)


class Scaled(Norms):
    """Changes what the projector says, so that keeping everything is not the stock model."""

    @contextlib.contextmanager
    def applied(self, model):
        projector = model.base_model.multi_modal_projector
        hook = projector.register_forward_hook(
            lambda module, arguments, output: output * 1.01
        )
        with super().applied(model) as applied:
            yield applied
        hook.remove()


class OneLess(Norms):
    """Says that one token less enters than does."""

    def tokens_per_layer(self, images, depth):
        return [count - 1 for count in super().tokens_per_layer(images, depth)]


class Overflowing(Norms):
    """Too large for 16 bits."""

    def reduce(self, crops):
        reduced = super().reduce(crops)
        return Reduced(reduced.features * 1e6 * 1e6 / 1e6 / 1e6, reduced.kept)


class Unsorted(Norms):
    """The longest first."""

    def reduce(self, crops):
        chosen = self.choose(crops).topk(self.tokens).indices + crops.prefix
        return Reduced(take(crops.hidden, chosen), chosen)


class OfTheBatch(Norms):
    """Compares the patches of a picture with those of the others beside it."""

    def choose(self, crops):
        patches = crops.hidden[:, crops.prefix :]
        return (patches - patches.mean(0)).norm(dim=-1)


class Chance(Norms):
    """Another choice each time."""

    def choose(self, crops):
        return torch.rand(super().choose(crops).shape)


class Signed(Norms):
    """Leaves its name on the model."""

    @contextlib.contextmanager
    def applied(self, model):
        with super().applied(model) as applied:
            model.reduced_by = type(self).__name__
            yield applied


class Careless(Norms):
    """Tidies up only where nothing fails."""

    @contextlib.contextmanager
    def applied(self, model):
        hook = model.register_forward_pre_hook(lambda module, arguments: None)
        with super().applied(model) as applied:
            yield applied
        hook.remove()


def candidate(cls):
    return Candidate(
        lambda subject, tokens, budget: cls.for_budget(tokens, budget, subject.shape),
        has_budget=True,
    )


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (Scaled, "keeping everything is the stock model"),
        (OneLess, "the budget is what enters the layers"),
        (Overflowing, "half precision works"),
        (Unsorted, "order is preserved"),
        (OfTheBatch, "a batch equals single prompts"),
        (Chance, "cached decoding equals recomputing"),
        (Signed, "nothing is left on the model"),
        (Careless, "nothing is left where it fails"),
        (Chance, "other methods do not matter"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_a_method_that_breaks_the_contract_is_found_out(cls, check):
    CHECKS[check](candidate(Norms), LLAVA)
    with pytest.raises(BrokenError):
        CHECKS[check](candidate(cls), LLAVA)
    for module in LLAVA.model().modules():  # of the methods that do not tidy up
        module._forward_pre_hooks.clear()
    vars(LLAVA.model()).pop("reduced_by", None)


def test_a_model_is_left_as_it_was_where_a_check_replaces_reduce():
    own, inherited = Unsorted.reduce, OfTheBatch.reduce
    for cls in (Unsorted, OfTheBatch):
        with contextlib.suppress(BrokenError):
            CHECKS["nothing is left where it fails"](candidate(cls), LLAVA)
    assert (Unsorted.reduce, OfTheBatch.reduce) == (own, inherited)
    assert "reduce" not in vars(OfTheBatch)


def test_whatever_a_method_raises_is_a_failure(monkeypatch):
    """A refusal is none; it may be a budget that cannot be met on this model."""

    def make(subject, tokens, budget):
        if subject is LLAVA:
            raise UsageError("not on this one")
        raise KeyError("a bug")

    monkeypatch.setattr("zipeval.contract.run.SUBJECTS", SUBJECTS[:2])
    outcomes = list(run_checks(Candidate(make, True)))
    assert len(outcomes) == 2 * len(CHECKS)
    assert {(outcome.subject, outcome.result) for outcome in outcomes} == {
        ("llava", NOT_APPLICABLE),
        ("llava_next", FAILED),
    }
    assert all(
        outcome.why.startswith("KeyError: 'a bug' (")
        for outcome in outcomes
        if outcome.result == FAILED
    )


def test_what_is_printed(monkeypatch, capsys):
    monkeypatch.setattr("zipeval.contract.run.SUBJECTS", SUBJECTS[:2])
    results = {
        "order is preserved": (NOT_APPLICABLE, "why not"),
        "half precision works": (FAILED, "why [so]."),
    }
    outcomes = []
    for subject in SUBJECTS[:2]:
        for check in CHECKS:
            outcomes.append(
                Outcome(check, subject.name, *results.get(check, (PASSED, "")))
            )
    show("mine", outcomes)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["mine", "llava", "llava_next"]
    assert [" ".join(line.split()[-2:]) for line in lines[1:10]].count(
        "passed passed"
    ) == 7
    assert lines[11:] == [
        "FAILED: half precision works, on llava, llava_next: why [so].",
        "n/a: order is preserved, on llava, llava_next: why not.",
        "14 passed, 2 FAILED, 2 n/a.",
    ]


def test_the_command(tmp_path):
    """For a method outside of zipeval, without this folder of tests."""
    (tmp_path / "configs" / "method").mkdir(parents=True)
    (tmp_path / "mine.py").write_text(
        "from zipeval.methods.uniform import Uniform\n\n\nclass Mine(Uniform):\n    pass\n"
    )
    text = "# zipeval run method=mine tokens=16\n# Mine.\nname: mine\n_target_: mine.Mine\ntokens: ${tokens}\n"
    (tmp_path / "configs" / "method" / "mine.yaml").write_text(text)

    def test_method(*arguments):
        command = [
            sys.executable,
            "-m",
            "zipeval",
            "test-method",
            *arguments,
            "--config-dir",
            "configs",
        ]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    done = test_method("mine")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout.splitlines()[-1]
        == f"{len(CHECKS) * len(SUBJECTS)} passed, 0 FAILED, 0 n/a."
    )
    (tmp_path / "mine.py").write_text(
        "from zipeval.methods.uniform import Uniform\n\n\n"
        "class Mine(Uniform):\n    def left(self, patches):\n        return 1\n"
    )
    done = test_method("mine")
    assert done.returncode == 1
    assert "and 1 as it says itself." in done.stdout
    assert done.stderr.startswith("zipeval: method=mine: it breaks the contract.")
    done = test_method("mien")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "zipeval: method=mien: no such method. Did you mean mine?"
    )
