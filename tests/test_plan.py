"""Plans of sweeps: the paper's tables as configurations, and what is told before anything starts."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import pytest

import zipeval.published
from zipeval.benchmarks import BENCHMARKS
from zipeval.cli import compose, expand, main
from zipeval.engine.budget import Shape
from zipeval.evaluation import runner
from zipeval.methods import build
from zipeval.results import records, samples

PUBLISHED = Path(zipeval.published.__path__[0])
FILES = {
    "table1": "scores",
    "table2": "scores",
    "table3": "scores",
    "table4": "efficiency",
    "table5": "misalignment",
}
METHODS = {
    "sparsevlm_all_tokens": "sparsevlm",
    "ex1_without_top50_encoder_tokens": "sparsevlm_without_top",
    "ex2_only_visionzip_top128": "sparsevlm_on_visionzip",
}
UNPUBLISHED = {  # settings, and what the table's comment runs instead
    "table2": (
        ["method=sparsevlm"],
        {("sparsevlm", tokens) for tokens in (640, 320, 160)},
    ),
    "table3": (
        ["method=fastv,sparsevlm", "tokens=135"],
        {("fastv", 135), ("sparsevlm", 135)},
    ),
}
NEEDED = ["judge.url=http://localhost:1/v1", "judge.model=any", "data.videos=anywhere"]


def lines(name):
    with (PUBLISHED / f"{FILES[name]}.csv").open(newline="") as stream:
        return [line for line in csv.DictReader(stream) if line["table"] == name]


def plan(monkeypatch, capsys, *arguments):
    """What `zipeval plan` prints, of these runs without upper bounds."""
    monkeypatch.setattr(sys, "argv", ["zipeval", "plan", *arguments, "bound=none"])
    capsys.readouterr()
    main()
    return capsys.readouterr().out


def hours(said):
    """By the end of a run's name."""
    return {
        line.split()[0][4:]: line.split()[-1]
        for line in said.splitlines()
        if re.match(r"\d{3}-", line)
    }


@pytest.mark.parametrize("name", FILES)
def test_a_table_is_what_the_paper_printed(name):
    """Its rows and benchmarks, without what its comment says is left out; vanilla is in every table of ours."""
    made, _ = expand(["-m", f"+table=paper_{name}", *NEEDED])
    rows = {(cell.config.method["name"], cell.config.tokens) for cell in made.cells}
    printed = set()
    for line in lines(name):
        method = line.get("method") or line["experiment"]
        printed.add((METHODS.get(method, method), int(line["visual_tokens"])))
    printed = {row for row in printed if row[0] != "vanilla"}
    printed -= UNPUBLISHED.get(name, ((), set()))[1]
    assert rows == {*printed, ("vanilla", None)}
    tasks = {tuple(cell.config.tasks) for cell in made.cells}
    assert [[BENCHMARKS[task].column for task in of] for of in tasks] == [
        list(dict.fromkeys(line["benchmark"] for line in lines(name)))
    ]


@pytest.mark.parametrize("name", FILES)
def test_every_setting_of_a_table_fits_its_model(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    said = plan(monkeypatch, capsys, f"+table=paper_{name}")
    assert "Refused" not in said
    printed = {int(line["visual_tokens"]) for line in lines(name)}
    entering = [
        line.split()[-3:-1]
        for line in said.splitlines()
        if re.match(r"\d{3}-.*-visionzip-", line)
    ]
    assert {mean for mean, _ in entering} == {f"{final}.0" for _, final in entering}
    assert {int(final) for _, final in entering} <= printed
    assert not [*tmp_path.iterdir()]


def test_an_experiment_is_a_sweep_of_its_own():
    """Its name, its rows, and what its two experiments leave SparseVLM with, in proportion on other models."""
    made, _ = expand(["+experiment=misalignment"])
    assert made.name.startswith("misalignment-")
    assert [cell.config for cell in made.cells] == [
        cell.config for cell in expand(["+table=paper_table5"])[0].cells
    ]
    left = {}
    for settings in ([], ["model=tiny_llava", "suite=shapes", "tokens=16"]):
        for cell in expand(["+experiment=misalignment", *settings])[0].cells[2:]:
            its = cell.config
            image = {"llava15": 576, "tiny_llava": 144}[its.model.name]
            left[image, its.method["name"]] = build(
                its.method, its.budget, Shape(image, image, 32)
            ).first.tokens
    assert left == {
        (576, "sparsevlm_without_top"): 526,
        (576, "sparsevlm_on_visionzip"): 128,
        (144, "sparsevlm_without_top"): 132,
        (144, "sparsevlm_on_visionzip"): 32,
    }
    crops = Shape(2880, 2880, 32, grids=((5, 0),))
    method = compose(
        ["method=sparsevlm_on_visionzip", "tokens=320", "budget=final"]
    ).method
    assert build(method, "final", crops).first.of_crops(crops.picture)[0].split() == (
        108,
        20,
    )


def test_curves_of_mini_gemini(monkeypatch, capsys, tmp_path):
    """Figure 4's benchmarks at Table 1's budgets, and the same small."""
    monkeypatch.chdir(tmp_path)
    made, _ = expand(["+experiment=figure4"])
    rows = [
        ("vanilla", None),
        *((m, t) for m in ("fastv", "sparsevlm", "visionzip") for t in (192, 128, 64)),
    ]
    assert [
        (cell.config.method["name"], cell.config.tokens) for cell in made.cells
    ] == rows
    assert {cell.config.model.name for cell in made.cells} == {"mini_gemini"}
    assert [BENCHMARKS[task].column for task in made.cells[0].config.tasks] == [
        "POPE",
        "TextVQA",
        "GQA",
    ]
    said = plan(
        monkeypatch,
        capsys,
        "+experiment=figure4",
        "model=tiny_gemini",
        "suite=shapes",
        "tokens=48,32,16",
    )
    assert len(hours(said)) == 10
    assert "Refused" not in said


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_what_a_table_leaves_out_has_no_published_setting(
    name, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    instead, rows = UNPUBLISHED[name]
    table = f"+table=paper_{name}"
    assert plan(monkeypatch, capsys, table, *instead).count(
        "nothing was published for"
    ) == len(rows)
    said = plan(monkeypatch, capsys, table, *instead, "budget=final")
    assert "Refused" not in said
    assert {*hours(said)} == {
        f"{expand(['-m', table, *NEEDED])[0].cells[0].config.model.name}-{m}-{t}"
        for m, t in rows
    }


def test_samples_are_the_cards(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    said = plan(monkeypatch, capsys, "+table=paper_table2")
    assert (
        "GQA 12,578, MMB 4,329, MME 2,374, SQA 2,017, VQAv2 214,354, TextVQA 5,000, MMMU 900\n"
        in said
    )
    assert {line.split()[2] for line in said.splitlines() if line.startswith("00")} == {
        "241,552"
    }
    assert "To run it, add judge.url= judge.model=.\n" in said
    assert "add" not in plan(monkeypatch, capsys, "+table=paper_table2", *NEEDED)
    assert all(known.samples for known in BENCHMARKS.values() if known.sources)


def test_samples_are_counted_where_the_data_is(miniatures, tmp_path):
    config = compose([f"data.root={miniatures}", "suite=paper_image", *NEEDED[:2]])
    for task in ("gqa", "mme", "seedbench"):
        assert samples.count(task, config) == len(
            _rows(miniatures, BENCHMARKS[task].sources[0])
        )
    assert samples.count("zipeval_shapes", config) == 1499
    assert samples.count("zipeval_shapes", compose(["limit=7"])) == 7
    folder = tmp_path / "MSVD_Zero_Shot_QA"
    (folder / "videos").mkdir(parents=True)
    for file, kind in (("test_q.json", "question"), ("test_a.json", "answer")):
        rows = [{"question_id": n, "video_name": "v", kind: "?"} for n in range(5)]
        (folder / file).write_text(json.dumps(rows))
    assert samples.count("zipeval_msvd_qa", compose([f"data.videos={tmp_path}"])) == 5
    assert samples.count("zipeval_msvd_qa", compose([])) is None


def _rows(root, source):
    import datasets

    return datasets.load_dataset(
        str(Path(root, source.dataset)), source.config, split=source.split
    )


def test_a_plan_foretells_what_is_measured(monkeypatch, capsys, tmp_path):
    """Visual tokens as the record has them, hours as the run took; other settings of a method are taken for alike."""
    monkeypatch.chdir(tmp_path)
    sweep = ["method=fastv,visionzip", "tokens=48,16"]
    before = plan(monkeypatch, capsys, *sweep)
    assert {*hours(before).values()} == {"-"}
    assert (
        "4 of 4 runs are not measured. `zipeval run -m method=fastv,visionzip tokens=48,16 bound=none limit=128`"
        in before
    )
    (path,) = runner.run(
        compose(["method=fastv", "tokens=16", "limit=4", "batch_size=2"])
    )
    record = records.read(path)
    said = plan(monkeypatch, capsys, *sweep, "limit=4")
    (line,) = (line for line in said.splitlines() if "-fastv-16" in line)
    visual = record["visual_tokens"]
    assert line.split()[2:5] == ["4", f"{visual['mean']:.1f}", f"{visual['final']:.0f}"]
    shares = sorted(s["latency"] / 2 for s in records.read_samples(path.parent, record))
    found = hours(said)
    assert float(found["tiny_llava-fastv-16"]) == pytest.approx(
        sum(shares[1:3]) * 2 / 3600, rel=0.01
    )
    assert found["tiny_llava-fastv-48"] == found["tiny_llava-fastv-16"]
    assert found["tiny_llava-visionzip-16"] == "-"
    assert f"as measured on {record['machine']['device']}." in said
    assert "2 of 4 runs are not measured." in said


def test_a_pace_is_of_what_is_most_alike_on_one_device():
    """Of all samples it is what the record took, of all its processes; of two devices the latest."""

    def record(
        task,
        method,
        tokens,
        device="old",
        ended="2026-01-01",
        seconds=10.0,
        processes=1,
    ):
        config = {
            "model": {"name": "m"},
            "method": {"name": method},
            "tokens": tokens,
            "budget": "paper",
            "limit": None,
        }
        of = {
            "task": task,
            "config": config,
            "machine": {"device": device},
            "ended": ended,
        }
        return of | {
            "seconds": seconds,
            "processes": processes,
            "samples": {"count": 5},
        }

    found = [
        record("gqa", "fastv", 64),
        record("gqa", "fastv", 128, seconds=20.0),
        record(
            "pope",
            "fastv",
            64,
            device="new",
            ended="2026-01-02",
            seconds=5.0,
            processes=2,
        ),
    ]
    wanted = {"task": "gqa", "method": "fastv"}
    assert samples.pace(found, wanted) == samples.Pace(3.0, "old")
    assert samples.pace(found, {**wanted, "tokens": 128}, wanted) == samples.Pace(
        4.0, "old"
    )
    assert samples.pace(found, {**wanted, "tokens": 192}, wanted) == samples.Pace(
        3.0, "old"
    )
    assert samples.pace(found, {"method": "fastv"}) == samples.Pace(2.0, "new")
    assert samples.pace(found, {"method": "visionzip"}) is None


def test_what_cannot_run_is_told(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    said = plan(monkeypatch, capsys, "method=visionzip", "tokens=16,9999")
    assert hours(said) == {
        "tiny_llava-visionzip-16": "-",
        "tiny_llava-visionzip-9999": "-",
    }
    assert "Refused: tokens=9999: tiny_llava has 144 visual tokens" in said
    assert "1 of 1 runs are not measured" in said


def test_a_projector_that_is_missing_is_told(monkeypatch, capsys, tmp_path):
    """And no command is named that would measure its run, as it would be refused."""
    monkeypatch.chdir(tmp_path)
    said = plan(monkeypatch, capsys, "method=visionzip_tuned", "tokens=16")
    assert (
        "Missing: projector=results/projectors/tiny_llava-visionzip-16/projector.safetensors: no such file"
        in said
    )
    assert (
        "`zipeval tune model=tiny_llava method=visionzip tokens=16 data=FILE.json images=DIR`"
        in said
    )
    assert "not measured" not in said
    said = plan(monkeypatch, capsys, "method=vanilla,visionzip_tuned", "tokens=16")
    assert "1 of 2 runs are not measured" in said
    assert "Missing: " in said
