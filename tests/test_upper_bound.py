"""`zipeval run` makes the whole table: the method, the upper bound that it lacks, and the percentages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_cli import zipeval as command

import zipeval.configs
from zipeval.benchmarks import BENCHMARKS, task_folder
from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.cli import compose, expand
from zipeval.config.schema import ModelConfig, fitting_suite
from zipeval.evaluation.runner import run
from zipeval.evaluation.upper_bound import describe, upper_bound
from zipeval.reporting.render import render
from zipeval.reporting.tables import tables
from zipeval.results import records
from zipeval.results.identity import recorded

LIMIT = "limit=4"


@pytest.fixture
def zipeval_here(tmp_path):
    """Runs `zipeval` with these arguments in an empty directory."""

    def call(*arguments, **environment):
        return command(*arguments, cwd=tmp_path, **environment)

    return call


def cells(*arguments):
    """Method and budget of every run of a sweep, in their order."""
    sweep, _ = expand(["-m", *arguments])
    return [(cell.config.method["name"], cell.config.tokens) for cell in sweep.cells]


def test_one_command_makes_the_table_and_the_next_reuses_its_bound(
    zipeval_here, tmp_path
):
    settings = ["model=tiny_llava", "tokens=16", LIMIT, f"results={tmp_path}"]
    first = zipeval_here("run", *settings, "method=visionzip")
    assert first.returncode == 0, first.stderr
    made = {
        record["config"]["method"]["name"]: record
        for record in records.read_all(str(tmp_path))
    }
    assert made.keys() == {"vanilla", "visionzip"}
    assert render(tables(str(tmp_path))) in first.stdout
    assert "| visionzip |     16 |" in first.stdout
    assert f"zipeval table results={tmp_path} statistics=true" in first.stdout
    second = zipeval_here("run", *settings, "method=fastv")
    assert second.returncode == 0, second.stderr
    assert "vanilla" in next(
        line for line in second.stdout.splitlines() if "finished before, kept" in line
    )
    assert "| fastv " in second.stdout
    assert "| visionzip " not in second.stdout  # another command's


def test_none_leaves_the_bound_out(zipeval_here, tmp_path):
    done = zipeval_here(
        "run",
        "method=visionzip",
        "tokens=16",
        LIMIT,
        "bound=none",
        f"results={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    assert len(records.read_all(str(tmp_path))) == 1
    assert len(done.stdout.splitlines()) == 1


def test_a_sweep_prints_its_table(zipeval_here, tmp_path):
    done = zipeval_here(
        "run", "-m", "method=uniform", "tokens=32,16", LIMIT, f"results={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    assert render(tables(str(tmp_path))) in done.stdout
    assert len(records.read_all(str(tmp_path))) == 3


def test_what_cannot_run_is_refused_before_its_bound_is_evaluated(
    zipeval_here, tmp_path
):
    done = zipeval_here(
        "run", "method=visionzip", "tokens=9999", LIMIT, f"results={tmp_path}"
    )
    assert done.returncode == 2
    assert "tokens=9999" in done.stderr
    assert records.read_all(str(tmp_path)) == []


def test_a_sweep_gets_the_bounds_that_it_lacks():
    assert cells("method=visionzip,fastv", "tokens=32,16") == [
        ("vanilla", None),
        ("visionzip", 32),
        ("visionzip", 16),
        ("fastv", 32),
        ("fastv", 16),
    ]
    assert cells("method=vanilla,visionzip", "tokens=16") == [
        ("vanilla", None),
        ("visionzip", 16),
    ]
    assert cells("method=visionzip", "tokens=16", "bound=none") == [("visionzip", 16)]
    assert cells("method=random", "tokens=16", "seed=0,1", "budget=mean") == [
        ("vanilla", None),
        ("random", 16),
        ("random", 16),
    ]


def test_every_setting_of_a_sweep_gets_its_own_bound():
    swept = ["method=visionzip", "tokens=16", "limit=4,8"]
    assert cells(*swept) == [("vanilla", None), ("visionzip", 16)] * 2
    assert (
        cells(
            "model=tiny_llava,tiny_next", "method=uniform", "tokens=16", "budget=final"
        ).count(("vanilla", None))
        == 2
    )


def test_the_command_of_a_bound_makes_that_bound():
    sweep, _ = expand(
        [
            "-m",
            "method=chain",
            "method.first.tokens=48",
            "tokens=16",
            "limit=4",
            "projector=null",
        ]
    )
    bound = sweep.cells[0]
    alone, _ = expand(["-m", *bound.overrides])
    assert [cell.config for cell in alone.cells] == [bound.config]


def test_the_bound_has_the_samples_and_the_settings_of_its_run():
    config = compose(
        [
            "method=fastv",
            "tokens=16",
            "budget=mean",
            "seed=3",
            LIMIT,
            "batch_size=2",
            "model.dtype=float32",
        ]
    )
    bound = upper_bound(config)
    assert bound == compose(
        ["method=vanilla", LIMIT, "batch_size=2", "model.dtype=float32"]
    )
    assert upper_bound(bound) is None
    assert upper_bound(replace(config, bound="none")) is None


def test_the_bound_is_no_part_of_a_runs_identity(tmp_path):
    settings = ["method=uniform", "tokens=16", "limit=2", f"results={tmp_path}"]
    assert "bound" not in recorded(compose(settings))
    assert run(compose(settings)) == run(compose([*settings, "bound=none"]))


@pytest.mark.parametrize(
    ("model", "suite"),
    [
        ("tiny_llava", "shapes"),
        ("tiny_video", "shapes"),
        ("llava15", "quick"),
        ("mini_gemini", "quick"),
    ],
)
def test_a_model_is_evaluated_on_what_it_can_know(model, suite):
    config = compose([f"model={model}"])
    assert fitting_suite(config.model) == suite
    assert config.tasks == compose([f"model={model}", f"suite={suite}"]).tasks
    assert compose([f"model={model}", "tasks=[gqa]"]).tasks == ["gqa"]
    assert (
        compose([f"model={model}", "suite=smoke"]).tasks
        == compose(["suite=smoke"]).tasks
    )


def test_every_model_has_a_suite_that_exists():
    configs = Path(zipeval.configs.__path__[0])
    for file in sorted(configs.glob("model/*.yaml")):
        tasks = compose([f"model={file.stem}"]).tasks
        assert tasks and all(task_folder(task) for task in tasks)
    quick = OmegaConf.load(configs / "suite" / "quick.yaml").tasks
    assert not {*quick} & PROTOCOLS.keys()
    assert {*quick} <= BENCHMARKS.keys()


def test_video_models_are_told_which_judge_they_need(zipeval_here):
    done = zipeval_here("run", "model=video_llava", "method=visionzip", "tokens=136")
    assert done.returncode == 2
    assert "judge.url=" in done.stderr


def test_without_weights_a_run_says_what_is_missing_and_what_it_would_do(
    zipeval_here, tmp_path
):
    done = zipeval_here(
        "run",
        "model=llava15",
        "method=visionzip",
        "tokens=64",
        f"results={tmp_path}",
        HF_HOME=str(tmp_path),
    )
    assert done.returncode == 2
    *missing, runs = [
        line.removeprefix("zipeval: ") for line in done.stderr.splitlines()
    ]
    assert [line.partition(": ")[0] for line in missing] == [
        "model=llava15",
        "tasks=[mme]",
        "tasks=[textvqa_val]",
        "tasks=[pope]",
    ]
    assert all("Where the hub can be reached, " in line for line in missing)
    assert runs == (
        "With these, this command evaluates llava15: vanilla (the upper bound) and visionzip 64 on "
        "MME (2,374 samples), TextVQA (5,000 samples), POPE (9,000 samples)."
    )


def test_a_line_says_what_will_run():
    assert describe(compose(["method=visionzip", "tokens=16", "limit=200"])) == (
        "tiny_llava: vanilla (the upper bound) and visionzip 16 on zipeval_shapes (200 samples)"
    )
    assert (
        describe(compose(["method=vanilla"]))
        == "tiny_llava: vanilla on zipeval_shapes (1,499 samples)"
    )


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (
            {"embedded": None, "name": "llava15"},
            "zipeval_shapes: drawn shapes, made for the embedded checkpoints.",
        ),
        ({}, None),
    ],
)
def test_a_table_says_where_pictures_are_not_the_models(tmp_path, changes, note):
    (path,) = run(compose(["method=vanilla", "limit=2", f"results={tmp_path}"]))
    record = json.loads(path.read_text())
    record["config"]["model"] |= changes
    path.write_text(json.dumps(record))
    (table,) = tables(str(tmp_path))
    assert [
        line for line in table.notes if note and line.startswith(note)
    ] == table.notes


def test_a_bound_that_is_neither_is_refused(zipeval_here):
    done = zipeval_here("run", "bound=maybe")
    assert done.returncode == 2
    assert "bound=maybe: expected one of auto, none." in done.stderr


def test_fitting_suites_look_at_where_the_weights_are_of():
    assert (
        fitting_suite(ModelConfig(name="x", family="video_llava", hub="a/b"))
        == "quick_video"
    )
