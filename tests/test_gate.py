"""The regression gate: over methods that are broken on purpose, and over records that were changed by hand."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from unittest.mock import patch
from xml.etree import ElementTree

import pytest
import torch
import yaml

from zipeval.benchmarks import task_folder
from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.cli import compose, main
from zipeval.engine.vision import Crops
from zipeval.errors import BudgetError, RunError, UsageError
from zipeval.evaluation import task_record
from zipeval.evaluation.runner import run
from zipeval.inference.session import Session
from zipeval.methods import visionzip
from zipeval.methods.fastv import FastV
from zipeval.regression import baseline, comparison, gate
from zipeval.regression import verdicts as verdict_reports
from zipeval.regression.verdicts import INCOMPARABLE, NEW, PASSED, REGRESSED
from zipeval.results import records

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "results/baselines/shapes.json"
COUNT = 400  # of samples of a record that is made up
ATTENTION, FOR_BUDGET = Crops.attention, FastV.for_budget.__func__


def evaluate(root, *overrides):
    """A real run of the embedded model."""
    (path,) = run(
        compose(
            [
                f"results={root}",
                "limit=128",
                "tokens=16",
                "runner.reuse=features",
                *overrides,
            ]
        )
    )
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """By method, the baseline of a real run."""
    files = {}
    for method in ("visionzip", "fastv"):
        root = tmp_path_factory.mktemp(method)
        evaluate(root / "runs", f"method={method}")
        files[method] = root / "baseline.json"
        assert baseline.write(str(root / "runs"), files[method]) == 1
    return files


@pytest.mark.parametrize("method", ["visionzip", "fastv"])
def test_a_second_run_passes(good, method, tmp_path):
    evaluate(tmp_path, f"method={method}", "batch_size=7")
    (verdict,) = gate.check(good[method], str(tmp_path), max_drop=0)
    assert (verdict.outcome, verdict.lines) == (PASSED, [])


def one_layer_later(cls, tokens, budget, shape, **options):
    made = FOR_BUDGET(cls, tokens, budget, shape, **options)
    return cls(ratio=made.ratio, K=made.K + 1)


def joined_by_targets(hidden, keys, count):
    """VisionZip's merging where a target also joins itself, which changes no answer."""
    chosen = visionzip.targets(hidden.shape[1], count)
    keys = torch.nn.functional.normalize(keys, dim=-1)
    joined = torch.nn.functional.one_hot(
        (keys @ keys[:, chosen].mT).argmax(2), count
    ).to(hidden)
    return hidden[:, chosen] + joined.mT @ hidden / joined.sum(1)[..., None]


BROKEN = {
    "targets join themselves": (
        "visionzip",
        visionzip,
        "merge",
        joined_by_targets,
        ["other logits in "],
    ),
    "the least attended": (
        "visionzip",
        Crops,
        "attention",
        lambda self: -ATTENTION(self),
        ["accuracy", "answer", "left"],
    ),
    "nothing is merged": (
        "visionzip",
        visionzip,
        "merge",
        lambda hidden, keys, count: hidden[
            :, visionzip.targets(hidden.shape[1], count)
        ],
        ["answer"],
    ),
    "K off by one": (
        "fastv",
        FastV,
        "for_budget",
        classmethod(one_layer_later),
        ["tokens, mean", "flops_exact", "left"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_is_a_regression(good, name, tmp_path):
    method, of, attribute, broken, said = BROKEN[name]
    with patch.object(of, attribute, broken):
        evaluate(tmp_path, f"method={method}")
    (verdict,) = gate.check(good[method], str(tmp_path), max_drop=1)
    assert verdict.outcome == REGRESSED
    if name == "targets join themselves":
        assert not any("another answer" in line for line in verdict.lines)
    for words in said:
        assert any(words in line for line in verdict.lines), verdict.lines
    with pytest.raises(RunError, match="1 record regressed"):
        verdict_reports.conclude([verdict], good[method], str(tmp_path))


def test_what_a_run_itself_refuses_cannot_be_compared(good, tmp_path):
    """More tokens are left than the method itself says: no record is written, and that is no pass."""
    with (
        patch.object(FastV, "layers", lambda self, depth: (self.K + 1,)),
        pytest.raises(BudgetError),
    ):
        evaluate(tmp_path / "broken", "method=fastv")
    evaluate(tmp_path, "method=vanilla", "limit=2")
    verdicts = gate.check(good["fastv"], str(tmp_path), max_drop=1)
    assert [verdict.outcome for verdict in verdicts] == [INCOMPARABLE, NEW]
    command = "`zipeval run model=tiny_llava method=fastv tokens=16 limit=128 tasks=[zipeval_shapes] ...`"
    assert command in verdicts[0].lines[0]


def put(
    root,
    wrong=100,
    first=0,
    worth=1.0,
    answers=0,
    left=0,
    task="shapes",
    reduces=True,
    fields=(),
    **changed,
):
    """A made-up record, of which `wrong` samples are, from `first` on, and the others are worth `worth`.

    Wrong ones have another answer, but for tasks of a judge, which decides otherwise about the same one.

    Args:
        answers, left: how many samples have another answer, and other tokens left.
        reduces: whether samples tell which tokens are left.
        fields: (dotted name, value) of the record to change.
        changed: fields of every sample.
    """
    wrong_ones = range(first, first + wrong)
    samples = [
        {
            "doc_id": i,
            "question_hash": f"{i:x}",
            "target": "red",
            "prediction": "blue\x07"
            if i < answers
            else "green"
            if i in wrong_ones and task not in PROTOCOLS
            else "red",
            **(
                {"kept": [[1, 2, 4 if i < left else 3]], "merged": [[]]}
                if reduces
                else {}
            ),
            "score": worth * (i not in wrong_ones),
            **changed,
        }
        for i in range(COUNT)
    ]
    model = {"name": "tiny", "family": "llava", "prompt": "hf", "image_aspect": "pad"}
    method = {
        "name": "visionzip",
        "_target_": "zipeval.methods.visionzip.VisionZip",
        "tokens": 16,
    }
    record = {
        "task": task,
        "task_hash": "h",
        "data_hash": None,
        "status": "success",
        "metric": "accuracy",
        "score": 100 * worth * (COUNT - wrong) / COUNT,
        "visual_tokens": {
            "requested": 16,
            "mean": 16.0,
            "final": 16.0,
            "entering": [16.0] * 6,
        },
        "prefill": {
            "prompt_tokens": 30.0,
            "kv_entries": 99.0,
            "flops_formula": 1e9,
            "flops_exact": 2e9,
        },
        "config": {
            "model": model,
            "method": method,
            "tokens": 16,
            "budget": "paper",
            "packing": "published",
            "limit": None,
            "seed": 0,
        },
        "resolved": {
            "fingerprint": "f",
            "device": "cuda:0",
            "dtype": "float32",
            "attn_implementation": "sdpa",
            "quantization": "none",
            "device_map": None,
        },
        "git": {"revision": "0123456789abcdef", "dirty": False},
        "code": records.code(),
        "versions": records.versions(),
    }
    for name, value in dict(fields).items():
        *path, last = name.split(".")
        node = record
        for part in path:
            node = node[part]
        node[last] = value
    return records.write(
        Path(root) / f"run-{len(list(Path(root).glob('*')))}", record, samples
    )


@pytest.fixture
def compared(tmp_path):
    """(what to change in a made-up record, max_drop) -> its verdict, against one that is as made up."""

    def check(max_drop=1.0, then=(), **changed):
        put(tmp_path / "then", **dict(then))
        put(tmp_path / "now", **changed)
        baseline.write(str(tmp_path / "then"), tmp_path / "baseline.json")
        verdict, *_ = gate.check(
            tmp_path / "baseline.json", str(tmp_path / "now"), max_drop
        )
        return verdict

    return check


MEASURED = [
    ("visual_tokens.mean", 16.1),
    ("visual_tokens.final", 15.0),
    ("visual_tokens.entering", [16.0, 16.0, 17.0, 15.0, 16.0, 16.0]),
    ("prefill.flops_exact", 1.999e9),
    ("prefill.flops_formula", 1.01e9),
    ("prefill.kv_entries", 98.0),
    ("prefill.prompt_tokens", 31.0),
]


@pytest.mark.parametrize("change", MEASURED)
def test_other_tokens_or_costs_alone_are_a_regression(change, compared):
    """Fewer of them too: the method is not the one that the baseline is of."""
    verdict = compared(fields=[change])
    assert verdict.outcome == REGRESSED
    assert change[0].rpartition(".")[2] in verdict.lines[0]
    assert " -> " in verdict.lines[0]


def test_rounding_of_what_was_measured_is_none(compared):
    assert compared(fields=[("prefill.flops_exact", 2.0001e9)]).outcome == PASSED


@pytest.mark.parametrize(
    ("lost", "max_drop", "outcome", "said"),
    [
        (
            3,
            1.0,
            PASSED,
            "accuracy 75 -> 74.25, 1% lower, p = 0.25",
        ),  # 1% of 75, and no more
        (
            4,
            1.0,
            REGRESSED,
            "accuracy 75 -> 74, 1.33% lower, p = 0.12: more than max_drop=1",
        ),
        (4, 2.0, PASSED, "accuracy 75 -> 74, 1.33% lower, p = 0.12"),
        (7, 5.0, PASSED, "accuracy 75 -> 73.25, 2.33% lower, p = 0.016"),
        (8, 5.0, REGRESSED, "accuracy 75 -> 73, 2.67% lower, p = 0.0078: significant"),
        (-30, 0.0, PASSED, "accuracy 75 -> 82.5, better"),
    ],
)
def test_a_lower_score(lost, max_drop, outcome, said, compared):
    verdict = compared(max_drop, then={"task": "mmvet"}, task="mmvet", wrong=100 + lost)
    assert (verdict.outcome, verdict.lines[0]) == (outcome, said)
    assert f"{max(lost, 0)} samples lost" in verdict.lines
    assert f"{max(-lost, 0)} samples gained" in verdict.lines


@pytest.mark.parametrize(("lost", "outcome"), [(3, PASSED), (10, REGRESSED)])
def test_scores_between_right_and_wrong(lost, outcome, compared):
    """McNemar's test has nothing to say of them, the interval of the difference has."""
    verdict = compared(100.0, then={"worth": 0.5}, worth=0.5, wrong=100 + lost)
    assert verdict.outcome == outcome
    assert ("lower: significant" in verdict.lines[0]) == (outcome == REGRESSED)


@pytest.mark.parametrize(("then", "now"), [(-50.0, -51.0), (0.0, -1.0)])
def test_scores_below_zero(then, now, compared):
    verdict = compared(then={"fields": [("score", then)]}, fields=[("score", now)])
    assert (verdict.outcome, "more than max_drop=1" in verdict.lines[0]) == (
        REGRESSED,
        True,
    )


def test_samples_are_compared_pair_by_pair(compared):
    """As many are right: those that were lost and gained are told all the same, by the first of each."""
    verdict = compared(then={"task": "mmvet"}, task="mmvet", first=4, answers=4)
    assert verdict.outcome == PASSED
    shown = [
        f"  doc_id {i}: score 0 -> 1, answers 'blue\\x07', target 'red'"
        for i in range(3)
    ]
    at = verdict.lines.index("4 samples gained")
    assert verdict.lines[at + 1 :] == [
        *shown,
        "zipeval's commit: 0123456789 -> 0123456789",
    ]
    assert verdict.lines[at - 4 : at - 2] == [
        "4 samples lost",
        "  doc_id 100: score 1 -> 0, answers 'red', target 'red'",
    ]


@pytest.mark.parametrize(
    ("name", "words"), [("answers", "another answer"), ("left", "other tokens left")]
)
def test_few_samples_may_change(name, words, compared):
    assert compared(**{name: 4}).lines[0] == f"{words} in 4 of 400 samples"


@pytest.mark.parametrize(
    ("name", "words"), [("answers", "another answer"), ("left", "other tokens left")]
)
def test_more_than_a_few_may_not(name, words, compared):
    verdict = compared(**{name: 5})
    assert (verdict.outcome, verdict.lines[0]) == (
        REGRESSED,
        f"{words} in 5 of 400 samples, more than 4",
    )


@pytest.mark.parametrize("changed", [{"reduces": False}, {"then": {"reduces": False}}])
def test_tokens_that_only_one_of_two_tells_are_others(changed, compared):
    verdict = compared(**changed)
    assert verdict.lines[0] == "other tokens left in 400 of 400 samples, more than 4"


def test_a_task_without_a_score(compared):
    unscored = {"fields": [("metric", None), ("score", None)], "score": None}
    assert compared(then=unscored, **unscored).outcome == PASSED


def test_a_score_that_is_gone(compared):
    verdict = compared(fields=[("score", None)])
    assert (verdict.outcome, verdict.lines[0]) == (REGRESSED, "score: 75.0 -> None")


NAN = float("nan")


@pytest.mark.parametrize(
    ("fields", "changed", "said"),
    [
        ([("score", NAN)], {}, "accuracy 75 -> nan: not a finite number"),
        (
            [],
            {"score": NAN},
            "accuracy 75 -> 75: not a finite number in 400 samples, the first doc_id 0",
        ),
        ([("score", float("inf"))], {}, "accuracy 75 -> inf: not a finite number"),
    ],
)
def test_a_score_that_is_no_number_is_a_regression(fields, changed, said, compared):
    verdict = compared(100.0, fields=fields, **changed)
    assert (verdict.outcome, verdict.lines[0]) == (REGRESSED, said)


@pytest.mark.parametrize("changed", [{"fields": [("score", NAN)]}, {"score": NAN}])
def test_a_baseline_has_only_numbers(changed, tmp_path):
    path = put(tmp_path / "runs", **changed)
    with pytest.raises(
        UsageError, match=f"{path}: it holds a number that is not finite"
    ):
        baseline.write(str(tmp_path / "runs"), tmp_path / "b.json")


ELSEWHERE = ("config.method._target_", "elsewhere.Method")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([("code", "other")], "code other (now "),
        ([("code", None)], "code None (now "),
        ([("versions", {**records.versions(), "torch": "1.0"})], "torch 1.0 (now "),
        ([("versions", {**records.versions(), "python": "2.7"})], None),
        ([ELSEWHERE], "code that is not here (No module named 'elsewhere')"),
    ],
)
def test_records_of_other_code_are_not_compared(fields, said, compared):
    verdict = compared(fields=fields)
    assert verdict.outcome == (INCOMPARABLE if said else PASSED)
    assert bool(said) == bool(verdict.lines)
    assert not said or (
        said in verdict.lines[0] and "--allow-other-code" in verdict.lines[0]
    )


def test_records_of_other_code_are_compared_where_that_is_allowed(tmp_path):
    put(tmp_path / "runs")
    baseline.write(str(tmp_path / "runs"), tmp_path / "b.json")
    put(tmp_path / "other", fields=[("code", "other")])
    put(tmp_path / "worse", fields=[("code", "other")], wrong=150)
    for results, outcome in (("other", PASSED), ("worse", REGRESSED)):
        (verdict,) = gate.check(
            tmp_path / "b.json", str(tmp_path / results), 1.0, allow_other_code=True
        )
        assert verdict.outcome == outcome
        assert any(
            line.startswith("made by other code than this zipeval: code other")
            for line in verdict.lines
        )


def test_code_that_made_what_a_directory_holds_is_part_of_the_exit_code(
    zipeval, tmp_path
):
    put(tmp_path / "kept", fields=[("code", "other")])
    given = ["check", "--against", "baseline.json", "results=kept"]
    assert zipeval(*given)[0] == 2
    assert (
        zipeval(
            "check", "--allow-other-code", "--against", "baseline.json", "results=kept"
        )[0]
        == 0
    )
    assert zipeval(*given, "--allow-other-code=true")[0] == 0
    assert zipeval(*given, "--allow-other-code=false")[0] == 2
    assert (
        "allow_other_code=maybe: expected one of false, true"
        in zipeval(*given, "--allow-other-code=maybe")[2]
    )


@pytest.mark.parametrize(
    ("samples", "allowed"),
    [
        (0, 0),
        (1, 0),
        (19, 0),
        (20, 1),
        (99, 1),
        (100, 1),
        (199, 1),
        (200, 2),
        (1499, 14),
    ],
)
def test_how_many_samples_may_change(samples, allowed):
    assert comparison.allowed_changes(samples) == allowed


@pytest.mark.parametrize(("max_drop", "outcome"), [(1.0, PASSED), (0.0, REGRESSED)])
def test_one_sample_of_few_may_be_lost(max_drop, outcome, compared, monkeypatch):
    """It weighs more than 1%; two are too many."""
    monkeypatch.setattr("test_gate.COUNT", 50)
    verdict = compared(max_drop, then={"wrong": 10}, wrong=11)
    assert (verdict.outcome, "accuracy 80 -> 78, 2.5% lower" in verdict.lines[0]) == (
        outcome,
        True,
    )


def test_two_samples_of_few_may_not_be_lost(compared, monkeypatch):
    monkeypatch.setattr("test_gate.COUNT", 50)
    assert compared(then={"wrong": 10}, wrong=12).outcome == REGRESSED


@pytest.mark.parametrize(("wrong", "worse"), [(300, False), (97, True)])
def test_an_error_that_grew_is_worse(wrong, worse, compared):
    error = {"fields": [("higher_is_better", False)], "task": "mmvet"}
    verdict = compared(0.0, then=error, **error, wrong=wrong)
    assert ("higher" in verdict.lines[0], "better" in verdict.lines[0]) == (
        worse,
        not worse,
    )
    assert (verdict.outcome == REGRESSED) or not worse


# What may happen to a real run, to the baseline and to the directory, and what the gate has to say of it.


class Case:
    """A real run of 128 samples and its baseline, to be changed."""

    def __init__(self, root):
        (self.path,) = root.glob("runs/*/*.json")
        self.root, self.record = root, json.loads(self.path.read_text())
        self.file = self.path.parent / self.record["samples"]["file"]
        self.samples = [json.loads(line) for line in self.file.read_text().splitlines()]
        self.baseline = json.loads((root / "baseline.json").read_text())
        self.line = self.baseline["records"][0]

    def write(self):
        content = "".join(json.dumps(sample) + "\n" for sample in self.samples)
        self.file.write_text(content)
        self.record["samples"]["sha256"] = hashlib.sha256(content.encode()).hexdigest()
        self.path.write_text(json.dumps(self.record))
        (self.root / "baseline.json").write_text(json.dumps(self.baseline))

    def outcome(self):
        try:
            verdicts = gate.check(
                self.root / "baseline.json", str(self.root / "runs"), max_drop=1
            )
        except UsageError:
            return INCOMPARABLE
        return verdicts[0].outcome


def of_samples(first, change):
    """A mutation of the first samples: a function that changes each in place."""

    def mutate(case):
        for sample in case.samples[:first]:
            change(sample)

    return mutate


def rescored(score):
    """A scorer that says the same of every answer, and the record with it."""

    def mutate(case):
        for sample in case.samples:
            sample["score"] = score
        case.record["score"] = None if score is None else 100.0 * score

    return mutate


def one_rescored(case):
    right = next(sample for sample in case.samples if sample["score"] == 1)
    right["score"] = 0.0
    case.record["score"] = 100 * fmean(sample["score"] for sample in case.samples)


def moved(by):
    def change(sample):
        sample["digest"] = {
            name: value + by for name, value in sample["digest"].items()
        }

    return change


def field(name, value):
    """A mutation of a record's field."""

    def mutate(case):
        *path, last = name.split(".")
        node = case.record
        for part in path:
            node = node[part]
        node[last] = value

    return mutate


def line(name, value):
    """A mutation of a line of the baseline."""
    return lambda case: case.line.update({name: value})


def of_schema_1(case):
    case.baseline["schema"] = 1
    for name in baseline.LATER:
        del case.line[name]


def copied(case):
    shutil.copytree(case.path.parent, case.path.parent.with_name("copy"))


def cut(case):
    case.record["samples"]["count"] -= 1
    case.samples.pop()


ALL = 128
MUTATIONS = {
    "nothing": (lambda case: None, PASSED),
    # of methods, as their samples tell it
    "an answer is another one": (
        of_samples(1, lambda s: s.update(prediction="?")),
        PASSED,
    ),
    "two answers are others": (
        of_samples(2, lambda s: s.update(prediction="?")),
        REGRESSED,
    ),
    "tokens are kept elsewhere": (
        of_samples(2, lambda s: s["kept"][0].reverse()),
        REGRESSED,
    ),
    "tokens are merged elsewhere": (
        of_samples(2, lambda s: s["merged"][0].reverse()),
        REGRESSED,
    ),
    "more tokens in a sample, fewer in another": (
        of_samples(2, lambda s: s["visual_tokens"].append(1)),
        REGRESSED,
    ),
    "logits are rounded otherwise": (of_samples(ALL, moved(1e-5)), PASSED),
    "logits of one sample are others": (of_samples(1, moved(1e-2)), PASSED),
    "logits are others": (of_samples(ALL, moved(1e-3)), REGRESSED),
    "logits are no numbers": (of_samples(ALL, moved(float("nan"))), REGRESSED),
    "logits are gone": (of_samples(ALL, lambda s: s.pop("digest")), REGRESSED),
    "more tokens on average": (field("visual_tokens.mean", 16.5), REGRESSED),
    # of scorers
    "every answer is right": (rescored(1.0), REGRESSED),
    "every answer is wrong": (rescored(0.0), REGRESSED),
    "no answer has a score": (rescored(None), REGRESSED),
    "an answer is scored otherwise": (one_rescored, REGRESSED),
    "samples have no scores, the record has": (
        of_samples(ALL, lambda s: s.update(score=None)),
        REGRESSED,
    ),
    "the record's score is another one": (field("score", 99.9), INCOMPARABLE),
    "the metric is another one": (field("metric", "accuracy_color"), REGRESSED),
    "less is better now": (field("higher_is_better", False), REGRESSED),
    # of baselines
    "nothing is measured": (line("measured", {}), INCOMPARABLE),
    "costs are not measured": (
        lambda case: case.line["measured"].pop("flops_exact"),
        INCOMPARABLE,
    ),
    "a measurement is null": (
        lambda case: case.line["measured"].update(kv_entries=None),
        INCOMPARABLE,
    ),
    "the baseline's score is another one": (line("score", 12.5), INCOMPARABLE),
    "the baseline has no answers": (line("answers", None), REGRESSED),
    "the baseline has no samples": (
        lambda case: case.line.update(scores=[], answers=""),
        INCOMPARABLE,
    ),
    "the baseline's places are cut": (
        lambda case: case.line.update(left=case.line["left"][2:]),
        INCOMPARABLE,
    ),
    "the baseline's digests are cut": (
        lambda case: case.line.update(digests=case.line["digests"][32:]),
        INCOMPARABLE,
    ),
    "a baseline of before": (of_schema_1, PASSED),
    # of directories
    "other code made the record": (field("code", "other"), INCOMPARABLE),
    "nobody knows what code made the record": (
        lambda case: case.record.pop("code"),
        INCOMPARABLE,
    ),
    "other packages made the record": (
        field("versions.transformers", "4.0"),
        INCOMPARABLE,
    ),
    "other weights": (field("resolved.fingerprint", "other"), INCOMPARABLE),
    "another task": (field("task_hash", "other"), INCOMPARABLE),
    "a judge is waited for": (field("status", "incomplete"), INCOMPARABLE),
    "a sample is missing": (cut, INCOMPARABLE),
    "two records": (copied, INCOMPARABLE),
    "no record": (
        lambda case: shutil.move(case.path.parent, case.root / "away"),
        INCOMPARABLE,
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations(name, good, tmp_path):
    shutil.copytree(good["visionzip"].parent, tmp_path / "case")
    case = Case(tmp_path / "case")
    mutate, outcome = MUTATIONS[name]
    mutate(case)
    if case.file.exists():
        case.write()
    assert case.outcome() == outcome


OTHERS = [
    (
        "resolved.fingerprint",
        "e",
        "other weights (fingerprint f in the baseline, e in ",
    ),
    (
        "resolved.projector",
        "p",
        "other projector (projector None in the baseline, p in ",
    ),
    ("task_hash", "g", "other task (task_hash h in the baseline, g in "),
    ("data_hash", "g", "other data (data_hash None in the baseline, g in "),
    ("config.limit", 64, "other samples (limit None in the baseline, 64 in "),
    (
        "resolved.dtype",
        "bfloat16",
        "other dtype (dtype float32 in the baseline, bfloat16 in ",
    ),
    (
        "config.model.prompt",
        "vicuna_v1",
        "other prompt (prompt hf in the baseline, vicuna_v1 in ",
    ),
    (
        "config.judge",
        {"model": "j"},
        "other judge (judge None in the baseline, {'model': 'j'} in ",
    ),
]


@pytest.mark.parametrize(("name", "value", "said"), OTHERS)
def test_what_cannot_be_compared(name, value, said, compared):
    verdict = compared(fields=[(name, value)])
    assert verdict.outcome == INCOMPARABLE
    assert verdict.lines[0].startswith(said)
    assert verdict.lines[0].endswith("`zipeval baseline`")


def test_earlier_baselines_have_no_projector(tmp_path):
    put(tmp_path / "runs")
    path = tmp_path / "b.json"
    baseline.write(str(tmp_path / "runs"), path)
    path.write_text(path.read_text().replace('"projector":null,', ""))
    assert "projector" not in path.read_text()
    assert [
        verdict.outcome for verdict in gate.check(path, str(tmp_path / "runs"), 1.0)
    ] == [PASSED]


def test_other_questions_cannot_be_compared(compared):
    assert compared(question_hash="x").lines[0].startswith("other questions (")


def test_records_without_verdicts_cannot_be_compared(compared):
    verdict = compared(fields=[("status", "incomplete")])
    assert verdict.outcome == INCOMPARABLE
    assert "answers have no verdict" in verdict.lines[0]


def test_another_gpu_of_the_same_kind_can(compared):
    assert compared(fields=[("resolved.device", "cuda:1")]).outcome == PASSED


def test_of_records_with_one_name_the_one_that_can_be_compared_is(compared, tmp_path):
    put(tmp_path / "now", fields=[("config.limit", 8)])
    assert compared().outcome == PASSED


def test_which_of_two_records_is_meant_is_not_guessed(compared, tmp_path):
    """Of a bad one and a copy of the good one, neither may decide."""
    first = put(tmp_path / "now", wrong=300)
    verdict = compared()
    assert verdict.outcome == INCOMPARABLE
    assert verdict.lines[0].startswith(
        f"{first}, {tmp_path / 'now/run-1/shapes.json'}: all are of it"
    )
    with pytest.raises(
        UsageError,
        match=f"{first}, .*run-1/shapes.json: both are of tiny visionzip 16 shapes",
    ):
        baseline.write(str(tmp_path / "now"), tmp_path / "b.json")


def test_a_record_that_the_baseline_lacks_is_told(compared, tmp_path):
    put(tmp_path / "now", task="colours")
    compared()
    verdicts = gate.check(tmp_path / "baseline.json", str(tmp_path / "now"), 1.0)
    assert [(verdict.name, verdict.outcome) for verdict in verdicts] == [
        ("tiny visionzip 16 shapes", PASSED),
        ("tiny visionzip 16 colours", NEW),
    ]
    assert verdict_reports.conclude(verdicts, tmp_path, "") is None


def test_a_baseline_is_small(tmp_path):
    put(tmp_path / "runs")
    baseline.write(str(tmp_path / "runs"), tmp_path / "new/baseline.json")
    assert (tmp_path / "new/baseline.json").stat().st_size < 1000 + 7 * COUNT


def test_a_baseline_measures_what_records_hold():
    assert baseline.COSTS == task_record.COSTS


def test_what_makes_no_baseline(tmp_path):
    with pytest.raises(
        UsageError, match=f"results={tmp_path}: no records. `zipeval run` makes them"
    ):
        baseline.write(str(tmp_path), tmp_path / "b.json")
    path = put(tmp_path, fields=[("status", "incomplete")])
    with pytest.raises(UsageError, match=f"{path}: answers have no verdict"):
        baseline.write(str(tmp_path), tmp_path / "b.json")
    path.unlink()
    put(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(
        UsageError, match=r"out=.*cannot be written .*Choose another out=FILE"
    ):
        baseline.write(str(tmp_path), tmp_path / "file/b.json")


UNREADABLE = {
    "No such file": lambda content: None,
    "Expecting value": lambda content: "",
    "schema 0": lambda content: content.replace('"schema":2', '"schema":0'),
    "it has no records": lambda content: '{"schema":2,"records":[]}',
    "lacks or has too many of right": lambda content: content.replace(
        '"left":', '"right":[],"left":'
    ),
    "lacks or has too many of same": lambda content: content.replace(
        '"same":', '"answers":'
    ),
    "it holds NaN": lambda content: content.replace('"score":75.0', '"score":NaN'),
    "are cut short": lambda content: content.replace('"answers":"', '"answers":"AA'),
    "'list'|list indices": lambda content: "[]",
}


@pytest.mark.parametrize("reason", UNREADABLE)
def test_an_unreadable_baseline_is_named(reason, tmp_path):
    put(tmp_path / "runs")
    path = tmp_path / "b.json"
    baseline.write(str(tmp_path / "runs"), path)
    content = UNREADABLE[reason](path.read_text())
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(
        UsageError,
        match=f"against={path}: not a readable baseline .*({reason}).*zipeval baseline out=",
    ):
        gate.check(path, str(tmp_path / "runs"), 1.0)


@pytest.fixture
def zipeval(tmp_path, monkeypatch, capsys):
    """(arguments) -> (exit code, what it prints, what it complains of), beside a baseline.json of runs/."""
    put(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["zipeval", *arguments])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    code, printed, _ = call("baseline", "results=runs", "out=baseline.json")
    assert (code, "baseline.json holds 1 record: commit it" in printed) == (0, True)
    return call


def test_exit_codes(zipeval, tmp_path):
    assert zipeval("check", "--against", "baseline.json", "results=runs") == (
        0,
        "ok              tiny visionzip 16 shapes\n",
        "",
    )
    put(tmp_path / "worse", wrong=110)
    code, printed, complaint = zipeval(
        "check", "--against=baseline.json", "results=worse"
    )
    assert (code, printed.split()[0]) == (1, "REGRESSION")
    assert "baseline.json: 1 record regressed" in complaint
    assert (
        zipeval("check", "--against=baseline.json", "--max-drop", "5", "results=worse")[
            0
        ]
        == 1
    )  # significant
    put(tmp_path / "other", fields=[("task_hash", "g")])
    code, printed, complaint = zipeval(
        "check", "against=baseline.json", "results=other"
    )
    assert (code, printed.split()[0]) == (2, "CANNOT")
    assert "baseline.json: 1 record cannot be compared" in complaint


def test_the_exit_code_does_not_depend_on_who_reads(zipeval, tmp_path):
    put(tmp_path / "worse", wrong=110)
    command = [
        sys.executable,
        "-m",
        "zipeval",
        "check",
        "--against",
        "baseline.json",
        "--junit",
        "j.xml",
    ]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, "results=worse"], env=buffered, **piped)
    process.stdout.close()
    complaint = process.stderr.read()
    assert (process.wait(), complaint.count("\n")) == (1, 1)
    assert "baseline.json: 1 record regressed" in complaint
    assert ElementTree.parse(tmp_path / "j.xml").getroot().get("failures") == "1"


def test_commands_that_are_advised_can_be_pasted(zipeval, tmp_path):
    put(tmp_path / "my runs")
    _, printed, _ = zipeval("baseline", "results=my runs", "out=b.json")
    advised = shlex.split(printed.split("`")[1])
    assert advised == ["zipeval", "check", "--against", "b.json", "results=my runs"]
    assert zipeval(*advised[1:])[0] == 0
    put(tmp_path / "no good", wrong=110)
    code, _, complaint = zipeval("check", "--against", "b.json", "results=no good")
    advised = shlex.split(complaint.split("`")[1])
    assert (code, advised) == (
        1,
        ["zipeval", "baseline", "results=no good", "out=b.json"],
    )


def test_max_drop_is_what_it_is_set_to(zipeval, tmp_path):
    put(tmp_path / "worse", wrong=104)
    given = ["check", "--against", "baseline.json", "results=worse"]
    assert [zipeval(*given, "--max-drop", drop)[0] for drop in ("1.3", "1.4")] == [1, 0]
    assert zipeval(*given)[0] == 1


def test_a_regression_is_said_before_what_cannot_be_compared(zipeval, tmp_path):
    put(tmp_path / "runs", task="colours")
    zipeval("baseline", "results=runs", "out=baseline.json")
    put(tmp_path / "worse", wrong=110)
    assert zipeval("check", "--against", "baseline.json", "results=worse")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "check: name a baseline"),
        (["--against"], "--against: needs a value"),
        (["--against", "baseline.json", "--junit"], "--junit: needs a value"),
        (
            ["--against", "baseline.json", "results=runs", "--max-drop="],
            "--max-drop: needs a value",
        ),
        (
            ["--against", "nowhere.json"],
            "against=nowhere.json: not a readable baseline",
        ),
        (
            ["--against", "baseline.json", "results=nowhere"],
            "results=nowhere: no record of it",
        ),
        (
            ["--against", "baseline.json", "--max-drop", "much"],
            "max_drop=much: expected percent",
        ),
        (
            ["--against", "baseline.json", "--max-drop=-1"],
            "max_drop=-1: expected percent",
        ),
        (
            ["--against", "baseline.json", "--format", "html"],
            "format=html: expected one of text, github",
        ),
        (
            ["--against", "baseline.json", "--maxdrop", "1"],
            "maxdrop: no such setting of `zipeval check`. Did you mean max_drop?",
        ),
        (
            [
                "--against",
                "baseline.json",
                "results=runs",
                "--junit",
                "baseline.json/x",
            ],
            "junit=baseline.json/x: cannot be",
        ),
    ],
)
def test_what_is_refused(arguments, said, zipeval):
    code, printed, complaint = zipeval("check", *arguments)
    assert code == 2
    assert said in printed + complaint


def test_a_baseline_without_a_name_is_refused(zipeval):
    code, _, complaint = zipeval("baseline", "out=")
    assert code == 2
    assert "out=: name the file" in complaint


def test_junit(zipeval, tmp_path):
    """Well formed whatever a model answers, with a test case for every record."""
    for task in ("colours", "sizes"):
        put(tmp_path / "runs", task=task)
    zipeval("baseline", "results=runs", "out=baseline.json")
    put(tmp_path / "now", wrong=90, first=3, answers=9, fields=[("metric", "a<b & c")])
    put(tmp_path / "now", task="colours")
    put(tmp_path / "now", task="new")
    assert (
        zipeval(
            "check", "--against", "baseline.json", "--junit", "out/j.xml", "results=now"
        )[0]
        == 1
    )
    suite = ElementTree.parse(tmp_path / "out/j.xml").getroot()
    assert suite.tag == "testsuite"
    assert {**suite.attrib} == {
        "name": "zipeval check",
        "tests": "4",
        "failures": "1",
        "errors": "1",
        "skipped": "1",
    }
    assert {case.get("name").split()[-1]: case[0].tag for case in suite} == {
        "shapes": "failure",
        "colours": "system-out",
        "sizes": "error",
        "new": "skipped",
    }
    failure = suite.find("testcase/failure")
    assert failure.get("message") == "another answer in 16 of 400 samples, more than 4"
    assert "answers 'blue\\x07'" in failure.text


def test_annotations_of_github(zipeval, tmp_path):
    """A line for each record that is not well; what would end it is escaped."""
    put(tmp_path / "now", wrong=150, task="shapes")
    _, printed, _ = zipeval(
        "check", "--against", "baseline.json", "--format", "github", "results=now"
    )
    (line,) = (line for line in printed.splitlines() if line.startswith("::"))
    assert line.startswith(
        "::error title=REGRESSION tiny visionzip 16 shapes::accuracy 75 -> 62.5, 16.7%25 lower, p = "
    )
    assert "%0A50 samples lost%0A  doc_id 100: score 1 -> 0" in line
    assert "REGRESSION      tiny visionzip 16 shapes" in printed
    assert (
        "::"
        not in zipeval(
            "check", "--against", "baseline.json", "--format", "github", "results=runs"
        )[1]
    )


def test_titles_of_annotations_end_where_they_should():
    verdict = verdict_reports.Verdict(
        "chain first=visionzip:64, second", REGRESSED, ["lower"]
    )
    assert (
        verdict_reports.annotations([verdict])
        == "::error title=REGRESSION chain first=visionzip%3A64%2C second::lower"
    )


@pytest.fixture(scope="module")
def workflow():
    """The commands of .github/workflows/regression.yml by the names of their steps."""
    held = yaml.safe_load((ROOT / ".github/workflows/regression.yml").read_text())
    return {
        step["name"]: shlex.split(step["run"])
        for step in held["jobs"]["gate"]["steps"]
        if "run" in step
    }


def test_the_committed_baseline_is_of_what_the_workflow_runs(workflow):
    """Of these weights and this task, too."""
    assert workflow["Evaluate"][:3] == ["zipeval", "run", "-m"]
    given = dict(argument.split("=") for argument in workflow["Evaluate"][3:])
    held = {entry["of"]["method"]: entry for entry in baseline.read(COMMITTED)}
    assert [*held] == sorted(given["method"].split(","))
    for method, entry in held.items():
        config = compose(
            [
                f"method={method}",
                *(f"{k}={v}" for k, v in given.items() if k != "method"),
            ]
        )
        session = Session(config)
        (task,) = config.tasks
        assert entry["of"] == {
            "model": "tiny_llava",
            "method": method,
            "tokens": session.config.tokens,
            "task": task,
        }
        assert entry["same"]["fingerprint"] == session.checkpoint.fingerprint
        assert entry["same"]["task_hash"] == session.task_hash(task, task_folder(task))
        assert (entry["same"]["limit"], len(entry["scores"])) == (None, 1499)
    assert shlex.join(workflow["Evaluate"][1:]) in (ROOT / ".ci/run").read_text()


def test_the_workflow_compares(workflow, zipeval, tmp_path):
    """Its command, where nothing that the committed baseline holds was run."""
    (tmp_path / "results/baselines").mkdir(parents=True)
    shutil.copy(COMMITTED, tmp_path / "results/baselines")
    assert workflow["Compare"][0] == "zipeval"
    code, printed, _ = zipeval(*workflow["Compare"][1:])
    assert (code, printed.count("::error title=CANNOT COMPARE tiny_llava ")) == (2, 4)
    assert ElementTree.parse(tmp_path / "junit.xml").getroot().get("errors") == "4"
