"""Names for tasks/turns/utils.py, whose text is part of the hash in records, and so imports from here as before."""

from __future__ import annotations

from zipeval.benchmarks.scoring import gqa_functions as gqa_functions
from zipeval.benchmarks.scoring import llava_yes_no as llava_yes_no
