"""Check the packages that a run stands on: they can be imported, and have the versions that zipeval asks for.

A package that broke is named in one sentence, with its version and the command that repairs it. What a user's method or
zipeval itself does wrong is no such thing, and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from traceback import walk_tb
from typing import TYPE_CHECKING

from zipeval.benchmarks import lmms_names
from zipeval.engine import hf_names
from zipeval.errors import IncompatibleError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# Modules that tell where a model goes.
DEVICE = ("torch", "transformers.utils")
# Modules that a run imports.
RUN = (
    *DEVICE,
    "transformers.models.llava.modeling_llava",
    "datasets",
    "lmms_eval.evaluator",
    "zipeval.evaluation.chat_model",
)
# The lowest and the newest tested version of the packages whose insides zipeval reads.
TESTED = {
    "transformers": hf_names.TESTED,
    "lmms-eval": lmms_names.TESTED,
}


@dataclass(frozen=True)
class Package:
    """An installed package that is not what zipeval asks for, or one that is missing.

    Attributes:
        name: of its distribution.
        version: that is installed; None if it is missing.
        bounds: that zipeval's metadata declares, as ">=1,<2"; empty where it declares none.
    """

    name: str
    version: str | None
    bounds: str

    @property
    def tested(self) -> tuple[str, str] | None:
        """The lowest and the newest version that the tests ran on, of a package whose insides zipeval reads."""
        return TESTED.get(self.name)

    def __str__(self) -> str:
        if self.version:
            return f"{self.name} {self.version}"
        return f"{self.name}, which is not installed"

    def describe(self) -> str:
        """Say which versions zipeval asks for, and which it is tested with."""
        declared = f"zipeval has no bounds for {self.name}"
        if self.bounds:
            declared = f"zipeval asks for {self.name}{self.bounds}"
        if self.tested is None:
            return declared
        # One version where the lowest is the newest, else two.
        versions = " to ".join(dict.fromkeys(self.tested))
        return f"{declared} and is tested with {versions}"

    def fits(self) -> bool:
        """Return whether it is installed, in a version that zipeval asks for."""
        from packaging.specifiers import SpecifierSet

        if self.version is None:
            return False
        # A prerelease that the user installed was meant to be used.
        bounds = SpecifierSet(self.bounds)
        return bounds.contains(self.version, prereleases=True)

    def repair(self) -> str:
        """Return the command that installs a version which fits."""
        return f"pip install '{self.wanted()}'"

    def wanted(self) -> str:
        """Return what to ask pip for: a version within the bounds, a tested one, or one before that which broke."""
        if not self.fits():
            return f"{self.name}{self.bounds}"
        if self.tested:
            lowest, newest = self.tested
            return f"{self.name}>={lowest},<={newest}"
        return f"{self.name}<{self.version}"

    def is_tested(self) -> bool:
        """Return whether it is missing, or a version from the lowest to the newest that the tests ran on."""
        from packaging.version import Version

        if self.version is None:
            return True
        lowest, newest = map(Version, self.tested)
        return lowest <= Version(self.version) <= newest


def load(modules: tuple[str, ...]) -> None:
    """Import what a run imports: `RUN`, or `DEVICE`.

    Raises:
        IncompatibleError: if one of them cannot be imported; names the package that is at fault.
    """
    for module in modules:
        # An import of foreign code raises anything.
        with explained(module.partition(".")[0], Exception):
            import_module(module)
            if module == "lmms_eval.evaluator":
                lmms_names.patch_filelocks()


@contextmanager
def explained(importing: str, errors: type[Exception] = ImportError) -> Iterator[None]:
    """Name in one sentence a package that cannot be imported within the block.

    Args:
        importing: the module that the block needs.
        errors: the errors that are taken for a failed import.

    Raises:
        IncompatibleError: in place of an error that an installed or missing package is to blame for.
    """
    try:
        yield
    except IncompatibleError:
        raise
    except errors as error:
        package = _culprit(error)
        if package is None:
            raise
        importer = installed(_distribution(importing) or importing)
        what = _describe_import(importer, package)
        # What an importer of another version reads in a package may never have been
        # there.
        if package.fits() and not importer.fits():
            package = importer
        raise IncompatibleError(
            f"cannot import {what} ({_reason(error)}); {package.describe()}, so run "
            f"`{package.repair()}`, "
            "then `zipeval doctor`."
        ) from error


def _describe_import(importer: Package, culprit: Package) -> str:
    """Name a package that was to be imported, and the one that it cannot be imported with or without."""
    name = str(culprit) if culprit.version else culprit.name
    if importer.name == culprit.name:
        return name
    preposition = "with" if culprit.version else "without"
    return f"{importer} {preposition} {name}"


def installed(name: str, extra: str = "") -> Package:
    """Return a package as it is installed, with the bounds that zipeval, or an extra of it, declares for it."""
    from packaging.utils import canonicalize_name

    specifiers = {}
    # The first one counts: an extra may ask for a package again, after zipeval itself.
    for requirement in requirements(extra):
        specifiers.setdefault(
            canonicalize_name(requirement.name), str(requirement.specifier)
        )
    version = None
    with suppress(metadata.PackageNotFoundError):
        version = metadata.version(name)
    return Package(name, version, specifiers.get(name, ""))


def requirements(extra: str = "") -> list[Requirement]:
    """Return what zipeval's metadata asks for on this machine.

    Args:
        extra: an extra whose packages are wanted too.
    """
    from packaging.requirements import Requirement

    declared = []
    # A checkout that is not installed declares nothing.
    with suppress(metadata.PackageNotFoundError):
        declared = metadata.requires("zipeval") or []
    wanted = []
    for requirement in map(Requirement, declared):
        # A marker tells for which systems and extras a package is wanted.
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": extra}):
            wanted.append(requirement)
    return wanted


def outside_bounds() -> list[Package]:
    """Return the packages that a run needs and that are missing, or of a version which zipeval does not ask for."""
    from packaging.utils import canonicalize_name

    names = [canonicalize_name(requirement.name) for requirement in requirements()]
    return [package for package in map(installed, names) if not package.fits()]


def extras_outside_bounds() -> list[tuple[str, Package]]:
    """Return (extra, package) of those that an extra needs and that are installed in a version which does not fit."""
    from packaging.utils import canonicalize_name

    extras = []
    with suppress(metadata.PackageNotFoundError):
        extras = metadata.metadata("zipeval").get_all("Provides-Extra", [])
    # What zipeval itself needs is asked for along with every extra.
    needed = {requirement.name for requirement in requirements()}
    outside = []
    for extra in extras:
        for requirement in requirements(extra):
            name = requirement.name
            package = installed(canonicalize_name(name), extra)
            # Nobody has to install an extra: a missing package is no fault.
            if name not in needed and package.version and not package.fits():
                outside.append((extra, package))
    return outside


def suspects() -> list[Package]:
    """Return those whose insides zipeval reads and that may have changed: of untested versions, or else all of them."""
    packages = list(map(installed, TESTED))
    return [package for package in packages if not package.is_tested()] or packages


def repair(packages: list[Package]) -> str:
    """Return the command that installs tested versions of packages, also over those of the same number."""
    wanted = " ".join(f"'{package.wanted()}'" for package in packages)
    return f"pip install --force-reinstall --no-deps {wanted}"


def _culprit(error: Exception) -> Package | None:
    """Return the package that an error while importing is the fault of; None: of none that is installed by pip."""
    # transformers' own error says nothing but that a class cannot be imported.
    while error.__cause__ is not None:
        error = error.__cause__
    importers = _raising_modules(error)
    missing = error.name if isinstance(error, ImportError) else None
    top = (missing or next(iter(importers), "zipeval")).partition(".")[0]
    name = _distribution(top)
    if name == "zipeval":
        return None
    if name is None:
        # It is there, but no package: a module of the user's.
        is_of_user = find_spec(top) is not None
        # It is missing, and a module of the user's wants it.
        wanted_by_user = _distribution(next(iter(importers), "")) is None
        if is_of_user or wanted_by_user:
            return None
    return installed(name or top)


def _raising_modules(error: Exception) -> list[str]:
    """Return the top-level modules of an error's traceback, without Python's own, the one that raised it first."""
    modules = []
    for frame, _ in walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        modules.append(module)
    pythons = {*sys.stdlib_module_names, "_frozen_importlib"}
    return [module for module in reversed(modules) if module not in pythons]


def _distribution(module: str) -> str | None:
    """Return the name of the package that brings a top-level module; None if pip installed none."""
    from packaging.utils import canonicalize_name

    names = metadata.packages_distributions().get(module)
    if names:
        return canonicalize_name(names[0])
    # Python 3.10 does not know the modules of a package that was built without a list
    # of them. ValueError: the module has no name at all.
    with suppress(metadata.PackageNotFoundError, ValueError):
        return canonicalize_name(metadata.distribution(module).name)
    return None


def _reason(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
