"""The packages that a run stands on: whether they can be imported, and in the versions that zipeval asks for.

A package that broke is named in one sentence, with its version and the command that repairs it. What a user's method or
zipeval itself does wrong is no such thing, and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

from zipeval.benchmarks import lmms_names
from zipeval.engine import hf_names
from zipeval.errors import IncompatibleError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DEVICE = ("torch", "transformers.utils")  # what tells where a model goes
RUN = (
    *DEVICE,
    "transformers.models.llava.modeling_llava",
    "datasets",
    "lmms_eval.evaluator",
    "zipeval.evaluation.chat_model",
)
TESTED = {
    "transformers": hf_names.TESTED,
    "lmms-eval": lmms_names.TESTED,
}  # lowest and newest, where insides are read


@dataclass(frozen=True)
class Package:
    """An installed package that is not what zipeval asks for, or one that is missing.

    Attributes:
        name: of its distribution.
        version: that is installed; None if it is missing.
        bounds: that zipeval's metadata declares, as ">=1,<2"; None where it declares none.
    """

    name: str
    version: str | None
    bounds: str | None

    @property
    def tested(self) -> tuple[str, str] | None:
        """The lowest and the newest version that the tests ran on, of a package whose insides zipeval reads."""
        return TESTED.get(self.name)

    def __str__(self) -> str:
        return (
            f"{self.name} {self.version}"
            if self.version
            else f"{self.name}, which is not installed"
        )

    def describe(self) -> str:
        """Say which versions zipeval asks for, and which it is tested with."""
        declared = (
            f"zipeval asks for {self.name}{self.bounds}"
            if self.bounds
            else f"zipeval has no bounds for {self.name}"
        )
        if self.tested is None:
            return declared
        lowest, newest = self.tested
        return f"{declared} and is tested with {lowest if lowest == newest else f'{lowest} to {newest}'}"

    def fits(self) -> bool:
        """Return whether it is installed, in a version that zipeval asks for."""
        from packaging.specifiers import SpecifierSet

        return self.version is not None and SpecifierSet(self.bounds or "").contains(
            self.version, prereleases=True
        )

    def repair(self) -> str:
        """Return the command that installs a version which fits."""
        return f"pip install '{self.wanted()}'"

    def wanted(self) -> str:
        """Return what to ask pip for: a version within the bounds, a tested one, or one before that which broke."""
        if not self.fits():
            return f"{self.name}{self.bounds or ''}"
        if self.tested:
            return "{}>={},<={}".format(self.name, *self.tested)
        return f"{self.name}<{self.version}"


def load(modules: tuple[str, ...]) -> None:
    """Import what a run imports: `RUN`, or `DEVICE`.

    Raises:
        IncompatibleError: if one of them cannot be imported; names the package that is at fault.
    """
    for module in modules:
        with explained(
            module.partition(".")[0], Exception
        ):  # an import of foreign code raises anything
            import_module(module)
            if module == "lmms_eval.evaluator":
                lmms_names.patch_filelocks()


@contextmanager
def explained(importing: str, errors: type[Exception] = ImportError) -> Iterator[None]:
    """Within the block a package that cannot be imported is named in one sentence.

    Args:
        importing: the module that the block needs.
        errors: what is taken for a failed import.

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
        if (
            package.fits() and not importer.fits()
        ):  # what it reads there may never have been there
            package = importer
        raise IncompatibleError(
            f"cannot import {what} ({_reason(error)}); {package.describe()}, so run `{package.repair()}`, "
            "then `zipeval doctor`."
        ) from error


def _describe_import(importer: Package, culprit: Package) -> str:
    """Name a package that was to be imported, and the one that it cannot be imported with or without."""
    if importer.name == culprit.name:
        return str(culprit) if culprit.version else culprit.name
    return (
        f"{importer} with {culprit}"
        if culprit.version
        else f"{importer} without {culprit.name}"
    )


def installed(name: str, extra: str = "") -> Package:
    """Return a package as it is installed, with the bounds that zipeval, or an extra of it, declares for it."""
    from packaging.utils import canonicalize_name

    bounds = next(
        (
            str(r.specifier)
            for r in requirements(extra)
            if canonicalize_name(r.name) == name
        ),
        None,
    )
    try:
        return Package(name, metadata.version(name), bounds or None)
    except metadata.PackageNotFoundError:
        return Package(name, None, bounds or None)


def requirements(extra: str = "") -> list[Requirement]:
    """Return what zipeval's metadata asks for on this machine.

    Args:
        extra: whose packages are wanted too.
    """
    from packaging.requirements import Requirement

    try:
        declared = metadata.requires("zipeval") or []
    except (
        metadata.PackageNotFoundError
    ):  # a checkout that is not installed declares nothing
        return []
    wanted = map(Requirement, declared)
    return [
        r for r in wanted if r.marker is None or r.marker.evaluate({"extra": extra})
    ]


def outside_bounds() -> list[Package]:
    """Return the packages that a run needs and that are missing, or of a version which zipeval does not ask for."""
    from packaging.utils import canonicalize_name

    packages = [
        installed(canonicalize_name(requirement.name)) for requirement in requirements()
    ]
    return [package for package in packages if not package.fits()]


def extras_outside_bounds() -> list[tuple[str, Package]]:
    """Return (extra, package) of those that an extra needs and that are installed in a version which does not fit."""
    from packaging.utils import canonicalize_name

    try:
        extras = metadata.metadata("zipeval").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []
    needed = {requirement.name for requirement in requirements()}
    packages = [
        (extra, installed(canonicalize_name(requirement.name), extra))
        for extra in extras
        for requirement in requirements(extra)
        if requirement.name not in needed
    ]
    return [
        (extra, package)
        for extra, package in packages
        if package.version and not package.fits()
    ]


def suspects() -> list[Package]:
    """Return those whose insides zipeval reads and that may have changed: of untested versions, or else all of them."""
    from packaging.version import Version

    packages = [installed(name) for name in TESTED]
    untested = [
        package
        for package in packages
        if package.version
        and not Version(package.tested[0])
        <= Version(package.version)
        <= Version(package.tested[1])
    ]
    return untested or packages


def repair(packages: list[Package]) -> str:
    """Return the command that installs tested versions of packages, also over those of the same number."""
    wanted = " ".join(f"'{package.wanted()}'" for package in packages)
    return f"pip install --force-reinstall --no-deps {wanted}"


def _culprit(error: Exception) -> Package | None:
    """Return the package that an error while importing is the fault of; None: of none that is installed by pip."""
    while (
        error.__cause__ is not None
    ):  # transformers' own says nothing but that a class cannot be imported
        error = error.__cause__
    module = getattr(error, "name", None) if isinstance(error, ImportError) else None
    if module is None:
        module = next(_raising(error), "zipeval")
    top = module.partition(".")[0]
    name = _distribution(top)
    if name == "zipeval" or (name is None and find_spec(top) is not None):
        return None  # found where the user's own modules are
    if name is None and _distribution(next(_raising(error), "")) is None:
        return None  # missing, and a user's module wants it
    return installed(name or top)


def _raising(error: Exception) -> Iterator[str]:
    """Yield the top-level modules of an error's traceback, without Python's own, the one that raised it first."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_globals.get("__name__", "").partition(".")[0])
        trace = trace.tb_next
    yield from (
        name
        for name in reversed(frames)
        if name not in sys.stdlib_module_names and name != "_frozen_importlib"
    )


def _distribution(module: str) -> str | None:
    """Return the name of the package that brings a top-level module; None if pip installed none."""
    from packaging.utils import canonicalize_name

    names = metadata.packages_distributions().get(module)
    if names:
        return canonicalize_name(names[0])
    try:  # Python 3.10 does not know the modules of a package that was built without a list of them
        return canonicalize_name(metadata.distribution(module).name)
    except (metadata.PackageNotFoundError, ValueError):  # ValueError: no name at all
        return None


def _reason(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
