"""`zipeval doctor` and `zipeval run` on stacks that do not work: what they say, and with which exit code they end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path

import pytest

from zipeval.benchmarks import stack
from zipeval.benchmarks.stack import Package
from zipeval.engine import hf_names
from zipeval.errors import IncompatibleError
from zipeval.evaluation import doctor, known_answers
from zipeval.methods.fastv import FastV
from zipeval.methods.visionzip import VisionZip

NOWHERE = "http://127.0.0.1:9"
# Some versions of transformers read the same inside of filelock, and are imported first.
IMPORTERS = "|".join(
    re.escape(f"{name} {version(name)}") for name in ("lmms-eval", "transformers")
)


def package(folder, name, number, source):
    """A package before all others on the path; only its `__init__` and its metadata are needed."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    metadata(folder, name, number)


def metadata(folder, name, number, required=()):
    directory = folder / f"{name}-{number}.dist-info"
    directory.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}"]
    (directory / "METADATA").write_text(
        "\n".join([*lines, *(f"Requires-Dist: {r}" for r in required), ""])
    )
    (directory / "top_level.txt").write_text(f"{name}\n")


@pytest.fixture
def newer_filelock(tmp_path):
    """The installed filelock without the module that lmms-eval patches, as 4.3 is without it."""
    folder = tmp_path / "overlay"
    shutil.copytree(Path(find_spec("filelock").origin).parent, folder / "filelock")
    for file in (folder / "filelock").glob("*.py"):
        file.write_text(file.read_text().replace("_api", "_interface"))
    (folder / "filelock" / "_api.py").rename(folder / "filelock" / "_interface.py")
    metadata(folder, "filelock", "4.3.1")
    return folder


def zipeval(*arguments, cwd, path="", script=None):
    """A finished process.

    Args:
        path: folder of packages that hide those that are installed.
        script: what to run in place of zipeval itself.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": NOWHERE}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(path), os.environ.get("PYTHONPATH")])
    )
    command = ["-c", script] if script else ["-m", "zipeval"]
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def one_sentence(done):
    """What a command that failed says, once it is nothing but that."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "bug" not in done.stderr
    (line,) = (
        line for line in done.stderr.splitlines() if line.startswith("zipeval: ")
    )
    return line.removeprefix("zipeval: ")


def test_a_stack_that_works(tmp_path):
    """With neither a hub nor a GPU."""
    done = zipeval("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "not reachable" in done.stdout
    assert "flash-attn    not installed" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("verdict       runs work")
    assert not [*tmp_path.iterdir()]


def test_doctor_names_a_package_that_lmms_eval_does_not_work_with(
    newer_filelock, tmp_path
):
    done = zipeval("doctor", cwd=tmp_path, path=newer_filelock)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    *_, outside, broken = done.stdout.splitlines()
    wanted = f"filelock{stack.installed('filelock').bounds}"
    assert (
        outside
        == f"version       filelock 4.3.1: zipeval asks for {wanted}, so run `pip install '{wanted}'`"
    )
    assert re.search(
        rf"cannot import ({IMPORTERS}) with filelock 4\.3\.1 \(No module named 'filelock\._api'\)",
        broken,
    )


def test_a_run_names_it_in_one_sentence(newer_filelock, tmp_path):
    told = one_sentence(zipeval("run", "limit=4", cwd=tmp_path, path=newer_filelock))
    assert re.match(
        rf"cannot import ({IMPORTERS}) with filelock 4\.3\.1 \(No module named ", told
    )
    assert "zipeval asks for filelock" in told
    assert "run `pip install 'filelock" in told
    assert told.endswith("then `zipeval doctor`.")
    assert not [*tmp_path.glob("results/**/*.json")]


def test_so_does_every_run_of_a_sweep(newer_filelock, tmp_path):
    settings = ["-m", "method=vanilla,fastv", "tokens=16", "limit=4", "results=runs"]
    told = one_sentence(zipeval("run", *settings, cwd=tmp_path, path=newer_filelock))
    states = [
        json.loads(path.read_text()) for path in tmp_path.glob("runs/sweeps/*/0*.json")
    ]
    assert [(state["status"], state["error"]) for state in states] == [
        ("failed", told)
    ] * 2


@pytest.mark.parametrize(
    "name, source, reason",
    [
        (
            "torch",
            "raise OSError('libcudart.so: cannot open shared object file')",
            "libcudart.so: cannot open",
        ),
        (
            "transformers",
            "from torch import what_torch_has_not",
            "cannot import name 'what_torch_has_not'",
        ),
        (
            "datasets",
            "raise RuntimeError('made for another NumPy')",
            "made for another NumPy",
        ),
    ],
)
def test_packages_that_cannot_be_imported(name, source, reason, tmp_path):
    package(tmp_path / "overlay", name, "99.0", source)
    told = one_sentence(
        zipeval("run", "limit=4", cwd=tmp_path, path=tmp_path / "overlay")
    )
    assert reason in told
    assert told.startswith(f"cannot import {name} 99.0")
    assert f"zipeval asks for {name}" in told
    assert f"pip install '{name}" in told
    done = zipeval("doctor", cwd=tmp_path, path=tmp_path / "overlay")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert f"version       {name} 99.0: zipeval asks for {name}" in done.stdout
    assert reason in done.stdout


def test_a_package_that_lacks_another(tmp_path, monkeypatch):
    package(tmp_path, "theirs", "1.0", "import what_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    told = (
        r"^cannot import theirs 1\.0 without what_nobody_has \(No module named 'what_nobody_has'\); zipeval has no "
        r"bounds for what_nobody_has, so run `pip install 'what_nobody_has'`, then `zipeval doctor`\.$"
    )
    with pytest.raises(IncompatibleError, match=told), stack.explained("theirs"):
        import_module("theirs")


def test_what_a_user_s_module_lacks_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import what_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    with (
        pytest.raises(ModuleNotFoundError, match="what_nobody_has"),
        stack.explained("lmms_eval"),
    ):
        import_module("mine")


BROKEN = """
import sys
from zipeval.engine import hf_names
hf_names.CACHE = ("what transformers will call it",)
from zipeval.cli import main
sys.argv[0] = "zipeval"
main()
"""


def test_a_transformers_that_is_not_tested_and_breaks_the_answers(tmp_path):
    real = distribution("transformers").locate_file("transformers")
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay" / "transformers").symlink_to(real, target_is_directory=True)
    metadata(tmp_path / "overlay", "transformers", "5.99.0")
    done = zipeval("doctor", cwd=tmp_path, path=tmp_path / "overlay", script=BROKEN)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    *_, outside, broken = done.stdout.splitlines()
    assert outside.startswith(
        "version       transformers 5.99.0: zipeval asks for transformers"
    )
    lowest, newest = hf_names.TESTED
    assert f"is tested with {lowest} to {newest}" in outside
    assert "pip install 'transformers" in outside
    assert broken.startswith("broken")


@pytest.mark.parametrize("method", known_answers.METHODS)
def test_known_answers(method):
    assert known_answers.answer(method) == known_answers.KNOWN[method]


def test_known_answers_differ_between_methods():
    vanilla, visionzip, fastv = known_answers.KNOWN.values()
    assert vanilla.text != visionzip.text
    assert vanilla.token_ids not in (visionzip.token_ids, fastv.token_ids)
    assert (
        len({tuple(known.visual_tokens) for known in (vanilla, visionzip, fastv)}) == 3
    )


@pytest.mark.parametrize("method", [VisionZip, FastV])
def test_a_method_that_is_silently_ignored_is_a_wrong_answer(method, monkeypatch):
    """Also where it is so from Python alone."""
    from contextlib import nullcontext

    generate = known_answers._generate

    def ignoring(session, messages):
        with monkeypatch.context() as patch:
            patch.setattr(method, "applied", lambda self, model: nullcontext())
            return generate(session, messages)

    monkeypatch.setattr(known_answers, "_generate", ignoring)
    rows = [*doctor._answers()]
    assert [name for name, _ in rows] == ["wrong answer"]
    found = rows[0][1]
    assert (
        f"{method.__name__.lower()}: token_ids [387, 382, 1] in place of [387, 378, 1]"
        in found
    )
    assert f"transformers {version('transformers')}: zipeval asks for" in found
    assert "pip install --force-reinstall --no-deps 'transformers>=" in found


def test_versions_outside_their_bounds(monkeypatch):
    known = {
        "torch": ("2.5", ">=2.6,<3"),
        "numpy": ("2.0", "<3"),
        "scipy": (None, ">=1.11"),
    }
    monkeypatch.setattr(
        stack.metadata,
        "requires",
        lambda name: [f"{n}{b}" for n, (_, b) in known.items()],
    )
    monkeypatch.setattr(
        stack.metadata, "version", lambda name: known[name][0] or missing(name)
    )
    rows = [finding for _, finding in doctor._versions()]
    assert rows == [
        "torch 2.5: zipeval asks for torch<3,>=2.6, so run `pip install 'torch<3,>=2.6'`",
        "scipy, which is not installed: zipeval asks for scipy>=1.11, so run `pip install 'scipy>=1.11'`",
    ]


def missing(name):
    raise stack.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    "which, command",
    [
        (Package("filelock", "4.3.1", "<4.3,>=3.16"), "filelock<4.3,>=3.16"),
        (Package("filelock", "4.2", "<4.3,>=3.16"), "filelock<4.2"),
        (Package("filelock", "4.3.1", ""), "filelock<4.3.1"),
        (Package("filelock", None, ""), "filelock"),
        (Package("lmms-eval", "0.7.4", "<0.8,>=0.7.3"), "lmms-eval>=0.7.3,<=0.7.3"),
        (Package("lmms-eval", "0.8", "<0.8,>=0.7.3"), "lmms-eval<0.8,>=0.7.3"),
    ],
)
def test_the_command_that_repairs(which, command):
    assert which.repair() == f"pip install '{command}'"


def test_what_says_how_to_repair_it_is_not_explained_again():
    with (
        pytest.raises(IncompatibleError, match=r"^by name$"),
        stack.explained("lmms_eval", Exception),
    ):
        raise IncompatibleError("by name")
