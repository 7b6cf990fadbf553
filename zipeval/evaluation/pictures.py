"""Find the picture of a sample again. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_picture(record: dict[str, Any], doc_id: int, number: int = 0) -> bytes | None:
    """Return the JPEG of a sample's picture, as it was kept beside the record.

    Args:
        number: of the sample's pictures which one; only the first is kept.

    Returns:
        None where it was not kept.
    """
    path = Path(record["path"]).with_suffix(".images") / f"{doc_id}.jpg"
    return path.read_bytes() if number == 0 and path.is_file() else None
