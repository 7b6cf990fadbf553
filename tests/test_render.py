from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from math import nan
from pathlib import Path

import jsonschema
import pandas
import pytest

from zipeval.errors import UsageError
from zipeval.reporting.paper import published
from zipeval.reporting.proper_names import proper_labels
from zipeval.reporting.remarks import FAILED, Remark
from zipeval.reporting.render import FORMATS, render
from zipeval.reporting.tables import Row, Table, TableCell

EVIL = '<script>alert("1")</script> & 100% of $x_1 {~^#}\\'
RECORD = {"run_id": "run-1"}


class Comparison:
    def __init__(self, low, high, distinguishable):
        self.low, self.high, self.distinguishable = low, high, distinguishable
        self.lost, self.gained, self.p = 7, 3, 0.34


def table():
    """A bound; two methods at one budget, of which one is tied with the bound and one the best; one at another."""
    bound = {"GQA": TableCell(60.0, 100.0, RECORD), "x": TableCell(0.0, nan, RECORD)}
    tied = {
        "GQA": TableCell(59.0, 98.33, RECORD, Comparison(96.0, 100.5, False)),
        "x": TableCell(0.8, nan, RECORD),
    }
    best = {"GQA": TableCell(59.5, 99.17, RECORD, Comparison(98.5, 99.9, True), True)}
    rows = [
        Row("vanilla", None, bound, 576.0, 576.0, 1.0, nan),
        Row("a", 64, tied, 64.0, 64.0, 0.111, 98.3),
        Row(EVIL, 64, best, 81.0, 48.0, 0.2),
        Row("c", 32, {"x": TableCell(None, None, RECORD)}, 32.0, 32.0, 0.1),
    ]
    return Table("m (f), float32", ["GQA", "x"], rows, [f"c: {EVIL}"])


def test_markdown():
    lines = render([table()]).splitlines()
    assert lines[2].split("|")[1:-1] == [
        " method".ljust(len(EVIL) + 2), " tokens ", "  mean ", " final ", "  flops ",
        "                       GQA ", "          x ", " average ",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[5].strip("|").split("|")][1:] == [
        "64", "64.0", "64.0", "11.1%", "59.0 (98.3%, 96.0-100.5)≈", "0.8 (of 0)", "98.3%"
    ]  # fmt: skip
    assert "|  59.5 (99.2%, 98.5-99.9)† |          - |       - |" in lines[6]
    assert lines[4].count("60.0 (100.0%)") == 1
    assert "†" in lines[9]  # the legend


@pytest.mark.parametrize(
    "comparison, shown",
    [
        (Comparison(100, 100, False), "60.0 (100.0%)≈†"),  # the same answers
        (
            Comparison(nan, nan, False),
            "60.0 (100.0%)†",
        ),  # a single question says nothing
        (Comparison(98, 102, False), "60.0 (100.0%, 98.0-102.0)≈†"),
    ],
)
def test_marks(comparison, shown):
    rows = [
        Row("vanilla", None, {"GQA": TableCell(60.0, 100.0)}),
        Row("a", 1, {"GQA": TableCell(60.0, 100.0, None, comparison, True)}),
    ]
    assert (
        render([Table("m", ["GQA"], rows)]).splitlines()[5].split("|")[3].strip()
        == shown
    )


def test_csv_and_json_hold_the_same_cells():
    found = list(csv.DictReader(io.StringIO(render([table()], "csv"))))
    (other,) = json.loads(render([table()], "json"))
    assert [line["method"] for line in found] == [
        cell["method"] for cell in other["cells"]
    ]
    as_text = [
        {k: "" if v is None else str(v) for k, v in cell.items()}
        for cell in other["cells"]
    ]
    assert as_text == found
    cell = next(
        c for c in other["cells"] if (c["method"], c["benchmark"]) == ("a", "GQA")
    )
    assert {k: cell[k] for k in ("score", "percent", "low", "high", "lost", "gained", "p", "tied", "run_id")} == {
        "score": 59.0, "percent": 98.33, "low": 96.0, "high": 100.5, "lost": 7, "gained": 3, "p": 0.34, "tied": False,
        "run_id": "run-1",
    }  # fmt: skip
    assert other["notes"] == table().notes
    assert next(c for c in other["cells"] if c["benchmark"] == "x")["percent"] is None


def test_json_keeps_to_its_documented_schema():
    schema = json.loads(
        (Path(__file__).parent.parent / "docs/table.schema.json").read_text()
    )
    jsonschema.Draft202012Validator.check_schema(schema)
    for tables in ([table()], [published("table1"), published("table4")]):
        jsonschema.validate(json.loads(render(tables, "json")), schema)
    documented = schema["$defs"]["cell"]
    written = json.loads(render([table()], "json"))[0]["cells"][0]
    assert list(written) == list(documented["properties"]) == documented["required"]


def test_csv_comes_back_through_pandas():
    frame = pandas.read_csv(io.StringIO(render([table()], "csv")))
    for name, values in pandas.DataFrame(
        json.loads(render([table()], "json"))[0]["cells"]
    ).items():
        for found, value in zip(frame[name], values, strict=True):
            assert found == value or (pandas.isna(found) and pandas.isna(value))


class Texts(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.cells, self.stack = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.tags[-1] in ("td", "th"):
            self.cells[-1] += data


def test_html_shows_labels_as_text():
    parser = Texts()
    parser.feed(render([table()], "html"))
    assert "script" not in parser.tags
    assert EVIL in parser.cells
    assert parser.tags.count("tbody") == 3  # a budget each
    assert "59.0 (98.3%, 96.0-100.5)≈" in parser.cells


def test_latex_has_a_section_for_each_budget():
    text = render([table()], "latex")
    titles = re.findall(
        r"\\midrule\n\\multicolumn\{7\}\{c\}\{\\textit\{(.*)\}\} \\\\\n\\midrule", text
    )
    assert titles == [
        "Upper bound, all tokens (576)",
        "Retain 64 tokens",
        "Retain 32 tokens",
    ]
    assert "tokens &" not in text


def test_latex_cells_have_two_lines_and_escapes():
    """The interval has a line of its own, as the table is wide; the best of a budget is bold in all its lines."""
    lines = render([table()], "latex").splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.startswith("a & ")]
    assert "& 59.0 & 0.8 & 98.3\\% " in lines[first]
    assert lines[first + 1].startswith(
        r" &  &  &  & {\scriptsize 98.3\%} & {\scriptsize of 0} &  "
    )
    assert r"96.0--100.5$\approx$" in lines[first + 2]
    assert all(
        rf"\textbf{{{text}}}" in "".join(lines)
        for text in ("59.5", r"99.2\%", "98.5--99.9")
    )
    assert (
        r"\& 100\% of \$x\_1 \{\textasciitilde{}\textasciicircum{}\#\}\textbackslash{}"
        in "".join(lines)
    )


def test_latex_prints_a_papers_names_and_what_its_signs_mean():
    text = render([published("table1")], "latex")
    labels = re.findall(r"^(\S+) & \d", text, flags=re.M)
    assert list(dict.fromkeys(labels)) == [
        "Vanilla",
        "FastV",
        "SparseVLM",
        "VisionZip",
        r"VisionZip$^\ddagger$",
    ]
    caption = re.search(r"\\caption\{(.*)\}", text)[1]
    assert "LLaVA-1.5-7B" in caption
    assert "percentage of the upper bound, Vanilla." in caption
    assert caption.endswith(r"$^\ddagger$ with the tuned projector.")
    assert r"\label{tab:llava-1-5-7b}" in text


def test_proper_names_are_classes_of_other_methods():
    def row(label, method, target):
        record = {"config": {"method": {"name": method, "_target_": target}}}
        return Row(label, 64, {"GQA": TableCell(60.0, 100.0, record)})

    rows = [
        row("mine x=2", "mine", "package.mine.MyMethod"),
        row("fastv K=3", "fastv", "package.fastv.AnotherName"),
        row("one", "one", "package.chain.Chain"),
        row("two", "two", "package.chain.Chain"),
        Row(
            "mine x=2: difference", 64, {"GQA": TableCell(0.0, 0.0)}, kind="difference"
        ),
        Row("unknown", 64, {}),
    ]
    assert list(proper_labels(Table("m", ["GQA"], rows)).values()) == [
        "MyMethod x=2", "FastV K=3", "one", "two", "MyMethod x=2: difference", "unknown"
    ]  # fmt: skip


def test_latex_marks_and_explains_what_markdown_marks():
    remark = Remark(FAILED, "3 of 200 samples failed and count as wrong")
    rows = [
        Row("vanilla", None, {"GQA": TableCell(60.0, 100.0)}),
        Row("a", 1, {"GQA": TableCell(None, None, remarks=(remark,))}),
    ]
    text = render([Table("m", ["GQA"], rows)], "latex")
    assert r"-\textsuperscript{\S}" in text
    assert (
        r"\textsuperscript{\S} a 1, GQA: 3 of 200 samples failed and count as wrong."
        in text
    )


def test_latex_of_a_table_that_is_too_wide_is_made_smaller_and_says_what_it_needs():
    text = render([wide()], "latex")
    assert r"\resizebox{\textwidth}{!}{\begin{tabular}" in text
    assert r"% Needs \usepackage{graphicx}" in text
    assert "graphicx" not in render([published("table1")], "latex")


def test_latex_labels_are_not_used_twice():
    text = render([table(), table()], "latex")
    assert re.findall(r"\\label\{(.*)\}", text) == ["tab:m", "tab:m-2"]


@pytest.mark.parametrize(
    "shown", [table(), published("table1")], ids=["ours", "published"]
)
def test_latex_has_as_many_cells_in_every_line(shown):
    """What can be seen of it without LaTeX."""
    text = re.sub(r"^%.*\n?", "", render([shown], "latex"), flags=re.M)
    plain = re.sub(r"\\textbackslash\{\}|\\[&%$#_{}]", "", text)
    assert plain.count("{") == plain.count("}")
    environments = re.findall(r"\\(begin|end)\{([\w*]+)\}", plain)
    assert environments == [
        ("begin", "table*"),
        ("begin", "tabular*"),
        ("end", "tabular*"),
        ("end", "table*"),
    ]
    lines = [
        line
        for line in plain.splitlines()
        if re.search(r"\\\\(\[.*pt\])?$", line) and "multicolumn" not in line
    ]
    columns = int(re.search(r"l\*\{(\d+)\}\{c\}", plain)[1]) + 1
    assert {line.count("&") + 1 for line in lines} == {columns}
    scores = [line for line in lines if not line.startswith(" ")]
    assert len(scores) == 1 + len(shown.rows)


def wide():
    """Table 1 as it would be measured, with all that a table may hold."""
    remark = Remark(FAILED, "3 of 200 samples failed and count as wrong")
    rows = []
    for number, row in enumerate(published("table1").rows):
        comparison = Comparison(98.7, 100.6, False) if number else None
        cells = {}
        for name, cell in row.cells.items():
            cells[name] = replace(
                cell,
                comparison=comparison,
                tied=number % 2 == 1,
                remarks=(remark,) * (number == 3),
            )
        rows.append(
            replace(
                row,
                cells=cells,
                mean=576.0,
                final=576.0,
                flops=1.0,
                average_comparison=comparison,
            )
        )
    return replace(published("table1"), rows=rows)


PRINTED = {"ours": table(), "wide": wide()} | {
    name: published(name) for name in ("table1", "table4", "table5")
}
CLASSES = {
    "article": r"\documentclass[twocolumn]{article}",
    "cvpr": r"\documentclass[10pt,twocolumn,letterpaper]{article}\setlength{\textwidth}{6.875in}",
}


@pytest.mark.parametrize("head", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("shown", PRINTED.values(), ids=PRINTED)
def test_latex_fits_the_page(tmp_path, shown, head):
    has_latex = shutil.which("pdflatex") and shutil.which("kpsewhich")
    if (
        not has_latex
        or subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).returncode
    ):
        pytest.skip("needs LaTeX with booktabs")
    body = render([shown], "latex")
    document = f"{head}\\usepackage{{booktabs,graphicx}}\\begin{{document}}\n{body}\nText.\n\\end{{document}}\n"
    (tmp_path / "t.tex").write_text(document)
    command = [
        "pdflatex",
        "-draftmode",
        "-halt-on-error",
        "-interaction=nonstopmode",
        "t.tex",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout


def test_every_format_takes_several_tables():
    for form in FORMATS:
        assert (
            render([table(), table()], form).count("vanilla")
            >= 2 * render([table()], form).count("vanilla") - 2
        )


def test_a_format_that_is_none():
    with pytest.raises(
        UsageError, match=r"format=latx: no such format. Did you mean latex\?"
    ):
        render([table()], "latx")


def test_tables_need_no_torch(tmp_path):
    code = (
        "import sys; from zipeval.cli import main;"
        "sys.argv = ['zipeval', 'table', 'table=paper/table1', 'source=paper']; main();"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "fastv 128 average: it is 84.4%, printed 83.5%." in done.stdout
