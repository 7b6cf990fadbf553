from __future__ import annotations

import re

from zipeval.utils.progress import progress


def test_plain_lines_where_there_is_no_terminal(capsys):
    with progress("run task", 10, every=0) as advance:
        advance(4)
        advance(6)
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"run task: 4/10, \d+ s, \d+ s left", first)
    assert re.fullmatch(r"run task: 10/10, \d+ s, 0 s left", last)


def test_lines_come_now_and_then_and_at_the_end(capsys):
    with progress("run task", 100, every=1000) as advance:
        for _ in range(100):
            advance(1)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress("run task", 10) as advance:
        advance(10)
    assert "10/10" in capsys.readouterr().err
