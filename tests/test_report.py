"""Reports and plots, from records that are written here: no model runs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from xml.etree import ElementTree

import pytest
from PIL import Image

from zipeval import cli
from zipeval.reporting import plots
from zipeval.reporting.html import overlap
from zipeval.reporting.html.gallery import covering, outlining, verdict
from zipeval.reporting.html.page import parts
from zipeval.reporting.html.report import report
from zipeval.reporting.render import grid
from zipeval.reporting.tables import tables
from zipeval.results import records

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></details>{{ 7 * 7 }}",
]
TASKS = ("zipeval_shapes", "gqa")


def sample(doc_id, score, **more):
    answered = {
        "target": f"target {doc_id}",
        "prediction": f"answer {doc_id}",
        "question_hash": f"{doc_id}",
    }
    cost = {"visual_tokens": [16, 16], "crops": [1], "latency": 3.2, "batch": 4}
    return {"doc_id": doc_id, **answered, **cost, "score": score, **more}


def put(root, method, tokens, task, samples, pictures=(), batch_size=4, prompt="hf"):
    """A record with the score that follows from its samples."""
    run_id = f"m-{method}-{tokens}-{prompt}"
    scored = [s["score"] for s in samples if s["score"] is not None]
    held = {
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "quantization": "none",
        "device_map": None,
    }
    read = {"path": None, "revision": None, "prompt": prompt, "image_aspect": "pad"}
    record = {
        "run_id": run_id,
        "task": task,
        "task_hash": "the-task",
        "data_hash": None,
        "failed": sum("error" in s for s in samples),
        "unscored": sum("unscored" in s for s in samples),
        "status": "incomplete" if any("unscored" in s for s in samples) else "success",
        "metric": "accuracy",
        "score": 100 * sum(scored) / len(scored),
        "metrics": {"accuracy": sum(scored) / len(scored)},
        "visual_tokens": {
            "requested": tokens,
            "mean": float(tokens or 16),
            "final": 4.0,
            "patches": 16,
        },
        "prefill": {"flops_exact": 1000.0 * (tokens or 16)},
        "config": {
            "model": {"name": "m", "family": "llava", **read, "device": "auto", **held},
            "method": {
                "name": method,
                "_target_": "x",
                **({"tokens": tokens} if tokens else {}),
            },
            "tokens": tokens,
            "budget": "paper",
            "packing": "published",
            "data": {"root": None},
            "limit": None,
            "batch_size": batch_size,
            "seed": 0,
        },
        "resolved": {
            "fingerprint": "the-weights",
            "device": "cpu",
            **held,
            "method": "x",
        },
        "versions": {"zipeval": "0.1.0", "torch": "2.0"},
        "git": {"revision": "c0ffee", "dirty": True},
        "model_revision": "the-commit",
        "machine": {
            "platform": "Linux",
            "device": "the-gpu",
            "cuda": None,
            "driver": None,
        },
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-01T00:00:02+00:00",
        "seconds": 1.5,
    }
    path = records.write(root / run_id, record, samples)
    for doc_id in pictures:
        folder = path.with_suffix(".images")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / f"{doc_id}.jpg")
    return path


SCORES = {
    ("vanilla", None): 9,
    ("fastv", 8): 8,
    ("visionzip", 8): 7,
    ("fastv", 4): 5,
    ("visionzip", 4): 6,
}


def write_sweep(root):
    """vanilla and two methods at two budgets, on two benchmarks of ten samples."""
    for number, task in enumerate(TASKS):
        for (method, tokens), right in SCORES.items():
            kept = {"kept": [[0, 1, 5]], "merged": [[15]]} if tokens else {}
            samples = [sample(i, float(i < right - number), **kept) for i in range(10)]
            put(
                root / "runs",
                method,
                tokens,
                task,
                samples,
                pictures=(0, 1) if number == 0 else (),
            )
    return root


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path)


class Page(HTMLParser):
    """Elements with their attributes, the text outside of style sheets, and that of plots alone."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.styles, self.labels, self.open = (
            [],
            [],
            [],
            [],
            None,
        )
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open = tag

    def handle_data(self, data):
        if self.open != "script":
            (self.styles if self.open == "style" else self.texts).append(data)
        if self.open in ("text", "tspan"):
            self.labels.append(data.strip())

    def handle_endtag(self, tag):
        self.open = None

    def all(self, tag, **attributes):
        return [
            a for t, a in self.elements if t == tag and attributes.items() <= a.items()
        ]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page(root, **options):
    report(str(root / "runs"), root / "report.html", **options)
    return Page((root / "report.html").read_text(encoding="utf-8"))


def rows(text):
    """Cells of every table row of a page, as text."""
    lines = re.findall(r"<tr>(.*?)</tr>", text, re.S)
    return [
        [
            " ".join(Page(c).text.split())
            for c in re.findall(r"<t[hd].*?</t[hd]>", line, re.S)
        ]
        for line in lines
    ]


def test_every_run_is_in_it_and_every_number_of_the_table(sweep):
    found = page(sweep)
    for method, tokens in SCORES:
        assert f"m-{method}-{tokens}-hf" in found.text
    (table,) = tables(str(sweep / "runs"), statistics=True)
    header, groups = grid(table)
    shown = rows((sweep / "report.html").read_text())
    assert header in shown
    for line in (line for group in groups for line in group):
        number_percent_marks_interval = [
            [cell[i] for i in (0, 1, 3, 2)] for cell in map(parts, line[1:])
        ]
        assert [
            line[0],
            *("".join(cell) for cell in number_percent_marks_interval),
        ] in [
            [row[0], *(cell.replace(" ", "") for cell in row[1:])]
            for row in shown
            if row
        ]
    (by_hand,) = (row for row in shown if row[:2] == ["fastv", "8"])
    assert [cell.split()[:2] for cell in by_hand[5:7]] == [
        ["80.0", "88.9%"],
        ["70.0", "87.5%"],
    ]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("92.5 (93.1%, 91.2-94.9)≈†", ("92.5", "93.1%", "91.2-94.9", "≈†")),
        ("100.0 (100.0%)", ("100.0", "100.0%", "", "")),
        ("0 (of 0)", ("0", "of 0", "", "")),
        ("96.4%, 92.9-100.0", ("96.4%", "", "92.9-100.0", "")),
        ("-", ("-", "", "", "")),
    ],
)
def test_a_cell_is_taken_apart(text, expected):
    assert parts(text) == expected


def test_nothing_is_asked_for_and_nothing_foreign_can_run(sweep):
    found = page(sweep)
    data, script = found.all("script")
    assert (data, script) == ({"type": "application/json", "id": "browser-data"}, {})
    assert not found.all("link", rel="stylesheet")
    for _, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "action", "poster", "srcset", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert not re.search(r"url\((?!#)|@import", "".join(found.styles))
    (policy,) = found.all("meta", **{"http-equiv": "Content-Security-Policy"})
    *others, script_rule, _, _ = policy["content"].split("; ")
    assert others == [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
    ]
    text = re.search(
        r"<script>(.*?)</script>",
        (sweep / "report.html").read_text(encoding="utf-8"),
        re.S,
    )[1]
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert script_rule == f"script-src 'sha256-{digest}'"


def test_ids_are_unique_and_links_have_targets(sweep):
    put(
        sweep / "runs", "vanilla", None, "gqa", [sample(0, 1.0)], prompt="vicuna_v1"
    )  # a second section
    found = page(sweep)
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {
        a["href"] for _, a in found.elements if a.get("href", "").startswith("#")
    }
    targets -= {
        target
        for target in targets
        if target == "#" or target.startswith("#questions?")
    }
    assert targets <= {f"#{i}" for i in ids}
    assert len(found.all("use")) > 10
    clips = {a["clip-path"] for _, a in found.elements if "clip-path" in a}
    assert clips and clips <= {f"url(#{i})" for i in ids}


def test_what_a_model_says_stays_text(tmp_path):
    samples = [
        sample(i, 0.0, prediction=said, target=said) for i, said in enumerate(HOSTILE)
    ]
    samples += [
        sample(3, 0.0, error=HOSTILE[0]),
        sample(4, 1.0, prediction=HOSTILE[1] * 20),
    ]
    put(tmp_path / "runs", "vanilla", None, "gqa", samples, pictures=range(5))
    found = page(tmp_path)
    assert len(found.all("script")) == 2 and not found.all("img")
    for said in HOSTILE:
        assert said in found.text
    assert HOSTILE[1] * 20 in found.text
    assert "7 * 7" in found.text


def test_names_stay_text(tmp_path):
    """Those of methods and tasks too, and in plots."""
    name, task = "$x_1$<b>&'\"", "$a$ <i>task"
    for method, tokens in (("vanilla", None), ("x", 8)):
        path = put(
            tmp_path / "runs",
            method,
            tokens,
            "t",
            [sample(i, 1.0, kept=[[i]], merged=[[]]) for i in (1, 2)],
        )
        record = records.read(path) | {"task": task}
        record["config"]["method"]["name"] = name if tokens else "vanilla"
        path.write_text(json.dumps(record))
    found = page(tmp_path)
    assert not found.all("b") and not found.all("i")
    assert found.labels.count(name) == 4
    assert found.labels.count(f"{task} (accuracy)") == 4
    assert name in found.text and task in found.text


def test_sections_without_data_say_so(tmp_path):
    put(tmp_path / "runs", "vanilla", None, "gqa", [sample(i, 1.0) for i in range(3)])
    text = page(tmp_path).text
    for sentence in (
        "There is no method beside the upper bound that has a score on every benchmark.",
        "There is no method beside the upper bound that has a score.",
        "There are no pictures beside these records.",
        "No two runs of one budget say which tokens they keep.",
        "Every sample was read, and every answer has its score.",
    ):
        assert sentence in text


def test_the_manifest_says_once_what_all_have_in_common(sweep):
    path = sweep / "runs" / "m-fastv-8-hf" / "gqa.json"
    record = json.loads(path.read_text())
    record["machine"]["device"] = "another-gpu"
    path.write_text(json.dumps(record))
    manifest = page(sweep).text.split("Common to all")[1].split("Configurations")[0]
    assert [
        manifest.count(name)
        for name in ("the-weights", "the-commit", "c0ffee and changes", "Linux")
    ] == [1] * 4
    found = rows((sweep / "report.html").read_text())
    header = next(row for row in found if row[:2] == ["run", "benchmark"])
    assert header == ["run", "benchmark", "device's name"]
    assert ["m-fastv-8-hf", "gqa", "another-gpu"] in found
    assert ["m-fastv-4-hf", "gqa", "the-gpu"] in found


def test_failures_are_told_once_with_their_runs(sweep):
    for method, tokens in (("vanilla", None), ("fastv", 8)):
        samples = [
            sample(0, 1.0),
            sample(7, 0.0, error="cut off"),
            sample(8, None, unscored="the judge was away"),
        ]
        put(sweep / "runs", method, tokens, "mmvet", samples)
    page(sweep)
    found = rows((sweep / "report.html").read_text())
    told = [row for row in found if row and row[0] == "mmvet"]
    assert [row[1:4] for row in told] == [
        ["7", "not read", "cut off"],
        ["8", "no verdict", "the judge was away"],
    ]
    assert all("m-vanilla-None-hf, m-fastv-8-hf" in row[4] for row in told)


def test_the_gallery_shows_what_is_kept(sweep):
    found = page(sweep)
    images = found.all("image")
    assert len(images) == 2  # each picture once, however many runs saw it
    for image in images:
        kind, _, content = image["href"].partition(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(BytesIO(base64.b64decode(content))).size == (8, 8)
        assert (image["width"], image["height"]) == ("4", "4")
    assert len(found.all("use", href=f"#{images[0]['id']}")) == len(SCORES)
    dropped = {a["d"] for a in found.all("path") if a.get("class") == "dropped"}
    assert dropped == {
        "M2 0h2v1h-2zM0 1h1v1h-1zM2 1h2v1h-2zM0 2h4v1h-4zM0 3h3v1h-3z"
    }  # all but 0, 1, 5 and 15
    assert {a["d"] for a in found.all("path") if a.get("class") == "merged"} == {
        "M3.1 3.1h.8v.8h-.8z"
    }
    assert "3 kept + 1 merged" in found.text
    assert found.text.count("target 0") == 1


def test_paths_over_a_picture():
    assert covering([], 4) == ""
    assert (
        covering([3, 4], 4) == "M3 0h1v1h-1zM0 1h1v1h-1z"
    )  # not one piece: a row ends between them
    assert covering([4, 6], 4) == "M0 1h1v1h-1zM2 1h1v1h-1z"
    assert covering([6, 5], 4) == "M1 1h2v1h-2z"
    assert outlining([6], 4) == "M2.1 1.1h.8v.8h-.8z"


@pytest.mark.parametrize(
    "given, said",
    [
        ({"score": 1.0}, "right"),
        ({"score": 0.0}, "wrong"),
        ({"score": 0.3333}, "score 0.333"),
        ({"score": None, "unscored": "x"}, "no verdict"),
        ({"score": 0.0, "error": "x"}, "not read"),
    ],
)
def test_verdicts(given, said):
    assert verdict(given) == said


def test_overlap_by_hand(tmp_path):
    """Of two samples 1 of 3 and 2 of 4 positions are shared; a third has two pictures of which 1 of 4 is."""
    kept = {
        "fastv": [[[0, 1]], [[0, 1, 2]], [[5], [0, 1]]],
        "visionzip": [[[1, 2]], [[1, 2, 3]], [[6], [1]]],
        "pool": [[[]], [[]], [[], []]],
    }
    put(tmp_path / "runs", "vanilla", None, "gqa", [sample(i, 1.0) for i in range(3)])
    for method, of in kept.items():
        samples = [
            sample(i, 1.0, kept=sets, merged=[[] for _ in sets])
            for i, sets in enumerate(of)
        ]
        put(tmp_path / "runs", method, 4, "gqa", samples)
    page(tmp_path)
    found = rows((tmp_path / "report.html").read_text())
    share = f"{(1 / 3 + 2 / 4 + 1 / 4) / 3:.2f}"
    assert share == "0.36"
    assert ["fastv", "2.7", "-", share] in found
    assert ["visionzip", "2.3", share, "-"] in found
    assert not [row for row in found if row[0] == "pool" and len(row) == 4]


def test_overlap_is_of_shared_samples_only():
    ours = {"a": [overlap.bits([0, 1])], "b": [overlap.bits([2])], "c": [0]}
    theirs = {"a": [overlap.bits([1])], "c": [0], "d": [overlap.bits([2])]}
    assert (
        overlap.mean_iou(ours, theirs) == 0.5
    )  # of a; b and d have one run, in c nothing is kept
    assert overlap.matrix([ours, theirs]) == [[1.0, 0.5], [0.5, 1.0]]
    assert overlap.mean_iou({"b": [1]}, {"a": [1]}) is None


def test_the_front_is_what_nothing_beats():
    points = [(3, 7), (1, 5), (2, 4), (3, 9), (5, 9), (4, 8), (1, 3)]
    assert plots.front(points) == [(1, 5), (3, 9)]


def test_plots_show_the_table(sweep):
    (table,) = tables(str(sweep / "runs"), statistics=True)
    seconds = [0.5 + i for i, _ in enumerate(table.rows)]
    tokens, time, curves, *bars = plots.plots(table, seconds)
    assert [plot.column for plot in (tokens, time, curves)] == [None, None, None]
    assert None not in [plot.column for plot in bars]
    for plot, values in ((tokens, [row.mean for row in table.rows]), (time, seconds)):
        (axes,) = plot.figure.axes
        shown = {
            c.get_label(): list(zip(*c.lines[0].get_data(), strict=True))
            for c in axes.containers
        }
        for row, value in zip(table.rows, values, strict=True):
            assert (value, row.average) in shown[row.label]
        for row in table.rows[1:]:  # the upper bound is compared with nothing
            assert axes.get_ylim()[0] < row.average_comparison.low
        assert " ".join(axes.get_xlabel().split()) in plot.about
    (axes,) = bars[0].figure.axes
    (fastv,) = (
        c for c in axes.containers if c.get_label() == "fastv" and hasattr(c, "patches")
    )
    cells = [row.cells[table.columns[0]] for row in table.rows if row.label == "fastv"]
    assert [100 + p.get_height() for p in fastv.patches] == pytest.approx(
        [cell.percent for cell in cells]
    )
    whiskers = [segment[:, 1] for segment in fastv.errorbar.lines[2][0].get_segments()]
    assert [list(w) for w in whiskers] == [
        pytest.approx([c.comparison.low, c.comparison.high]) for c in cells
    ]


def test_a_curve_is_of_one_benchmark_in_its_own_metric(sweep):
    (table,) = tables(str(sweep / "runs"), statistics=True)
    panels = plots.curves(table).axes
    assert (
        [axes.get_title() for axes in panels]
        == table.columns
        == ["zipeval_shapes", "GQA"]
    )
    for axes, column in zip(panels, table.columns, strict=True):
        assert axes.get_ylabel() == {"GQA": "exact_match x 100"}.get(
            column, "accuracy x 100"
        )
        shown = {c.get_label(): c for c in axes.containers}
        cells = [
            row.cells[column] for row in reversed(table.rows) if row.label == "fastv"
        ]
        x, y = shown["fastv"].lines[0].get_data()
        assert (
            [*x]
            == [row.mean for row in reversed(table.rows) if row.label == "fastv"]
            == [4, 8]
        )
        assert [*y] == [cell.score for cell in cells]
        bound = table.rows[0].cells[column].score
        ends = [
            [*segment[:, 1]] for segment in shown["fastv"].lines[2][0].get_segments()
        ]
        expected = [
            [bound * end / 100 for end in (c.comparison.low, c.comparison.high)]
            for c in cells
        ]
        assert ends == [pytest.approx(interval) for interval in expected]
        assert shown["vanilla"].lines[0].get_ydata() == [bound]
    alone = replace(table, rows=table.rows[:1])
    assert plots.curves(alone) is None


def test_time_is_a_batchs_share_and_needs_every_benchmark(sweep):
    samples = [sample(i, 1.0, latency=8.0, batch=4) for i in range(4)] + [
        sample(4, 1.0, latency=3.0, batch=1)
    ]
    path = put(sweep / "runs", "vanilla", None, "mmvet", samples)
    from zipeval.reporting.html.report import outcome

    (table,) = tables(str(sweep / "runs"), statistics=True)
    outcomes = {
        c.record["path"]: outcome(c.record)
        for row in table.rows
        for c in row.cells.values()
    }
    assert outcomes[str(path)].seconds == pytest.approx((4 * 2.0 + 3.0) / 5)
    seconds = plots.seconds_of_rows(
        table, {path: found.seconds for path, found in outcomes.items()}
    )
    assert seconds[0] == pytest.approx((0.8 + 0.8 + 2.2) / 3)
    assert seconds[1] is None
    assert outcome(records.read(path) | {"reuse": "features"}).seconds is None


def test_plots_are_written_as_pdf_and_svg_and_always_alike(sweep):
    written = report(
        str(sweep / "runs"), sweep / "out" / "report.html", sweep / "plots"
    )
    names = ["tokens", "time", "curves", "bars-1-zipeval_shapes", "bars-2-GQA"]
    expected = [f"1-m-{name}.{form}" for name in names for form in ("pdf", "svg")]
    assert [path.name for path in written] == ["report.html", *expected]
    for path in written[1:]:
        if path.suffix == ".pdf":
            assert path.read_bytes().startswith(b"%PDF-")
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
    again = report(
        str(sweep / "runs"), sweep / "again" / "report.html", sweep / "again"
    )
    assert [p.read_bytes() for p in written] == [p.read_bytes() for p in again]


def test_the_command(sweep, monkeypatch, capsys):
    monkeypatch.chdir(sweep)
    monkeypatch.setattr(
        sys, "argv", ["zipeval", "report", "results=runs", "out=a/b.html", "plots=p"]
    )
    cli.main()
    assert capsys.readouterr().out.splitlines()[:2] == ["a/b.html", "p/1-m-tokens.pdf"]
    assert (sweep / "a" / "b.html").is_file()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["results=nowhere"], "results=nowhere: no records"),
        (
            ["results=runs", "out=file/below.html"],
            "out=file/below.html: cannot write there",
        ),
        (
            ["results=runs", "plots=file"],
            "out=report.html plots=file: cannot write there",
        ),
        (
            ["results=runs", "plot=p"],
            "plot: no such setting of `zipeval report`. Did you mean plots?",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refused(arguments, said, sweep, monkeypatch, capsys):
    monkeypatch.chdir(sweep)
    (sweep / "file").touch()
    monkeypatch.setattr(sys, "argv", ["zipeval", "report", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_report_needs_no_torch(sweep):
    code = (
        "import sys; from pathlib import Path; from zipeval.reporting.html.report import report\n"
        f"report({str(sweep / 'runs')!r}, Path({str(sweep / 'r.html')!r}), Path({str(sweep / 'p')!r}))\n"
        "print({'torch', 'transformers', 'lmms_eval', 'matplotlib.pyplot'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
