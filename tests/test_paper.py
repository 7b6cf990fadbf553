"""The paper's tables: what follows from its raw scores, and our records beside them."""

from __future__ import annotations

import csv
from dataclasses import asdict

import pytest
from test_tables import put

from zipeval.cli import compose, main
from zipeval.errors import UsageError
from zipeval.inference.validation import check
from zipeval.reporting import paper
from zipeval.reporting.render import render
from zipeval.reporting.tables import key

FIVE = {
    "fastv 192 MM-Vet: 27.7 is 89.1% of 31.1, printed 89.7%.",
    "fastv 128 MM-Vet: 28.1 is 90.4% of 31.1, printed 90.9%.",
    "visionzip 128 LLaVA-B: 64.8 is 97.0% of 66.8, printed 97.6%.",
    "sparsevlm 64 MM-Vet: 23.3 is 74.9% of 31.1, printed 74.5%.",
    "fastv 128 average: it is 84.4%, printed 83.5%.",
}


def lines(file, table):
    with (paper.SOURCE / file).open() as stream:
        return [line for line in csv.DictReader(stream) if line["table"] == table]


@pytest.mark.parametrize(
    "name, wrong, count",
    [("table1", FIVE, 143), ("table2", set(), 70), ("table3", set(), 16)],
)
def test_printed_percentages_follow_from_raw_scores(name, wrong, count):
    table = paper.published(name)
    assert set(table.notes) == wrong
    cells = {
        (row.label, str(row.tokens), column): c
        for row in table.rows
        for column, c in row.cells.items()
    }
    printed = lines("scores.csv", name)
    assert len(cells) == len(printed) == count
    for line in printed:
        cell = cells[line["method"], line["visual_tokens"], line["benchmark"]]
        assert cell.score == float(line["score"])
        named = any(
            n.startswith(
                f"{line['method']} {line['visual_tokens']} {line['benchmark']}:"
            )
            for n in wrong
        )
        assert (
            abs(cell.percent - float(line["percent_of_upper_bound"])) > 0.1
        ) == named
    for row, line in zip(table.rows, lines("averages.csv", name), strict=True):
        named = any(
            note.startswith(f"{row.label} {row.tokens} average") for note in wrong
        )
        assert (abs(row.average - float(line["average_percent"])) > 0.1) == named


def test_a_number_that_does_not_follow_is_named(monkeypatch, tmp_path):
    for file in paper.SOURCE.glob("*.csv"):
        text = (
            file.read_text()
            .replace("756,3.0,27.8,7.8", "756,3.5,27.8,7.8")
            .replace("46.4,-9.2", "46.4,-8.2")
        )
        (tmp_path / file.name).write_text(text)
    monkeypatch.setattr(paper, "SOURCE", tmp_path)
    assert paper.published("table4").notes == [
        "visionzip 160 total_speedup: it is 3.0, printed 3.5."
    ]
    assert paper.published("table5").notes == [
        "ex1_without_top50_encoder_tokens: the change is -9.2%, printed -8.2%."
    ]


def test_speed_ups_and_changes_follow_from_raw_numbers():
    for name in ("table4", "table5"):
        assert paper.published(name).notes == []
    (*_, visionzip) = paper.published("table4").rows
    assert visionzip.cells["total_speedup"].score == pytest.approx(2293 / 756)
    assert visionzip.cells["prefill_speedup"].score == pytest.approx(218 / 27.8)


def test_records_stand_beside_the_paper_and_never_in_its_rows(tmp_path):
    for method, tokens, gqa, pope in (
        ("vanilla", None, 60.0, 80.0),
        ("visionzip", 64, 57.0, 72.0),
    ):
        for task, score in (("gqa", gqa), ("pope", pope), ("vizwiz_vqa_val", 1.0)):
            put(tmp_path, method, score, tokens, task=task, model="llava15")
    put(tmp_path, "vanilla", 99.0, task="gqa", model="another")
    (table,) = paper.measured("table1", str(tmp_path))
    assert table.columns == paper.published("table1").columns
    kinds = {(row.label, row.tokens): row for row in table.rows}
    assert len(kinds) == 2 + 13 + 2
    ours, theirs = kinds["visionzip", 64], kinds["visionzip (published)", 64]
    assert {name: cell.score for name, cell in ours.cells.items()} == {
        "GQA": 57,
        "POPE": 72,
    }
    assert theirs.cells["GQA"].score == 55.1
    difference = kinds["visionzip: difference", 64]
    assert difference.cells["GQA"].score == pytest.approx(57 - 55.1)
    assert difference.cells["POPE"].percent == pytest.approx(90 - 100 * 77.0 / 85.9)
    assert kinds["vanilla: difference", None].cells["GQA"].score == pytest.approx(
        60 - 61.9
    )
    assert (ours.average, difference.average, theirs.average) == (
        None,
        None,
        pytest.approx(94.0, abs=0.1),
    )
    for row in table.rows:
        assert {cell.record is not None for cell in row.cells.values()} == {
            row.kind == "measured"
        }
    shown = render([table])
    assert "+1.9 (+6.0%)" in shown
    assert "-13.9 (" not in shown


def test_a_tuned_projector_is_in_the_papers_row_wherever_it_lies(tmp_path):
    put(tmp_path, "vanilla", 60.0, task="gqa", model="llava15")
    for tokens, score in ((64, 57.0), (128, 58.0)):
        where = f"results/projectors/llava15-visionzip-{tokens}/projector.safetensors"
        put(
            tmp_path,
            "visionzip_tuned",
            score,
            tokens,
            task="gqa",
            model="llava15",
            projector=where,
        )
    (table,) = paper.measured("table1", str(tmp_path))
    differences = {
        row.tokens: row
        for row in table.rows
        if row.label == "visionzip_tuned: difference"
    }
    assert differences.keys() == {64, 128}
    assert differences[64].cells["GQA"].score == pytest.approx(57 - 57.0)
    assert differences[128].cells["GQA"].score == pytest.approx(58 - 58.9)


def test_an_average_of_all_columns_stands_beside_the_printed_one(tmp_path):
    for task in (
        "zipeval_tgif_qa",
        "zipeval_msvd_qa",
        "zipeval_msrvtt_qa",
        "zipeval_activitynet_qa",
    ):
        put(tmp_path, "vanilla", 50.0, task=task, model="video_llava")
        put(tmp_path, "visionzip", 45.0, 136, task=task, model="video_llava")
    (table,) = paper.measured("table3", str(tmp_path))
    (difference,) = [row for row in table.rows if row.label == "visionzip: difference"]
    assert difference.average == pytest.approx(90 - 93.2, abs=0.1)


def experiment(root, scores, tokens=64, **options):
    """Records of Table 5's runs."""
    firsts = (
        {},
        {"name": "without_top", "tokens": 526},
        {"name": "visionzip", "tokens": 128},
    )
    for method, first, score in zip(
        paper.EXPERIMENTS.values(), firsts, scores, strict=False
    ):
        chain = (
            {
                "first": first,
                "second": {"name": "sparsevlm", "tokens": tokens},
                "of": 576,
            }
            if first
            else {}
        )
        put(root, method, score, tokens, **chain, **options)


def test_experiments_are_compared_with_sparsevlm_on_all_tokens(tmp_path):
    """Of every model and budget by itself; the paper's differences are those of its own model, budget and benchmark."""
    experiment(tmp_path, (50.0, 45.0, 51.0), task="textvqa_val", model="llava15")
    put(tmp_path, "vanilla", 60.0, task="textvqa_val", model="llava15")
    put(tmp_path, "sparsevlm", 55.0, 128, task="textvqa_val", model="llava15")
    put(tmp_path, "sparsevlm", 99.0, 64, task="textvqa_val", model="llava15", version=2)
    experiment(tmp_path, (80.0, 40.0), 16)
    experiment(tmp_path, (50.0, 45.0), task="textvqa_val", model="other")
    found = {
        table.about.partition(" (")[0]: table
        for table in paper.measured("table5", str(tmp_path))
    }
    of_llava, of_m, of_other = (found.pop(name) for name in ("llava15", "m", "other"))
    assert not found
    assert of_llava.columns == ["TextVQA"]
    shown = [
        (row.label, row.cells["TextVQA"].score, row.cells["TextVQA"].percent)
        for row in of_llava.rows
    ]
    ours = [("sparsevlm", 50.0, 100.0), ("sparsevlm version=2", 99.0, 198.0)]
    on, without = (
        paper.AS_PUBLISHED[f"sparsevlm_{name}"].format(64)
        for name in ("on_visionzip", "without_top")
    )
    ours += [(on, 51.0, pytest.approx(102)), (without, 45.0, pytest.approx(90))]
    assert shown[:4] == ours
    published = {label: percent for label, _, percent in shown[4:7]}
    assert published["sparsevlm_without_top (published)"] == pytest.approx(
        100 - 9.2, abs=0.05
    )
    assert published["sparsevlm_on_visionzip (published)"] == pytest.approx(
        100 + 2.7, abs=0.05
    )
    differences = {label: percent for label, _, percent in shown[7:]}
    assert differences[f"{without}: difference"] == pytest.approx(90 - 90.8, abs=0.05)
    assert (
        "sparsevlm version=2: difference" not in differences
    )  # a variant, which the paper does not have
    assert "(% of the upper bound, sparsevlm)" in render([of_llava])
    assert of_m.columns == ["shapes (accuracy)", "TextVQA"]
    assert [row.cells["shapes (accuracy)"].percent for row in of_m.rows[:2]] == [
        100.0,
        50.0,
    ]
    assert not [
        row
        for table in (of_m, of_other)
        for row in table.rows
        if row.kind == "difference"
    ]


@pytest.mark.parametrize("method", paper.EXPERIMENTS.values())
def test_the_papers_experiments_are_ours_as_they_are_configured(method, tmp_path):
    config = compose([f"method={method}", "tokens=64", "model=llava15"])
    of_run = {"config": asdict(check(config)), "visual_tokens": {"requested": 64}}
    assert key(of_run) == (paper.AS_PUBLISHED[method].format(64), 64)


def test_an_experiment_without_sparsevlm_on_all_tokens_is_refused(tmp_path):
    experiment(tmp_path, (80.0, 40.0), 16)
    put(tmp_path, "sparsevlm_without_top", 40.0, 32)
    with pytest.raises(
        UsageError,
        match=r"no upper bound.*method=sparsevlm tasks=.shapes. tokens=32 budget=paper",
    ):
        paper.measured("table5", str(tmp_path))


@pytest.mark.parametrize(
    "name, message",
    [
        ("table6", r"table=paper/table6: no such table. Did you mean table\d\?"),
        ("table1", "no records of model=llava15"),
        ("table4", "no measurements of model=llava_next.*`zipeval bench"),
        (
            "table5",
            r"no experiments. `zipeval run -m \+experiment=misalignment` makes them",
        ),
    ],
)
def test_what_cannot_be_shown(name, message, tmp_path):
    put(tmp_path, "vanilla", 1.0, task="gqa")
    put(tmp_path, "sparsevlm", 1.0, 64, task="gqa")
    put(tmp_path, "sparsevlm", 1.0, 64, task="gqa", version=2)
    with pytest.raises(UsageError, match=message):
        paper.measured(name, str(tmp_path))


@pytest.mark.parametrize(
    "given",
    [
        "table1 task=pope",
        "table1 source=paper statistics=true",
        "table1 source=paper results=DIR",
        "table4 statistics=true",
    ],
)
def test_a_setting_that_would_change_nothing_is_refused(given, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["zipeval", "table", *f"table=paper/{given}".split()]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2


def test_the_papers_models_and_columns_are_ours():
    for name, model in paper.MODELS.items():
        assert compose([f"model={model}"]).model.name == model
        from zipeval.benchmarks import BENCHMARKS

        assert set(paper.published(name).columns) <= {
            benchmark.column for benchmark in BENCHMARKS.values()
        }
