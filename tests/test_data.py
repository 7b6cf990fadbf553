"""Local copies of data sets: read in place of the hub's, and examined before anything is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import datasets
import pyarrow.parquet
import pytest
from miniatures import HUB
from test_cli import zipeval

from zipeval import benchmarks
from zipeval.benchmarks import BENCHMARKS, data
from zipeval.cli import compose, main
from zipeval.errors import UsageError
from zipeval.evaluation.runner import run
from zipeval.models import _loaded
from zipeval.reporting.render import render
from zipeval.reporting.tables import tables
from zipeval.results import records

QUESTIONS = f"{HUB}/GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet"


@pytest.fixture
def copy(miniatures, tmp_path):
    """A copy of the miniatures that a test may change."""
    return shutil.copytree(miniatures, tmp_path / "copy")


def answer_everything_with(answer, root):
    """Change the data: GQA's answers."""
    table = pyarrow.parquet.read_table(root / QUESTIONS)
    rows = [{**row, "answer": answer} for row in table.to_pylist()]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows, schema=table.schema), root / QUESTIONS
    )


def gqa(root, results, *overrides):
    settings = [
        "tasks=[gqa]",
        f"data.root={root}",
        f"results={results}",
        "limit=2",
        *overrides,
    ]
    (path,) = run(compose(settings))
    return path


def test_copies_of_one_name_are_told_apart(miniatures, copy, tmp_path):
    """datasets itself serves the rows of whichever it saw first."""
    answer_everything_with("blue", copy)
    targets, hashes = [], []
    for number, root in enumerate((miniatures, copy, miniatures)):
        path = gqa(root, tmp_path / str(number))
        record = records.read(path)
        targets.append([s["target"] for s in records.read_samples(path.parent, record)])
        hashes.append(record["data_hash"])
    assert targets == [["red", "yes"], ["blue", "blue"], ["red", "yes"]]
    assert hashes[0] == hashes[2] != hashes[1]


def test_a_copy_elsewhere_is_the_same_data(miniatures, copy, tmp_path, capsys):
    assert gqa(miniatures, tmp_path / "results") == gqa(copy, tmp_path / "results")
    assert "kept" in capsys.readouterr().out


def test_a_record_of_other_data_is_not_kept(miniatures, copy, tmp_path):
    path = gqa(miniatures, tmp_path / "results")
    answer_everything_with("blue", copy)
    with pytest.raises(
        UsageError, match=rf"data.root={copy}: {path} is of other data .*Move it away"
    ):
        gqa(copy, tmp_path / "results")


def test_a_table_does_not_compare_other_data(miniatures, copy, tmp_path):
    answer_everything_with("blue", copy)
    gqa(miniatures, tmp_path / "results")
    gqa(copy, tmp_path / "results", "method=visionzip", "tokens=16")
    with pytest.raises(
        UsageError,
        match=rf"no upper bound of the same .*Make it with `.* data.root={copy} ",
    ):
        render(tables(str(tmp_path / "results")))


def test_load_dataset_is_redirected_within_the_block_only(miniatures):
    before = datasets.load_dataset
    with data.copies_below(str(miniatures)):
        rows = datasets.load_dataset(f"{HUB}/POPE", token=True)
        assert len(rows["test"]) == 12
    assert datasets.load_dataset is before


def test_public_data_sets_need_no_login(monkeypatch):
    """lmms-eval's tasks give token=True, which is refused where nobody is logged in."""
    seen = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, **given: seen.append((path, given))
    )
    with data.copies_below(None):
        datasets.load_dataset(f"{HUB}/POPE", name="Full", token=True)
        datasets.load_dataset(f"{HUB}/POPE", token="mine")
    assert seen == [
        (f"{HUB}/POPE", {"name": "Full"}),
        (f"{HUB}/POPE", {"token": "mine"}),
    ]


def test_any_task_of_lmms_eval_reads_copies(copy, tmp_path):
    """pope_adv is in no table of ours; its data set is found in its YAML, vizwiz_vqa_test's in what that includes."""
    assert "pope_adv" not in BENCHMARKS
    assert benchmarks.dataset("pope_adv") == f"{HUB}/POPE"
    assert benchmarks.dataset("vizwiz_vqa_test") == f"{HUB}/VizWiz-VQA"
    assert benchmarks.dataset("zipeval_shapes") is None
    pope = copy / HUB / "POPE"
    (pope / "README.md").write_text(
        "---\nconfigs:\n- config_name: Full\n  data_files:\n  - {split: adversarial, path: data/test-*}\n---\n"
    )
    (path,) = run(
        compose(
            [
                "tasks=[pope_adv]",
                f"data.root={copy}",
                f"results={tmp_path / 'results'}",
                "limit=2",
            ]
        )
    )
    record = records.read(path)
    assert (record["metric"], record["data_hash"]) == (
        "pope_accuracy",
        data.fingerprint("pope_adv", str(copy)),
    )


def no_split(root):
    readme = root / HUB / "GQA/README.md"
    readme.write_text(readme.read_text().replace("split: testdev", "split: train"))


def no_config(root):
    readme = root / HUB / "GQA/README.md"
    readme.write_text(
        readme.read_text().replace(
            "config_name: testdev_balanced_images", "config_name: other"
        )
    )


def no_file(root):
    (root / QUESTIONS).unlink()


def cut_off(root):
    (root / QUESTIONS).write_bytes((root / QUESTIONS).read_bytes()[:-100])


def pointer(root):
    (root / QUESTIONS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
    )


def no_yaml(root):
    (root / HUB / "GQA/README.md").write_text("---\nconfigs: [\n---\n")


def gone(root):
    shutil.rmtree(root / HUB / "GQA")


@pytest.mark.parametrize(
    "change, said",
    [
        (no_split, "is missing (COPY/GQA has no split testdev, only train)"),
        (no_config, "is missing (BuilderConfig 'testdev_balanced_images' not found"),
        (no_file, "is missing (No (supported) data files found"),
        (
            cut_off,
            "is damaged (COPY/GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet: ",
        ),
        (
            pointer,
            "is damaged (COPY/GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet: ",
        ),
        (no_yaml, "is damaged (COPY/GQA/README.md: its head is no YAML"),
        (gone, "is missing (not in the Hugging Face cache, not below data.root="),
    ],
)
def test_what_is_wrong_with_a_copy(change, said, copy, tmp_path, monkeypatch, capsys):
    """Before the weights are loaded, and by `zipeval data check` too; the other data sets are as they were."""
    change(copy)
    said = said.replace("COPY", f"{copy}/{HUB}")
    fetch = f"`hf download --repo-type dataset {HUB}/GQA --local-dir {copy}/{HUB}/GQA`"
    _loaded.clear()
    with pytest.raises(UsageError) as refused:
        gqa(copy, tmp_path / "results")
    assert str(refused.value).startswith(f"tasks=[gqa]: {HUB}/GQA {said}")
    assert fetch in str(refused.value)
    assert not _loaded
    monkeypatch.setattr(
        sys,
        "argv",
        ["zipeval", "data", "check", "tasks=[pope,gqa]", f"data.root={copy}"],
    )
    with pytest.raises(SystemExit) as end:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 1
    assert lines[0] == f"present  {HUB}/POPE test: {copy}/{HUB}/POPE"
    wrong = [line for line in lines[1:] if not line.startswith("present")]
    state, reason = said.removeprefix("is ").split(" (", 1)
    assert any(
        line.startswith(state) and reason.removesuffix(")") in line and fetch in line
        for line in wrong
    )


def test_data_check_of_what_is_there(miniatures, tmp_path):
    done = zipeval(
        "data", "check", "suite=paper_image", f"data.root={miniatures}", cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 13  # GQA has two parts
    assert all(line.startswith("present  ") for line in lines)


def test_data_check_without_copies(tmp_path):
    (tmp_path / f"cache/{HUB}___pope/default/0.0.0/0").mkdir(parents=True)
    (tmp_path / f"cache/{HUB}___pope/default/0.0.0/0/dataset_info.json").touch()
    done = zipeval(
        "data",
        "check",
        "suite=paper_image",
        cwd=tmp_path,
        HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )
    assert (done.returncode, done.stderr) == (1, "")
    states = [line.split()[:2] for line in done.stdout.splitlines()]
    assert ["present", f"{HUB}/POPE"] in states
    assert len([state for state, _ in states if state == "missing"]) == 12
    assert (
        f"`hf download --repo-type dataset {HUB}/MME --local-dir data/{HUB}/MME`"
        in done.stdout
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["check", "data.root=nowhere"], "data.root=nowhere: no such directory"),
        (["check", "tasks=[popp]"], "Did you mean pope?"),
        (["check", "suite=paper"], "suite=paper: no such suite"),
        (["chek"], "zipeval data check suite="),
        ([], "zipeval data check suite="),
    ],
    ids=str,
)
def test_data_check_refuses(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zipeval", "data", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_tables_and_lists_import_nothing_heavy():
    script = (
        "import json, sys, zipeval.tables, zipeval.cli\nsys.argv = ['zipeval', 'list', 'tasks']\nzipeval.cli.main()\n"
        "print(json.dumps([m for m in ('torch', 'transformers', 'lmms_eval', 'datasets') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    *_, heavy = done.stdout.splitlines()
    assert json.loads(heavy) == []
    (line,) = (
        line for line in done.stdout.splitlines() if line.startswith("vqav2_val ")
    )
    assert ["VQAv2", f"{HUB}/VQAv2", "validation"] == [
        line.split()[i] for i in (1, 5, 6)
    ]
    assert "server" in line
