"""Addresses without what is secret in them."""

from __future__ import annotations

import re


def public_url(url: str) -> str:
    """Return an address without what may be secret in it: user, password, query."""
    return re.sub(r"^(https?://)?.*@|[?#].*", r"\1", url)
