"""What commands say of themselves, from their declarations, and how they read settings."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import yaml

import zipeval.configs
from zipeval.cli.arguments import Command
from zipeval.cli.main import COMMANDS, main
from zipeval.cli.run_settings import method_settings, run_settings
from zipeval.cli.settings import Operand, Setting, path, positive, switch
from zipeval.config.schema import CHOICES, RunConfig
from zipeval.errors import UsageError
from zipeval.utils.docstrings import attributes

DECLARED = {name: command for name, (command, _) in COMMANDS.items()}
CONFIGS = Path(zipeval.configs.__path__[0])


@pytest.fixture
def zipeval_says(monkeypatch, capsys, tmp_path):
    """(exit code, standard output, standard error) of a command."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["zipeval", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            main()
        except SystemExit as end:
            return end.code or 0, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", DECLARED)
@pytest.mark.parametrize(
    "asks", ["{} --help", "{} -h", "help {}", "{} results=x --help"]
)
def test_every_command_explains_itself(name, asks, zipeval_says):
    """Each setting with its meaning and the values that it takes, nothing else is done."""
    if name == "doctor" and "results" in asks:
        pytest.skip("it has no settings")
    code, said, refused = zipeval_says(*asks.format(name).split())
    assert (code, refused) == (0, "")
    words = " ".join(said.split())
    command = DECLARED[name]
    assert words.startswith(f"usage: zipeval {name}")
    assert " ".join(command.summary.split()) in words
    for setting in command.own_settings:
        assert setting.meaning and setting.label in said
        assert " ".join(setting.help.split()) in words
    for operand in command.operands:
        assert operand.meaning in words


def test_the_overview_names_every_command(zipeval_says):
    for asked in ((), ("--help",), ("help",)):
        code, said, _ = zipeval_says(*asked)
        assert code == 0
        for name, command in DECLARED.items():
            assert f"  zipeval {name}" in said
            assert command.summary.split()[0] in said


@pytest.mark.parametrize("name", ["run", "plan"])
def test_every_setting_of_a_run_is_explained(name, zipeval_says):
    """By the docstring of its class: a setting that is new there is here, too."""
    _, said, _ = zipeval_says(name, "--help")
    words = " ".join(said.split())
    explained = {setting.name for setting in run_settings()}
    nodes = [
        field.default_factory
        for field in fields(RunConfig)
        if is_dataclass(field.default_factory)
    ]
    assert len(nodes) == 4
    for config in (RunConfig, *nodes):
        assert attributes(config).keys() == {field.name for field in fields(config)}
        for attribute in attributes(config).values():
            assert len(attribute.meaning.split()) > 3
    for node in nodes:
        prefix = next(
            field.name for field in fields(RunConfig) if field.default_factory is node
        )
        for name_of_field, attribute in attributes(node).items():
            assert f"{prefix}.{name_of_field}" in explained
            assert attribute.meaning in words
    for setting, choices in CHOICES.items():
        assert (
            f"{setting}={'|'.join('null' if choice is None else choice for choice in choices)}"
            in said
        )


def test_the_defaults_that_are_shown_are_those_of_a_run(zipeval_says):
    """They are said of the classes; configs/run.yaml is what is composed."""
    composed = yaml.safe_load((CONFIGS / "run.yaml").read_text())
    for name, value in asdict(RunConfig()).items():
        if name not in ("model", "method", "tasks"):
            assert composed[name] == value, name
    words = " ".join(zipeval_says("run", "--help")[1].split())
    for group in ("model", "method", "suite"):
        (chosen,) = (entry[group] for entry in composed["defaults"] if group in entry)
        assert f"`zipeval list {group}s` (default: {chosen})" in words


def test_options_of_the_method_that_is_named_are_explained(zipeval_says):
    _, said, _ = zipeval_says("run", "method=fastv,visionzip", "--help")
    words = " ".join(said.split())
    assert "method.ratio=VALUE instead of tokens: share that is dropped" in words
    assert (
        "method.dominant=VALUE counts CLS; null: the paper's 54:10 split of tokens"
        in words
    )
    assert "options of method=" not in zipeval_says("run", "--help")[1]
    assert [setting.name for setting in method_settings("nowhere")] == []


def test_defaults_of_other_commands_than_run_are_theirs(zipeval_says):
    words = " ".join(zipeval_says("bench", "--help")[1].split())
    assert "enters its last layer (default: final)" in words
    words = " ".join(zipeval_says("tune", "--help")[1].split())
    assert "one of `zipeval list methods` (default: visionzip)" in words


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["run", "method=vanilla,visionzip"],
            "several values are a sweep. Add -m: `zipeval run -m method=vanilla,visionzip`",
        ),
        (
            ["run", "method=visionzip", "tokens=48,16"],
            "tokens=48,16: several values are a sweep. Add -m",
        ),
        (
            ["run", "tokens=range(1,4)", "method=fastv"],
            "tokens=range(1,4): several values are a sweep. Add -m",
        ),
        (
            ["run", "tasks=pope,gqa"],
            "tasks=pope,gqa: write tasks=[pope,gqa] for one run on all of them, or add -m",
        ),
        (
            ["run", "--multrun"],
            "--multrun: no such option of `zipeval run`. Did you mean --multirun?",
        ),
        (["run", "-sc", "install=bash"], "`zipeval completion bash` prints a script"),
        (
            ["report", "out=x.pdf"],
            "out=x.pdf: the report is a web page. Name a file that ends in .html, or plots=DIR",
        ),
        (
            ["report", "--out", "x"],
            "out=x: the report is a web page. Name a file that ends in .html.",
        ),
        (["report", "out="], "out=: needs a value"),
        (
            ["table", "--format=latx"],
            "format=latx: expected one of markdown, csv, latex, html, json.",
        ),
        (
            ["table", "--results"],
            "--results: needs a value. `zipeval table --help` explains it.",
        ),
        (["table", "--results", "--statistics"], "--results: needs a value"),
        (["table", "extra"], "table extra: it takes nothing but NAME=VALUE"),
        (
            ["bench", "model=tiny_llava,tiny_next"],
            "model=tiny_llava,tiny_next: expected one model. Run this for each.",
        ),
        (
            ["bench", "limit=3"],
            "limit=3: `zipeval bench` has no use for it, its inputs are synthetic. Leave it out.",
        ),
        (
            ["bench", "tokns=3"],
            "tokns: no such setting of `zipeval bench`. Did you mean tokens?",
        ),
        (
            ["bench", "--config-dir", "nowhere", "model=tiny_llava"],
            "--config-dir nowhere: no such directory.",
        ),
        (
            ["visualize", "a.png", "What?", "limit=3"],
            "limit: no such setting of `zipeval visualize`.",
        ),
        (
            ["list"],
            "list: say what. Available: experiments, launchers, methods, models, suites, tables, tasks.",
        ),
        (["list", "models", "methods"], "list models methods: say what."),
        (["completion", "fish"], "completion fish: say which shell"),
        (["doctor", "x=1"], "x: no such setting of `zipeval doctor`."),
        (["test-method"], "test-method: name one method"),
        (["show", "-x"], "-x: expected NAME=VALUE. `zipeval show --help` explains it."),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refusals(arguments, said, zipeval_says, tmp_path):
    code, out, error = zipeval_says(*arguments)
    assert (code, out) == (2, "")
    assert error.startswith("zipeval: ")
    assert len(error.splitlines()) == 1
    assert said in error
    assert not [*tmp_path.iterdir()]


def test_options_stand_anywhere(zipeval_says, monkeypatch):
    """Also behind settings, where argparse would not look for them."""
    seen = []
    monkeypatch.setattr(
        "zipeval.sweeps.job.Job.__call__",
        lambda self, config: seen.extend(self.sweep.cells),
    )
    zipeval_says("run", "method=vanilla,none", "-m", "limit=2")
    assert [cell.config.limit for cell in seen] == [2, 2]


EXAMPLE = Command(
    "example",
    "WHAT [NAME=VALUE ...]",
    "An example.",
    operands=(
        Operand("WHAT", "something"),
        Operand("MORE", "something more", required=False),
    ),
    settings=(
        Setting("out", "a file", "FILE", path, "there.txt"),
        Setting("max_drop", "a number", "N", positive, 3),
        Setting("form", "a form", default="a", choices=("a", "b")),
        Setting(
            "all_of_it",
            "or a part",
            read=switch,
            default=False,
            choices=("false", "true"),
            flag=True,
        ),
    ),
    passed_on=("seed", "model."),
)


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ([], {}),
        (["out=here.txt"], {"out": Path("here.txt")}),
        (["--out", "here.txt"], {"out": Path("here.txt")}),
        (["--out=here.txt"], {"out": Path("here.txt")}),
        (["max_drop=16", "max_drop=17"], {"max_drop": 17}),
        (["--max-drop", "16"], {"max_drop": 16}),
        (["--max_drop=16"], {"max_drop": 16}),
        (["form=b"], {"form": "b"}),
        (["--all-of-it"], {"all_of_it": True}),
        (["--all-of-it", "form=b"], {"all_of_it": True, "form": "b"}),
        (["all_of_it=true"], {"all_of_it": True}),
        (
            ["seed=1", "--model.dtype", "float16", "--seed=2"],
            {"overrides": ["seed=1", "model.dtype=float16", "seed=2"]},
        ),
        (["model.path=a=b"], {"overrides": ["model.path=a=b"]}),
        (["out=a=b"], {"out": Path("a=b")}),
        (["Is x=3?"], {"operands": ["what", "Is x=3?"]}),
        (["--", "form=b"], {"operands": ["what", "form=b"]}),
    ],
    ids=str,
)
def test_settings_are_read_alike_however_they_are_written(arguments, changed):
    read = vars(EXAMPLE.parse(["what", *arguments]))
    default = {"out": Path("there.txt"), "max_drop": 3, "form": "a", "all_of_it": False}
    assert read == {**default, "operands": ["what"], "overrides": [], **changed}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["max_drop=0"],
            "max_drop=0: expected a whole number from 1 up, such as max_drop=16.",
        ),
        (["form=c"], "form=c: expected one of a, b."),
        (["--all-of-it=yes"], "all_of_it=yes: expected one of false, true."),
        (
            ["maxdrop=1"],
            "maxdrop: no such setting of `zipeval example`. Did you mean max_drop?",
        ),
        (["dtype=1"], "dtype: no such setting"),
        (["a", "b", "c"], "example what a b c: it takes nothing but"),
    ],
    ids=str,
)
def test_what_is_not_declared_is_refused(arguments, said):
    with pytest.raises(UsageError) as refused:
        EXAMPLE.parse(["what", *arguments])
    assert str(refused.value).startswith(said)
