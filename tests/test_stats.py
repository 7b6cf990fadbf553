"""Intervals that hold what they promise, by simulation and beside a slow bootstrap; every task's own number."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import defaultdict
from functools import partial
from statistics import fmean

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from judge_server import likes_all, serving
from lmms_eval.tasks.mme.utils import mme_aggregate_results
from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score
from scipy.stats import binomtest
from test_benchmarks import SCRIPTS

from zipeval.benchmarks import BENCHMARKS, judge
from zipeval.benchmarks.protocols import summary
from zipeval.benchmarks.videoqa import SETS
from zipeval.errors import UsageError
from zipeval.reporting import stats
from zipeval.reporting.stats import average, compare, tied, value

POPE_KINDS = ("adversarial", "popular", "random")
GROUPED = ("mme", "mmbench_en_dev")
SHAPES = (
    "gqa",
    "pope",
    "mme",
    "mmbench_en_dev",
    "llava_in_the_wild",
    "mmvet",
    "not_in_a_paper",
)


def run(values, **columns):
    """Samples with these scores; columns: a list of what else each has."""
    rest = [
        dict(zip(columns, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ] or [{}] * len(values)
    return [
        {"doc_id": i, "question_hash": f"{i:x}", "score": score, "scores": {}, **more}
        for i, (score, more) in enumerate(zip(values, rest, strict=True))
    ]


def shaped(task, scores):
    """Samples with the kinds, groups, targets and references of a task, dealt out in turn."""
    i = range(len(scores))
    columns = {
        "pope": {
            "kind": [POPE_KINDS[n % 3] for n in i],
            "target": [("yes", "no")[n // 3 % 2] for n in i],
        },
        "mme": {
            "kind": [("color", "OCR", "scene")[n // 2 % 3] for n in i],
            "group": [n // 2 for n in i],
        },
        "mmbench_en_dev": {"group": [n // 3 for n in i]},
        "llava_in_the_wild": {"scores": [{"reference": 7.0 + n % 3} for n in i]},
    }
    return run([float(score) for score in scores], **columns.get(task, {}))


# Simulated pairs of runs: (samples, the bound's, the percentage of the populations that they are drawn from).


def followed(rng, right, loses=0.07, gains=0.1):
    """Another run: what it makes of questions that the bound answers right and wrong."""
    return np.where(
        right, rng.random(right.shape) > loses, rng.random(right.shape) < gains
    )


def after(p, loses=0.07, gains=0.1):
    return p * (1 - loses) + (1 - p) * gains


def simulated_gqa(rng, n=300):
    bound = rng.random(n) < 0.62
    return run(followed(rng, bound) * 1.0), run(bound * 1.0), 100 * after(0.62) / 0.62


def simulated_pope(rng, n=100):
    """Half of every kind's questions are to be answered with yes, as in the benchmark; n of each kind."""
    targets, kinds = (
        ["yes", "no"] * (3 * n // 2),
        [kind for kind in POPE_KINDS for _ in range(n)],
    )
    p = np.array(
        [[0.75, 0.85], [0.75, 0.9], [0.75, 0.97]]
    )  # of a right answer to yes and to no
    bound = rng.random(3 * n) < np.tile(p[:, None], (1, n // 2, 1)).ravel()
    ours = followed(rng, bound)

    def f1(p):
        return (2 * p[:, 0] / (2 * p[:, 0] + 2 - p.sum(1))).mean()

    columns = {"target": targets, "kind": kinds}
    return (
        run(ours * 1.0, **columns),
        run(bound * 1.0, **columns),
        100 * f1(after(p)) / f1(p),
    )


def simulated_mme(rng, images=(30, 60)):
    """The two questions about an image are both easy or both hard; so many images of each kind."""
    kinds = [f"kind {kind}" for kind, n in enumerate(images) for _ in range(2 * n)]
    groups = [image for n in images for image in range(n) for _ in range(2)]
    p = np.array([0.95, 0.55])
    bound = rng.random(len(kinds)) < np.repeat(
        p[rng.integers(0, 2, len(kinds) // 2)], 2
    )
    ours = followed(rng, bound)

    def score(p):
        return (p + p**2).mean()

    columns = {"kind": kinds, "group": groups}
    return (
        run(ours * 1.0, **columns),
        run(bound * 1.0, **columns),
        100 * score(after(p)) / score(p),
    )


SIMULATED = {"gqa": simulated_gqa, "pope": simulated_pope, "mme": simulated_mme}


def coverage(task, pairs=1000, resamples=500, seed=0, **sizes):
    """Share of pairs of runs whose interval holds the percentage of their populations."""
    rng, held = np.random.default_rng(seed), 0
    for _ in range(pairs):
        ours, bound, percent = SIMULATED[task](rng, **sizes)
        found = compare(task, ours, bound, resamples, seed=int(rng.integers(2**32)))
        held += found.low <= percent <= found.high
    return held / pairs


@pytest.mark.parametrize("task", SIMULATED)
def test_95_of_100_intervals_hold_the_truth(task):
    assert 0.93 <= coverage(task) <= 0.97


def slow_interval(task, ours, bound, rng, resamples=500):
    """The same by drawing samples and asking for the number of every draw, which is what the fast one stands for."""
    units, found = defaultdict(lambda: defaultdict(list)), []
    for i, pair in enumerate(zip(ours, bound, strict=True)):
        kind = pair[0]["kind"] if task in ("pope", "mme") else None
        units[kind][pair[0]["group"] if task in GROUPED else i].append(pair)
    for _ in range(resamples):
        drawn = [rng.choices([*of.values()], k=len(of) - 1) for of in units.values()]
        runs = (
            [
                {**pair[i], "group": n}
                for of in drawn
                for n, unit in enumerate(of)
                for pair in unit
            ]
            for i in (0, 1)
        )
        ours_drawn, bound_drawn = (value(task, samples) for samples in runs)
        found.append(100 * ours_drawn / bound_drawn)
    return np.quantile(found, [0.025, 0.975])


@pytest.mark.parametrize("task", SHAPES)
def test_the_interval_is_that_of_a_slow_bootstrap(task):
    rng = random.Random(0)
    grades = {
        "llava_in_the_wild": range(1, 11),
        "mmvet": [n / 10 for n in range(11)],
    }.get(task, (0, 1, 1, 1))
    bound = [rng.choice(grades) for _ in range(90)]
    ours = [score if rng.random() < 0.7 else rng.choice(grades) for score in bound]
    ours, bound = shaped(task, ours), shaped(task, bound)
    found = compare(task, ours, bound)
    low, high = slow_interval(task, ours, bound, rng)
    # Both ends are quantiles of 500 draws: their standard error is 0.03 of the interval.
    assert (found.low, found.high) == pytest.approx(
        (low, high), abs=0.1 * (found.high - found.low)
    )
    assert found.percent == pytest.approx(100 * value(task, ours) / value(task, bound))


@given(st.integers(0, 4500), st.integers(0, 4500))
@settings(max_examples=40, deadline=None)
def test_mcnemar_is_scipys(lost, gained):
    right = ([0.0] * lost + [1.0] * gained, [1.0] * lost + [0.0] * gained)
    found = compare("gqa", *(run([*scores, 1.0]) for scores in right), resamples=1)
    assert (found.lost, found.gained) == (lost, gained)
    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1
    assert found.p == pytest.approx(expected, rel=1e-6)


PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=12, max_size=60).map(
    lambda p: p[: len(p) // 6 * 6]
)
quick = partial(compare, resamples=50)


@pytest.mark.parametrize("task", SHAPES)
@given(answers=PAIRS, shuffle=st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_properties(task, answers, shuffle):
    ours, bound = (shaped(task, scores) for scores in zip(*answers, strict=True))
    found = quick(task, ours, bound)
    shuffled = [shuffle.sample(of, len(of)) for of in (ours, bound)]
    assert repr(quick(task, *shuffled)) == repr(found)
    swapped = quick(task, bound, ours)
    assert (swapped.lost, swapped.gained, swapped.p) == (
        found.gained,
        found.lost,
        found.p,
    )
    assert found.lost - found.gained == sum(b - a for a, b in answers)
    assume(value(task, ours) > 0)
    itself = quick(task, ours, ours)
    assert (itself.percent, itself.low, itself.high) == (100, 100, 100)
    assert (itself.lost, itself.gained, itself.p, itself.distinguishable) == (
        0,
        0,
        1,
        False,
    )
    assert tied(task, ours, ours, resamples=50)


@pytest.mark.parametrize("task", ["textvqa_val", "llava_in_the_wild"])
def test_a_run_is_itself_also_in_tenths(task):
    """Of which sums differ in their last bits."""
    scores = np.random.default_rng(0).integers(0, 11, 3000) * 0.1
    itself = compare(task, shaped(task, scores), shaped(task, scores))
    assert (itself.percent, itself.low, itself.high, itself.lost, itself.p) == (
        100,
        100,
        100,
        None,
        None,
    )


@given(answers=st.lists(st.booleans(), min_size=6, max_size=60))
@settings(max_examples=50, deadline=None)
def test_the_number_is_lmms_evals(answers):
    answers = answers[: len(answers) // 6 * 6]
    kinds = defaultdict(list)
    for sample in (pope := shaped("pope", answers)):
        said = (
            sample["target"]
            if sample["score"]
            else {"yes": "no", "no": "yes"}[sample["target"]]
        )
        kinds[sample["kind"]].append(
            {"prediction": said, "ground_truth": sample["target"]}
        )
    assert value("pope", pope) == pytest.approx(
        100 * fmean(map(pope_aggregate_f1_score, kinds.values()))
    )
    mme = shaped("mme", answers)
    logged = [
        {"question_id": s["group"], "category": s["kind"], "score": s["score"]}
        for s in mme
    ]
    assert value("mme", mme) == pytest.approx(mme_aggregate_results(logged))


JUDGED = {
    "mmbench_en_dev": (["A", "A", "C", "A", "B"], None),
    "mmvet": (["one", "two", "three", "four"], "0.4"),
    "llava_in_the_wild": (["one", "two", "three", "four"], "8 5"),
}


@pytest.mark.parametrize("task", [*SCRIPTS, *JUDGED, "zipeval_shapes"])
def test_the_number_is_the_records(task, scripted, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(judge, "RETRIES", 0)
    if task not in JUDGED:
        mixed = (
            SCRIPTS[task][2] if task in SCRIPTS else ["red", "2", "yes", "circle"] * 10
        )
        record, samples = scripted(task, mixed, f"limit={len(mixed)}")
    else:
        answers, verdict = JUDGED[task]
        with serving(
            lambda prompt: (
                verdict if verdict and "three" in prompt else likes_all(prompt)
            )
        ) as server:
            record, samples = scripted(
                task, answers, f"judge.url={server.url}", "judge.model=m"
            )
    assert 0 < record["score"] < (600 if task == "mme" else 100)
    assert value(task, samples) == pytest.approx(record["score"])


def test_every_benchmark_is_tried():
    turns = {
        task for task, known in BENCHMARKS.items() if known.turns
    }  # tests/test_conversing.py
    assert {*SCRIPTS, *JUDGED, *SETS, "zipeval_shapes", *turns} == set(BENCHMARKS)


@pytest.mark.parametrize("task", [*SETS, *JUDGED])
def test_without_a_verdict_a_sample_counts_nowhere(task):
    scores = [1, 0, None, 1, 1, 0, 1, 1, None, 1]
    samples = shaped(
        "mmbench_en_dev" if task in GROUPED else "llava_in_the_wild",
        [s or 0 for s in scores],
    )
    for sample, score in zip(samples, scores, strict=True):
        sample |= {"score": score, "capabilities": [], "kind": "conv"} | (
            {"unscored": "gone"} if score is None else {}
        )
        sample["scores"] |= {"grade": 5}
    assert value(task, samples) == pytest.approx(summary(task, samples)["score"])
    ours = [
        {
            **s,
            "score": None
            if s["doc_id"] == 0
            else 1 - s["score"]
            if s["score"] is not None
            else 1,
        }
        for s in samples
    ]
    left = [i for i, s in enumerate(scores) if i and s is not None]
    expected = compare(task, [ours[i] for i in left], [samples[i] for i in left])
    assert compare(task, ours, samples) == expected
    assert (expected.lost, expected.gained) == (5, 2)


def test_a_task_without_a_place_in_a_paper_has_its_own_scale():
    assert value("not_in_a_paper", run([1.0, 0.0, None])) == 0.5
    assert value("gqa", run([1.0, 0.0, None])) == 50


def test_one_less_than_all_are_drawn():
    """Of ten, of which one is lost, nine: in 5.3% of the draws it is in there three times or more, in 0.8% four."""
    found = compare("gqa", run([1.0] * 9 + [0.0]), run([1.0] * 10))
    assert (found.low, found.high) == (pytest.approx(100 * 6 / 9), 100)


def test_a_failed_sample_is_a_lost_one():
    failed = [{**s, "error": "cannot be decoded", "score": 0.0} for s in run([1.0])]
    assert quick("gqa", [*failed, *run([1.0] * 4)[1:]], run([1.0] * 4)).lost == 1


def test_nothing_to_draw_from():
    nothing = compare("gqa", run([None, 1.0]), run([1.0, None]))
    assert all(map(math.isnan, (nothing.percent, nothing.low, nothing.high)))
    assert (nothing.lost, nothing.gained, nothing.p, nothing.distinguishable) == (
        None,
        None,
        None,
        False,
    )
    assert math.isnan(value("pope", []))
    single = compare("gqa", run([0.0]), run([1.0]))
    assert (single.percent, single.lost, single.p, single.distinguishable) == (
        0,
        1,
        1,
        False,
    )
    assert math.isnan(single.low)
    assert tied("gqa", run([0.0]), run([1.0]))
    one_of_a_kind = [
        shaped("pope", scores) for scores in ([0, 1, 1, 1, 1], [1, 1, 1, 1, 1])
    ]
    assert math.isnan(compare("pope", *one_of_a_kind).low)


def test_a_bound_of_zero_has_no_percentage():
    found = compare("gqa", run([1.0, 0.0]), run([0.0, 0.0]))
    assert all(map(math.isnan, (found.percent, found.low, found.high)))
    assert (found.lost, found.gained) == (0, 1)
    rare = compare(
        "gqa", run([1.0, 0.0, 0.0]), run([1.0, 0.0, 0.0])
    )  # 4 of 9 draws have a bound of 0
    assert (rare.percent, rare.low, rare.high) == (100, 100, 100)


def test_what_is_told_apart():
    bound = run([1.0] * 200 + [0.0] * 100)
    lost = run([0.0] * 20 + [1.0] * 180 + [0.0] * 100)
    both = run([0.0] * 20 + [1.0] * 200 + [0.0] * 80)
    assert compare("gqa", lost, bound).distinguishable
    assert compare("gqa", bound, lost).distinguishable
    assert not compare("gqa", both, bound).distinguishable
    assert not tied("gqa", lost, bound)
    assert not tied("gqa", bound, lost)
    assert tied("gqa", both, bound)


def test_an_average_draws_every_benchmark_on_its_own():
    """So that of two the variance is a half."""
    ours, bound, _ = simulated_gqa(np.random.default_rng(0), 500)
    (one, other), two = (
        simulated_gqa(np.random.default_rng(1), 500)[:2],
        compare("gqa", ours, bound),
    )
    both = average([("gqa", ours, bound), ("scienceqa_img", ours, bound)])
    assert both.percent == pytest.approx(two.percent)
    assert both.high - both.low == pytest.approx(
        (two.high - two.low) / 2**0.5, rel=0.05
    )
    assert (both.lost, both.gained, both.p) == (None, None, None)
    mixed = average([("gqa", ours, bound), ("vqav2_val", one, other)])
    assert mixed.percent == pytest.approx(
        (two.percent + compare("gqa", one, other).percent) / 2
    )


def test_chunks_make_no_difference(monkeypatch):
    ours, bound = (
        run(scores)
        for scores in np.random.default_rng(0).integers(0, 11, (2, 300)) / 10
    )
    found = compare("vqav2_val", ours, bound)
    monkeypatch.setattr(stats, "CHUNK", 1000)
    assert compare("vqav2_val", ours, bound) == found
    assert compare("vqav2_val", ours, bound, seed=1) != found


@pytest.mark.parametrize(
    "change, named",
    [
        (
            lambda samples: samples.pop(),
            r"\(3, '3', None, None\) in one and \(None, None, None, None\) in the other",
        ),
        (lambda samples: samples.pop(1), r"\(1, '1', .* in one and \(2, '2', "),
        (
            lambda samples: samples[2].update(question_hash="other"),
            r"\(2, '2', .* in one and \(2, 'other', ",
        ),
        (
            lambda samples: samples[2].update(kind="color"),
            r"\(2, '2', None, None\) in one and \(2, '2', 'color', None\)",
        ),
        (
            lambda samples: samples[2].update(group=7),
            r"\(2, '2', None, None\) in one and \(2, '2', None, 7\)",
        ),
        (
            lambda samples: samples.append(samples[0]),
            r"\(1, '1', .* in one and \(0, '0', ",
        ),
    ],
)
@pytest.mark.parametrize("function", [compare, tied, lambda *pair: average([pair])])
def test_other_questions_are_refused(change, named, function):
    ours, bound = run([1.0] * 4), run([1.0] * 4)
    change(bound)
    with pytest.raises(
        UsageError,
        match=rf"tasks=\[gqa\].*do not pair: .*{named}.*`zipeval run`.*limit=",
    ):
        function("gqa", ours, bound)


def test_it_imports_no_torch():
    script = "import sys, zipeval.stats; print({'torch', 'scipy', 'lmms_eval'} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True
        ).stdout
        == "set()\n"
    )
