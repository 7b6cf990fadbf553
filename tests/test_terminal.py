"""Tables on terminals, and the columns and files of `zipeval table`."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_render import Comparison, table
from test_tables import put

from zipeval.cli import main
from zipeval.reporting.columns import choose
from zipeval.reporting.paper import published
from zipeval.reporting.remarks import FAILED, OVERFLOWED, Remark
from zipeval.reporting.render import render
from zipeval.reporting.tables import Row, Table, TableCell
from zipeval.reporting.terminal import print_narrow

TABLE1 = published("table1")


def narrow(shown, width):
    stream = io.StringIO()
    print_narrow(shown, width, stream)
    return stream.getvalue()


def on_terminal(columns, *arguments, cwd):
    """Return what a command prints on a terminal of so many columns, without colours."""
    screen, keyboard = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    command = [sys.executable, "-m", "zipeval", *arguments]
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=keyboard, stderr=keyboard
    ) as process:
        os.close(keyboard)
        output = b""
        while part := _read(screen):
            output += part
    os.close(screen)
    assert process.returncode == 0, output
    return re.sub(r"\x1b\[[0-9;]*m", "", output.decode()).replace("\r\n", "\n")


def _read(screen):
    try:
        return os.read(screen, 65536)
    except OSError:  # Linux's way to say that nobody writes any more
        return b""


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["zipeval", "table", *arguments])
    main()


def test_table1_fits_100_columns():
    text = narrow(TABLE1, 100)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "Not shown" not in text
    (fastv, *_) = [
        number for number, line in enumerate(lines) if line.startswith("fastv ")
    ]
    assert lines[fastv].split() == (
        [
            "fastv",
            "52.7",
            "61.2",
            "1612.0",
            "64.8",
            "67.3",
            "67.1",
            "52.5",
            "34.3",
            "57.1",
            "27.7",
            "49.4",
            "88.1%",
        ]
    )
    assert lines[fastv + 1].split()[:3] == ["85.1%", "94.6%", "86.6%"]
    assert [line for line in lines if line.endswith("tokens")] == [
        "192 tokens",
        "128 tokens",
        "64 tokens",
    ]
    assert "Upper bound, all tokens (576)" in lines


def test_what_does_not_fit_is_named_and_the_average_stays():
    text = " ".join(narrow(TABLE1, 60).split())
    assert (
        "Not shown for lack of width: TextVQA, MMMU, SEED, MM-Vet, LLaVA-B. The average is of all benchmarks. "
        "`zipeval table columns=A,B` chooses benchmarks, out=FILE.csv has all of it."
    ) in text
    assert "vanilla 61.9 64.7 1862.0 85.9 69.5 78.5 100.0%" in text


def test_measures_are_left_out_before_benchmarks():
    rows = [replace(row, mean=64.0, final=64.0, flops=0.5) for row in TABLE1.rows]
    text = narrow(replace(TABLE1, rows=rows), 104)
    assert "Not shown for lack of width: final, flops." in text
    assert "mean, final: visual tokens, measured" in " ".join(text.split())
    assert "mean, final: visual" not in narrow(replace(TABLE1, rows=rows), 98)


def test_marks_stand_behind_the_percentage_or_the_score():
    remark = Remark(FAILED, "3 of 200 samples failed")
    rows = [
        Row("vanilla", None, {"GQA": TableCell(60.0, 100.0)}),
        Row(
            "a",
            64,
            {
                "GQA": TableCell(
                    59.0, 98.3, None, Comparison(96.0, 100.5, False), True, (remark,)
                )
            },
        ),
        Row(
            "b",
            64,
            {"GQA": TableCell(None, None, remarks=(Remark(OVERFLOWED, "all"),))},
        ),
    ]
    lines = narrow(Table("m", ["GQA"], rows), 80).splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.startswith("a ")]
    assert lines[first + 1].split() == ["98.3%,", "96.0-100.5≈†§"]
    assert lines[first + 2].split() == ["b", "-‖"]
    assert "§ samples that could not be read" in " ".join(" ".join(lines).split())


LABELS = (
    st.text("abcXYZ _-(),0123", min_size=1, max_size=24).map(str.strip).filter(bool)
)
SCORES = st.none() | st.floats(0, 2000, allow_nan=False)
PERCENTAGES = st.none() | st.just(float("nan")) | st.floats(0, 200, allow_nan=False)


@st.composite
def drawn_tables(draw):
    endings = draw(
        st.lists(
            st.sampled_from(["", "-Vet", "VQA", " (accuracy)", "_turns_of_a_task"]),
            min_size=1,
            max_size=9,
        )
    )
    columns = [f"Q{number}{ending}" for number, ending in enumerate(endings)]
    labels = draw(st.lists(LABELS, min_size=1, max_size=4, unique=True))
    has_measures, has_average = draw(st.booleans()), draw(st.booleans())
    rows = []
    for number, label in enumerate(["vanilla", *labels]):
        comparison = draw(st.sampled_from([None, Comparison(91.2, 100.5, False)]))
        remarks = draw(
            st.sampled_from(
                [(), (Remark(FAILED, "3 of 9 failed"), Remark(OVERFLOWED, "2 of 9"))]
            )
        )
        cells = {}
        for name in columns:
            cells[name] = TableCell(
                draw(SCORES),
                draw(PERCENTAGES),
                None,
                comparison,
                draw(st.booleans()),
                remarks,
            )
        measures = (
            {name: 0.5 for name in ("mean", "final", "flops")} if has_measures else {}
        )
        average = 98.3 if has_average else None
        rows.append(
            Row(label, None if number == 0 else 64, cells, average=average, **measures)
        )
    return Table("m (f)", columns, rows, draw(st.lists(LABELS, max_size=2)))


@settings(max_examples=60, deadline=None)
@given(drawn_tables(), st.integers(20, 200))
def test_no_line_is_longer_than_the_terminal_and_no_benchmark_is_lost(shown, width):
    text = narrow(shown, width)
    smallest = max(map(len, narrow(shown, 1).splitlines()))
    assert max(map(len, text.splitlines())) <= max(width, smallest)
    head, _, rest = text.partition("Upper bound, all")
    in_head = set(re.findall(r"Q\d", head))
    in_note = set(
        re.findall(r"Q\d", rest.partition("Not shown for")[2].partition("`")[0])
    )
    assert in_head | in_note == {name[:2] for name in shown.columns}
    assert not in_head & in_note


def test_the_narrow_form_is_for_terminals_that_are_too_narrow(tmp_path):
    asked = ("table", "table=paper/table1", "source=paper")
    text = on_terminal(100, *asked, cwd=tmp_path)
    assert "192 tokens" in text
    assert "|" not in text
    markdown = render([TABLE1]) + "\n"
    assert on_terminal(250, *asked, cwd=tmp_path) == markdown
    assert on_terminal(100, *asked, "format=markdown", cwd=tmp_path) == markdown


def test_piped_output_is_markdown(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    run(monkeypatch, "table=paper/table1", "source=paper")
    assert capsys.readouterr().out == render([TABLE1]) + "\n"


def test_columns_of_a_published_table_have_no_average_of_the_papers(
    monkeypatch, capsys
):
    run(monkeypatch, "table=paper/table1", "source=paper", "columns=mmvet,GQA")
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "method",
        "tokens",
        "MM-Vet",
        "GQA",
    ]
    assert "No average, which is of all 11 columns of this table." in lines
    assert "fastv 192 MM-Vet: 27.7 is 89.1% of 31.1, printed 89.7%." in lines
    assert not any("LLaVA-B" in line or "average:" in line for line in lines)


def test_columns_in_another_order_keep_the_average():
    from zipeval.reporting.columns import with_columns

    (turned,) = with_columns([TABLE1], TABLE1.columns[::-1])
    assert turned.columns == TABLE1.columns[::-1]
    assert [row.average for row in turned.rows] == [row.average for row in TABLE1.rows]
    assert turned.notes == TABLE1.notes


def records_of_three(root):
    for task, score in (("pope", 80.0), ("gqa", 60.0), ("mme", 1500.0)):
        put(root, "vanilla", score, task=task)
        put(root, "visionzip", score / 2 if task == "mme" else score, 64, task=task)


def test_an_average_of_records_is_of_the_chosen_columns_and_says_so(
    tmp_path, monkeypatch, capsys
):
    records_of_three(tmp_path)
    run(monkeypatch, f"results={tmp_path}", "columns=pope,gqa")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split("|")[-4:-1] == [
        "          POPE ",
        "           GQA ",
        " average ",
    ]
    (visionzip,) = [line for line in lines if line.startswith("| visionzip")]
    assert visionzip.split("|")[-2].strip() == "100.0%"
    assert "average: of POPE, GQA only." in lines


def test_columns_of_one_task_are_its_metrics(tmp_path, monkeypatch, capsys):
    records_of_three(tmp_path)
    run(monkeypatch, f"results={tmp_path}", "task=pope", "columns=accuracy_exist")
    assert "| accuracy_exist |" in capsys.readouterr().out


def test_columns_of_records_beside_the_paper(tmp_path, monkeypatch, capsys):
    for task, score in (("pope", 80.0), ("gqa", 60.0), ("mme", 1500.0)):
        put(tmp_path, "vanilla", score, task=task, model="llava15")
        put(tmp_path, "visionzip", score, 64, task=task, model="llava15")
    run(monkeypatch, f"results={tmp_path}", "table=paper/table1", "columns=POPE,GQA")
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")][-2:] == [
        "POPE",
        "GQA",
    ]
    assert any(line.startswith("| visionzip: difference") for line in lines)


@pytest.mark.parametrize(
    "asked", ["", "source=paper table=paper/table1", "table=paper/table1"]
)
def test_an_unknown_column_is_refused_before_any_output(
    tmp_path, monkeypatch, capsys, asked
):
    put(tmp_path, "vanilla", 80.0, task="pope", model="llava15")
    arguments = asked.split() + ([] if "source" in asked else [f"results={tmp_path}"])
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "columns=POEP", *arguments)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "columns=POEP: no such column. Did you mean POPE?" in err


def test_a_name_means_the_columns_that_it_is_most_exactly():
    headings = [
        "GQA",
        "GQA (turns)",
        "exact_match,strict",
        "exact_match,flexible",
        "task (error ↓)",
    ]
    assert choose(["gqa"], headings) == ["GQA"]
    assert choose(["zipeval_gqa_turns", "gqa", "GQA"], headings) == [
        "GQA (turns)",
        "GQA",
    ]
    assert choose(["exact_match"], headings) == headings[2:4]
    assert choose(["task"], headings) == headings[4:]


@pytest.mark.parametrize(
    "name, form",
    [
        ("t.md", "markdown"),
        ("t.csv", "csv"),
        ("t.tex", "latex"),
        ("t.html", "html"),
        ("t.json", "json"),
    ],
)
def test_a_files_suffix_is_its_format(tmp_path, monkeypatch, capsys, name, form):
    file = tmp_path / name
    run(monkeypatch, "table=paper/table1", "source=paper", f"out={file}")
    assert capsys.readouterr().out == f"{file}\n"
    assert file.read_text() == render([TABLE1], form) + "\n"


def test_a_named_format_is_stronger_than_the_suffix(tmp_path, monkeypatch):
    file = tmp_path / "t.txt"
    run(monkeypatch, "table=paper/table1", "source=paper", f"out={file}", "format=csv")
    assert file.read_text() == render([TABLE1], "csv") + "\n"


@pytest.mark.parametrize(
    "out, message",
    [
        ("t.xlsx", "expected a file that ends in .md, .csv, .tex, .html, .json"),
        ("none/t.csv", "there is no directory"),
        ("folder.csv", "is a directory"),
        ("locked/t.csv", "cannot be written to"),
        ("/proc/t.csv", "cannot be written (No such file or directory)"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(
    tmp_path, monkeypatch, capsys, out, message
):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "locked").mkdir()
    # The superuser may write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "locked")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "table=paper/table1", "source=paper", f"out={tmp_path / out}")
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_a_table_without_percentages_has_single_lines():
    (first, *_) = [
        line
        for line in narrow(published("table4"), 60).splitlines()
        if line.startswith("visionzip")
    ]
    assert first.split() == ["visionzip", "756.0", "27.8", "3.03", "7.84"]
    assert narrow(table(), 60).count("Upper bound, all tokens (576)") == 1
