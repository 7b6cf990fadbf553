"""Hydra looks for configurations in what installed packages bring, too."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from zipeval.config.directories import ENTRY_POINTS, installed_directories


class InstalledConfigurations(SearchPathPlugin):
    """The directories of the entry points `zipeval.methods`, behind zipeval's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the directories."""
        for directory in installed_directories():
            search_path.append(ENTRY_POINTS, f"file://{directory.path}")
