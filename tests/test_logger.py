"""Weights & Biases: what it is told, offline and read back, and that nothing it does costs a result."""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from PIL import Image
from test_tables import put
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

from zipeval.cli import compose, main
from zipeval.errors import UsageError
from zipeval.evaluation.runner import run
from zipeval.reporting import logger
from zipeval.reporting.tables import Row, Table, TableCell
from zipeval.results import records

VANILLA, VISIONZIP = ["method=vanilla"], ["method=visionzip", "tokens=16"]
KEY = "0123456789abcdefghijklmnopqrstuvwxyzSECRET"


def read_back(directory: Path) -> dict:
    """What is in the .wandb file of a run: its id, config and last values, and the tables beside it."""
    (path,) = directory.glob("*.wandb")
    store, found = DataStore(), {"config": {}, "summary": {}, "tables": {}}
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = Record.FromString(data)
        if record.HasField("run"):
            found["id"] = record.run.run_id
            found["config"] |= {
                item.key: json.loads(item.value_json)
                for item in record.run.config.update
            }
        if record.HasField("history"):
            items = record.history.item
            found["summary"] |= {
                i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items
            }
    for name, value in found["summary"].items():
        if value == "table-file":
            name = name.removesuffix("/_type")
            table = json.loads(
                (directory / "files" / found["summary"][f"{name}/path"]).read_text()
            )
            found["tables"][name] = [
                dict(zip(table["columns"], row, strict=True)) for row in table["data"]
            ]
    return found


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """(records of visionzip and vanilla, what was logged of: visionzip alone, vanilla, visionzip again; output)."""
    root = tmp_path_factory.mktemp("logged")
    paths, output = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(root))
        patch.setenv("WANDB_PROJECT", "theirs")
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("OPENAI_API_KEY", KEY)
        patch.setattr(
            "builtins.print", lambda *said, **_: output.append(" ".join(map(str, said)))
        )
        for method in (VISIONZIP, VANILLA, VISIONZIP):
            paths += run(
                compose([f"results={root}/runs", "limit=4", "logger=wandb", *method])
            )
    runs = sorted(
        root.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_ctime
    )
    return [records.read(path) for path in paths[:2]], runs, output


def test_what_is_logged(logged):
    (visionzip, vanilla), runs, _ = logged
    found = read_back(runs[2])
    assert found["id"] == visionzip["run_id"]
    config, summary = found["config"], found["summary"]
    assert {name: config[name] for name in visionzip["config"]} == visionzip["config"]
    assert config["resolved"] == visionzip["resolved"]
    of_task = config["tasks"]["zipeval_shapes"]
    for name in (
        "status",
        "task_hash",
        "versions",
        "git",
        "machine",
        "started",
        "ended",
    ):
        assert of_task[name] == visionzip[name]
    assert summary["zipeval_shapes/score"] == visionzip["score"] == 75
    assert (
        summary["zipeval_shapes/percent"]
        == 100 * visionzip["score"] / vanilla["score"]
        == 75
    )
    assert summary["zipeval_shapes/metrics/accuracy"] == 0.75
    assert summary["zipeval_shapes/visual_tokens/mean"] == 16
    assert (
        summary["zipeval_shapes/prefill/flops_exact"]
        == visionzip["prefill"]["flops_exact"]
    )


def test_the_table_and_its_points(logged):
    (visionzip, vanilla), runs, _ = logged
    flops = visionzip["prefill"]["flops_exact"] / vanilla["prefill"]["flops_exact"]
    all_tokens = {
        "method": "vanilla",
        "tokens": None,
        "mean": 144,
        "final": 144,
        "flops": 1,
        "average %": 100,
    }
    reduced = {
        "method": "visionzip",
        "tokens": 16,
        "mean": 16,
        "final": 16,
        "flops": flops,
        "average %": 75,
    }
    tables = read_back(runs[2])["tables"]
    assert tables["accuracy_against_tokens"] == [all_tokens, reduced]
    (column,) = (
        name
        for name in tables["table"][0]
        if name.endswith("%") and name != "average %"
    )
    scores = [{column.removesuffix(" %"): score, column: score} for score in (100, 75)]
    assert tables["table"] == [all_tokens | scores[0], reduced | scores[1]]


def test_the_plots(logged):
    _, runs, _ = logged
    summary = read_back(runs[2])["summary"]
    shown = {
        name.removesuffix("/_type")
        for name, value in summary.items()
        if value == "image-file"
    }
    assert {name.partition("-")[0] for name in shown} == {
        "plots/tokens",
        "plots/curves",
        "plots/bars",
    }
    for name in shown:
        with Image.open(runs[2] / "files" / summary[f"{name}/path"]) as image:
            assert 700 < image.width < 1000  # axes of one size, at 200 dots per inch
            assert len(image.convert("RGB").getcolors(1 << 20)) > 9


def test_without_an_upper_bound_scores_are_logged_and_the_missing_command_said(logged):
    (visionzip, _), runs, output = logged
    found = read_back(runs[0])
    assert found["id"] == visionzip["run_id"]
    assert found["summary"]["zipeval_shapes/score"] == 75
    assert "zipeval_shapes/percent" not in found["summary"]
    assert found["tables"] == {}
    told = [line for line in output if line.startswith("logger=wandb: ")]
    assert len(told) == 3
    assert "Make it with `zipeval run model=tiny_llava method=vanilla" in told[0]
    for line, directory in zip(told, runs, strict=True):
        assert line.startswith(f"logger=wandb: `wandb sync {directory}` uploads it")
    assert not any("Make it" in line for line in told[1:])


def test_no_key_is_written_anywhere(logged):
    (visionzip, _), runs, _ = logged
    root = runs[0].parent.parent
    files = [path for path in root.rglob("*") if path.is_file()]
    assert Path(visionzip["path"]) in files
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_records_do_not_depend_on_it(logged, tmp_path):
    (visionzip, _), *_ = logged
    (path,) = run(compose([f"results={tmp_path}", "limit=4", *VISIONZIP]))
    assert records.reproducible_fields(
        records.read(path)
    ) == records.reproducible_fields(visionzip)
    assert "logger" not in visionzip["config"]


def test_judged_tasks_are_logged_with_the_others_under_the_identity_that_has_the_judge():
    judged = {
        "run_id": "with-judge",
        "task": "b",
        "config": {"judge": {"model": "m"}, "seed": 0},
        "resolved": {},
    }
    other = {"run_id": "without", "task": "a", "config": {"seed": 0}, "resolved": {}}
    assert logger.identity([other, judged]) == "with-judge"
    assert logger.identity([other]) == "without"


def test_the_table_is_the_one_with_these_records(tmp_path):
    """The runs of other settings in the same directory have theirs before and after it."""
    for limit in (5, 7, 9):
        put(tmp_path, "vanilla", 80.0, limit=limit)
        path = put(tmp_path, "visionzip", 60.0 + limit, 16, limit=limit)
        record = records.read(path)
        assert [
            row.cells.popitem()[1].score
            for row in logger.table_of(str(tmp_path), [record]).rows
        ] == [
            80,
            60 + limit,
        ]


def test_a_row_that_lacks_a_benchmark_has_no_point():
    def row(label, cells, average):
        return Row(
            label,
            16,
            {name: TableCell(50.0, percent) for name, percent in cells.items()},
            average=average,
        )

    rows = [
        row("all", {"GQA": 90.0, "MME": 80.0}, 85.0),
        row("one", {"GQA": 90.0}, None),
    ]
    logged = logger.in_wandb(Table("", ["GQA", "MME"], rows))
    assert [line[-1] for line in logged["accuracy_against_tokens"].data] == [85.0]
    assert [line[5:] for line in logged["table"].data] == [
        [50.0, 90.0, 50.0, 80.0, 85.0],
        [50.0, 90.0, None, None, None],
    ]


TROUBLES = {
    "raises": (
        "def init(**_): raise ValueError('no account\\nsecond line')",
        "ValueError: no account",
    ),
    "exits": ("import os; os._exit(3)", "no reason given"),
    "is slow": (
        "import time\ndef init(**_): time.sleep(600)",
        "not done after 3 seconds",
    ),
    "is slow at exit": (
        "import atexit, time; atexit.register(time.sleep, 600)\ndef init(**_): raise OSError('broken')",
        "OSError: broken",
    ),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A results directory with a finished run."""
    root = tmp_path_factory.mktemp("kept")
    run(compose([f"results={root}", "limit=2"]))
    return root


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_is_one_line_and_no_lost_result(
    trouble, kept, tmp_path, monkeypatch, capsys
):
    code, reason = TROUBLES[trouble]
    settings = "class Settings:\n    def __init__(self, **_): pass\n"
    (tmp_path / "wandb.py").write_text(settings + code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(logger, "DEADLINE", 3 if trouble == "is slow" else 30)
    start = time.monotonic()
    _one_warning(kept, capsys, reason)
    assert time.monotonic() - start < 25


def test_a_server_that_cannot_be_reached(kept, tmp_path, monkeypatch, capsys):
    """The real wandb, and nothing listens at the port: it would wait for 90 seconds and then never exit."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setattr(logger, "DEADLINE", 6)
    _one_warning(kept, capsys, "not done after 6 seconds")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.setattr(logger, "DEADLINE", 30)
    start = time.monotonic()
    _one_warning(kept, capsys, "CommError: Run initialization has timed out after 1")
    assert time.monotonic() - start < 25


def test_a_full_disk(kept, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(logger, "TemporaryFile", full)
    _one_warning(kept, capsys, "No space left on device")


def _one_warning(results, capsys, reason):
    (path,) = results.glob("*/zipeval_shapes.json")
    before = path.read_bytes()
    assert run(compose([f"results={results}", "limit=2", "logger=wandb"])) == [path]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"zipeval: logger=wandb: {path.parent.name} is not logged ({reason}"
    )
    assert "the same command tries again" in line
    assert path.read_bytes() == before


def test_records_are_written_first(tmp_path, monkeypatch):
    def interrupted(results, paths):
        assert [records.read(path)["status"] for path in paths] == ["success"]
        raise KeyboardInterrupt

    monkeypatch.setattr(logger, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(compose([f"results={tmp_path}", "limit=1", "logger=wandb"]))
    assert len(records.read_all(str(tmp_path))) == 1


def test_not_installed_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(logger, "version", missing)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zipeval", "run", "logger=wandb", "limit=1"])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert (end.value.code, len(said.splitlines())) == (2, 1)
    assert (
        "logger=wandb: wandb is not installed. `pip install 'zipeval[wandb]'`" in said
    )
    assert os.listdir(tmp_path) == []


def test_another_logger_is_refused():
    with pytest.raises(UsageError, match="logger=mlflow: expected one of null, wandb"):
        run(compose(["logger=mlflow"]))
