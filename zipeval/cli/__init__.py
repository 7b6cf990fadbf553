"""The command line: the only package that knows argv. Each command is declared beside the function that runs it."""

from zipeval.cli.main import main as main
from zipeval.cli.measure import bench as bench
from zipeval.cli.resources import convert as convert
from zipeval.cli.run import expand as expand
from zipeval.config.compose import compose as compose
from zipeval.config.compose import explain as explain
