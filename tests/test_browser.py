"""The rows of the browser of questions, and the server that gives them out; for its page see test_browser_page.py."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import HOSTILE, put, sample

from zipeval import cli
from zipeval.errors import UsageError
from zipeval.reporting.html import browser, page
from zipeval.reporting.html.browser import Query, read_section, select
from zipeval.reporting.html.live import LiveResults
from zipeval.reporting.html.report import MOST_DATA, report
from zipeval.reporting.html.sample_columns import read_columns
from zipeval.reporting.html.server import ViewServer
from zipeval.reporting.scored_samples import parse_samples
from zipeval.reporting.stats import compare
from zipeval.reporting.tables import tables
from zipeval.results import records

TASKS = ("zipeval_shapes", "gqa")
# Right answers, as numbers of questions: of 12 that vanilla is asked it has all but two.
RIGHT = {
    ("vanilla", None): {*range(10)},
    ("fastv", 8): {*range(8), 10},
    ("visionzip", 8): {*range(7), 11},
    ("visionzip", 4): {0, 1, 2, 10, 11},
}
LOST = {"fastv 8": 2, "visionzip 8": 3, "visionzip 4": 7}
GAINED = {"fastv 8": 1, "visionzip 8": 1, "visionzip 4": 2}


def asked(doc_id, right, tokens, **more):
    """A sample as a record of schema 6 has it."""
    traced = (
        {"kept": [[0, 1, 5]], "merged": [[15]], "visual_tokens": [16, tokens]}
        if tokens
        else {}
    )
    question = {
        "question": f"What is in picture {doc_id}?\nAnswer briefly.",
        "kind": ("colour", "shape")[doc_id % 2],
    }
    prediction = f"answer {doc_id}" if right else f"nonsense {doc_id}"
    return (
        sample(doc_id, float(right), **question, **traced, prediction=prediction) | more
    )


@pytest.fixture
def sweep(tmp_path):
    """vanilla and two methods at two budgets, on two benchmarks."""
    for task in TASKS:
        for (method, tokens), right in RIGHT.items():
            samples = [asked(i, i in right, tokens) for i in range(12)]
            put(tmp_path / "runs", method, tokens, task, samples, pictures=(0, 1))
    return tmp_path


def section_of(directory, number=0):
    made = tables(str(directory / "runs"))
    return read_section(made[number], page.identities(made)[number])


def documents(section, **query):
    return [
        section.benchmarks[t].documents[row]
        for t, row in select(section, Query(**query)).places
    ]


def test_what_a_run_lost_is_what_the_table_says(sweep):
    section = section_of(sweep)
    (table,) = tables(str(sweep / "runs"), statistics=True)
    for row in table.rows[1:]:
        name = f"{row.label} {row.tokens}"
        for cell in row.cells.values():
            comparison = cell.comparison
            chosen = {"benchmark": cell.record["task"], "run": name}
            assert (
                len(documents(section, outcome="lost", **chosen))
                == comparison.lost
                == LOST[name]
            )
            assert (
                len(documents(section, outcome="gained", **chosen))
                == comparison.gained
                == GAINED[name]
            )
        assert (
            len(documents(section, outcome="lost", run=name)) == 2 * LOST[name]
        )  # of both benchmarks


def test_filters_by_hand(sweep):
    section = section_of(sweep)
    gqa = {"benchmark": "gqa"}
    assert documents(section, **gqa, outcome="lost", run="visionzip 8") == [
        "7",
        "8",
        "9",
    ]
    assert documents(section, **gqa, outcome="wrong", run="vanilla") == ["10", "11"]
    assert documents(section, **gqa, outcome="right", run="visionzip 4") == [
        "0",
        "1",
        "2",
        "10",
        "11",
    ]
    assert documents(section, **gqa, outcome="gained", run="*") == ["10", "11"]
    assert documents(section, **gqa, outcome="lost", run="*", method="fastv") == [
        "8",
        "9",
    ]
    assert documents(section, **gqa, outcome="lost", run="*", budget="8") == [
        "7",
        "8",
        "9",
    ]
    assert documents(section, **gqa, kind="shape", outcome="lost", run="fastv 8") == [
        "9"
    ]
    assert documents(section, **gqa, text="PICTURE 1") == ["1", "10", "11"]
    assert documents(section, **gqa, text="nonsense 3") == ["3"]
    assert (
        documents(section, **gqa, text="nonsense 3", budget="8") == []
    )  # that budget did not say so
    assert documents(section, **gqa, text="#11") == ["11"]
    assert documents(section, text="#11") == ["11", "11"]
    assert select(section, Query(method="fastv")).runs == [0, 1]


def test_rows_are_sorted_by_how_many_runs_fail(sweep):
    section = section_of(sweep)
    counts = {i: sum(i not in right for right in RIGHT.values()) for i in range(12)}
    worst_first = sorted(range(12), key=lambda i: -counts[i])
    assert documents(section, benchmark="gqa", sort="most-fail") == [
        *map(str, worst_first)
    ]
    best_first = sorted(range(12), key=lambda i: counts[i])
    assert documents(section, benchmark="gqa", sort="fewest-fail") == [
        *map(str, best_first)
    ]
    row = browser.row_data(section.benchmarks["gqa"], 10, [0, 1])
    assert [(a["run"], a["verdict"], a["flags"]) for a in row["answers"]] == [
        (0, "wrong", browser.SCORED | browser.FAILS),
        (1, "right", browser.SCORED | browser.GAINED),
    ]


def test_graded_scores_fail_where_they_are_worse_than_the_bounds(tmp_path):
    grades = {"vanilla": [8.0, 5.0, 1.0, 3.0], "fastv": [7.0, 6.0, 1.0, 0.0]}
    for method, scores in grades.items():
        samples = [sample(i, score) for i, score in enumerate(scores)]
        put(
            tmp_path / "runs",
            method,
            None if method == "vanilla" else 8,
            "mmvet",
            samples,
        )
    section = section_of(tmp_path)
    assert documents(section, outcome="lost", run="fastv 8") == ["0", "3"]
    assert documents(section, outcome="gained", run="fastv 8") == ["1"]
    assert documents(section, outcome="wrong", run="vanilla") == []
    assert section.benchmarks["mmvet"].answers[1].verdicts == [
        "score 7",
        "score 6",
        "score 1",
        "score 0",
    ]


def test_lower_scores_are_gained_where_lower_is_better(tmp_path):
    errors = {"vanilla": [0.2, 0.5, 0.0], "fastv": [0.4, 0.1, 0.0]}
    for method, scores in errors.items():
        samples = [sample(i, score) for i, score in enumerate(scores)]
        path = put(
            tmp_path / "runs",
            method,
            None if method == "vanilla" else 8,
            "wer",
            samples,
        )
        record = json.loads(path.read_text()) | {
            "higher_is_better": False,
            "from_samples": False,
        }
        path.write_text(json.dumps(record))
    section = section_of(tmp_path)
    assert documents(section, outcome="lost", run="fastv 8") == ["0"]
    assert documents(section, outcome="gained", run="fastv 8") == ["1"]
    assert documents(section, outcome="wrong", run="fastv 8") == ["0"]
    assert section.benchmarks["wer"].answers[0].verdicts == [
        "score 0.2",
        "score 0.5",
        "score 0",
    ]


def test_what_has_no_score_is_neither_lost_nor_gained(tmp_path):
    put(tmp_path / "runs", "vanilla", None, "mmvet", [sample(i, 1.0) for i in range(3)])
    waiting = [
        sample(0, None, unscored="away"),
        sample(1, 0.0, error="cut off"),
        sample(2, 1.0),
    ]
    put(tmp_path / "runs", "fastv", 8, "mmvet", waiting)
    section = section_of(tmp_path)
    assert documents(section, outcome="lost", run="fastv 8") == [
        "1"
    ]  # as in the table: it counts as wrong
    assert documents(section, outcome="right", run="fastv 8") == ["2"]
    assert section.benchmarks["mmvet"].answers[1].verdicts == [
        "no verdict",
        "not read",
        "right",
    ]
    bound, run = (
        records.read_samples(p.parent, records.read(p))
        for p in sorted((tmp_path / "runs").glob("*/*.json"))[::-1]
    )
    assert compare("mmvet", run, bound).lost == 1


def test_the_kind_of_a_question_is_the_one_score_beside_its_metric():
    from zipeval.reporting.html.sample_columns import kind_of_question

    record = {"metric": "accuracy"}
    assert (
        kind_of_question(record, {"scores": {"accuracy": 1.0, "accuracy_colour": 1.0}})
        == "colour"
    )
    assert (
        kind_of_question(
            record, {"scores": {"accuracy": 1.0, "accuracy_a": 1.0, "accuracy_b": 0.0}}
        )
        == ""
    )
    assert kind_of_question(record, {"scores": {"accuracy_colour": 1.0}}) == ""
    assert kind_of_question(record, {"scores": {}, "kind": "popular"}) == "popular"


def test_records_of_before_show_what_they_have(tmp_path):
    put(tmp_path / "runs", "vanilla", None, "gqa", [sample(i, 1.0) for i in range(2)])
    section = section_of(tmp_path)
    row = browser.row_data(section.benchmarks["gqa"], 1, [0])
    assert (row["question"], row["choices"], row["kind"], row["target"]) == (
        None,
        None,
        "",
        "target 1",
    )
    # Those of now beside a bound of before bring the questions along.
    put(
        tmp_path / "runs",
        "fastv",
        8,
        "gqa",
        [sample(i, 1.0, question=f"What {i}?", choices=["a", "b"]) for i in range(2)],
    )
    row = browser.row_data(section_of(tmp_path).benchmarks["gqa"], 1, [0])
    assert (row["question"], row["choices"]) == ("What 1?", ("a", "b"))


def test_runs_about_other_questions_are_refused(sweep):
    put(sweep / "runs", "vanilla", None, "mmvet", [sample(0, 1.0)])
    put(sweep / "runs", "fastv", 8, "mmvet", [sample(0, 1.0, question_hash="another")])
    with pytest.raises(
        UsageError, match=r"tasks=\[mmvet\]: .* are not about the same questions"
    ):
        section_of(sweep)


def test_kept_tokens_are_bits_of_the_first_crop():
    kept = {"kept": [[0, 3, 9, 99], [1]], "merged": [[2], []], "visual_tokens": [16, 6]}
    assert browser.sample_tokens(kept, side=4) == {
        "layers": [16, 6],
        "kept": f"{1 + 8 + 512:x}",
        "merged": "4",
        "kept_count": 5,
        "merged_count": 1,
    }
    assert browser.sample_tokens(kept, side=4, positions=False) == {"layers": [16, 6]}
    assert browser.sample_tokens({"error": "cut off"}, side=4) == {"layers": []}


numbers = st.lists(st.integers(0, 600), max_size=4)
texts = st.text() | st.sampled_from(
    ['"kept": [[1]], "', '\\"kept": [1], "', '], "', "\n", *HOSTILE]
)


@given(
    st.lists(
        st.tuples(
            texts, texts, st.lists(numbers, max_size=2), st.permutations(range(6))
        ),
        max_size=3,
    )
)
def test_positions_are_cut_out_and_nothing_else(drawn):
    """Whatever the texts are, and wherever the positions stand."""
    samples = []
    for question, prediction, sets, order in drawn:
        fields = [
            ("question", question),
            ("prediction", prediction),
            ("kept", sets),
            ("merged", sets),
        ]
        fields += [("visual_tokens", [16, 4]), ("score", 1.0)]
        samples.append(dict(fields[i] for i in order))
    content = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples).encode(
        "utf-8", "surrogatepass"
    )
    try:
        content.decode()
    except UnicodeDecodeError:
        return  # no record can be written with it
    assert parse_samples(content) == samples
    lean = parse_samples(content, positions=False)
    for sample_, whole in zip(lean, samples, strict=True):
        for name in ("question", "prediction", "score"):
            assert sample_[name] == whole[name]
        assert not sample_.keys() - whole.keys()


def test_a_samples_line_is_found_again(sweep):
    path = next((sweep / "runs").glob("*visionzip-8*/gqa.json"))
    record = records.read(path)
    columns = read_columns(record)
    assert list(columns.file.read([11, 0])) == [
        records.read_samples(path.parent, record)[row] for row in (11, 0)
    ]


# ---------------------------------------------------------------- the file


def data_of(path: Path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(text.split('id="browser-data">')[1].split("</script>")[0])


def test_the_file_holds_all_questions_and_the_tokens_of_those_with_a_picture(sweep):
    report(str(sweep / "runs"), sweep / "report.html")
    (section,) = data_of(sweep / "report.html")["sections"]
    pool, (shapes, gqa) = section["pool"], section["benchmarks"]
    assert [benchmark["count"] for benchmark in (shapes, gqa)] == [12, 12]
    assert [pool[number] for number in gqa["questions"]][
        3
    ] == "What is in picture 3?\nAnswer briefly."
    answers = gqa["answers"]["1"]
    assert (
        sum(int(flags, 16) & browser.LOST > 0 for flags in answers["flags"])
        == LOST["fastv 8"]
    )
    assert answers["tokens"].keys() == {"0", "1"} == gqa["pictures"].keys()
    assert pool[answers["layers"]] == [16, 8]
    assert len(set(map(json.dumps, pool))) == len(pool)


def test_no_text_ends_the_script_that_holds_it(tmp_path):
    samples = [
        sample(i, 0.0, prediction=text, target=text, question=text)
        for i, text in enumerate([*HOSTILE, "<!--\u2028"])
    ]
    put(tmp_path / "runs", "vanilla", None, "gqa", samples)
    report(str(tmp_path / "runs"), tmp_path / "report.html")
    block = (
        (tmp_path / "report.html")
        .read_text()
        .split('id="browser-data">')[1]
        .split("</script>")[0]
    )
    assert not {*"<>&\u2028"} & {*block}
    (section,) = json.loads(block)["sections"]
    assert {*HOSTILE, "<!--\u2028"} <= {
        text for text in section["pool"] if isinstance(text, str)
    }


def test_a_file_that_would_be_too_large_says_so_and_has_no_links(sweep, monkeypatch):
    monkeypatch.setattr("zipeval.reporting.html.report.MOST_DATA", 1000)
    report(str(sweep / "runs"), sweep / "report.html")
    text = (sweep / "report.html").read_text()
    assert "sections" not in data_of(sweep / "report.html")
    assert (
        "None are in it." in text and f"zipeval view results={sweep / 'runs'}" in text
    )
    assert 'href="#questions?' not in text
    assert MOST_DATA <= 10_000_000


# ---------------------------------------------------------------- the server


@contextmanager
def serving(directory, host="127.0.0.1"):
    server = ViewServer(LiveResults(str(directory)), host, 0)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}
    )
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection(
        "127.0.0.1", server.server_address[1], timeout=30
    )
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, dict(response.getheaders()), body


def answer(server, path):
    status, headers, body = ask(server, path)
    assert (status, headers["Content-Type"]) == (200, "application/json"), body
    return json.loads(body)


@pytest.fixture
def server(sweep):
    with serving(sweep / "runs") as started:
        assert ask(started, "/")[0] == 200
        yield started


def test_rows_come_in_pages(server, monkeypatch):
    monkeypatch.setattr(browser, "PAGE", 5)
    found = answer(server, "/api/rows?outcome=lost&run=visionzip+4")
    assert (found["total"], len(found["rows"]), found["runs"]) == (14, 5, [0, 1, 2, 3])
    assert [row["document"] for row in found["rows"]] == ["3", "4", "5", "6", "7"]
    last = answer(server, "/api/rows?outcome=lost&run=visionzip+4&page=3")
    assert [(row["task"], row["document"]) for row in last["rows"]] == [
        ("gqa", str(i)) for i in (6, 7, 8, 9)
    ]
    assert answer(server, "/api/rows?outcome=lost&run=visionzip+4&page=4")["rows"] == []


def test_a_question_comes_with_its_tokens_and_its_neighbours(server):
    found = answer(
        server, "/api/sample?task=gqa&document=8&outcome=lost&run=fastv+8&benchmark=gqa"
    )
    assert found["row"]["question"] == "What is in picture 8?\nAnswer briefly."
    assert found["tokens"]["1"] == {
        "layers": [16, 8],
        "kept": "23",
        "merged": "8000",
        "kept_count": 3,
        "merged_count": 1,
    }
    assert (found["position"], found["total"], found["neighbours"]) == (
        0,
        2,
        [None, ["gqa", "9"]],
    )
    assert not found["pictured"]
    assert answer(server, "/api/sample?task=gqa&document=1")["pictured"]
    assert answer(server, "/api/sample?task=gqa&document=99") == {
        "problem": "There is no question 99 of gqa here."
    }
    outside = answer(server, "/api/sample?task=gqa&document=1&outcome=lost&run=fastv+8")
    assert (outside["position"], outside["neighbours"]) == (-1, [None, None])


def test_pictures_are_those_of_the_records(server, sweep):
    status, headers, body = ask(server, "/picture?task=gqa&document=1")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert (
        body == next((sweep / "runs").glob("*vanilla*/gqa.images/1.jpg")).read_bytes()
    )
    status, headers, _ = ask(server, "/picture?task=gqa&document=5")
    assert (status, headers["Content-Type"]) == (200, "image/svg+xml")


@pytest.mark.parametrize(
    "path",
    [
        "/nowhere",
        "/../../../etc/passwd",
        "/..%2f..%2fetc/passwd",
        "/m-vanilla-None-hf/gqa.json",
        "/picture?task=gqa&document=../../gqa",
        "/picture?task=..&document=1",
        "/picture?task=gqa",
        "/api/sample?task=pope&document=1",
        "/api/rows?table=nowhere",
        "/api/rows?outcome=lost&run=nobody",
        "/api/rows?outcome=stolen",
        "/api/rows?sort=upwards",
        "/api/rows?benchmark=pope",
        "/api/rows?page=many",
        "/api/rows?" + "&".join(f"a{i}=1" for i in range(99)),
    ],
)
def test_only_what_the_directory_has_is_served(server, path):
    status, _, body = ask(server, path)
    assert status in (400, 404) and b"root:" not in body


@pytest.mark.parametrize(
    "method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"]
)
def test_nothing_but_get_is_served(server, method):
    status, headers, _ = ask(server, "/", method)
    assert (status, headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost:9999", "[::1]:80", "LOCALHOST"]
)
def test_this_machines_names_are_answered(server, host):
    assert ask(server, "/api/sections", Host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "192.168.1.7",
        "localhost.evil.example:80",
        "[",
    ],
)
def test_another_name_is_refused(server, host):
    """A page of that name would read the results with it: DNS rebinding."""
    for path in ("/", "/api/sections", "/picture?task=gqa&document=1"):
        status, _, body = ask(server, path, Host=host)
        assert status in (400, 421) and b"vanilla" not in body


def test_a_request_without_a_host_or_for_another_server_is_refused(server):
    with socket.create_connection(server.server_address[:2]) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b" 421 " in connection.makefile("rb").readline()
    assert ask(server, "http://evil.example/", Host="127.0.0.1")[0] == 421


def test_another_address_is_served_when_it_is_asked_for(sweep):
    with serving(sweep / "runs", "0.0.0.0") as started:
        for host, expected in {
            "192.168.1.7": 200,
            socket.gethostname(): 200,
            "evil.example": 421,
        }.items():
            assert ask(started, "/", Host=host)[0] == expected


def test_no_foreign_page_can_use_it(server):
    for path in ("/", "/api/rows", "/picture?task=gqa&document=1", "/nowhere"):
        _, headers, _ = ask(server, path)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert "Access-Control-Allow-Origin" not in headers


def test_new_records_appear_when_the_page_is_loaded_again(sweep):
    with serving(sweep / "runs") as started:
        ask(started, "/")
        assert len(answer(started, "/api/sections")["sections"][0]["runs"]) == 4
        put(sweep / "runs", "fastv", 4, "gqa", [asked(i, False, 4) for i in range(12)])
        assert (
            len(answer(started, "/api/sections")["sections"][0]["runs"]) == 4
        )  # the page that is shown stays valid
        assert b"fastv+4" in ask(started, "/")[2]
        assert answer(started, "/api/rows?outcome=lost&run=fastv+4")["total"] == 10


def test_a_sweep_under_way_is_shown_as_far_as_it_is(tmp_path):
    (tmp_path / "runs").mkdir()
    with serving(tmp_path / "runs") as started:
        assert b"no records" in ask(started, "/")[2]
        assert answer(started, "/api/sections") == {"sections": []}
        put(tmp_path / "runs", "fastv", 8, "gqa", [asked(0, True, 8)])
        assert b"no record has an upper bound yet" in ask(started, "/")[2]
        put(tmp_path / "runs", "vanilla", None, "gqa", [asked(0, True, None)])
        put(tmp_path / "runs", "fastv", 8, "mmvet", [asked(0, True, 8)])
        text = ask(started, "/")[2].decode()
        assert (
            "lost=fastv+8" in text
            and "mmvet.json is left out: it has no upper bound yet" in text
        )
        lines = [
            {"session": {}, "made_with": {}},
            {"doc_id": 0, "at": 1.0},
            {"doc_id": 1, "at": 1.0},
        ]
        from zipeval.results.journal import _line

        folder = tmp_path / "runs" / "m-visionzip-8"
        folder.mkdir()
        (folder / "gqa.journal.jsonl").write_text("".join(map(_line, lines)))
        assert "m-visionzip-8 gqa, 2 answers so far" in ask(started, "/")[2].decode()


def test_a_table_without_upper_bound_is_refused_elsewhere(tmp_path):
    put(tmp_path / "runs", "fastv", 8, "gqa", [asked(0, True, 8)])
    with pytest.raises(UsageError, match="has no upper bound"):
        tables(str(tmp_path / "runs"))


def test_samples_that_changed_are_told_of_in_the_page(sweep):
    with serving(sweep / "runs") as started:
        next((sweep / "runs").glob("*fastv*/gqa.samples.jsonl")).write_text("{}\n")
        ask(started, "/")
        assert (
            "does not match its record" in answer(started, "/api/sections")["problem"]
        )
        assert "does not match its record" in ask(started, "/report")[2].decode()


def test_the_whole_report_is_served_too(server):
    status, _, body = ask(server, "/report")
    text = body.decode()
    assert (
        status == 200
        and 'id="s1-tradeoff"' in text
        and 'id="s1-tradeoff"' not in ask(server, "/")[2].decode()
    )
    assert json.loads(text.split('id="browser-data">')[1].split("</script>")[0]) == {
        "live": True,
        "page": browser.PAGE,
    }
    assert (
        "lost=visionzip+8" in text
        and "Questions that visionzip 8 lost: 3 (and 1 gained)" in text
    )


def test_tables_are_linked_by_what_they_are(sweep):
    """A link stays right when a table comes before it; two that are described alike are two."""
    made = tables(str(sweep / "runs"))
    (before,) = page.identities(made)
    put(
        sweep / "runs", "vanilla", None, "gqa", [asked(0, True, None)], prompt="a-first"
    )
    names = page.identities(tables(str(sweep / "runs")))
    assert len(set(names)) == 2 and before in names
    assert page.identities([made[0], replace(made[0])]) == [before, f"{before}-2"]


# ---------------------------------------------------------------- the command


def start(directory, *arguments):
    command = [sys.executable, "-m", "zipeval", "view", *arguments]
    return subprocess.Popen(
        command,
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_prints_its_address_and_ends_with_ctrl_c(sweep):
    process = start(sweep, "results=runs")
    line = process.stdout.readline()
    assert (
        line.startswith("http://127.0.0.1:") and "shows runs. Ctrl-C ends it." in line
    )
    connection = http.client.HTTPConnection(line.split("/")[2], timeout=30)
    connection.request("GET", "/")
    assert connection.getresponse().read().startswith(b"<!DOCTYPE html>")
    connection.close()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err, out.strip()) == (0, "", "")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["results=nowhere"], "results=nowhere: no such directory"),
        (["results=runs", "port=many"], "port=many: expected a number up to 65535"),
        (["results=runs", "port=70000"], "port=70000: expected a number up to 65535"),
        (["results=runs", "host=203.0.113.9"], "host=203.0.113.9: cannot listen there"),
        (
            ["results=runs", "prot=1"],
            "prot: no such setting of `zipeval view`. Did you mean port?",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refused(arguments, said, sweep, monkeypatch, capsys):
    monkeypatch.chdir(sweep)
    monkeypatch.setattr(sys, "argv", ["zipeval", "view", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_busy_port_is_refused(sweep, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "zipeval",
                "view",
                f"results={sweep / 'runs'}",
                f"port={taken.getsockname()[1]}",
            ],
        )
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 2
    assert (
        "something else listens there. Leave it out, and a free one is taken."
        in capsys.readouterr().err
    )


def test_the_page_needs_neither_torch_nor_plots(sweep):
    code = (
        "import sys; from zipeval.reporting.html.live import LiveResults\n"
        f"live = LiveResults({str(sweep / 'runs')!r}); live.page(); live.now.sections()\n"
        "import zipeval.reporting.server\n"
        "print({'torch', 'transformers', 'lmms_eval', 'matplotlib', 'datasets'} & sys.modules.keys())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.strip() == "set()"


def test_flags_by_hand():
    nan = np.nan
    scores, bound = np.array([1, 0, 0, 1, nan, 0.5]), np.array([1, 1, 0, 0, 1, 0.25])
    flags = browser._flags(scores, bound, True, 0.0)
    scored, fails, lost, gained = (
        browser.SCORED,
        browser.FAILS,
        browser.LOST,
        browser.GAINED,
    )
    assert flags.tolist() == [
        scored,
        scored | fails | lost,
        scored | fails,
        scored | gained,
        0,
        scored | gained,
    ]
