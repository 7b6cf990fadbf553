"""Completion in real shells: what stands on the line when TAB was pressed."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import sys
import time
from pathlib import Path

import pytest

from zipeval.cli.completion import candidates
from zipeval.cli.main import COMMANDS

DECLARED = {name: command for name, (command, _) in COMMANDS.items()}
START = {
    "bash": (
        ["bash", "--norc", "--noprofile", "-i"],
        "source <(zipeval completion bash)\n",
    ),
    "zsh": (
        ["zsh", "-f", "-i"],
        "bindkey -e; autoload -U compinit; compinit -D -u; source <(zipeval completion zsh)\n",
    ),
}
CONTROL = re.compile(r"\x1b[\[?][0-9;?]*[a-zA-Z]|\x1b[=>]|[^\n\x20-\x7e]")
TO_THE_START = "\x01"  # Ctrl-A


class Terminal:
    """A shell in a terminal of its own."""

    def __init__(self, shell: str, cwd: Path):
        command, prepare = START[shell]
        scripts = Path(sys.executable).parent
        environment = {
            **os.environ,
            "PATH": f"{scripts}:{os.environ['PATH']}",
            "TERM": "vt100",
            "HOME": str(cwd),
        }
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            os.chdir(cwd)
            os.execvpe(command[0], command, environment)
        self.output = ""
        self.write("stty cols 200; " + prepare + "PS1='> '; echo RE''ADY\n")
        self.wait_for(r"READY")

    def write(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def wait_for(self, pattern: str) -> re.Match:
        """Return what matches in the text that is shown, behind what was waited for before."""
        end = time.monotonic() + 60
        while not (match := re.search(pattern, shown := CONTROL.sub("", self.output))):
            assert time.monotonic() < end, shown
            if select.select([self.terminal], [], [], 1)[0]:
                self.output += os.read(self.terminal, 65536).decode(errors="replace")
        self.output = shown[match.end() :]
        return match

    def completed(self, keys: str) -> str:
        """Return the line that some keys come to: it is printed in place of being run."""
        self.write(keys + TO_THE_START + "echo RESULT: " + "\n")
        return self.wait_for(r"(?<!echo )RESULT: (zipeval.*)\n")[1]

    def close(self) -> None:
        os.close(self.terminal)
        os.waitpid(self.process, 0)


@pytest.fixture(scope="module", params=START)
def terminal(request, tmp_path_factory):
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed")
    directory = tmp_path_factory.mktemp("completion")
    (directory / "page.html").touch()
    (directory / "configs" / "method").mkdir(parents=True)
    (directory / "configs" / "method" / "outside.yaml").write_text("name: outside\n")
    shell = Terminal(request.param, directory)
    yield shell
    shell.close()


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("zipeval tab\t", "zipeval table"),
        ("zipeval run method=vis\t", "zipeval run method=visionzip"),
        ("zipeval run method=visionzip_\t", "zipeval run method=visionzip_tuned"),
        (
            "zipeval run -m method=vanilla,visionzip_\t",
            "zipeval run -m method=vanilla,visionzip_tuned",
        ),
        ("zipeval run model=tiny_l\ttok\t16", "zipeval run model=tiny_llava tokens=16"),
        ("zipeval run model.dty\tbf\t", "zipeval run model.dtype=bfloat16"),
        ("zipeval run +table=paper_table\t2", "zipeval run +table=paper_table2"),
        ("zipeval table form\tla\t", "zipeval table format=latex"),
        ("zipeval check --max\t1", "zipeval check --max-drop 1"),
        ("zipeval check --format g\t", "zipeval check --format github"),
        ("zipeval list mod\t", "zipeval list models"),
        ("zipeval report out=pa\t", "zipeval report out=page.html"),
        (
            "zipeval run --config-dir con\tmethod=out\t",
            "zipeval run --config-dir configs/method=out",
        ),
        (
            "zipeval run --config-dir configs method=out\t",
            "zipeval run --config-dir configs method=outside",
        ),
    ],
)
def test_a_line_is_completed(keys, line, terminal):
    assert terminal.completed(keys).rstrip() == line


def test_several_candidates_are_listed(terminal):
    terminal.write(
        "zipeval run method=vis\t\t\t"
    )  # bash first completes what all of them begin with
    terminal.wait_for(
        r"visionzip +(method=)?visionzip_tuned|visionzip\s+\S*visionzip_tuned"
    )
    terminal.write("\x15")  # Ctrl-U


def complete(line):
    words = line.split(" ")
    return candidates(words[1:-1], words[-1], DECLARED)


@pytest.mark.parametrize("name", DECLARED)
def test_every_setting_of_a_command_is_offered(name):
    offered = {*complete(f"zipeval {name} "), *complete(f"zipeval {name} --")}
    for setting in DECLARED[name].own_settings:
        assert offered & {f"{setting.name}=", setting.dashed}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("zipeval run mo", ["model.", "model="]),
        ("zipeval run runner.c", ["runner.cache_gib=", "runner.compile="]),
        (
            "zipeval run runner.compile=",
            ["runner.compile=false", "runner.compile=true"],
        ),
        ("zipeval run method=fastv method.k", ["method.keep="]),
        ("zipeval run -m method=visionzip,vis", ["method=visionzip,visionzip_tuned"]),
        ("zipeval run tasks=[pope,gq", ["tasks=[pope,gqa]"]),
        ("zipeval run tokens=16 to", []),
        ("zipeval bench limi", []),
        ("zipeval tune lr", ["lr="]),
        ("zipeval nonsense ", []),
        ("zipeval run nonsense=", []),
        ("zipeval list models ", []),
        (
            "zipeval check --allow-other-code ",
            [
                "against=",
                "allow_other_code=",
                "format=",
                "junit=",
                "max_drop=",
                "results=",
            ],
        ),
    ],
)
def test_candidates(line, offered):
    assert complete(line) == offered


def test_runs_and_sweeps_are_offered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (
        "tiny-vanilla-1/pope.json",
        "tiny-fastv-2/pope.json",
        "sweeps/tiny-3/plan.json",
    ):
        file = tmp_path / "results/runs" / path
        file.parent.mkdir(parents=True)
        file.touch()
    assert complete("zipeval show ti") == ["tiny-fastv-2", "tiny-vanilla-1"]
    assert complete("zipeval status t") == ["tiny-3"]
