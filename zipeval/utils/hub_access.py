"""Find out if the Hugging Face hub can be reached."""

from __future__ import annotations

from urllib.request import urlopen


def reachable() -> bool:
    """Return whether the hub answers within five seconds."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urlopen(constants.ENDPOINT, timeout=5).close()
    except OSError:
        return False
    return True
