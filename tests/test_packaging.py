"""Check what the package says of itself: its pins and bounds, its metadata, its workflows and its licence."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import zipeval

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def direct_dependencies() -> list[Requirement]:
    """Return what pyproject.toml requires, of all extras but ray, which wants an environment of its own."""
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"]]
    for name in extras.keys() - {"ray"}:
        lines += extras[name]
    requirements = [Requirement(line) for line in lines]
    return [
        requirement for requirement in requirements if requirement.name != "zipeval"
    ]


def pins(python: str) -> dict[str, Version]:
    """Return the version of each package that constraints.txt pins for a Python on Linux."""
    environment = default_environment()
    environment |= {"python_version": python, "python_full_version": f"{python}.9"}
    environment |= {"sys_platform": "linux", "platform_machine": "x86_64"}
    versions = {}
    for line in CONSTRAINTS[1:]:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.name not in versions, (
                f"{requirement.name} is pinned twice for Python {python}"
            )
            (specifier,) = requirement.specifier
            versions[canonicalize_name(requirement.name)] = Version(specifier.version)
    return versions


def test_constraints_are_versions_and_nothing_else():
    """A host, a path or a hash would tie them to one machine or one index."""
    assert (
        CONSTRAINTS[0].startswith("# ") and "scripts/constraints.sh" in CONSTRAINTS[0]
    )
    for line in CONSTRAINTS[1:]:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; [\w.*'<>=!() ]+)?", line), line


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_every_direct_dependency_within_its_bounds(python):
    versions = pins(python)
    for requirement in direct_dependencies():
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, (
            requirement
        )


def test_the_newest_transformers_that_is_allowed_is_the_one_that_is_pinned():
    """So the tests run with it: a bound that is raised without new pins allows a series that no test has seen."""
    (requirement,) = (r for r in direct_dependencies() if r.name == "transformers")
    (bound,) = (Version(s.version) for s in requirement.specifier if s.operator == "<")
    newest = max(pins(python)["transformers"] for python in PYTHONS)
    assert (newest.major, newest.minor + 1) == (bound.major, bound.minor)


def test_supported_pythons_are_named_alike_everywhere():
    project = PROJECT["project"]
    named = [
        name.split()[-1]
        for name in project["classifiers"]
        if re.fullmatch(r".*:: Python :: 3\.\d+", name)
    ]
    tested = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"][
        "tests"
    ]["strategy"]["matrix"]
    assert named == list(PYTHONS) == tested["python"]
    assert project["requires-python"] == ">=3.10,<3.14"


def test_metadata():
    project = PROJECT["project"]
    assert project["license"] == "Apache-2.0"
    assert project["license-files"] == ["LICENSE"]
    assert project["authors"] == [{"name": "zipeval contributors"}]
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["zipeval"]
    assert (ROOT / "zipeval/py.typed").is_file()


def test_every_package_on_the_disk_is_installed():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    for init in ROOT.glob("zipeval/**/__init__.py"):
        package = ".".join(init.parent.relative_to(ROOT).parts)
        assert package in listed, f"{package} is missing in pyproject.toml's packages"


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == zipeval.__version__
    assert citation["license"] == PROJECT["project"]["license"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_install_the_pinned_versions(path):
    """Except the canary, which is there to try others."""
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    for job in workflow["jobs"].values():
        commands = [step["run"] for step in job["steps"] if "run" in step]
        installs = [command for command in commands if "pip install" in command]
        assert installs
        for command in installs:
            assert ("-c constraints.txt" in command) == (path.stem != "canary")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_for_issues(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    fields = [field["id"] for field in form["body"]]
    assert len(fields) == len(set(fields))


def test_a_bug_report_asks_for_the_installation_and_the_record():
    (form,) = (
        yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in FORMS
        if path.stem == "bug"
    )
    assert {"doctor", "record"} <= {field["id"] for field in form["body"]}


def test_hooks_before_a_commit():
    hooks = yaml.safe_load(
        (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    )
    assert "ruff-check" in [
        hook["id"] for repository in hooks["repos"] for hook in repository["hooks"]
    ]
