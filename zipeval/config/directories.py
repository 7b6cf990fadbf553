"""Find configurations: zipeval's own, those that installed packages bring, and those in a directory of the user's.

A package brings methods by an entry point of the group `zipeval.methods`, which names what holds `method/NAME.yaml`:

    [project.entry-points."zipeval.methods"]
    pyramid = "zipeval_pyramid.configs"         # a package, by its folder; it is not imported
    others = "zipeval_others:CONFIGS"           # or an attribute: the path of a directory
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from zipeval.errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "zipeval.methods"
OWN = "zipeval"


@dataclass(frozen=True)
class ConfigDirectory:
    """A directory with folders of configurations.

    Attributes:
        path: of the directory; a folder in it is a group, such as method.
        source: a name for people of what brings it: `zipeval`, `zipeval-pyramid 1.0`, `--config-dir DIR`.
    """

    path: Path
    source: str

    def files(self, group: str) -> dict[str, Path]:
        """Return the files of a group by the name that is typed: of a table in a folder, FOLDER/NAME."""
        folder = self.path / group
        files = {}
        for path in sorted(folder.rglob("*.yaml")):
            name = path.relative_to(folder).with_suffix("")
            files[name.as_posix()] = path
        return files


@dataclass(frozen=True)
class ConfigFile:
    """A configuration that can be named: `method=NAME`."""

    name: str
    path: Path
    source: str


def config_directories(config_dir: str | None = None) -> list[ConfigDirectory]:
    """Return all directories of configurations, in the order in which Hydra looks into them.

    Args:
        config_dir: what --config-dir names.

    Raises:
        UsageError: for a directory that is not there.
    """
    import zipeval.configs

    directories = [
        ConfigDirectory(Path(zipeval.configs.__path__[0]), OWN),
        *installed_directories(),
    ]
    if config_dir is not None:
        directories.append(
            ConfigDirectory(check_config_dir(config_dir), f"--config-dir {config_dir}")
        )
    return directories


def check_config_dir(config_dir: str) -> Path:
    """Return the absolute path of what --config-dir names.

    Raises:
        UsageError: if it is no directory.
    """
    path = Path(config_dir).expanduser()
    if not path.is_dir():
        raise UsageError(f"--config-dir {config_dir}: no such directory.")
    return path.absolute()


@cache
def installed_directories() -> tuple[ConfigDirectory, ...]:
    """Return the directories that installed packages bring.

    Raises:
        UsageError: for an entry point that names no directory with methods.
    """
    from importlib.metadata import entry_points

    directories = []
    # The order of entry points is that of the folders on sys.path, and differs between
    # machines.
    for entry_point in sorted(entry_points(group=ENTRY_POINTS), key=attrgetter("name")):
        package = _package_name(entry_point)
        path = _entry_point_directory(entry_point)
        if path is None or not (path / "method").is_dir():
            raise UsageError(
                f"{package}: its entry point {entry_point.name} = "
                f"{entry_point.value!r} of the group {ENTRY_POINTS} "
                "names no directory with a folder method/. Mend or uninstall the "
                "package."
            )
        directories.append(ConfigDirectory(path.absolute(), package))
    return tuple(directories)


def _package_name(entry_point: EntryPoint) -> str:
    """Return the name and version of the package that an entry point is of, or else its own name."""
    package = entry_point.dist
    return f"{package.name} {package.version}" if package else entry_point.name


def _entry_point_directory(entry_point: EntryPoint) -> Path | None:
    """Return the directory that an entry point names, if there is one."""
    if entry_point.attr:
        # TypeError: the attribute is no path.
        with suppress(ImportError, AttributeError, TypeError):
            return Path(entry_point.load())
        return None
    # The folder is looked up, not imported: a method's package may import torch, and a
    # list should not wait for that.
    top, *inner = entry_point.module.split(".")
    paths = [folder.joinpath(*inner) for folder in _package_folders(top)]
    return next(filter(Path.is_dir, paths), None)


def _package_folders(name: str) -> Iterator[Path]:
    """Yield the folders of a top-level package."""
    from importlib.util import find_spec

    spec = find_spec(name)
    if spec is not None and spec.submodule_search_locations:
        yield from map(Path, spec.submodule_search_locations)


def config_files(group: str, config_dir: str | None = None) -> list[ConfigFile]:
    """Return what can be named in a group, sorted by name: of `method`, all methods."""
    files = []
    for directory in config_directories(config_dir):
        for name, path in directory.files(group).items():
            files.append(ConfigFile(name, path, directory.source))
    return sorted(files, key=lambda file: file.name)


def check_unique(group: str, name: str, config_dir: str | None = None) -> None:
    """Refuse a name that two directories bring: Hydra would take the first and say nothing.

    Raises:
        UsageError: names both files.
    """
    # By their real paths: --config-dir may name a directory that a package brings.
    places = {}
    for directory in config_directories(config_dir):
        path = directory.path / group / f"{name}.yaml"
        if path.is_file():
            places.setdefault(path.resolve(), directory.source)
    if len(places) > 1:
        listed = " and ".join(f"{path} ({source})" for path, source in places.items())
        raise UsageError(
            f"{group}={name}: there are several, {listed}. Give yours another name."
        )
