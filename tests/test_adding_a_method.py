"""docs/adding-a-method.md, followed to the letter by someone outside of the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from zipeval.engine import decoder, ragged, staged, vision
from zipeval.results import records

DOC = Path(__file__).parent.parent / "docs" / "adding-a-method.md"


@pytest.fixture
def outside(tmp_path):
    """The document's files, where it says they are."""
    for name, content in re.findall(
        r"`([\w/]+\.(?:py|yaml))`[^\n]*:\n\n```\w+\n(.*?)```",
        DOC.read_text(),
        re.DOTALL,
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def follow(command, cwd):
    environment, _, arguments = command.partition(" zipeval ")
    return subprocess.run(
        [sys.executable, "-m", "zipeval", *arguments.split(), "limit=6", "bound=none"],
        cwd=cwd,
        env={**os.environ, **dict([environment.split("=")])},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_both_methods_run_and_are_measured(outside):
    commands = re.findall(
        r"^PYTHONPATH=. zipeval run .*$", DOC.read_text(), re.MULTILINE
    )
    assert len(commands) == 2
    for command in commands:
        done = follow(command, outside)
        assert done.returncode == 0, done.stderr
    norms, pyramid = (
        r["visual_tokens"] for r in records.read_all(str(outside / "results/runs"))
    )
    assert norms["entering"] == [16.0] * 6
    assert pyramid["mean"] == fmean(pyramid["entering"]) == pytest.approx(100, abs=1)
    assert pyramid["entering"] == sorted(pyramid["entering"], reverse=True)
    assert pyramid["entering"][0] == 144


def test_a_plain_class_will_do(outside):
    """Neither hashable nor with a repr of its own; the same command twice is one run."""
    source = (outside / "norms.py").read_text()
    (outside / "norms.py").write_text(
        source.replace("@dataclass(frozen=True)", "@dataclass(repr=False)")
    )
    command = "PYTHONPATH=. zipeval run --config-dir configs method=norms tokens=16"
    assert follow(command, outside).returncode == 0
    again = follow(command, outside)
    assert "finished before, kept" in again.stdout
    assert len(list(outside.glob("results/runs/*"))) == 1


def test_a_method_whose_settings_miss_its_budget_is_not_run(outside):
    source = (outside / "pyramid.py").read_text()
    wrong = "    @classmethod\n    def for_budget(cls, *given, **options):\n        return cls((50, 40, 9), (1, 2, 3))\n\n"
    (outside / "pyramid.py").write_text(
        source.replace("    def reduce", wrong + "    def reduce")
    )
    done = follow(
        "PYTHONPATH=. zipeval run --config-dir configs method=pyramid tokens=100 budget=mean",
        outside,
    )
    assert done.returncode == 1
    assert "tokens=100 budget=mean come to 66.0" in done.stderr


def test_a_method_that_leaves_other_than_it_says_fails_its_run(outside):
    source = (outside / "norms.py").read_text()
    (outside / "norms.py").write_text(
        source.replace("topk(self.tokens)", "topk(self.tokens + 1)")
    )
    done = follow(
        "PYTHONPATH=. zipeval run --config-dir configs method=norms tokens=16", outside
    )
    assert done.returncode == 1
    assert (
        "Norms leaves 17 visual tokens of an image, and 16 as it says itself"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not list(outside.glob("results/**/*.json"))


@pytest.mark.parametrize("name", ["norms", "pyramid"])
def test_both_methods_keep_the_contract(name, outside):
    """As the document's command says; pyramid acts inside the decoder, where the order is the engine's."""
    (command,) = re.findall(
        r"^PYTHONPATH=. (zipeval test-method .*)$", DOC.read_text(), re.MULTILINE
    )
    done = zipeval(command.replace("norms", name).split()[1:], outside, ".")
    assert (done.returncode, done.stderr) == (0, "")
    counts = {
        "norms": "54 passed, 0 FAILED, 0 n/a.",
        "pyramid": "48 passed, 0 FAILED, 6 n/a.",
    }
    assert done.stdout.splitlines()[-1] == counts[name]


@pytest.fixture
def installed(outside):
    """The document's package as pip leaves it: modules, configurations, and what it says of itself."""
    (entry_points,) = re.findall(
        r'"zipeval.methods"\]\n(.*?)```', DOC.read_text(), re.DOTALL
    )
    site = outside / "site"
    package = site / "zipeval_norms"
    (package / "configs" / "method").mkdir(parents=True)
    (package / "__init__.py").write_text("import torch\n")
    (package / "norms.py").write_text((outside / "norms.py").read_text())
    configuration = (outside / "configs" / "method" / "norms.yaml").read_text()
    (package / "configs" / "method" / "norms.yaml").write_text(
        configuration.replace("norms.Norms", "zipeval_norms.norms.Norms")
    )
    about = site / "zipeval_norms-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: zipeval-norms\nVersion: 1.2\n"
    )
    (about / "entry_points.txt").write_text(
        "[zipeval.methods]\n" + entry_points.replace('"', "")
    )
    return outside


def zipeval(arguments, cwd, path="site"):
    """A command in a process where a package is installed."""
    return subprocess.run(
        [sys.executable, "-m", "zipeval", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd / path)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_method_of_an_installed_package_is_one_like_any_other(installed):
    """It is listed with the package's name, and taken by every command that takes methods."""
    listed = zipeval(["list", "methods"], installed)
    assert re.search(
        r"^norms +zipeval-norms 1\.2 +The patches whose features are longest\.$",
        listed.stdout,
        re.MULTILINE,
    )
    assert re.search(r"^visionzip +zipeval  ", listed.stdout, re.MULTILINE)
    for arguments in (
        ["run", "-m", "method=vanilla,norms", "tokens=16", "limit=2"],
        ["bench", "method=norms", "tokens=16", "new_tokens=1", "repeats=1"],
    ):
        done = zipeval(arguments, installed)
        assert done.returncode == 0, done.stderr
    assert "norms" in zipeval(["plan", "method=norms", "tokens=16"], installed).stdout
    assert "| norms " in zipeval(["table"], installed).stdout
    assert zipeval(["report"], installed).returncode == 0
    assert "Norms(tokens=16)" in (installed / "report.html").read_text()
    assert (
        zipeval(["__complete", "zipeval run method=nor"], installed).stdout
        == "method=norms\n"
    )
    help_text = zipeval(["run", "method=norms", "--help"], installed)
    assert help_text.returncode == 0
    unknown = zipeval(["run", "method=nroms", "tokens=16"], installed).stderr
    assert "Did you mean norms?" in unknown


def test_a_list_does_not_import_the_package(installed):
    """Which may import torch."""
    script = (
        "import sys, zipeval.cli; sys.argv[1:] = ['list', 'methods']; zipeval.cli.main();"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed / "site")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=installed,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "zipeval-norms" in done.stdout


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("list methods --config-dir configs", 0),
        ("plan --config-dir configs method=norms,pyramid tokens=130 budget=mean", 0),
        ("bench --config-dir configs method=norms tokens=16 new_tokens=1 repeats=1", 0),
        ("run -m --config-dir configs method=vanilla,norms tokens=16 limit=2", 0),
        ("run --config-dir=configs method=norms tokens=16 limit=2", 0),
        ("run --config-dir configs method=nroms tokens=16 limit=2", 2),
    ],
)
def test_a_directory_is_taken_by_every_command(command, code, outside):
    done = zipeval(command.split(), outside, ".")
    assert done.returncode == code, done.stderr
    assert "norms" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if code:
        assert "Did you mean norms?" in done.stderr


def test_a_picture_of_a_method_in_a_directory(outside):
    from PIL import Image

    Image.effect_noise((96, 96), 90).save(outside / "photo.png")
    done = zipeval(
        ["visualize", "photo.png", "What?", "--config-dir", "configs", "method=norms"],
        outside,
        ".",
    )
    assert done.returncode == 0, done.stderr
    assert "norms" in (outside / "visualize.svg").read_text()


@pytest.mark.parametrize("command", ["run", "run -m", "bench", "plan"])
def test_two_methods_of_one_name_are_refused(command, outside):
    """Hydra would take zipeval's, and the table would say that it was the other one."""
    path = outside / "configs" / "method"
    (path / "norms.yaml").rename(path / "visionzip.yaml")
    done = zipeval(
        [*command.split(), "--config-dir", "configs", "method=visionzip", "tokens=16"],
        outside,
        ".",
    )
    assert done.returncode == 2
    assert done.stderr.startswith("zipeval: method=visionzip: there are several, ")
    assert f"{path / 'visionzip.yaml'} (--config-dir configs)" in done.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        "zipeval_norms",
        "nowhere.configs",
        "zipeval_norms:NOTHING",
        "zipeval_norms.norms",
    ],
)
def test_an_entry_point_that_names_no_configurations_is_refused(wrong, installed):
    (file,) = installed.glob("site/*.dist-info/entry_points.txt")
    file.write_text(f"[zipeval.methods]\nnorms = {wrong}\n")
    done = zipeval(["list", "methods"], installed)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"zipeval: zipeval-norms 1.2: its entry point norms = {wrong!r}"
    )


def test_an_entry_point_may_name_a_path(installed):
    (file,) = installed.glob("site/*.dist-info/entry_points.txt")
    file.write_text("[zipeval.methods]\nnorms = zipeval_norms.places:CONFIGS\n")
    place = "from pathlib import Path\n\nCONFIGS = Path(__file__).parent / 'configs'\n"
    (installed / "site/zipeval_norms/places.py").write_text(place)
    assert "zipeval-norms 1.2" in zipeval(["list", "methods"], installed).stdout


def test_names_of_before_are_there_for_a_release():
    before = {
        (decoder, "Kept"): decoder.Selection,
        (decoder, "Prompts"): decoder.PromptBatch,
        (decoder, "keep_best"): decoder.topk_mask,
        (staged, "Staged"): staged.ScheduledDecoderMethod,
    }
    for (module, name), renamed in before.items():
        with pytest.warns(DeprecationWarning, match=renamed.__name__):
            assert getattr(module, name) is renamed
    for module, name in ((decoder, "Helt"), (vision, "Prompts")):
        with pytest.raises(AttributeError, match=name):
            getattr(module, name)
    assert vision.Crops and vision.Reduced and ragged.take


def test_a_method_with_the_names_of_before(outside):
    path = outside / "pyramid.py"
    text = path.read_text()
    for renamed, before in (
        ("ScheduledDecoderMethod", "Staged"),
        ("PromptBatch", "Prompts"),
        ("Selection", "Kept"),
        ("topk_mask", "keep_best"),
        ("counts_before", "kept"),
    ):
        assert renamed in text
        text = text.replace(renamed, before)
    path.write_text(text)
    commands = re.findall(
        r"^PYTHONPATH=. zipeval run .*$", DOC.read_text(), re.MULTILINE
    )
    done = follow(commands[1], outside)
    assert done.returncode == 0, done.stderr
