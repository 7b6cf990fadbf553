"""Tables from records: raw scores and percentages of the upper bound, as data. Imports no torch."""

from zipeval.reporting.tables.build import tables
from zipeval.reporting.tables.cells import heading, headings, is_higher_better
from zipeval.reporting.tables.model import (
    DIFFERENCE,
    MEASURED,
    PUBLISHED,
    Record,
    Row,
    Table,
    TableCell,
)
from zipeval.reporting.tables.notes import OF_TURNS
from zipeval.reporting.tables.settings import bound_among, key, upper_bound_of

__all__ = [
    "DIFFERENCE",
    "MEASURED",
    "OF_TURNS",
    "PUBLISHED",
    "Record",
    "Row",
    "Table",
    "TableCell",
    "bound_among",
    "heading",
    "headings",
    "is_higher_better",
    "key",
    "tables",
    "upper_bound_of",
]
